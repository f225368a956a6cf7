"""The learner without Ray: what it publishes, what it refuses, how it ends."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

from pipeline.actor import image_batcher, memory_plan
from pipeline.actor import learner as learner_module
from pipeline.actor.checkpoints import Checkpoints
from pipeline.actor.concept_log import ConceptLog
from pipeline.actor.image_batcher import ImageBatcher
from pipeline.actor.job import Job
from pipeline.actor.learner import POOL_THREADS, Learner
from pipeline.inputs.manifest import read_manifest
from pipeline.ledger.plan import ConceptTask
from pipeline.ledger.records import ConceptRecord, DrawnWith, from_json
from pipeline.stages import make_plan
from pipeline.store.errors import ActorBroken, ActorLeaving, InputChanged, PhotosUnreachable, RunAborted, StoreFailed
from pipeline.store.parquet import read_table
from pipeline.store.storage import RunStore
from tests.pipeline.runs import task, tiny_config, write_manifest, write_photo
from textual_inversion.adapter_formats import with_adapter
from textual_inversion.config import StopConfig
from textual_inversion.engine import Engine
from textual_inversion.formats import parse_diffusers
from textual_inversion.generate import ImageRequest
from textual_inversion.objective import Batch
from textual_inversion.prompts import name_in_prompt
from textual_inversion.slot_state import SlotState
from textual_inversion.training_data import TrainingData


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("photos")
    return write_photo(folder / "a.png", 1), write_photo(folder / "b.png", 2)


@pytest.fixture
def learner(tiny_model: Path, tmp_path: Path) -> Iterator[Learner]:
    learner = Learner(tiny_config(tiny_model, tmp_path / "out", actors={"slots": 2, "checkpoint_steps": 2}))
    yield learner
    learner.close()


def events(output: Path, record: ConceptRecord) -> list[tuple[str, object]]:
    """(what happened, the number or text that matters) of a concept's log."""
    told = map(json.loads, (output / record.folder.log).read_text().splitlines())
    return [
        (line["message"], line.get("step", line.get("steps", line.get("error", line.get("attempt"))))) for line in told
    ]


def learn_all(learner: Learner, tasks: list[ConceptTask], attempt: int = 1) -> list:
    async def together() -> list:
        return await asyncio.gather(*(learner.learn(one, attempt) for one in tasks), return_exceptions=True)

    return asyncio.run(together())


def test_a_concept_is_published_with_its_record(learner: Learner, photos: tuple[str, str], tmp_path: Path) -> None:
    one = task("toy", photos)
    (record,) = learn_all(learner, [one])
    vitals = learner.vitals()
    assert (vitals.steps, vitals.slots, vitals.slots_used, vitals.losses) == (6, 2, 0, [])
    assert vitals.host_bytes > 2**26  # torch alone is more
    assert vitals.device_bytes == 0

    store = RunStore(str(tmp_path / "out"))
    assert record.status == "done"
    assert (record.initializer, record.start) == ("cat", "words")
    assert record.memory.endswith("used to save memory: nothing")
    assert record.steps == 6
    assert from_json(store.get(one.folder.record)) == record
    assert record.sampling == DrawnWith(solver="dpm++", steps=2, guidance_scale=2.0)
    names = {path.rpartition("/")[2] for path in store.list(one.folder.root)}
    assert names == {"learned_embeds.safetensors", "grid.png", "curve.parquet", "log.jsonl", "record.json"}
    for name, stored in record.files.items():
        data = store.get(one.folder.file(name))
        assert (len(data), hashlib.sha256(data).hexdigest()) == (stored.bytes, stored.sha256)
    (rows,) = load(store.get(one.folder.embedding)).values()
    assert rows.shape == (1, 32)
    assert read_table(tmp_path / "out" / one.folder.curve).num_rows == 6


def test_what_earlier_attempts_left_is_seen_to(learner: Learner, photos: tuple[str, str], tmp_path: Path) -> None:
    one, store = task("toy", photos), RunStore(str(tmp_path / "out"))
    store.put(one.folder.log, b"earlier\n")
    store.put(one.folder.failure, b"{}")
    assert learn_all(learner, [one])[0].status == "done"
    assert store.get(one.folder.log).startswith(b"earlier\n{")
    assert not store.exists(one.folder.failure)


