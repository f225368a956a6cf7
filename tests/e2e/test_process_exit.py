"""Commands end with their exit code every time, and are not aborted after their work is done."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import evaluate
from tests.pipeline.runs import tiny_toml, write_manifest
from tests.tiny_models import tiny_extractor

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(900)]

CALLS = {"use": 5}
"""Calls of a command that takes seconds; 20 of the others."""

FORKED = """
import importlib, os, sys
module, *imported = map(importlib.import_module, sys.argv[1].split(","))
for _ in range(int(sys.argv[2])):
    child = os.fork()
    if child == 0:
        sys.exit(module.main(sys.argv[3:]))
    print("exit code", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Calls of a command, each of which ends a process of its own. What the command imports is imported once for all."""


@pytest.fixture(scope="module")
def job(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Make and evaluate a run, and return a function from a command's name to its arguments on that run."""
    folder = tmp_path_factory.mktemp("finished")
    clip = tiny_extractor("clip", folder / "clip")
    (folder / "prompts.txt").write_text("a photo of a {}\n")
    (folder / "job.toml").write_text(tiny_toml(tiny_model, extractor=str(clip), actors={"count": 1}))
    arguments = [str(write_manifest(folder, ["a", "b"])), "--config", str(folder / "job.toml")]
    output = ["--output", str(folder / "out")]
    assert evaluate.main([*arguments, *output, "--prompts", str(folder / "prompts.txt")]) == 0

    def of_command(name: str) -> list[str]:
        return {
            "status": [output[1]],
            "explain": [output[1], "a"],
            "validate": [*arguments, *output],
            "run": [*arguments, *output],
            "prune": [*arguments, *output, "--prune", "--dry-run"],
            "evaluate": [output[1], "--prompts", str(folder / "prompts.txt")],
            "use": ["draw", "a <a>", "--learned", output[1], "--output", str(folder / "drawn"), "--overwrite", "-n1",
                    "--set=device=cpu", "--set=generation.sampling.steps=1", "--set=generation.sampling.batch_size=1"],
        }[name]  # fmt: skip

    return of_command


@pytest.mark.parametrize("name", ["status", "explain", "validate", "run", "prune", "evaluate", "use"])
def test_a_command_ends_with_its_exit_code(job: Callable[[str], list[str]], name: str) -> None:
    modules = [f"pipeline.{'run' if name == 'prune' else name}", "pandas", "PIL.Image"]
    if name == "use":
        modules += ["torch", "textual_inversion.families.sd"]
    calls = CALLS.get(name, 20)
    command = [sys.executable, "-c", FORKED, ",".join(modules), str(calls), *job(name)]
    done = subprocess.run(command, capture_output=True, text=True)
    codes = [line for line in done.stdout.splitlines() if line.startswith("exit code")]
    assert codes == ["exit code 0"] * calls, done.stderr[-3000:]
