"""The README's library example runs as it is printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from textual_inversion.formats import parse_diffusers

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_library_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    shorter = example.replace("steps=100", "steps=2")
    assert shorter != example
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    monkeypatch.chdir(tmp_path)
    exec(compile(shorter, "README.md", "exec"), {})
    assert parse_diffusers((tmp_path / "tiger.safetensors").read_bytes()).placeholder_token == "<tiger>"
    with Image.open(tmp_path / "tiger.png") as picture:
        assert picture.size == (64, 64)
