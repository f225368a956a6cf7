"""A tiny Stable Diffusion 3 through the whole command on real Ray."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.actor.library import read_embedding
from tests.pipeline.runs import tiny_toml, write_manifest
from tests.tiny_sd3 import WIDTHS, tiny_stable_diffusion_3

ROOT = Path(__file__).parents[2]


@pytest.mark.own_cluster
@pytest.mark.slow
def test_stable_diffusion_3_learns_draws_and_resumes(tmp_path: Path) -> None:
    model, output = tiny_stable_diffusion_3(tmp_path / "model"), tmp_path / "out"
    manifest, prompts = write_manifest(tmp_path, ["a", "b"]), tmp_path / "prompts.txt"
    prompts.write_text("a photo of a {}\n")
    inversion = {"steps": 4, "batch_size": 2, "adapter": {"kind": "lora", "rank": 1}}
    config = tmp_path / "job.toml"
    config.write_text(tiny_toml(model, actors={"count": 1}, inversion=inversion))
    command = [sys.executable, "-m", "pipeline.run", str(manifest), "--config", str(config)]
    command += ["--output", str(output), "--prompts", str(prompts)]

    planned = subprocess.run([*command, "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert planned.returncode == 0, planned.stdout + planned.stderr
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=400)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "2 learned, 0 done before, 0 failed" in first.stdout
    assert "pictures: 2 drawn, 0 done before, 0 failed" in first.stdout
    for name in "ab":
        (found,) = output.glob(f"concepts/{name}/*/learned_embeds.safetensors")
        embedding = read_embedding(str(found))
        assert {key: rows.shape[1] for key, rows in embedding.vectors.items()} == WIDTHS
        assert embedding.adapter is not None
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=400)
    assert "0 learned, 2 done before, 0 failed" in again.stdout, again.stdout + again.stderr