def test_the_record_says_what_memory_was_estimated(
    tiny_model: Path, photos: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_plan, "free_bytes", lambda _device: 1e9)  # not ample
    actors = {"slots": 2, "gradient_checkpointing": "auto", "vae_slicing": "on"}
    learner = Learner(tiny_config(tiny_model, tmp_path, actors=actors))
    (record,) = learn_all(learner, [task("toy", photos)])
    learner.close()
    assert record.memory.startswith("a learning pass of 4 samples keeps 0.00")
    assert record.memory.endswith("1 GB were free; used to save memory: slices")


@pytest.mark.parametrize(("class_cue", "name"), [(True, "<toy> cat"), (False, "<toy>")])
def test_the_record_and_the_file_say_how_the_concept_is_prompted(
    tiny_model: Path, photos: tuple[str, str], tmp_path: Path, class_cue: bool, name: str
) -> None:
    learner = Learner(tiny_config(tiny_model, tmp_path / "out", inversion={"class_cue": class_cue}))
    (record,) = learn_all(learner, [task("toy", photos)])
    learner.close()
    assert record.prompt_as == record.name_in_prompts == name
    store = RunStore(str(tmp_path / "out"))
    embedding = parse_diffusers(store.get(record.folder.embedding))
    assert name_in_prompt(embedding.placeholder_token, embedding.class_noun) == name
    assert ("prompt_as" in embedding.metadata) is class_cue


@pytest.mark.parametrize("scored", [False, True])
def test_the_initializer_is_drawn_only_for_scores(
    tiny_model: Path, photos: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scored: bool
) -> None:
    """Once for all concepts that start from it."""
    drawn: list[str] = []
    draw = ImageBatcher.draw

    def noted(batcher: ImageBatcher, asked: list[ImageRequest]) -> Future[list[Image.Image]]:
        drawn.extend(one.prompt for one in asked)
        return draw(batcher, asked)

    monkeypatch.setattr(ImageBatcher, "draw", noted)
    learner = Learner(tiny_config(tiny_model, tmp_path))
    if scored:
        monkeypatch.setattr(learner, "_extractor", "a CLIP")
        monkeypatch.setattr(learner_module, "score", lambda *_: {})
    records = learn_all(learner, [task("toy", photos), task("doll", photos)])
    learner.close()
    assert [record.status for record in records] == ["done"] * 2
    assert drawn.count("a photo of a {}") == 2
    assert drawn.count("a photo of a cat") == int(scored)


def test_looks_at_the_frozen_batch_are_in_the_published_curve(
    tiny_model: Path, photos: tuple[str, str], tmp_path: Path
) -> None:
    stop = {"keep_best": True, "check_every_steps": 4}
    settings = tiny_config(tiny_model, tmp_path / "out")
    learner = Learner(replace(settings, inversion=replace(settings.inversion, stop=StopConfig(**stop))))
    one = task("toy", photos)
    (record,) = learn_all(learner, [one])
    learner.close()
    losses = read_table(tmp_path / "out" / one.folder.curve)["frozen_loss"].to_pylist()
    assert [loss is not None for loss in losses] == [False, False, False, True, False, True]
    best = 4 if losses[3] <= losses[5] else 6
    with safe_open(tmp_path / "out" / one.folder.embedding, "pt") as file:
        assert file.metadata()["step"] == str(best)
    assert record.steps == 6


@pytest.mark.parametrize(
    ("kind", "targets"), [("lora", ["fc1"]), ("causal", ["fc2"]), ("causal", ["fc2", "cross_attention"])]
)
def test_an_adapter_is_published_with_its_concept(
    tiny_model: Path, photos: tuple[str, str], tmp_path: Path, kind: str, targets: list[str]
) -> None:
    adapter = {"kind": kind, "targets": targets, "learning_rate": 0.01, "rank": 2, "alpha": 1.0}
    inversion = {"steps": 4, "batch_size": 2, "adapter": adapter}
    learner = Learner(tiny_config(tiny_model, tmp_path, inversion=inversion))
    one = task("toy", photos)
    (record,) = learn_all(learner, [one])
    learner.close()

    store = RunStore(str(tmp_path))
    assert record.status == "done", record.error
    assert "adapter.safetensors" in record.files
    found = with_adapter(
        parse_diffusers(store.get(one.folder.embedding)), lambda name: store.get(one.folder.file(name))
    )
    assert found.adapter is not None
    assert (found.adapter.kind, found.adapter.scale) == (kind, 0.5)
    assert found.metadata["fingerprint"] == one.fingerprint
    assert {name.rpartition(".")[2] for name in found.adapter.tensors} == set(targets)
    assert all(up.any() for _, up in found.adapter.tensors.values())


