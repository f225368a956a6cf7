"""The stages' own logic, without a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import cluster, driver, gate_retries, prometheus, stages
from pipeline.config import RunConfig
from pipeline.inputs.manifest import read_manifest
from pipeline.ledger.done import find_done
from pipeline.ledger.gate import verdict
from pipeline.ledger.plan import ConceptTask, settings_of
from pipeline.ledger.records import ConceptRecord, load_records, put_record
from pipeline.sample_config import GateConfig
from pipeline.stages import Run
from pipeline.store.storage import RunStore
from pipeline.times import now
from pipeline.work_queue import WorkQueue
from tests.pipeline.outputs import make_photos, put_manifest
from tests.pipeline.s3_memory import S3Memory

CLIP_I = {("good", 0): 0.8, ("poor", 0): 0.1, ("poor", 1): 0.7, ("hopeless", 0): 0.2, ("hopeless", 1): 0.3}
"""By concept and rung; the initializer words have 0.5."""


@pytest.fixture
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the driver learn in this process, tries before all else, one concept after the other."""

    def drive(queue: WorkQueue, _fleet: Any, rungs: list[RunConfig], *_: Any, **__: Any) -> Iterator[driver.Ended]:
        queue.look_ahead(2)
        while len(queue):
            work = queue.take(max(rung for rung, number in queue.num_waiting().items() if number))
            assert work is not None
            yield work.task, learned(rungs[work.task.rung], work.task)
            queue.look_ahead(2)

    nothing = SimpleNamespace(**dict.fromkeys(("count_failures", "settled"), lambda _: None))
    monkeypatch.setattr(driver, "drive", drive)
    monkeypatch.setattr(prometheus, "RunMetrics", lambda: nothing)
    monkeypatch.setattr(cluster, "new_fleet", lambda *_: None)
    monkeypatch.setattr(stages, "connect", lambda _: (0.0, 1.0))
    for module in (stages, gate_retries):
        monkeypatch.setattr(module, "current_settings", lambda config: settings_of(config, model_hash="m"))


def learned(config: RunConfig, task: ConceptTask) -> ConceptRecord:
    """Store and return the record that an actor would, in the same way."""
    scores = {"clip_i": CLIP_I[task.concept.concept_id, task.rung], "clip_i_initializer": 0.5}
    record = ConceptRecord(
        concept_id=task.concept.concept_id, fingerprint=task.fingerprint, status="done", placeholder_token="<x>",
        scores=scores, inputs=task.inputs, steps=100, finished_at=now(), gate=verdict(scores, config.gate),
    )  # fmt: skip
    store = RunStore(config.output)
    if record.gate == "below" and config.gate.ladder:
        store.put(record.folder.ladder, b"{}")
    put_record(store, record)
    return record


@pytest.mark.usefixtures("_no_cluster")
def test_a_concept_is_settled_before_others_begin_and_no_record_is_read_again(
    tmp_path: Path, s3_memory: S3Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = RunStore(str(tmp_path))
    manifest = put_manifest(photos, make_photos(photos, "poor", "good", "hopeless"))
    config = RunConfig(manifest=manifest, output="s3://catalog/out", gate=GateConfig(ladder=("seed",)))
    store = RunStore(config.output)
    run = Run(config)
    ended: list[str] = []
    monkeypatch.setattr(run._tracker, "add", lambda record: ended.append(f"{record.concept_id} {record.gate}"))
    run.learn(run.plan.tasks(read_manifest(manifest)))
    assert ended == ["poor passed", "good passed", "hopeless below"]
    assert (run.stats.learned, run.stats.steps, run.stats.gate_retries.steps) == (3, 300, 200)
    assert run.stats.gate_retries.describe() == "2 (1 passed then, 1 better but still below)"

    s3_memory.requests.clear()
    records = {record.concept_id: record for record in load_records(store, run.plan.carried)}
    assert {name: record.scores["clip_i"] for name, record in records.items()} == {
        "poor": 0.7, "good": 0.8, "hopeless": 0.3
    }  # fmt: skip
    assert s3_memory.requests["get"] == 1, "the part that the run wrote"
    s3_memory.requests.clear()
    done = find_done(store)
    assert (len(done.fingerprints), done.awaiting_retry) == (3 + 2, {})
    assert s3_memory.requests["get"] == 1
