"""Sixty concepts through a bad night: workers killed at random, a node lost and another joined, the driver killed and
the command run again. Everything comes out once, with the bytes of a calm night."""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import RunConfig
from pipeline.config_file import load_config
from pipeline.ledger.records import from_json
from pipeline.store.parquet import read_table
from pipeline.store.storage import RunStore
from tests.faults.counted import attempts
from tests.faults.night import Night, learned_calmly, two_nodes
from tests.faults.processes import descendants
from tests.pipeline.runs import tiny_toml, write_manifest
from textual_inversion.slot_state import SlotState

pytestmark = [pytest.mark.slow, pytest.mark.own_cluster, pytest.mark.timeout(900)]

log = logging.getLogger(__name__)

CONCEPTS, STEPS, INTERVAL, KILLS = 60, 16, 4, 5
LEARNER = "ray::CountedActor"
SETTINGS = {
    "inversion": {"steps": STEPS, "batch_size": 2},
    "actors": {"count": 2, "slots": 2, "checkpoint_steps": INTERVAL, "max_attempts": 12},
}
LEARNED = ("learned_embeds.safetensors", "curve.parquet", "grid.png")


@pytest.fixture(scope="module")
def night(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Night]:
    folder = tmp_path_factory.mktemp("night")
    manifest = write_manifest(folder, [f"c{i:02d}" for i in range(CONCEPTS)])
    (folder / "job.toml").write_text(tiny_toml(tiny_model, **SETTINGS))
    output = folder / "out"
    counted = "from tests.faults.counted import main; main()"
    command = [sys.executable, "-c", counted, str(manifest), "--output", str(output),
               "--config", str(folder / "job.toml")]  # fmt: skip
    with two_nodes() as (cluster, nodes):
        yield Night(cluster, nodes, command, output)


@pytest.fixture(scope="module")
def config(night: Night) -> RunConfig:
    """The job's, as it resolves, but on an output where nothing happens."""
    toml = Path(night.command[-1]).read_text()
    return load_config(toml, manifest=night.command[3], output=str(night.output.parent / "calm"), device="cpu")


@pytest.fixture(scope="module")
def calm(config: RunConfig) -> RunStore:
    """All concepts learned in this process."""
    return learned_calmly(config)


def records(night: Night) -> list[Path]:
    return sorted(night.output.glob("concepts/*/*/record.json"))


def saved_steps(night: Night) -> dict[str, int]:
    """Concept -> the step its checkpoint is of."""
    found = {}
    for path in night.output.glob("concepts/*/*/checkpoint.safetensors"):
        try:
            found[path.parts[-3]] = SlotState.from_bytes(path.read_bytes()).step
        except FileNotFoundError:  # it has just been learned
            continue
    return found


def log_of(record: Path) -> list[dict[str, Any]]:
    """What was noted of a concept, attempt after attempt."""
    return [json.loads(line) for line in (record.parent / "log.jsonl").read_text().splitlines()]


def test_sixty_concepts(night: Night, calm: RunStore) -> None:
    def progress() -> object:
        return len(records(night)), saved_steps(night)

    night.start()
    saved: dict[str, int] = {}
    before: list[int] = []
    for number in range(KILLS):
        night.await_change(progress)
        if number == 2:
            night.replace_node()
        elif number == 3:
            before = descendants(LEARNER)
            night.kill_driver()
            saved = saved_steps(night)
            night.start()
        else:
            night.kill_oldest(LEARNER)
    said = night.end()
    assert night.kills == KILLS - 2
    assert " 0 failed, 0 bad rows" in said

    found = [from_json(path.read_bytes()) for path in records(night)]
    assert sorted(record.concept_id for record in found) == [f"c{i:02d}" for i in range(CONCEPTS)]
    assert {record.status for record in found} == {"done"}
    published_again = 0
    for path in records(night):
        relative = path.parent.relative_to(night.output)
        for name in LEARNED:
            assert (path.parent / name).read_bytes() == calm.get(f"{relative}/{name}"), (relative, name)
        told = log_of(path)
        messages = [line["message"] for line in told]
        last = messages[len(messages) - messages[::-1].index("begins") :]
        assert last.count("published") == 1, told
        published_again += messages.count("published") - 1
        if [line["process"] for line in told if line["message"] == "begins"][-1] not in before:
            step = [line["step"] for line in told if line["message"] == "prepared"][-1]
            assert step >= saved.get(path.parts[-3], 0), "what was saved is gone on from"
    assert published_again <= KILLS, "more than the kills between a concept's last line and its record"
    table = read_table(night.output / "results.parquet", ["concept_id", "status"])
    assert Counter(table["status"].to_pylist()) == {"done": CONCEPTS}
    assert not list(night.output.glob("**/lease.json"))
    check_work_lost(night.output)


def check_work_lost(output: Path) -> None:
    """An attempt that was cut off costs the steps that the next one takes again: those after the last checkpoint in
    storage. At most one interval of them was learned while no checkpoint was on its way there: one is handed over each
    interval unless its predecessor is still on its way, and what has arrived is gone on from. So a kill costs at most
    one interval and what is learned while a checkpoint is on its way; if that takes longer than an interval, while two
    are. Of every step that any actor took, none is lost in another way."""
    lost: list[int] = []
    taken = 0
    for those in attempts(output).values():
        for cut, following in pairwise(those):
            lost.append(cut.steps[-1] - following.begun)
            assert lost[-1] >= 0
            assert cut.unsaved(after=following.begun) <= INTERVAL, (cut, following)
        assert those[-1].steps[-1] == STEPS
        taken += sum(len(one.steps) for one in those)
    assert taken == CONCEPTS * STEPS + sum(lost)
    assert lost, "no kill met a concept that was being learned"
    log.warning("%d attempts cut off; %d steps taken, lost %s", len(lost), taken, sorted(lost))
