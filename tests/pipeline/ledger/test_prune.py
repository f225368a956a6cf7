"""What is deleted when nobody asks for it any more, and, above all, what is not."""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.bulk.picture_rows import RESULT_SCHEMA
from pipeline.inputs.content_hash import content_hashes
from pipeline.inputs.manifest import read_manifest
from pipeline.ledger.digest import digest
from pipeline.ledger.done import find_done
from pipeline.ledger.plan import Plan
from pipeline.ledger.prune import METADATA, Leftovers, delete_leftovers, find_leftovers
from pipeline.ledger.records import Try, read_record
from pipeline.store.parquet import read_table
from pipeline.store.storage import ConceptFolder, RunStore
from tests.pipeline.outputs import end, make_photos, put_manifest, settings, tasks_of

NOW, BEFORE = settings(), settings(seed=7)


def planned(store: RunStore, manifest: str) -> Plan:
    plan = Plan(digest(NOW), find_done(store).fingerprints, content_hashes)
    for _ in plan.tasks(read_manifest(manifest)):
        pass
    return plan


def prune(store: RunStore, manifest: str) -> list[str]:
    left = find_leftovers(store, manifest, planned(store, manifest))
    lines = list(left.lines())
    delete_leftovers(store, left)
    return lines


def draw(store: RunStore, part: int, *pictures: tuple[str, str]) -> None:
    """A part of pictures of (concept id, fingerprint)."""
    rows: list[dict[str, Any]] = []
    for number, (name, mark) in enumerate(pictures):
        path = f"images/{name}/{part}-{number}.png"
        store.put(path, b"png")
        rows.append(
            {"row_id": f"{part}-{number}", "concept_id": name, "fingerprint": mark, "status": "ok", "path": path}
        )
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, RESULT_SCHEMA), buffer)
    store.put(f"{METADATA}/part-{part}.parquet", buffer.getvalue())


def concepts(store: RunStore) -> set[tuple[str, str]]:
    folders = (ConceptFolder.from_path(path) for path, _ in store.scan("concepts"))
    return {(folder.concept_id, folder.fingerprint) for folder in folders if folder}


def test_what_has_no_row_and_what_is_superseded_goes(root: str) -> None:
    store = RunStore(root)
    rows = make_photos(store, "stays", "changed", "waiting", "removed")
    manifest = put_manifest(store, rows)
    now, before = tasks_of(manifest, NOW), tasks_of(manifest, BEFORE)
    for name in ("stays", "changed", "removed"):
        end(store, now[name])
    for name in ("changed", "waiting", "removed"):
        end(store, before[name])
        store.put(before[name].folder.embedding, b"rows")
    draw(store, 0, ("stays", now["stays"].fingerprint), ("changed", before["changed"].fingerprint))
    draw(store, 1, ("removed", now["removed"].fingerprint))
    draw(store, 2, ("waiting", before["waiting"].fingerprint), ("changed", now["changed"].fingerprint))
    store.put("images/removed/stray.png", b"png")
    manifest = put_manifest(store, rows[:3])

    unchanged = store.list()
    left = find_leftovers(store, manifest, planned(store, manifest))
    assert store.list() == unchanged, "looking deletes nothing"
    assert set(left.removed) == {"removed"}
    assert set(left.superseded) == {before["changed"].folder}
    assert (left.num_rows, len(left.pictures)) == (2, 3)
    assert next(iter(left.lines())) == "concept removed, which has no row"

    prune(store, manifest)
    assert concepts(store) == {
        ("stays", now["stays"].fingerprint),
        ("changed", now["changed"].fingerprint),
        ("waiting", before["waiting"].fingerprint),  # the only result it has
    }
    assert {path for path in store.list("images") if path.endswith(".png")} == {
        "images/stays/0-0.png",
        "images/waiting/2-0.png",
        "images/changed/2-1.png",
    }
    told = [row for path in store.list(METADATA) for row in read_table(io.BytesIO(store.get(path))).to_pylist()]
    assert {row["path"] for row in told} == {path for path in store.list("images") if path.endswith(".png")}
    assert prune(store, manifest)[-1].startswith("0 concepts without a row, 0 results")


def test_of_a_ladder_the_kept_try_stays(root: str) -> None:
    store = RunStore(root)
    manifest = put_manifest(store, make_photos(store, "poor", "climbing"))
    now, second, third = (tasks_of(manifest, settings(seed=seed)) for seed in (0, 1, 2))
    for task in (second["poor"], third["poor"], second["climbing"], now["climbing"]):
        end(store, task)
    store.put(now["climbing"].folder.ladder, b"{}")
    tries = tuple(Try(rung=f"{i}", fingerprint=each["poor"].fingerprint) for i, each in enumerate((now, second, third)))
    end(store, now["poor"], tries=tries, kept=third["poor"].fingerprint)
    prune(store, manifest)
    assert concepts(store) == {
        ("poor", now["poor"].fingerprint),
        ("poor", third["poor"].fingerprint),
        ("climbing", now["climbing"].fingerprint),
        ("climbing", second["climbing"].fingerprint),
    }
    assert read_record(store, now["poor"].folder).result == third["poor"].folder


def test_a_bad_row_keeps_what_its_concept_has() -> None:
    store = RunStore("memory://bad-row")
    rows = make_photos(store, "good", "bad")
    tasks = tasks_of(put_manifest(store, rows), NOW)
    for task in tasks.values():
        end(store, task)
    rows[1]["images"] = []
    prune(store, put_manifest(store, rows))
    assert {name for name, _ in concepts(store)} == {"good", "bad"}


@pytest.mark.parametrize("rows", [[], [{"concept_id": None, "images": ["a.png"]}]])
def test_a_manifest_that_does_not_tell_prunes_nothing(rows: list[dict[str, Any]]) -> None:
    store = RunStore("memory://untold")
    good = make_photos(store, "good")
    end(store, tasks_of(put_manifest(store, good), NOW)["good"])
    schema = pa.schema([("concept_id", pa.string()), ("images", pa.list_(pa.string()))])
    table = pa.Table.from_pylist([*rows, *(good if rows else [])], schema)
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    store.put("m.parquet", buffer.getvalue())
    with pytest.raises(ValueError, match="correct it first"):
        find_leftovers(store, store.uri("m.parquet"), planned(store, store.uri("m.parquet")))
    assert concepts(store)


def test_a_manifest_that_was_cut_short_deletes_nothing() -> None:
    left = Leftovers(removed={f"c{i}": 1 for i in range(12)}, num_concepts=100)
    with pytest.raises(ValueError, match=r"12 % of the concepts .*\(12 of 100\).*--prune-at-most 12%$"):
        left.check(0.1)
    with pytest.raises(ValueError, match="nothing was deleted"):
        left.check(11)
    left.check(0.12)
    left.check(12)
    Leftovers().check(0)
