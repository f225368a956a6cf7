"""Photos that are replaced between the plan and the moment they are learned from: no record vouches for others."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.actor.learner import Learner
from pipeline.inputs.manifest import read_manifest
from pipeline.ledger.records import load_records
from pipeline.stages import Run, make_plan
from pipeline.store.errors import InputChanged
from pipeline.store.storage import RunStore
from tests.pipeline.runs import tiny_config, write_manifest, write_photo

pytestmark = pytest.mark.slow


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_learns_what_is_there_and_records_that(tiny_model: Path, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, ["moved", "still"])
    config = tiny_config(tiny_model, tmp_path / "out", manifest=str(manifest), actors={"count": 1})
    run = Run(config)
    tasks = list(run.plan.tasks(read_manifest(config.manifest)))
    photo = tmp_path / "photos" / "moved-1.png"
    write_photo(photo, 77)
    with run.living_actors():
        run.learn(iter(tasks))
    run.report()

    store = RunStore(config.output)
    records = {record.concept_id: record for record in load_records(store)}
    assert {name: record.status for name, record in records.items()} == {"moved": "done", "still": "done"}
    moved, still = records["moved"], records["still"]
    assert moved.inputs["images"][1] == md5(photo.read_bytes())
    assert (still.fingerprint, moved.attempts) == (tasks[1].fingerprint, 2)
    assert not store.exists(tasks[0].folder.record)
    assert (run.stats.learned, run.stats.failures) == (2, {})
    # the run has planned what it recorded: planned again, all is done
    plan, _ = make_plan(config, store)
    assert not list(plan.tasks(read_manifest(config.manifest)))
    assert set(plan.carried) == set(run.plan.carried)


def test_on_s3_too(bucket: str, tiny_model: Path, tmp_path: Path) -> None:
    fs = fsspec.filesystem("s3")
    for number in range(2):
        fs.pipe_file(f"{bucket}/{number}.png", Path(write_photo(tmp_path / "p.png", number)).read_bytes())
    with fs.open(f"{bucket}/manifest.parquet", "wb") as file:
        pq.write_table(pa.table({"concept_id": ["toy"], "images": [["0.png", "1.png"]], "initializer": ["cat"]}), file)
    config = tiny_config(tiny_model, f"{bucket}/out", manifest=f"{bucket}/manifest.parquet")
    plan, _ = make_plan(config, RunStore(config.output))
    (task,) = plan.tasks(read_manifest(config.manifest))
    new = Path(write_photo(tmp_path / "p.png", 77)).read_bytes()
    fs.pipe_file(f"{bucket}/1.png", new)
    learner = Learner(config)
    try:
        with pytest.raises(InputChanged, match=r"photo s3://.*/1\.png has changed since the plan was made"):
            asyncio.run(learner.learn(task))
        record = asyncio.run(learner.learn(plan.replan(task), 2))
    finally:
        learner.close()
    assert (record.status, record.inputs["images"][1]) == ("done", md5(new))
    assert [path for path in RunStore(config.output).list("concepts") if path.endswith("record.json")] == [
        record.folder.record
    ]
