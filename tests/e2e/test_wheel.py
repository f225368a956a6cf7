"""The built package, installed beside a program that has a module `pipeline` of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline.runs import tiny_toml, write_photo

ROOT = Path(__file__).resolve().parents[2]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the sources, install it without its dependencies, and return the folder."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pipeline", "textual_inversion"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    build = [
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--wheel-dir",
        str(folder),
        str(folder / "source"),
    ]
    subprocess.run([*PIP, *build], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    install = ["install", "--no-deps", "--no-index", "--no-compile", "--target", str(folder / "site"), str(wheel)]
    subprocess.run([*PIP, *install], check=True, capture_output=True)
    return folder / "site"


@pytest.mark.slow
def test_an_installed_package_works_beside_another_pipeline(site: Path, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "pipeline.py").write_text("raise SystemExit('the user`s own module was imported')")
    photos = Path(write_photo(tmp_path / "my cat" / "1.png", 0)).parent
    (tmp_path / "job.toml").write_text(tiny_toml(tiny_model))
    environment = {**os.environ, "PYTHONPATH": str(site)}

    def ti(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, site / "bin" / "ti", *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    done = ti("--help")
    assert (done.returncode, done.stderr) == (0, "")
    done = ti("validate", photos, "--photos", "--output", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert "'demo/model' is one of the demo's, which are in the project's repository and in no installed" in done.stderr
    done = ti("validate", photos, "--photos", "--config", tmp_path / "job.toml", "--output", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "0 done, 1 to do, 0 bad rows" in done.stdout
    ask = "from pipeline.bulk import protocols as p; from pipeline import config_file as c, report; "
    ask += "print(p.__file__, *[(p.PROMPTS / each.prompts_file).exists() for each in p.PROTOCOLS.values()], "
    ask += "len(list(c.RECIPES.glob('*'))) > 9)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", ask], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{site}/pipeline/bulk/protocols.py True True True True\n"
