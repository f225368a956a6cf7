"""Previews of an actor's concepts: what the strip shows, that learning does not change, and what a failure costs."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from PIL import Image

from pipeline.actor import previews as previews_module
from pipeline.actor.concept_log import ConceptLog
from pipeline.actor.job import Job
from pipeline.actor.learner import Learner
from pipeline.ledger.plan import ConceptTask
from pipeline.ledger.records import ConceptRecord, StripFacts, from_json
from pipeline.store.storage import RunStore
from tests.pipeline.actor.test_learner import learn_all
from tests.pipeline.runs import task, tiny_config, write_photo
from textual_inversion.generate import generate
from textual_inversion.strips import Strip

LEARNED = ("learned_embeds.safetensors", "curve.parquet", "grid.png")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[ConceptTask]:
    folder = tmp_path_factory.mktemp("photos")
    photos = write_photo(folder / "a.png", 1), write_photo(folder / "b.png", 2)
    return [task(name, photos) for name in ("one", "two")]


def learned(model: Path, output: Path, tasks: list[ConceptTask], steps: int, **changes: object) -> list[ConceptRecord]:
    preview = {"steps": steps, "sampling_steps": 2}
    learner = Learner(
        tiny_config(model, output, actors={"slots": 2, "checkpoint_steps": 2}, preview=preview, **changes)
    )
    try:
        return learn_all(learner, tasks)
    finally:
        learner.close()


def files(output: Path, records: list[ConceptRecord]) -> list[bytes]:
    return [RunStore(str(output)).get(record.folder.file(name)) for record in records for name in LEARNED]


def test_the_strip_shows_the_start_the_steps_between_and_the_end(
    tiny_model: Path, tasks: list[ConceptTask], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(previews_module, "generate", lambda *given: drawn.append(len(given[1])) or generate(*given))
    records = learned(tiny_model, tmp_path / "out", tasks, 2)
    assert drawn[0] in (1, 2)
    assert sum(drawn) == 8
    for record in records:
        assert record.previews == StripFacts(steps=(0, 2, 4, 6), cell_px=128)
        assert from_json(RunStore(str(tmp_path / "out")).get(record.folder.record)) == record
        assert "previews.png" not in record.files
        strip = Strip.from_png((tmp_path / "out" / record.folder.previews).read_bytes())
        assert list(strip.pictures) == [0, 2, 4, 6]
        assert len({picture.tobytes() for picture in strip.pictures.values()}) == 4


def test_learning_is_the_same_with_previews_and_without(
    tiny_model: Path, tasks: list[ConceptTask], tmp_path: Path
) -> None:
    without = learned(tiny_model, tmp_path / "without", tasks, 0)
    records = learned(tiny_model, tmp_path / "with", tasks, 1)
    assert [record.previews for record in without] == [None, None]
    assert not (tmp_path / "without" / without[0].folder.previews).exists()
    assert files(tmp_path / "without", without) == files(tmp_path / "with", records)


def test_a_resumed_concept_goes_on_with_its_strip(
    tiny_model: Path, tasks: list[ConceptTask], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    [task, _] = tasks
    store = RunStore(str(output))
    with monkeypatch.context() as patch:  # the run ends between the last step and the record
        patch.setattr(RunStore, "put_checked", lambda *_: (_ for _ in ()).throw(OSError("gone")))
        [lost] = learned(tiny_model, output, [task], 2)
    assert isinstance(lost, Exception)
    assert store.exists(task.folder.checkpoint)
    before = Strip.from_png(store.get(task.folder.previews))
    assert list(before.pictures)[:2] == [0, 2]
    grey = Strip({step: Image.new("RGB", (128, 128), "grey") for step in before.pictures})
    store.put(task.folder.previews, grey.to_png())
    [record] = learned(tiny_model, output, [task], 2)
    assert record.previews is not None
    assert record.previews.steps == (0, 2, 4, 6)
    after = Strip.from_png(store.get(task.folder.previews))
    assert after.pictures[0].tobytes() == grey.pictures[0].tobytes()
    assert after.pictures[6].tobytes() != grey.pictures[0].tobytes()


def test_a_damaged_strip_is_begun_anew(
    tiny_model: Path, tasks: list[ConceptTask], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, folder = RunStore(str(tmp_path)), tasks[0].folder
    store.put(folder.previews, b"cut sh")
    learner = Learner(tiny_config(tiny_model, tmp_path, preview={"steps": 2}))
    job = Job(tasks[0], 1, ConceptLog(store, folder, 1))
    learner._previews.resume(job, 4)
    learner.close()
    assert not job.strip.pictures
    assert "previews of one: the earlier ones cannot be read: " in caplog.text


@pytest.mark.parametrize("place", ["generate", "store"])
def test_a_preview_that_fails_is_told_and_ends_nothing(
    place: str,
    tiny_model: Path,
    tasks: list[ConceptTask],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    output = tmp_path / "out"
    expected = files(tmp_path / "plain", learned(tiny_model, tmp_path / "plain", tasks[:1], 0))
    put = RunStore.put

    def no_strip(store: RunStore, path: str, data: bytes) -> None:
        if path.endswith("previews.png"):
            raise OSError("the disk is full")
        put(store, path, data)

    if place == "generate":
        monkeypatch.setattr(previews_module, "generate", lambda *_: 1 / 0)
    elif place == "store":
        monkeypatch.setattr(RunStore, "put", no_strip)
    with caplog.at_level(logging.WARNING):
        [record] = learned(tiny_model, output, tasks[:1], 2)
    assert record.status == "done"
    assert record.previews is None
    assert files(output, [record]) == expected
    told = [json.loads(line) for line in (output / record.folder.log).read_text().splitlines()]
    reason = "ZeroDivisionError" if place == "generate" else "the disk is full"
    assert reason in caplog.text
    assert any(reason in line.get("error", "") for line in told)