def test_bad_photos_fail_their_concept_alone(learner: Learner, photos: tuple[str, str], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    records = learn_all(
        learner,
        [task("good", photos), task("bad", (photos[0], str(broken))), task("gone", (str(tmp_path / "no.png"),))],
    )
    assert [(record.status, record.error_kind) for record in records] == [
        ("done", ""), ("failed", "bad_input"), ("failed", "bad_input")
    ]  # fmt: skip
    assert "broken.png" in records[1].error
    assert "no.png" in records[2].error
    assert events(tmp_path / "out", records[1])[-1] == ("failed", records[1].error)


def test_masks_and_captions_reach_the_engine(learner: Learner, photos: tuple[str, str], tmp_path: Path) -> None:
    half = Image.new("L", (20, 18), 0)
    half.paste(255, (0, 0, 10, 18))
    half.save(tmp_path / "half.png")
    Image.new("L", (18, 20), 255).save(tmp_path / "turned.png")

    def masked(name: str, masks: tuple[str, str]) -> ConceptTask:
        plain = task(name, photos)
        return replace(plain, concept=replace(plain.concept, masks=masks, captions=("a {} on snow", "a {} in the sun")))

    good = masked("good", (str(tmp_path / "half.png"), str(tmp_path / "half.png")))
    views = learner._encode(Job(good, 1, ConceptLog(learner._store, good.folder, 1)), learner._fetch(good)).views
    assert views.masks is not None
    assert views.masks.shape == (4, 1, 8, 8)
    assert views.masks[0, 0, :, :3].min() == 1
    assert views.masks[0, 0, :, -3:].max() == 0
    records = learn_all(learner, [good, masked("bad", (str(tmp_path / "half.png"), str(tmp_path / "turned.png")))])
    assert [record.status for record in records] == ["done", "failed"]
    assert f"mask {tmp_path / 'turned.png'}: the mask is 18 x 20 px but its photo 40 x 36" in records[1].error


def test_a_photo_replaced_after_the_plan_is_not_learned_under_its_old_hash(learner: Learner, tmp_path: Path) -> None:
    one = planned(learner, write_manifest(tmp_path, ["toy"]))[0]
    write_photo(Path(one.concept.images[1]), 77)
    (changed,) = learn_all(learner, [one])
    assert isinstance(changed, InputChanged)
    assert re.search(r"photo .*toy-1\.png has changed since the plan was made", str(changed))
    assert not RunStore(str(tmp_path / "out")).exists(one.folder.record)
    log = (tmp_path / "out" / one.folder.log).read_text()
    assert json.loads(log.splitlines()[-1])["message"] == "to be planned anew"


def test_an_actor_with_other_settings_refuses_the_run(learner: Learner, tmp_path: Path) -> None:
    one = planned(learner, write_manifest(tmp_path, ["toy"]), seed=3)[0]
    (refused,) = learn_all(learner, [one])
    assert isinstance(refused, RunAborted)
    assert "loaded something else than the run was planned for" in str(refused)


def planned(learner: Learner, manifest: Path, **changes: object) -> list[ConceptTask]:
    """The tasks of a run with the learner's configuration, or a changed one."""
    plan, _ = make_plan(replace(learner._config, **changes), learner._store)  # type: ignore[arg-type]
    return list(plan.tasks(read_manifest(str(manifest))))


def test_the_word_that_was_chosen_is_told(tiny_model: Path, photos: tuple[str, str], tmp_path: Path) -> None:
    demo_clip = str(Path(__file__).parents[3] / "demo" / "clip")
    init = {"method": "auto", "words": ["clock", "statue", "beach"]}
    learner = Learner(tiny_config(tiny_model, tmp_path, extractor=demo_clip, inversion={"init": init}))
    one = task("toy", photos)
    (record,) = learn_all(learner, [one])
    learner.close()
    assert record.status == "done"
    assert record.initializer in init["words"]
    assert record.start.startswith(f"auto: {record.initializer} (cosine 0.")
    with safe_open(tmp_path / one.folder.embedding, "pt") as file:
        assert file.metadata()["initializer"] == record.initializer
        assert file.metadata()["start"] == record.start


def test_a_result_does_not_depend_on_company(tiny_model: Path, photos: tuple[str, str], tmp_path: Path) -> None:
    def embedding(*names: str) -> bytes:
        output = tmp_path / f"{len(names)}"
        learner = Learner(tiny_config(tiny_model, output, actors={"slots": 2}))
        records = learn_all(learner, [task(name, photos) for name in names])
        learner.close()
        assert {record.status for record in records} == {"done"}
        return RunStore(str(output)).get(task("toy").folder.embedding)

    assert embedding("toy") == embedding("other", "toy", "third", "fourth")


def test_checkpoints_are_written_and_taken_up(
    learner: Learner, photos: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RunStore(str(tmp_path / "out"))
    saved: list[SlotState] = []
    save = Checkpoints.save

    def keep(self: Checkpoints, job: Job, state: SlotState, *, is_last: bool) -> None:
        saved.append(state)
        save(self, job, state, is_last=is_last)

    monkeypatch.setattr(Checkpoints, "save", keep)
    calm, resumed = task("toy", photos, "calm"), task("toy", photos, "resumed")
    learn_all(learner, [calm])
    assert saved[0].step == 2
    monkeypatch.undo()

    # a mark in the checkpoint's curve shows that learning went on from it
    marked = replace(saved[0], curve=torch.tensor([[1.0, 77.0, 1.0], [2.0, 77.0, 1.0]]))
    store.put(resumed.folder.checkpoint, marked.to_bytes())
    (record,) = learn_all(learner, [resumed], attempt=2)
    assert (record.status, record.attempts, record.steps) == ("done", 2, 6)
    losses = read_table(tmp_path / "out" / resumed.folder.curve)["loss"].to_pylist()
    assert [loss == 77.0 for loss in losses] == [True] * 2 + [False] * 4
    assert not store.exists(resumed.folder.checkpoint)
    told = events(tmp_path / "out", record)
    assert told == [
        ("begins", 2),
        ("photos fetched", None),
        ("prepared", 2),
        ("checkpoint", 4),
        ("left the engine", 6),
        ("published", 6),
    ]
    first, second = (load(store.get(one.folder.embedding))["<toy>"] for one in (calm, resumed))
    assert torch.equal(first, second)


def test_checkpoints_wait_for_no_pictures(tiny_model: Path, photos: tuple[str, str], tmp_path: Path) -> None:
    """Those of sixteen concepts that end together take a while, and a kill must not cost more meanwhile."""
    actors = {"slots": 1, "checkpoint_steps": 1}
    learner = Learner(tiny_config(tiny_model, tmp_path, inversion={"steps": 100_000}, actors=actors))
    is_over = threading.Event()

    async def learn() -> None:
        call = asyncio.create_task(learner.learn(task("toy", photos)))
        while not learner.vitals().slots_used:
            await asyncio.sleep(0.01)
        for _ in range(POOL_THREADS):
            learner._pool.submit(is_over.wait, 60)
        (job,) = learner._jobs.values()
        before, until = job.num_saves, time.monotonic() + 120
        while job.num_saves < before + 3:
            assert time.monotonic() < until
            await asyncio.sleep(0.01)
        is_over.set()
        await asyncio.to_thread(learner.close)
        with pytest.raises(ActorBroken, match="the engine was closed"):
            await call

    asyncio.run(learn())


def test_a_checkpoint_of_another_concept_is_told_as_one_of_storage(
    learner: Learner, photos: tuple[str, str], tmp_path: Path
) -> None:
    one = task("toy", photos)
    other = SlotState.initial({"another encoder": torch.ones(1, 2)})
    RunStore(str(tmp_path / "out")).put(one.folder.checkpoint, other.to_bytes())
    (record,) = learn_all(learner, [one])
    assert (record.status, record.error_kind) == ("failed", "storage")
    assert "delete it to start anew" in record.error


def test_a_damaged_checkpoint_is_not_used(learner: Learner, photos: tuple[str, str], tmp_path: Path) -> None:
    one = task("toy", photos)
    RunStore(str(tmp_path / "out")).put(one.folder.checkpoint, b"cut sh")
    (record,) = learn_all(learner, [one])
    assert (record.status, record.steps) == ("done", 6)


def test_a_finished_concept_is_not_learned_again(
    learner: Learner, photos: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = task("toy", photos)
    (record,) = learn_all(learner, [one])
    monkeypatch.setattr(Learner, "_fetch", lambda *_: pytest.fail("began again"))
    assert learn_all(learner, [one], attempt=2) == [record]


class Unknown(Exception):
    """An exception that no code knows of."""


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (learner_module, "open_pictures"),
        (learner_module, "encode_views"),
        (learner_module, "check_sample_prompts"),
        (learner_module, "sample_requests"),
        (image_batcher, "draw"),
        (learner_module, "put_files"),
        (learner_module, "put_done"),
        (SlotState, "to_bytes"),
    ],
)
def test_a_bug_ends_its_concept_and_no_other(
    learner: Learner,
    photos: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: object,
    name: str,
) -> None:
    """Wherever a concept is served outside the engine's shared pass; the actor goes on."""

    def fail(*_: object, **__: object) -> None:
        raise Unknown("a mistake in the code")

    with monkeypatch.context() as patch:
        patch.setattr(place, name, fail)
        (record,) = learn_all(learner, [task("ill", photos)])
    assert (record.status, record.error_kind) == ("failed", "bug")
    assert "bug in this software, not a fault of the concept: Unknown: a mistake in the code" in record.error
    log = (tmp_path / "out" / record.folder.log).read_text()
    assert str(tmp_path / "out" / record.folder.log) in record.error
    last = json.loads(log.splitlines()[-1])
    assert (last["message"], last["kind"]) == ("failed", "bug")
    assert "Traceback" in last["trace"]
    assert "in fail" in last["trace"]
    (record,) = learn_all(learner, [task("well", photos)])
    assert record.status == "done"


def test_a_loss_that_is_not_finite_is_told_as_such(tiny_model: Path, photos: tuple[str, str], tmp_path: Path) -> None:
    learner = Learner(tiny_config(tiny_model, tmp_path, inversion={"learning_rate": 3e38}))
    (record,) = learn_all(learner, [task("ill", photos)])
    learner.close()
    assert (record.status, record.error_kind) == ("failed", "numerics")
    assert "not finite" in record.error


def test_an_engine_that_stops_breaks_the_actor(
    tiny_model: Path, photos: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Engine.run

    def crash(engine: Engine, next_assignment: Callable[[bool], object], *more: Any, **named: Any) -> None:
        if threading.current_thread().name != "engine":  # the check of passes before the actor takes concepts
            return run(engine, next_assignment, *more, **named)
        next_assignment(True)
        raise RuntimeError("device lost")

    monkeypatch.setattr(Engine, "run", crash)
    learner = Learner(tiny_config(tiny_model, tmp_path))
    failures = learn_all(learner, [task("a", photos), task("b", photos)])
    failures += learn_all(learner, [task("c", photos)])
    assert [type(failure) for failure in failures] == [ActorBroken] * 3
    assert {failure.kind for failure in failures} == {"bug"}  # for all that is known: torch did not name the device
    assert all("device lost (test_learner.py, line " in str(failure) for failure in failures)
    lines = RunStore(str(tmp_path)).get(task("a", photos).folder.log).decode().splitlines()
    assert "in crash" in json.loads(lines[-1])["trace"]


def test_draining_saves_what_is_in_slots_and_starts_nothing(
    tiny_model: Path, photos: tuple[str, str], tmp_path: Path
) -> None:
    config = tiny_config(tiny_model, tmp_path, inversion={"steps": 100_000}, actors={"slots": 1, "checkpoint_steps": 5})
    learner = Learner(config)
    first, second = task("first", photos), task("second", photos)

    async def stop_midway() -> None:
        calls = [asyncio.create_task(learner.learn(first))]
        while not learner.vitals().slots_used:
            await asyncio.sleep(0.01)
        calls.append(asyncio.create_task(learner.learn(second)))
        await learner.drain(30)
        for call in calls:
            call.cancel()

    asyncio.run(stop_midway())
    learner.close()
    store = RunStore(str(tmp_path))
    assert store.exists(first.folder.checkpoint)
    assert not store.exists(second.folder.checkpoint)


def test_draining_asks_for_checkpoints_at_once(tiny_model: Path, photos: tuple[str, str], tmp_path: Path) -> None:
    """However far the next regular one is: a preempted machine has seconds."""
    actors = {"slots": 2, "checkpoint_steps": 1_000_000}
    learner = Learner(tiny_config(tiny_model, tmp_path, inversion={"steps": 100_000}, actors=actors))
    tasks = [task("one", photos), task("two", photos)]

    async def stop_midway() -> float:
        calls = [asyncio.create_task(learner.learn(one)) for one in tasks]
        while learner.vitals().slots_used < 2:
            await asyncio.sleep(0.01)
        began = time.monotonic()
        await learner.drain(60)
        for call in calls:
            call.cancel()
        return time.monotonic() - began

    assert asyncio.run(stop_midway()) < 30
    learner.close()
    for one in tasks:
        state = SlotState.from_bytes(RunStore(str(tmp_path)).get(one.folder.checkpoint))
        assert state.step == len(state.curve) > 0


def test_with_notice_what_is_in_a_slot_goes_on_and_all_else_is_handed_back(
    tiny_model: Path, photos: tuple[str, str], tmp_path: Path
) -> None:
    actors = {"slots": 1, "calls_ahead": 1, "checkpoint_steps": 1_000_000}
    learner = Learner(tiny_config(tiny_model, tmp_path, inversion={"steps": 400}, actors=actors))
    begun, ahead, late = (task(name, photos) for name in ("begun", "ahead", "late"))

    async def take_back() -> ConceptRecord:
        calls = [asyncio.create_task(learner.learn(begun))]
        while not learner.vitals().slots_used:
            await asyncio.sleep(0.01)
        calls.append(asyncio.create_task(learner.learn(ahead)))
        while ahead.concept.concept_id not in learner._jobs:
            await asyncio.sleep(0.01)
        while not calls[1].done():  # as the one who watches for notice does
            learner.leave()
            await asyncio.sleep(0.05)
        for call in (calls[1], learner.learn(late)):
            with pytest.raises(ActorLeaving):
                await call
        return await calls[0]

    record = asyncio.run(take_back())
    learner.close()
    assert (record.status, record.steps) == ("done", 400)
    told = [what for what, _ in events(tmp_path, record)]
    assert "checkpoint" in told
    assert told[-1] == "published"
    assert [path.name for path in (tmp_path / ahead.folder.root).iterdir()] == ["log.jsonl"]


def test_draining_without_checkpoints_waits_for_nothing(
    tiny_model: Path, photos: tuple[str, str], tmp_path: Path
) -> None:
    learner = Learner(tiny_config(tiny_model, tmp_path, inversion={"steps": 100_000}, actors={"checkpoint_steps": 0}))

    async def stop_midway() -> None:
        call = asyncio.create_task(learner.learn(task("one", photos)))
        while not learner.vitals().slots_used:
            await asyncio.sleep(0.01)
        await asyncio.wait_for(learner.drain(60), 30)
        call.cancel()

    asyncio.run(stop_midway())
    learner.close()
    assert not RunStore(str(tmp_path)).exists(task("one").folder.checkpoint)


def test_closing_ends_what_is_in_a_slot_and_all_threads(
    tiny_model: Path, photos: tuple[str, str], tmp_path: Path
) -> None:
    others = set(threading.enumerate())
    learner = Learner(tiny_config(tiny_model, tmp_path, inversion={"steps": 100_000}))

    async def close_midway() -> None:
        call = asyncio.create_task(learner.learn(task("one", photos)))
        while not learner.vitals().slots_used:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(learner.close)
        with pytest.raises(ActorBroken, match="the engine was closed"):
            await call

    asyncio.run(close_midway())
    until = time.monotonic() + 30
    own = ("engine", "image-batcher", "learner", "checkpoints")
    while left := [each.name for each in set(threading.enumerate()) - others if each.name.startswith(own)]:
        assert time.monotonic() < until, left
        time.sleep(0.01)


def test_settings_that_do_not_go_with_the_model_keep_an_actor_from_starting(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text("\n")
    penalties = {"knowledge": 0.1, "captions": str(tmp_path / "captions.txt")}
    with pytest.raises(ValueError, match=r"penalties\.captions = .* holds no captions"):
        Learner(tiny_config(tiny_model, tmp_path, inversion={"penalties": penalties, "adapter": {"kind": "lora"}}))


def without_memory_for(monkeypatch: pytest.MonkeyPatch, slots: int, from_step: int = 0) -> None:
    """A device that has no memory for a step with so many slots, or more, once a concept is that far."""
    make, draw, last_slots = Engine.__init__, TrainingData.draw, 0

    def making(self: Engine, *arguments: Any, **options: Any) -> None:
        nonlocal last_slots
        last_slots = options["slots"]
        make(self, *arguments, **options)

    def crowded(self: TrainingData, generator: torch.Generator, size: int, step: int, *rest: Any) -> Batch:
        if last_slots >= slots and step >= from_step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return draw(self, generator, size, step, *rest)

    monkeypatch.setattr(Engine, "__init__", making)
    monkeypatch.setattr(TrainingData, "draw", crowded)


@pytest.mark.parametrize("from_step", [0, 3])
def test_a_device_out_of_memory_gives_up_slots_and_loses_nothing(
    tiny_model: Path, photos: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, from_step: int
) -> None:
    def embeddings(output: Path, slots: int) -> list[Tensor]:
        learner = Learner(tiny_config(tiny_model, output, actors={"slots": slots, "checkpoint_steps": 2}))
        tasks = [task(f"c{number}", photos) for number in range(5)]
        records = learn_all(learner, tasks)
        learner.close()
        assert [(record.status, record.steps) for record in records] == [("done", 6)] * 5
        assert learner.vitals().slots == 1
        store = RunStore(str(output))
        return [next(iter(load(store.get(one.folder.embedding)).values())) for one in tasks]

    calm = embeddings(tmp_path / "calm", 1)
    without_memory_for(monkeypatch, 2, from_step)
    crowded = embeddings(tmp_path / "crowded", 4)
    torch.testing.assert_close(crowded, calm, rtol=1e-4, atol=1e-5)  # equal to rounding: passes of another size


def test_a_device_without_memory_for_one_slot_breaks_the_actor(
    tiny_model: Path, photos: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_memory_for(monkeypatch, 1)
    learner = Learner(tiny_config(tiny_model, tmp_path, actors={"slots": 2}))
    (failure,) = learn_all(learner, [task("a", photos)])
    learner.close()
    assert isinstance(failure, ActorBroken)
    assert "no memory for one slot: OutOfMemoryError: CUDA out of memory" in str(failure)


@pytest.mark.parametrize(("place", "work", "good"), [(learner_module, "encode_views", 2), (image_batcher, "draw", 0)])
def test_when_photos_or_pictures_find_no_memory_the_engine_gives_some_back(
    tiny_model: Path,
    photos: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: ModuleType,
    work: str,
    good: int,
) -> None:
    learner = Learner(tiny_config(tiny_model, tmp_path, inversion={"steps": 15}, actors={"slots": 4}))
    do, tries = getattr(place, work), []

    def crowded(*arguments: object) -> object:
        """No memory after the first good tries, as soon as others are in their slots, as long as there are four."""
        tries.append(1)
        until = time.monotonic() + 60
        while len(tries) > good and learner.vitals().slots == 4 and time.monotonic() < until:
            if learner.vitals().slots_used:
                raise torch.OutOfMemoryError("CUDA out of memory")
            time.sleep(0.001)
        return do(*arguments)

    monkeypatch.setattr(place, work, crowded)
    records = learn_all(learner, [task(f"c{number}", photos) for number in range(6)])
    assert [(record.status, record.steps) for record in records] == [("done", 15)] * 6
    assert learner.vitals().slots == 2
    learner.close()


def test_whose_storage_failed_is_told_apart(
    learner: Learner, photos: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> bytes:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "put", fails)
        (failure,) = learn_all(learner, [task("a", photos)])
    assert isinstance(failure, StoreFailed)
    assert "No space left on device" in str(failure)
    monkeypatch.setattr(learner_module, "open_pictures", fails)
    (failure,) = learn_all(learner, [task("b", photos)])
    assert isinstance(failure, PhotosUnreachable)


def learned_from(
    tiny_model: Path, output: Path, concept: ConceptTask, **init: Any
) -> tuple[ConceptRecord, dict[str, Tensor]]:
    """Learn one concept with steps that move its rows by nearly nothing."""
    inversion = {"steps": 1, "learning_rate": 1e-7, "norm_control": "none", "init": init}
    learner = Learner(tiny_config(tiny_model, output, inversion=inversion))
    (record,) = learn_all(learner, [concept])
    learner.close()
    path = output / record.folder.embedding
    return record, load(path.read_bytes()) if path.exists() else {}


def started_from(one: ConceptTask, path: Path) -> ConceptTask:
    *images, start = (hashlib.md5(Path(name).read_bytes()).hexdigest() for name in (*one.concept.images, path))
    concept = replace(one.concept, start_from=str(path))
    return replace(one, concept=concept, inputs={"images": images, "start_from": start})


def test_learning_starts_from_an_embedding_that_the_row_names(
    tiny_model: Path, photos: tuple[str, str], tmp_path: Path
) -> None:
    """Of any layout, whatever `init.method` is."""
    rows = torch.randn(1, 32, generator=torch.Generator().manual_seed(3))
    torch.save({"string_to_param": {"*": rows}}, tmp_path / "old.pt")
    one = started_from(task("toy", photos), tmp_path / "old.pt")
    record, found = learned_from(tiny_model, tmp_path / "out", one)
    assert (record.error, record.start) == ("", f"the embedding {tmp_path}/old.pt")
    torch.testing.assert_close(found["<toy>"], rows, rtol=0, atol=1e-5)

    torch.save({"string_to_param": {"*": rows[:, :8]}}, tmp_path / "narrow.pt")
    narrow = started_from(task("narrow", photos), tmp_path / "narrow.pt")
    record, _ = learned_from(tiny_model, tmp_path / "out", narrow)
    assert (record.status, record.error_kind) == ("failed", "bad_input")
    assert "start from an embedding of the same model" in record.error
    (tmp_path / "lora.safetensors").write_bytes(save({"x.lora_down.weight": rows}))
    lora = started_from(task("lora", photos), tmp_path / "lora.safetensors")
    record, _ = learned_from(tiny_model, tmp_path / "out", lora)
    assert (record.status, record.error_kind) == ("failed", "bad_input")
    assert f"start_from {tmp_path}/lora.safetensors: it is a LoRA" in record.error


def test_an_embedding_that_changed_since_the_plan_is_planned_anew(
    learner: Learner, photos: tuple[str, str], tmp_path: Path
) -> None:
    torch.save({"<x>": torch.ones(1, 32)}, tmp_path / "old.bin")
    one = started_from(task("toy", photos), tmp_path / "old.bin")
    torch.save({"<x>": torch.zeros(1, 32)}, tmp_path / "old.bin")
    (changed,) = learn_all(learner, [one])
    assert isinstance(changed, InputChanged)


def test_learning_starts_from_what_an_earlier_run_learned(
    tiny_model: Path, photos: tuple[str, str], tmp_path: Path
) -> None:
    _, before = learned_from(tiny_model, tmp_path / "before", task("toy", photos))
    _, word = learned_from(tiny_model, tmp_path / "word", task("dog", photos))
    moved = {"<toy>": before["<toy>"] + 0.1}
    (path,) = (tmp_path / "before" / "concepts").glob("*/*/learned_embeds.safetensors")
    with safe_open(path, "pt") as file:
        header = file.metadata()
    path.write_bytes(save(moved, metadata=header))
    record_path = path.with_name("record.json")
    record = json.loads(record_path.read_text())
    del record["digest"]  # an edited record counts as damaged, one of an earlier release does not
    record_path.write_text(json.dumps(record | {"files": {}}))
    earlier = {"method": "earlier", "earlier_run": str(tmp_path / "before")}
    record, found = learned_from(tiny_model, tmp_path / "out", task("toy", photos), **earlier)
    assert record.start.startswith("its rows in the earlier run, ")
    torch.testing.assert_close(found["<toy>"], moved["<toy>"], rtol=0, atol=1e-5)
    record, found = learned_from(tiny_model, tmp_path / "out", task("dog", photos), **earlier)
    assert (record.error, record.start) == ("", "words, as the earlier run has no such concept")
    assert torch.equal(found["<dog>"], word["<dog>"])

    path.write_bytes(save(moved, metadata={**header, "model_hash": "another"}))
    record, _ = learned_from(tiny_model, tmp_path / "other", task("toy", photos), **earlier)
    assert record.start == "words, as the earlier run learned it on another model"
