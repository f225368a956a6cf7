from __future__ import annotations

import dataclasses
import io
import json
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import RunConfig
from pipeline.config_file import load_config
from pipeline.inputs.manifest import BadRow, ManifestRow, read_manifest
from pipeline.ledger.done import find_done
from pipeline.ledger.plan import (
    ConceptTask,
    Plan,
    digest,
    earlier_hash,
    fingerprint,
    fingerprint_inputs,
    settings_of,
)
from pipeline.ledger.records import ConceptRecord, load_records, put_record
from pipeline.ledger.selection import Selection
from pipeline.store.storage import RunStore
from textual_inversion.concept import Concept
from textual_inversion.errors import BadInput

CONCEPT = Concept(concept_id="cat", placeholder_token="<cat>", images=("a.png", "b.png"), initializer="cat")
PHOTOS = ["0" * 32, "1" * 32]


def settings(config: RunConfig | None = None, model: str = "m", extractor: str = "e") -> str:
    return digest(settings_of(config or RunConfig(), model_hash=model, extractor_hash=extractor))


def test_a_fingerprint_is_the_same_in_every_process_and_release() -> None:
    # A value kept from the first release: if it changes, every user's concepts are learned again.
    assert fingerprint(CONCEPT, PHOTOS, "settings") == "1d43db2f31ac5c12680a8db6c260e4c1"


@pytest.mark.parametrize(
    "change",
    [
        {"concept_id": "dog"},
        {"placeholder_token": "<kitty>"},
        {"initializer": "kitten"},
        {"category": "style"},
        {"num_vectors": 2},
    ],
)
def test_a_changed_row_means_not_done(change: dict[str, Any]) -> None:
    changed = dataclasses.replace(CONCEPT, **change)
    assert fingerprint(changed, PHOTOS, "s") != fingerprint(CONCEPT, PHOTOS, "s")


def test_photos_count_by_content_and_order_not_by_address() -> None:
    moved = dataclasses.replace(CONCEPT, images=("s3://new/a.png", "s3://new/b.png"))
    assert fingerprint(moved, PHOTOS, "s") == fingerprint(CONCEPT, PHOTOS, "s")
    assert fingerprint(CONCEPT, PHOTOS[::-1], "s") != fingerprint(CONCEPT, PHOTOS, "s")
    assert fingerprint(CONCEPT, PHOTOS[:1], "s") != fingerprint(CONCEPT, PHOTOS, "s")


def test_masks_and_captions_count_only_if_given() -> None:
    addressed = dataclasses.replace(CONCEPT, masks=("a.png", "b.png"))
    assert fingerprint(addressed, PHOTOS, "s") == fingerprint(CONCEPT, PHOTOS, "s")
    captioned = dataclasses.replace(CONCEPT, captions=("a {}", "my {}"))
    several = {
        fingerprint(CONCEPT, PHOTOS, "s"),
        fingerprint(CONCEPT, PHOTOS, "s", PHOTOS),
        fingerprint(CONCEPT, PHOTOS, "s", PHOTOS[::-1]),
        fingerprint(captioned, PHOTOS, "s"),
        fingerprint(dataclasses.replace(CONCEPT, captions=("my {}", "a {}")), PHOTOS, "s"),
    }
    assert len(several) == 5


def test_an_embedding_to_start_from_counts_by_content_and_only_if_given() -> None:
    addressed = dataclasses.replace(CONCEPT, start_from="old.safetensors")
    assert fingerprint(addressed, PHOTOS, "s") == fingerprint(CONCEPT, PHOTOS, "s")
    digests = {digest(fingerprint_inputs(addressed, PHOTOS, "s", (), start)) for start in ("", "one", "other")}
    assert len(digests) == 3


@pytest.mark.parametrize(
    "override",
    [
        "inversion.steps=7",
        "inversion.augment.flip=false",
        "grid.prompts=['{}']",
        "grid.sampling.steps=3",
        "grid.initializer_prompts=1",
        "seed=1",
        "precision=float16",
    ],
)
def test_a_changed_setting_of_the_method_means_not_done(override: str) -> None:
    assert settings(load_config(overrides=[override])) != settings()


