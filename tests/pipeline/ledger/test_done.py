"""A concept is done while its record and its files are as they were written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import fsspec
import pytest

from pipeline.inputs.manifest import read_manifest
from pipeline.ledger.digest import digest
from pipeline.ledger.done import find_done
from pipeline.ledger.plan import ConceptTask, Plan
from pipeline.ledger.record_parts import PartWriter
from pipeline.ledger.records import ConceptRecord, StoredFile, add_to_part, load_records, put_record
from pipeline.ledger.selection import Selection
from pipeline.store import retries
from pipeline.store.errors import StoreFailed
from pipeline.store.storage import RunStore
from tests.pipeline import outputs

CHOSEN = outputs.settings()
FILES = {"learned_embeds.safetensors": b"rows", "grid.png": b"picture"}


@pytest.fixture(params=["memory://done", "s3://done/out"])
def store(request: pytest.FixtureRequest) -> RunStore:
    """Return an output; one on S3 has copies of its records (`tasks`)."""
    if request.param.startswith("s3:"):
        request.getfixturevalue("s3_memory")
    fsspec.filesystem("memory").store.clear()
    return RunStore(request.param)


@pytest.fixture
def tasks(store: RunStore) -> dict[str, ConceptTask]:
    """Three concepts that are done."""
    found = outputs.tasks_of(outputs.put_manifest(store, outputs.make_photos(store, "a", "b", "c")), CHOSEN)
    parts = PartWriter(store)
    for task in found.values():
        add_to_part(parts, finish(store, task))
    parts.flush()
    return found


def finish(store: RunStore, task: ConceptTask, **changes: object) -> ConceptRecord:
    """Put a concept's files and its record."""
    name = task.concept.concept_id.encode()
    files = {}
    for file, content in FILES.items():
        data = content + name
        files[file] = StoredFile(bytes=len(data), sha256=store.put_checked(task.folder.file(file), data))
    return outputs.end(store, task, files=files, **changes)


def edit(store: RunStore, task: ConceptTask) -> None:
    tree = json.loads(store.get(task.folder.record))
    store.put(task.folder.record, json.dumps(tree | {"steps": 999}).encode())


DAMAGE: dict[str, tuple[Callable[[RunStore, ConceptTask], None], str]] = {
    "cut short": (lambda store, task: store.put(task.folder.embedding, b"ro"), "has 2 bytes and not the 5"),
    "emptied": (lambda store, task: store.put(task.folder.grid, b""), "has 0 bytes and not the 8"),
    "deleted": (lambda store, task: store.delete(task.folder.embedding), "learned_embeds.safetensors is missing"),
    "garbage": (lambda store, task: store.put(task.folder.record, b"\xff\x00"), "not a concept record"),
    "a list": (lambda store, task: store.put(task.folder.record, b"[1]"), "not a concept record"),
    "deeply nested": (lambda store, task: store.put(task.folder.record, b"[" * 100_000), "cannot be read"),
    "edited": (edit, "it is not as it was written"),
    "another's record": (
        lambda store, task: store.put(
            task.folder.record,
            next(store.get(path) for path in store.list("concepts/a") if path.endswith("record.json")),
        ),
        "it is the record of concepts/a/",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_concept_is_not_done_and_is_learned_again(
    damage: str, store: RunStore, tasks: dict[str, ConceptTask]
) -> None:
    inflict, said = DAMAGE[damage]
    inflict(store, tasks["b"])
    done = find_done(store)
    assert done.fingerprints == {tasks[name].fingerprint.encode() for name in "ac"}
    assert list(done.damaged) == [tasks["b"].fingerprint]
    plan = Plan(digest(CHOSEN), done.fingerprints, damaged=done.damaged)
    assert [task.concept.concept_id for task in plan.tasks(read_manifest(store.uri("m.parquet")))] == ["b"]
    assert said in plan.damaged["b"]
    assert "the next run learns it again" in plan.damaged["b"]
    loaded = {record.concept_id: record for record in load_records(store)}
    assert {name: record.status for name, record in loaded.items()} == {"a": "done", "b": "failed", "c": "done"}
    assert loaded["b"].error_kind == "storage"


def test_what_is_left_out_is_named(store: RunStore, tasks: dict[str, ConceptTask]) -> None:
    store.delete(tasks["b"].folder.grid)
    done = find_done(store)
    plan = Plan(digest(CHOSEN), done.fingerprints, selection=Selection(only=frozenset("a")), damaged=done.damaged)
    assert list(plan.tasks(read_manifest(store.uri("m.parquet")))) == []
    assert (plan.damaged_left_out, plan.num_done, plan.num_left_out) == ({"b"}, 2, 1)


def test_other_bytes_of_the_same_size_are_found_by_their_digest(store: RunStore, tasks: dict[str, ConceptTask]) -> None:
    a, b = (store.get(tasks[name].folder.embedding) for name in "ab")
    store.put(tasks["a"].folder.embedding, b)
    store.put(tasks["b"].folder.embedding, a)
    assert find_done(store).damaged == {}
    done = find_done(store, verify=True)
    assert done.fingerprints == {tasks["c"].fingerprint.encode()}
    assert all("its SHA-256 is another" in damage for damage in done.damaged.values())


def test_the_files_of_the_try_that_is_kept_count(store: RunStore, tasks: dict[str, ConceptTask]) -> None:
    kept = dataclasses.replace(tasks["a"], fingerprint="0" * 32)
    record = finish(store, kept)
    first = outputs.end(store, tasks["a"], files=record.files, kept=kept.fingerprint)
    store.delete(tasks["a"].folder.embedding)  # that of the try that is not kept
    assert find_done(store, verify=True).damaged == {}
    store.put(kept.folder.embedding, b"")
    assert find_done(store).damaged.keys() == {first.fingerprint, kept.fingerprint}


def test_a_record_of_an_earlier_release_names_no_files(store: RunStore) -> None:
    old = ConceptRecord(concept_id="old", fingerprint="1" * 32, status="done", placeholder_token="<old>")
    put_record(store, old)
    tree = json.loads(store.get(old.folder.record))
    del tree["digest"]
    store.put(old.folder.record, json.dumps(tree).encode())
    assert find_done(store, verify=True).fingerprints == {old.fingerprint.encode()}


@pytest.mark.parametrize("verify", [False, True])
def test_a_store_that_fails_for_now_damages_nothing(
    verify: bool, store: RunStore, tasks: dict[str, ConceptTask], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bytes:
        raise TimeoutError("no answer")

    def fail_all(_: RunStore, paths: list[str]) -> dict[str, bytes | OSError]:
        return {path: TimeoutError("no answer") for path in paths}

    assert retries.is_retryable(TimeoutError())
    if verify:
        monkeypatch.setattr(RunStore, "get", fail)
    else:
        monkeypatch.setattr(RunStore, "get_many", fail_all)
    with pytest.raises(StoreFailed, match=r"a/.* cannot be read"):
        find_done(store, verify=verify)
    assert tasks
