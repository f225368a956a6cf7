"""Pictures through a bad night: workers killed as they draw, the driver killed and the command run again. Each is there
once, with the bytes it has when nothing happens."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

from pipeline.bulk.generate import METADATA
from pipeline.config_file import load_config
from pipeline.store.disk import TEMPORARY
from pipeline.store.parquet import read_tables
from tests.faults.night import Night, drawn_calmly, learned_calmly, two_nodes
from tests.pipeline.runs import tiny_toml, write_manifest

pytestmark = [pytest.mark.slow, pytest.mark.own_cluster, pytest.mark.timeout(900)]

CONCEPTS = 6
ACTOR, BORROWER = "ray::ModelActor", "ray::MapWorker(MapBatches(BoundedWorker)).submit"
"""How Ray names an actor that draws, and a worker of Ray Data that has borrowed one."""
KILLED = (ACTOR, BORROWER, ACTOR)
PROMPTS = [
    f"a {kind} of {article} {{}}" for kind in ("photo", "rendering", "painting") for article in ("a", "the", "one")
]
SETTINGS = {
    "inversion": {"steps": 2, "batch_size": 2},
    "actors": {"count": 2},
    "generation": {"sampling": {"steps": 30, "batch_size": 2, "guidance_scale": 2.0}, "rows_per_part": 4},
}


def pictures(output: Path) -> dict[str, str]:
    """Where each is -> the digest of its bytes."""
    found = sorted(output.glob("images/c*/*.png"))
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def test_pictures(tiny_model: Path, tmp_path: Path) -> None:
    manifest, output = write_manifest(tmp_path, [f"c{i}" for i in range(CONCEPTS)]), tmp_path / "out"
    toml, prompts = tmp_path / "job.toml", tmp_path / "prompts.txt"
    toml.write_text(tiny_toml(tiny_model, **SETTINGS))
    prompts.write_text("\n".join(PROMPTS))
    config = load_config(toml.read_text(), manifest=str(manifest), output=str(tmp_path / "calm"), device="cpu")
    learned_calmly(config)
    shutil.copytree(config.output, output)
    expected = {row["row_id"]: row["sha256"] for row in drawn_calmly(config, PROMPTS)}
    command = [sys.executable, "-m", "pipeline.run", str(manifest), "--output", str(output), "--config", str(toml),
               "--prompts", str(prompts)]  # fmt: skip

    def drawn() -> int:
        return len(list(output.glob("images/c*/*.png")))

    with two_nodes() as (cluster, nodes):
        night = Night(cluster, nodes, command, output, pause_s=0.4)
        night.start()
        for title in KILLED:
            night.await_change(drawn)
            night.kill_oldest(title)
        night.await_change(drawn)
        night.kill_driver()
        night.start()
        said = night.end()
    assert night.kills == len(KILLED)
    assert f"0 learned, {CONCEPTS} done before" in said
    assert " 0 failed" in next(line for line in said.splitlines() if line.startswith("pictures:"))

    rows = read_tables(output / METADATA).to_pylist()
    assert Counter(row["status"] for row in rows) == {"ok": len(expected)}
    assert {row["row_id"]: row["sha256"] for row in rows} == expected
    assert pictures(output) == pictures(tmp_path / "calm") == {row["path"]: row["sha256"] for row in rows}
    others = [path for path in (output / "images").rglob("*") if path.is_file() and path.suffix != ".parquet"]
    assert {path.suffix for path in others if not path.name.startswith(TEMPORARY)} == {".png"}