@pytest.mark.parametrize(
    "override",
    [
        "actors.slots=9",
        "output=elsewhere",
        "manifest=m",
        "device=cpu",
        "report.embedded=1",
        "preview.steps=50",
        "preview.sampling_steps=4",
        "generation.prompts=p",
        "grid.sampling.batch_size=4",
        "model=other/place",
    ],
)
def test_where_and_how_fast_do_not_matter(override: str) -> None:
    assert settings(load_config(overrides=[override])) == settings()


def test_the_models_content_matters() -> None:
    assert len({settings(), settings(model="m2"), settings(extractor="e2")}) == 3


def test_captions_count_by_content_not_by_address() -> None:
    preserving = ["inversion.adapter.kind=lora", "inversion.penalties.knowledge=0.1"]
    here, there = (
        load_config(overrides=[*preserving, f"inversion.penalties.captions={path}"])
        for path in ("/here.txt", "/there.txt")
    )
    digests = [settings_of(c, model_hash="m", captions_hash=h) for c, h in ((here, "1"), (there, "1"), (here, "2"))]
    assert digests[0] == digests[1] != digests[2]


def test_an_encoder_counts_by_content_where_it_is_used() -> None:
    encoder = "inversion.init.encoder"
    here, there = (load_config(overrides=["inversion.init.method=encoder", f"{encoder}={path}"]) for path in "ab")
    found = [settings_of(c, model_hash="m", encoder_hash=h) for c, h in ((here, "1"), (there, "1"), (here, "2"))]
    assert found[0] == found[1] != found[2]
    own, other = (
        settings_of(here, model_hash="m", encoder_hash="1", encoder_extractor_hash=extractor) for extractor in ("", "e")
    )
    assert own == found[0] != other
    assert "extractor" not in own["inversion"]["init"], "fingerprints of releases without the setting stay"
    unused = load_config(
        overrides=[
            "inversion.init.method=words",
            f"{encoder}=a",
            "inversion.init.unsure_steps=9",
            "inversion.init.extractor=e",
        ]
    )
    assert settings_of(unused, model_hash="m") == settings_of(RunConfig(), model_hash="m")


def test_only_what_has_a_class_cue_is_learned_again_to_be_drawn_with_it() -> None:
    def grid_of(config: RunConfig) -> dict[str, Any]:
        settings: dict[str, Any] = settings_of(config, model_hash="m")["grid"]
        return settings

    declared = dataclasses.asdict(RunConfig().grid)
    del declared["sampling"]["batch_size"], declared["initializer_prompts"]
    assert grid_of(RunConfig()) == declared
    assert grid_of(load_config(overrides=["inversion.class_cue=true"])) == {**declared, "class_cue": True}


def record(task: ConceptTask, status: Any = "done") -> ConceptRecord:
    return ConceptRecord(
        concept_id=task.concept.concept_id, fingerprint=task.fingerprint, status=status, placeholder_token="<x>"
    )


def test_an_earlier_run_counts_by_what_it_finished(root: str) -> None:
    store = RunStore(root)
    task = ConceptTask(concept=CONCEPT, fingerprint="f" * 32)
    with pytest.raises(ValueError, match="must be the output folder of a run with concepts"):
        earlier_hash(root)
    put_record(store, record(task))
    first = earlier_hash(root)
    assert first == earlier_hash(root)
    put_record(store, record(dataclasses.replace(task, fingerprint="e" * 32)))
    assert earlier_hash(root) != first
    assert earlier_hash("") == ""
    digests = {digest(settings_of(RunConfig(), model_hash="m", earlier_hash=value)) for value in ("", first)}
    assert len(digests) == 2


def make_run(store: RunStore, num_concepts: int) -> str:
    """Photos and a manifest of concepts c0, c1, ..., two photos each."""
    rows = []
    for i in range(num_concepts):
        for j in range(2):
            store.put(f"photos/{i}-{j}.png", f"photo {i} {j}".encode())
        rows.append({"concept_id": f"c{i}", "images": [f"photos/{i}-{j}.png" for j in range(2)], "sku": i})
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    store.put("m.parquet", buffer.getvalue())
    return store.uri("m.parquet")


def plan_again(store: RunStore, manifest: str, chosen: str = "settings") -> tuple[Plan, list[str]]:
    plan = Plan(chosen, find_done(store).fingerprints)
    return plan, [task.concept.concept_id for task in plan.tasks(read_manifest(manifest))]


