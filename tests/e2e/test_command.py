"""The command as a user types it, in a process of its own, with everything in a real S3 server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.pipeline.runs import tiny_toml, write_photo
from tests.pipeline.s3_server import S3Server

ROOT = Path(__file__).resolve().parents[2]


HEAVY = ("torch", "transformers", "ray", "diffusers", "pandas", "aiohttp", "s3fs")

RUN = """
import runpy, sys
sys.argv = ["pipeline.run", *sys.argv[1:]]
try:
    runpy.run_module("pipeline.run", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
"""


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        ("import textual_inversion", []),
        (RUN, ["--help"]),
        (RUN, ["manifests/demo.parquet", "--prompts", "manifests/demo_prompts.parquet", "--dry-run", "--output"]),
    ],
    ids=["import", "help", "dry-run"],
)
def test_what_starts_at_once_imports_nothing_heavy(code: str, arguments: list[str], tmp_path: Path) -> None:
    """Seconds would be measured on somebody's busy machine; what takes them is what is imported."""
    ask = f"{code}\nimport sys\nprint('heavy:', *[name for name in {HEAVY!r} if name in sys.modules])"
    output = [str(tmp_path)] if arguments[-1:] == ["--output"] else []
    done = subprocess.run(
        [sys.executable, "-c", ask, *arguments, *output], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1].split() == ["heavy:"]


def test_no_command_imports_anything_heavy_to_say_how_it_is_used() -> None:
    """All in one process: the first that does is named with what it brought."""
    commands = sorted(path.stem for path in (ROOT / "pipeline").glob("*.py") if '"__main__"' in path.read_text())
    assert {"evaluate", "explain", "run", "status", "use", "validate"} <= {*commands}
    program = f"""
import contextlib, os, runpy, sys
for name in {commands}:
    sys.argv = [name, "--help"]
    with contextlib.redirect_stdout(open(os.devnull, "w")), contextlib.suppress(SystemExit):
        runpy.run_module(f"pipeline.{{name}}", run_name="__main__")
    if heavy := {{*{HEAVY}}} & {{*sys.modules}}:
        sys.exit(f"python -m pipeline.{{name}} --help imports {{heavy}}")
"""
    command = [sys.executable, "-W", "ignore", "-c", program]  # what another command imported, is imported
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_everything_in_s3(s3_server: S3Server, bucket: str, tiny_model: Path, tmp_path: Path) -> None:
    fs = fsspec.filesystem("s3", **s3_server.options)
    for name in ("a-0", "a-1"):
        fs.pipe_file(
            f"{bucket}/photos/{name}.png", Path(write_photo(tmp_path / f"{name}.png", ord(name[-1]))).read_bytes()
        )
    with fs.open(f"{bucket}/manifest.parquet", "wb") as file:
        pq.write_table(pa.table({"concept_id": ["a"], "images": [["photos/a-0.png", "photos/a-1.png"]]}), file)
    fs.pipe_file(f"{bucket}/prompts.txt", b"a photo of a {}\na rendering of a {}\n")
    config = tmp_path / "job.toml"
    config.write_text(tiny_toml(tiny_model, actors={"count": 1}))
    command = [sys.executable, "-m", "pipeline.run", f"{bucket}/manifest.parquet", "--output", f"{bucket}/out",
               "--prompts", f"{bucket}/prompts.txt", "--config", str(config)]  # fmt: skip
    environment = os.environ | s3_server.environment | {"RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1"}

    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1 learned, 0 done before, 0 failed, 0 bad rows" in done.stdout
    assert "pictures: 2 drawn" in done.stdout
    names = {path.rpartition("/")[2] for path in fs.find(f"{bucket}/out/concepts/a")}
    assert names == {"curve.parquet", "grid.png", "learned_embeds.safetensors", "log.jsonl", "record.json"}
    assert len(fs.glob(f"{bucket}/out/images/a/*.png")) == 2
    assert fs.exists(f"{bucket}/out/report.html")

    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "0 learned, 1 done before" in again.stdout
    assert "pictures: 0 drawn, 2 done before" in again.stdout
