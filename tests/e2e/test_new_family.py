"""Models of other families through the whole command on real Ray."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pipeline.actor.library import read_embedding
from tests.pipeline.runs import tiny_toml, write_manifest
from tests.tiny_models import DIM, tiny_latent_diffusion
from tests.tiny_sdxl import WIDTHS as WIDTHS_XL
from tests.tiny_sdxl import tiny_stable_diffusion_xl
from tests.toy_family import WIDTHS, write_model

ROOT = Path(__file__).parents[2]


TOY = ("tests.e2e.run_toy_family", WIDTHS, {f"{key}.{layer}" for key in WIDTHS for layer in ("fc1", "fc2")})
BERT = (
    "pipeline.run",
    {"bert": DIM},
    {f"model.layers.{block}.{layer}" for block in (0, 1) for layer in ("fc1", "fc2")},
)
XL = (
    "pipeline.run",
    WIDTHS_XL,
    {
        f"{key}.encoder.layers.{block}.mlp.{layer}"
        for key in WIDTHS_XL
        for block in range(3)
        for layer in ("fc1", "fc2")
    },
)


@pytest.mark.own_cluster
@pytest.mark.slow
@pytest.mark.timeout(900)  # two runs of the whole command on real Ray
@pytest.mark.parametrize(
    ("write", "module", "widths", "layers"),
    [
        pytest.param(write_model, *TOY, id="two text encoders"),
        pytest.param(tiny_latent_diffusion, *BERT, id="BERT"),
        pytest.param(tiny_stable_diffusion_xl, *XL, id="XL"),
    ],
)
def test_a_family_through_the_whole_command(
    tmp_path: Path, write: Callable[[Path], Path], module: str, widths: dict[str, int], layers: set[str]
) -> None:
    model, output = write(tmp_path / "model"), tmp_path / "out"
    manifest, prompts = write_manifest(tmp_path, ["a", "b", "c"]), tmp_path / "prompts.txt"
    prompts.write_text("a photo of a {}\nthe photo of a {}\n")
    inversion = {"steps": 6, "batch_size": 2, "adapter": {"kind": "lora", "rank": 1, "targets": ["fc1", "fc2"]}}
    config = tmp_path / "job.toml"
    config.write_text(tiny_toml(model, actors={"count": 1}, inversion=inversion))
    command = [sys.executable, "-m", module, str(manifest), "--config", str(config)]
    command += ["--output", str(output), "--prompts", str(prompts)]

    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=420)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "3 learned, 0 done before, 0 failed" in first.stdout
    assert "pictures: 6 drawn, 0 done before, 0 failed" in first.stdout
    for name in "abc":
        (found,) = output.glob(f"concepts/{name}/*/learned_embeds.safetensors")
        embedding = read_embedding(str(found))
        assert {key: tuple(rows.shape) for key, rows in embedding.vectors.items()} == {
            key: (1, width) for key, width in widths.items()
        }
        assert embedding.adapter is not None
        assert embedding.adapter.tensors.keys() == layers
        with Image.open(found.parent / "grid.png") as grid:
            assert grid.width > 200
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=420)
    assert "0 learned, 3 done before, 0 failed" in again.stdout, again.stdout + again.stderr