def test_running_again_does_what_is_left(root: str) -> None:
    store = RunStore(root)
    manifest = make_run(store, 4)
    plan = Plan("settings", find_done(store).fingerprints)
    tasks = list(plan.tasks(read_manifest(manifest)))
    assert [task.concept.concept_id for task in tasks] == ["c0", "c1", "c2", "c3"]
    assert tasks[1].carried == {"sku": 1}

    put_record(store, record(tasks[0]))
    put_record(store, record(tasks[1], "failed"))
    store.put(tasks[2].folder.checkpoint, b"half way")
    store.put(tasks[3].folder.record, b"")  # a store that lost the content
    plan, left = plan_again(store, manifest)
    assert left == ["c1", "c2", "c3"]
    assert (plan.num_done, plan.num_todo, plan.bad) == (1, 3, [])
    assert list(plan.carried) == [task.fingerprint.encode() for task in tasks]
    assert json.loads(plan.carried[tasks[0].fingerprint.encode()]) == {"sku": 0}

    for task in tasks:
        put_record(store, record(task))
    assert plan_again(store, manifest)[1] == []
    store.put("photos/2-1.png", b"another photo")
    assert plan_again(store, manifest)[1] == ["c2"]
    assert plan_again(store, manifest, "other settings")[1] == ["c0", "c1", "c2", "c3"]
    store.put("photos/2-1.png", b"photo 2 1")
    assert plan_again(store, manifest)[1] == []


def test_a_selection_leaves_the_others_as_they_are_and_in_the_results(root: str) -> None:
    store = RunStore(root)
    manifest = make_run(store, 5)
    everything = list(Plan("settings", set()).tasks(read_manifest(manifest)))
    put_record(store, record(everything[0]))

    def planned(selection: Selection) -> tuple[list[str], Plan]:
        plan = Plan("settings", find_done(store).fingerprints, selection=selection)
        return [task.concept.concept_id for task in plan.tasks(read_manifest(manifest))], plan

    names, plan = planned(Selection(only=frozenset({"c0", "c3", "c4"})))
    assert names == ["c3", "c4"]
    assert (plan.num_done, plan.num_todo, plan.num_left_out, plan.expected_todo(5)) == (1, 2, 2, 2)
    assert len(plan.carried) == 5
    names, plan = planned(Selection(limit=2))
    assert (names, plan.num_left_out, plan.expected_todo(5)) == (["c1", "c2"], 2, 2)
    assert planned(Selection(only=frozenset({"c3", "c4"}), limit=1))[0] == ["c3"]


def test_a_task_says_what_its_fingerprint_is_of(root: str) -> None:
    store = RunStore(root)
    (task,) = Plan("settings", set()).tasks(read_manifest(make_run(store, 1)))
    assert digest(json.loads(json.dumps(task.inputs))) == task.fingerprint
    assert len(task.inputs["images"]) == 2
    assert task.inputs["settings"] == "settings"


def test_a_missing_photo_is_a_bad_row(root: str) -> None:
    store = RunStore(root)
    manifest = make_run(store, 3)
    store.delete("photos/1-1.png")
    plan, left = plan_again(store, manifest)
    assert left == ["c0", "c2"]
    (row,) = plan.bad
    assert (row.row, row.concept_id) == (2, "c1")
    assert store.uri("photos/1-1.png") in row.reason


def test_masks_are_looked_up_as_photos_are(root: str) -> None:
    store = RunStore(root)
    for name in ("a.png", "b.png", "m/a.png", "m/b.png"):
        store.put(name, name.encode())
    masks = ["m/a.png", "m/b.png"]
    concept = {"concept_id": "cat", "images": ["a.png", "b.png"], "masks": masks}
    rows = [concept, {**concept, "concept_id": "dog", "masks": ["m/a.png", "m/none.png"]}]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    store.put("m.parquet", buffer.getvalue())
    manifest = store.uri("m.parquet")

    def planned() -> tuple[list[ConceptTask], list[BadRow]]:
        plan = Plan("settings", set())
        return list(plan.tasks(read_manifest(manifest))), plan.bad

    (task,), (row,) = planned()
    assert row.reason.startswith(f"mask {store.uri('m/none.png')} cannot be read: FileNotFoundError")
    store.put("m/b.png", b"drawn anew")
    (changed,), _ = planned()
    assert changed.fingerprint != task.fingerprint


