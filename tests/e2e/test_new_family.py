"""Models of other families through planning, learning and drawing; one of them through the whole command on Ray."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from PIL import Image

from pipeline.actor.library import read_embedding
from pipeline.exit_codes import OK
from pipeline.run import configure, main, parse
from tests.faults.night import drawn_calmly, learned_calmly
from tests.pipeline.runs import tiny_toml, write_manifest
from tests.tiny_models import DIM, tiny_latent_diffusion
from tests.tiny_sd3 import WIDTHS as WIDTHS_3
from tests.tiny_sd3 import tiny_stable_diffusion_3
from tests.tiny_sdxl import WIDTHS as WIDTHS_XL
from tests.tiny_sdxl import tiny_stable_diffusion_xl
from tests.toy_family import WIDTHS, write_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PROMPTS = ("a photo of a {}", "the photo of a {}")


def fully_connected(*blocks: str) -> set[str]:
    """Return the names of both layers of each block's feed-forward network."""
    return {f"{block}.{layer}" for block in blocks for layer in ("fc1", "fc2")}


def write_job(folder: Path, model: Path) -> list[str]:
    """Write a manifest, prompts and settings beside the model, and return the command's arguments."""
    manifest, prompts, config = write_manifest(folder, ["a", "b"]), folder / "prompts.txt", folder / "job.toml"
    prompts.write_text("\n".join(PROMPTS))
    inversion = {"steps": 4, "batch_size": 2, "adapter": {"kind": "lora", "rank": 1, "targets": ["fc1", "fc2"]}}
    config.write_text(tiny_toml(model, actors={"count": 1}, inversion=inversion))
    return [str(manifest), "--config", str(config), "--output", str(folder / "out"), "--prompts", str(prompts)]


def check_learned(output: Path, widths: Mapping[str, int], layers: set[str]) -> None:
    for name in "ab":
        (found,) = output.glob(f"concepts/{name}/*/learned_embeds.safetensors")
        embedding = read_embedding(str(found))
        assert {key: tuple(rows.shape) for key, rows in embedding.vectors.items()} == {
            key: (1, width) for key, width in widths.items()
        }
        assert embedding.adapter is not None
        assert embedding.adapter.tensors.keys() == layers
        with Image.open(found.parent / "grid.png") as grid:
            assert min(grid.size) > 128


@pytest.mark.parametrize(
    ("write", "widths", "layers"),
    [
        pytest.param(
            tiny_latent_diffusion,
            {"bert": DIM},
            fully_connected(*(f"model.layers.{block}" for block in range(2))),
            id="BERT",
        ),
        pytest.param(
            tiny_stable_diffusion_xl,
            WIDTHS_XL,
            fully_connected(*(f"{key}.encoder.layers.{block}.mlp" for key in WIDTHS_XL for block in range(3))),
            id="XL",
        ),
        pytest.param(
            tiny_stable_diffusion_3,
            WIDTHS_3,
            fully_connected(
                *(f"{key}.encoder.layers.{block}.mlp" for key in ("clip_l", "clip_g") for block in range(2))
            ),
            id="SD3",
        ),
    ],
)
def test_a_family_is_planned_learned_and_drawn(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    write: Callable[[Path], Path],
    widths: Mapping[str, int],
    layers: set[str],
) -> None:
    """In this process, by the code of an actor: Ray has nothing to do with the family."""
    command = write_job(tmp_path, write(tmp_path / "model"))
    assert main([*command, "--dry-run"]) == OK
    assert "0 done, 2 to do, 0 bad rows" in capsys.readouterr().out
    config = configure(parse(command))
    learned_calmly(config)
    check_learned(tmp_path / "out", widths, layers)
    assert len({row["sha256"] for row in drawn_calmly(config, PROMPTS)}) == 4
    assert main([*command, "--dry-run"]) == OK
    assert "2 done, 0 to do, 0 bad rows" in capsys.readouterr().out


@pytest.mark.own_cluster
def test_a_family_that_only_the_tests_know(tmp_path: Path) -> None:
    """In a process of its own, because Ray's workers register the family when a cluster is joined."""
    command = [sys.executable, "-m", "tests.e2e.run_toy_family", *write_job(tmp_path, write_model(tmp_path / "model"))]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=420)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "2 learned, 0 done before, 0 failed" in first.stdout
    assert "pictures: 4 drawn, 0 done before, 0 failed" in first.stdout
    check_learned(tmp_path / "out", WIDTHS, fully_connected(*WIDTHS))
    planned = subprocess.run([*command, "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "2 done, 0 to do, 0 bad rows" in planned.stdout, planned.stdout + planned.stderr
