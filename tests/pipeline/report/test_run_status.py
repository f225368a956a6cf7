"""What a listing tells of a run: going on, ended, dead, of another night."""

from __future__ import annotations

import io
import json
import time

import pyarrow.parquet as pq
import pytest

from pipeline.inputs.manifest import BadRow
from pipeline.ledger.records import load_records
from pipeline.ledger.results import write_results
from pipeline.report.run_status import ConceptState, pick_records, read_status
from pipeline.store.parquet import read_table
from pipeline.store.storage import RunStore
from tests.pipeline.outputs import end, make_photos, put_manifest, put_run, settings, tasks_of

EARLIER, LATER = "2000-01-01T00:00:00+00:00", "2100-01-01T00:00:00+00:00"


def test_a_run_that_has_ended(root: str) -> None:
    store = RunStore(root)
    manifest = put_manifest(store, make_photos(store, "cat", "dog", "owl", "fox"))
    tasks = tasks_of(manifest, settings())
    end(store, tasks["cat"], seconds=1.0)
    end(store, tasks["dog"], seconds=30.0, attempts=2)
    for name in ("owl", "fox"):
        error = f"photo photos/{name}-0.png: not a picture"
        end(store, tasks[name], status="failed", error=error, error_kind="bad_input")
    store.put("images/cat/1.png", b"x")
    store.put("images/metadata/1.parquet", b"x")
    bad = [BadRow(file="m.parquet", row=5, concept_id="ant", reason="it has no images")]
    write_results(store, list(load_records(store)), bad)
    counts = {"rows": 5, "looked_at": 5, "bad_rows": 1}
    put_run(store, manifest, settings(), started_at=EARLIER, counts=counts)
    status = read_status(store)
    assert (status.stage, status.alive, status.rows, status.manifest) == ("ended", False, 5, manifest)
    assert (status.done, status.failed, status.bad_rows, status.waiting, status.pictures) == (2, 2, 1, 0, 1)
    assert [(facts.concept_id, facts.seconds, facts.attempts) for facts in status.slowest] == [
        ("dog", 30.0, 2),
        ("cat", 1.0, 1),
    ]
    assert status.median_s == 15.5
    assert [(cause.kind, cause.count, set(cause.names)) for cause in status.causes] == [
        ("bad_input", 2, {"owl", "fox"}),
        ("bad_input", 1, {"ant"}),
    ]
    assert status.concepts_per_hour is not None
    assert status.seconds_left is None


def test_a_run_that_goes_on_is_told_from_one_that_died(root: str) -> None:
    store = RunStore(root)
    manifest = put_manifest(store, make_photos(store, "cat", "dog", "owl", "fox"))
    tasks = tasks_of(manifest, settings())
    end(store, tasks["cat"])
    store.put(tasks["dog"].folder.checkpoint, b"half way")
    store.put(tasks["cat"].folder.checkpoint, b"left behind")
    put_run(store, manifest, settings(), stage="learning", started_at=EARLIER, counts={"rows": 4, "looked_at": 3})
    status = read_status(store)
    assert status.alive
    assert (status.done, status.learning, status.interrupted, status.waiting) == (1, 1, 0, 2)
    status = read_status(store, clock=time.time() + 3600)
    assert not status.alive
    assert (status.done, status.learning, status.interrupted, status.waiting) == (1, 0, 1, 3)
    assert status.quiet_s == pytest.approx(3600, abs=5)


def test_what_an_earlier_run_left_is_not_counted_as_done_twice(root: str) -> None:
    store = RunStore(root)
    manifest = put_manifest(store, make_photos(store, "cat", "dog", "owl"))
    for task in tasks_of(manifest, settings()).values():
        end(store, task)
    put_run(
        store,
        manifest,
        settings(),
        started_at=LATER,
        stage="learning",
        counts={"rows": 3, "looked_at": 2, "done_before": 2},
    )
    status = read_status(store)
    assert (status.done, status.done_before, status.other, status.waiting) == (2, 2, 1, 1)


def test_a_run_json_of_an_older_release_counts_no_concept_twice(root: str) -> None:
    store = RunStore(root)
    manifest = put_manifest(store, make_photos(store, "cat", "dog"))
    for task in tasks_of(manifest, settings()).values():
        end(store, task)
    counts = {"rows": 2, "done_before": 1, "learned": 1, "failed": 0, "problems": {}, "bad_rows": 0}
    store.put("run.json", json.dumps({"config": {"manifest": manifest}, "counts": counts}).encode())
    status = read_status(store)
    assert (status.done, status.done_before, status.rows, status.stage, status.waiting) == (2, 0, 2, None, None)