def test_an_embedding_to_start_from_is_looked_up_as_photos_are(root: str) -> None:
    store = RunStore(root)
    for name in ("a.png", "mask.png", "old.safetensors"):
        store.put(name, name.encode())
    concept = {"concept_id": "cat", "images": ["a.png"], "masks": ["mask.png"], "start_from": "old.safetensors"}
    rows = [
        concept,
        {**concept, "concept_id": "dog", "start_from": "none.pt"},
        {**concept, "concept_id": "cow", "start_from": None},
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    store.put("m.parquet", buffer.getvalue())

    def planned() -> tuple[list[ConceptTask], list[BadRow]]:
        plan = Plan("settings", set())
        return list(plan.tasks(read_manifest(store.uri("m.parquet")))), plan.bad

    (cat, cow), (row,) = planned()
    assert row.reason.startswith(f"start_from {store.uri('none.pt')} cannot be read: FileNotFoundError")
    assert cat.concept.start_from == store.uri("old.safetensors")
    assert (len(cat.inputs["images"]), len(cat.inputs["masks"])) == (1, 1)
    assert "start_from" not in cow.inputs
    store.put("old.safetensors", b"another")
    (changed, _), _ = planned()
    assert changed.inputs["start_from"] != cat.inputs["start_from"]
    assert changed.fingerprint != cat.fingerprint


def test_a_concept_whose_photo_changed_is_planned_anew_in_its_place(root: str) -> None:
    store = RunStore(root)
    manifest = make_run(store, 3)
    plan = Plan("settings", set())
    tasks = list(plan.tasks(read_manifest(manifest)))
    store.put("photos/1-1.png", b"drawn anew")
    anew = plan.replan(tasks[1])
    assert anew.concept == tasks[1].concept
    assert anew.inputs["images"][0] == tasks[1].inputs["images"][0]
    assert anew.fingerprint != tasks[1].fingerprint
    expected = [tasks[0].fingerprint, anew.fingerprint, tasks[2].fingerprint]
    assert [key.decode() for key in plan.carried] == expected
    assert [task.fingerprint for task in Plan("settings", set()).tasks(read_manifest(manifest))] == expected
    store.delete("photos/1-1.png")
    with pytest.raises(BadInput, match=r"photo .*1-1\.png cannot be read: FileNotFoundError"):
        plan.replan(anew)


def test_rows_are_pulled_as_tasks_are_taken() -> None:
    pulled = 0

    def rows() -> Iterator[ManifestRow | BadRow]:
        nonlocal pulled
        for i in range(100_000):
            pulled += 1
            concept = dataclasses.replace(CONCEPT, concept_id=f"c{i}")
            yield ManifestRow(file="m", row=i + 1, concept=concept, carried={}, carried_json=b"{}")

    look_up: Callable[..., dict[str, str | OSError | ValueError]] = lambda uris: dict.fromkeys(uris, "0" * 32)  # noqa: E731
    plan = Plan("settings", set(), look_up)
    tasks = plan.tasks(rows())
    assert pulled == 0
    assert next(tasks).concept.concept_id == "c0"
    assert pulled < 1000


def test_a_task_is_small_and_travels() -> None:
    task = ConceptTask(concept=CONCEPT, fingerprint="f" * 32, carried={"sku": 1})
    assert pickle.loads(pickle.dumps(task)) == task
    assert len(pickle.dumps(task)) < 1000


@pytest.mark.slow
def test_planning_on_s3_costs_listings_and_the_copy_of_the_records(bucket: str, s3_calls: list[str]) -> None:
    store = RunStore(bucket)
    manifest = make_run(store, 30)
    tasks = list(Plan("settings", set()).tasks(read_manifest(manifest)))
    for task in tasks[:20]:
        put_record(store, record(task))
    rows = list(read_manifest(manifest))
    list(load_records(store, update_cache=True))  # as the report of an earlier run does
    s3_calls.clear()
    plan = Plan("settings", find_done(store).fingerprints)
    assert len(list(plan.tasks(rows))) == 10
    assert s3_calls == ["ListObjectsV2", "ListObjectsV2", "GetObject", "ListObjectsV2"]  # results, parts, photos
