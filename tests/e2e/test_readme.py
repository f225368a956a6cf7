"""The examples of the README and of the notebook run as they are printed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from textual_inversion.formats import parse_diffusers

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_library_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (example,) = (each for each in examples if "import textual_inversion" in each)
    shorter = example.replace("steps=100", "steps=2")
    assert shorter != example
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    monkeypatch.chdir(tmp_path)
    exec(compile(shorter, "README.md", "exec"), {})
    assert parse_diffusers((tmp_path / "tiger.safetensors").read_bytes()).placeholder_token == "<tiger>"
    with Image.open(tmp_path / "tiger.png") as picture:
        assert picture.size == (64, 64)


@pytest.mark.slow
def test_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The notebook's cells run in their order, with fewer steps, and the pictures that it shows are stored in it."""
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    (tmp_path / "examples").mkdir()
    monkeypatch.chdir(tmp_path / "examples")
    shown: list[Image.Image] = []
    names = {"display": shown.append}
    cells = json.loads((ROOT / "examples/photos_to_pictures.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    for number, source in enumerate(code):
        for whole, shorter in (
            ("steps=100", "steps=2"),
            ("preview_steps=25", "preview_steps=1"),
            ("count=4", "count=1"),
        ):
            source = source.replace(whole, shorter)
        exec(compile(source, f"cell {number}", "exec"), names)
    assert len(shown) == 1 + 3
    assert parse_diffusers(Path("tiger.safetensors").read_bytes()).placeholder_token == "<tiger>"
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", ()) for output in outputs) == 2 + 3 + 3