def test_the_newest_of_a_concept_counts(root: str) -> None:
    store = RunStore(root)
    manifest = put_manifest(store, make_photos(store, "cat"))
    end(store, tasks_of(manifest, settings())["cat"])
    time.sleep(1.1 if root.startswith("s3:") else 0.02)
    end(store, tasks_of(manifest, settings(seed=1))["cat"], status="failed", error="out of luck")
    status = read_status(store)
    assert (status.done, status.failed, status.stage, status.rows) == (0, 1, None, None)
    assert (status.causes[0].kind, status.causes[0].cause) == ("unknown", "out of luck")


def test_results_of_an_older_release_have_no_kinds(root: str) -> None:
    store = RunStore(root)
    manifest = put_manifest(store, make_photos(store, "cat"))
    end(store, tasks_of(manifest, settings())["cat"], status="failed", error="out of luck", error_kind="bug")
    write_results(store, list(load_records(store)))
    table = read_table(io.BytesIO(store.get("results.parquet"))).drop_columns(["error_kind"])
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    store.put("results.parquet", buffer.getvalue())
    assert [(cause.kind, cause.cause) for cause in read_status(store).causes] == [("unknown", "out of luck")]


def test_failures_are_read_before_records_of_done_concepts() -> None:
    states = {f"c{i}": ConceptState("f", "done", float(i)) for i in range(600)} | {
        "bad": ConceptState("f", "failed", 0.0)
    }
    picked = list(pick_records(states))
    assert picked[:2] == ["bad", "c599"]
    assert len(picked) == 500


def test_a_damaged_record_and_a_damaged_run_are_named(root: str) -> None:
    store = RunStore(root)
    task = tasks_of(put_manifest(store, make_photos(store, "cat")), settings())["cat"]
    store.put(task.folder.failure, b"{")
    assert "failure.json cannot be read" in read_status(store).causes[0].cause
    store.put("run.json", b"{")
    with pytest.raises(ValueError, match=r"run\.json does not describe a run .*; delete it"):
        read_status(store)


def test_no_run_there(root: str) -> None:
    RunStore(root).put("other/file.txt", b"x")
    with pytest.raises(ValueError, match=r"no run at .*: neither run\.json nor concepts/"):
        read_status(RunStore(root))


@pytest.mark.slow
def test_on_s3_it_costs_a_listing_and_no_request_a_concept(bucket: str, s3_calls: list[str]) -> None:
    store = RunStore(bucket)
    names = [f"c{i}" for i in range(30)]
    manifest = put_manifest(store, make_photos(store, *names))
    for task in tasks_of(manifest, settings()).values():
        end(store, task)
    write_results(store, list(load_records(store)))
    put_run(store, manifest, settings(), started_at=EARLIER, counts={"rows": 30, "looked_at": 30})
    s3_calls.clear()
    assert read_status(store).done == 30
    assert s3_calls.count("ListObjectsV2") == 2  # of everything, and of the copies of records
    assert len(s3_calls) <= 5


def test_concepts_tried_again_are_counted_once(root: str) -> None:
    store = RunStore(root)
    manifest = put_manifest(store, make_photos(store, "cat", "dog"))
    tasks = tasks_of(manifest, settings())
    end(store, tasks["cat"])
    end(store, tasks["dog"])
    store.put(tasks["dog"].folder.ladder, b"{}")
    gate = {"learned_before": 2}  # their records were put again
    put_run(store, manifest, settings(), started_at=EARLIER, counts={"rows": 2, "done_before": 2, "gate": gate})
    status = read_status(store)
    assert (status.done, status.below_gate) == (2, 1)


def test_damaged_results_do_not_count_as_done(root: str) -> None:
    store = RunStore(root)
    manifest = put_manifest(store, make_photos(store, "cat", "dog", "owl"))
    tasks = tasks_of(manifest, settings())
    for name in ("cat", "dog", "owl"):
        end(store, tasks[name])
    counts = {"rows": 3, "looked_at": 3}
    put_run(store, manifest, settings(), started_at=EARLIER, counts=counts)
    list(
        load_records(store, update_cache=True)
    )  # as a report does, which keeps a copy of all records on an object store
    assert (read_status(store).done, read_status(store).damaged) == (3, {})
    store.put(tasks["dog"].folder.record, b"garbage")
    swapped = store.get(tasks["cat"].folder.record) + b"\n"  # of another size: S3 tells times in seconds only
    store.put(tasks["owl"].folder.record, swapped)
    status = read_status(store)
    assert (status.done, status.failed, status.waiting) == (1, 0, 0)
    assert set(status.damaged) == {"dog", "owl"}
    assert "cannot be read" in status.damaged["dog"]
    assert "it is the record of" in status.damaged["owl"]
