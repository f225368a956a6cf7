"""Why a concept is done or not: everything that can have become of one, on every store."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from pipeline.exit_codes import OK, USAGE
from pipeline.explain import decide_verdict, describe, explain, main
from pipeline.ledger.records import ConceptRecord, DrawnWith, Try
from pipeline.store.storage import RunStore
from tests.pipeline.outputs import end, make_photos, put_manifest, put_run, settings, tasks_of


@pytest.fixture
def store(root: str) -> RunStore:
    """A run of two concepts; `cat` is done."""
    store = RunStore(root)
    manifest = put_manifest(store, make_photos(store, "cat", "dog"))
    put_run(store, manifest, settings())
    drawn = DrawnWith(solver="ddim", steps=4, guidance_scale=1.0)
    end(store, tasks_of(manifest, settings())["cat"], start="words", scores={"clip_i": 0.8}, sampling=drawn)
    return store


def rewrite(store: RunStore, **changes: Any) -> None:
    rows = make_photos(store, "cat", "dog")
    put_manifest(store, [{**rows[0], **changes}, rows[1]])


def test_done(store: RunStore) -> None:
    store.put("images/cat/1.png", b"x")
    found = explain(store, "cat")
    assert found.verdict == "done"
    assert found.place == f"{store.uri('m.parquet')}, row 1"
    assert found.fingerprint == found.attempts[0].fingerprint
    assert [uri for uri, _, _ in found.objects] == [store.uri(found.attempts[0].folder.record)]
    assert found.pictures == [store.uri("images/cat/1.png")]
    assert found.differences == []
    text = "\n".join(describe(found))
    assert text.startswith("cat: DONE. a record has the present fingerprint")
    assert "done under the present fingerprint, 10 steps in 2.0 s" in text
    assert "clip_i 0.800" in text
    assert "sample pictures drawn in 4 ddim steps with guidance 1" in text
    assert "started from the mean of all words" in text
    named = replace(found, attempts=[replace(found.attempts[0], initializer="kitten")])
    assert "started from words" in "\n".join(describe(named))


def test_below_the_gate_and_what_was_tried(store: RunStore) -> None:
    task = tasks_of(store.uri("m.parquet"), settings())["cat"]
    end(store, task, gate="below", scores={"clip_i": 0.2})
    store.put(task.folder.ladder, b"{}")
    assert explain(store, "cat").reason == "it is below the gate; the next run tries it again with other settings"
    store.delete(task.folder.ladder)
    tries = (
        Try(rung="", fingerprint=task.fingerprint, scores={"clip_i": 0.2}),
        Try(rung="seed", fingerprint="1" * 32, scores={"clip_i": 0.7}),
        Try(rung="steps*2", fingerprint="2" * 32, error="not finite"),
    )
    end(store, task, gate="passed", scores={"clip_i": 0.7}, tries=tries, kept="1" * 32)
    text = "\n".join(describe(explain(store, "cat")))
    for line in (
        "passed the gate",
        "tried as configured: clip_i 0.200",
        "tried with seed: clip_i 0.700, kept",
        "tried with steps*2: not finite",
    ):
        assert f"{line}\n" in text


def test_not_reached_learning_and_failed(store: RunStore) -> None:
    assert explain(store, "dog").verdict == "not reached"
    task = tasks_of(store.uri("m.parquet"), settings())["dog"]
    store.put(task.folder.checkpoint, b"half way")
    assert explain(store, "dog").verdict == "learning"
    store.delete(task.folder.checkpoint)
    end(store, task, status="failed", error="photo photos/dog-0.png: not a picture", error_kind="bad_input")
    found = explain(store, "dog")
    text = "\n".join(describe(found))
    assert "\n  bad input: correct the row, photos, masks or texts that the cause names, then run again\n" in text
    assert "failed (bad input) under the present fingerprint" in text
    assert (found.verdict, found.reason) == (
        "failed",
        "photo photos/dog-0.png: not a picture; the next run tries it again",
    )


def test_a_changed_row_is_named_field_by_field(store: RunStore) -> None:
    rewrite(store, initializer="kitten", placeholder="<puss>")
    found = explain(store, "cat")
    assert found.verdict == "changed"
    assert found.differences == ['row: placeholder_token: "<cat>" -> "<puss>"', 'row: initializer: "cat" -> "kitten"']


def test_changed_photos_are_named_one_by_one(store: RunStore) -> None:
    store.put("photos/cat-1.png", b"overwritten")
    uri = store.uri("photos/cat-1.png")
    assert explain(store, "cat").differences == [f"photo 2 has other bytes: {uri}"]
    store.put("photos/new.png", b"new")
    rewrite(store, images=["photos/cat-0.png", "photos/new.png", "photos/cat-1.png"])
    assert explain(store, "cat").differences == [
        f"photo 2 is new: {store.uri('photos/new.png')}",
        "photos: 2 before, 3 now",
    ]
    rewrite(store, images=["photos/cat-1.png", "photos/cat-0.png"])
    assert explain(store, "cat").differences == ["photos: the same in another order"]


def test_changed_settings_are_named_field_by_field(store: RunStore) -> None:
    now = settings(seed=7) | {"model": "n" * 32}
    now["inversion"] = now["inversion"] | {"steps": 7}
    put_run(store, store.uri("m.parquet"), now)
    steps = settings()["inversion"]["steps"]
    assert explain(store, "cat").differences == [
        f"settings: inversion.steps: {steps} -> 7",
        "settings: seed: 0 -> 7",
        "settings: the model's files (model)",
    ]
    end(store, tasks_of(store.uri("m.parquet"), now)["cat"], finished_at="2100-01-01T00:00:00+00:00")
    found = explain(store, "cat")
    assert (found.verdict, len(found.attempts), found.differences) == ("done", 2, [])


def test_a_record_of_before_inputs_were_kept_is_read(store: RunStore) -> None:
    task = tasks_of(store.uri("m.parquet"), settings())["cat"]
    path = task.folder.record
    tree = json.loads(store.get(path))
    del tree["inputs"], tree["digest"]
    store.put(path, json.dumps(tree).encode())
    assert explain(store, "cat").verdict == "done"
    rewrite(store, initializer="kitten")
    found = explain(store, "cat")
    assert found.verdict == "changed"
    assert found.differences[0].startswith("not known: ")


def test_a_run_json_without_settings_still_tells_the_last_record(store: RunStore) -> None:
    put_run(store, store.uri("m.parquet"), settings(), settings="")
    found = explain(store, "cat")
    assert (found.verdict, found.reason) == ("done", "as its last record says")
    assert "did not keep its settings" in found.notes[0]


def test_rows_that_are_bad_or_gone(store: RunStore) -> None:
    store.delete("photos/cat-1.png")
    found = explain(store, "cat")
    assert found.verdict == "bad row"
    assert found.reason.startswith(f"{store.uri('photos/cat-1.png')} cannot be read")
    rewrite(store, images=[])
    assert "no images" in explain(store, "cat").reason
    put_manifest(store, make_photos(store, "dog"))
    assert explain(store, "cat").verdict == "no row"


def test_a_manifest_that_cannot_be_read(store: RunStore) -> None:
    store.delete("m.parquet")
    found = explain(store, "cat")
    assert found.verdict == "done"
    assert "name another manifest with --manifest" in found.notes[0]
    with pytest.raises(ValueError, match="no manifest at"):
        explain(store, "cat", store.uri("m.parquet"))


def test_a_damaged_record_says_so(store: RunStore) -> None:
    store.put(tasks_of(store.uri("m.parquet"), settings())["cat"].folder.record, b"{")
    found = explain(store, "cat")
    assert found.verdict == "failed"
    assert "the next run learns it again" in found.reason


def test_the_command(store: RunStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([store.root, "cat"]) == OK
    assert capsys.readouterr().out.startswith("cat: DONE.")
    assert main([store.root, "cat", "--json"]) == OK
    assert json.loads(capsys.readouterr().out)["verdict"] == "done"
    assert main([store.root, "Cat"]) == USAGE
    assert "did you mean cat?" in capsys.readouterr().err
    assert main([store.root, "../../etc"]) == USAGE
    assert "no concept '../../etc' in" in capsys.readouterr().err
    assert main([f"{store.root}/none", "cat"]) == USAGE
    assert "error: no run at" in capsys.readouterr().err


@pytest.mark.slow
def test_on_s3_it_costs_a_few_requests(bucket: str, s3_calls: list[str]) -> None:
    store = RunStore(bucket)
    manifest = put_manifest(store, make_photos(store, *(f"c{i}" for i in range(30))))
    put_run(store, manifest, settings())
    for task in tasks_of(manifest, settings()).values():
        end(store, task)
    s3_calls.clear()
    assert explain(store, "c7").verdict == "done"
    assert s3_calls.count("ListObjectsV2") <= 5
    assert len(s3_calls) <= 20


@pytest.mark.parametrize(
    ("fingerprint", "statuses", "written", "expected"),
    [
        ("", [], {}, "unknown"),
        ("", [("old", "failed")], {}, "failed"),
        ("now", [("now", "done")], {"record.json": 1.0}, "done"),
        ("now", [("now", "failed")], {"record.json": 1.0}, "failed"),  # a damaged record
        ("now", [("now", "failed")], {"failure.json": 1.0}, "failed"),
        ("now", [("now", "failed")], {"failure.json": 1.0, "checkpoint.safetensors": 2.0}, "learning"),
        ("now", [("now", "failed")], {"failure.json": 2.0, "checkpoint.safetensors": 1.0}, "failed"),
        ("now", [("old", "done")], {"checkpoint.safetensors": 2.0}, "learning"),
        ("now", [("old", "done")], {}, "changed"),
        ("now", [("old", "failed")], {}, "changed"),
        ("now", [], {}, "not reached"),
    ],
)
def test_the_verdict_on_a_good_row(
    fingerprint: str, statuses: list[tuple[str, Any]], written: dict[str, float], expected: str
) -> None:
    attempts = [
        ConceptRecord(
            concept_id="cat", fingerprint=mark, status=status, placeholder_token="<x>", error="no key", error_kind="bug"
        )
        for mark, status in statuses
    ]
    paths = {f"concepts/cat/now/{name}": at for name, at in written.items()}
    verdict, reason, kind = decide_verdict("cat", fingerprint, attempts, paths)
    assert verdict == expected
    assert bool(reason) == (verdict != "unknown")
    assert kind == ("bug" if verdict == "failed" else "")


def test_without_a_known_manifest_the_records_tell(store: RunStore) -> None:
    store.delete("run.json")
    found = explain(store, "cat")
    assert (found.verdict, found.reason) == ("done", "as its last record says")
    assert any("name one with --manifest" in note for note in found.notes)
