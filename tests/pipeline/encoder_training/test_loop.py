"""The training loop around a stand-in for the trainer: points, checkpoints, resuming, and its ends."""

from __future__ import annotations

import io
import logging
from dataclasses import astuple
from math import inf

import fsspec
import pytest
import torch

from pipeline.encoder_training.loop import NOT_FINITE
from pipeline.encoder_training.schedule import concepts_of_step
from pipeline.encoder_training.state import TrainingState, load_checkpoint
from pipeline.ledger.encoder_record import CHECKPOINT, CURVE
from pipeline.store.parquet import read_table
from pipeline.store.storage import RunStore
from tests.pipeline.encoder_training.stand_ins import SPLIT, StandInTrainer, loop_of


@pytest.fixture
def store() -> RunStore:
    fsspec.filesystem("memory").store.clear()
    return RunStore("memory://encoder")


def test_a_training_to_its_end(store: RunStore) -> None:
    trainer = StandInTrainer()
    loop = loop_of(trainer, store)
    reported: list[int] = []
    loop.report = lambda state: reported.append(state.step)
    assert loop.run() == "all steps"
    assert trainer.seen == [concepts_of_step(SPLIT.trained, 0, step, 4) for step in range(12)]
    assert [point.step for point in loop.state.curve] == reported == [4, 8, 12]
    assert [point.held_out for point in loop.state.curve] == pytest.approx([1 / 4, 1 / 8, 1 / 12])
    numbers = [sum(float(name[1:]) for name in names) / 4 for names in trainer.seen]
    assert loop.state.curve[1].loss == pytest.approx(sum(numbers[4:8]) / 4)
    torch.testing.assert_close(loop.state.best["weight"], trainer.weight / 2)
    table = read_table(io.BytesIO(store.get(CURVE)))
    assert [tuple(row.values()) for row in table.to_pylist()] == [astuple(point) for point in loop.state.curve]


def test_a_killed_training_goes_on_as_if_it_had_not_been_killed(store: RunStore) -> None:
    """What happened after the last checkpoint is done again, with the same concepts."""
    undisturbed = loop_of(StandInTrainer(), RunStore("memory://other"))
    undisturbed.run()
    killed = loop_of(StandInTrainer(), store)

    def die_at_seven(state: TrainingState) -> None:
        if state.step == 7:
            raise KeyboardInterrupt

    killed.watch = die_at_seven
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    trainer = StandInTrainer()
    resumed = loop_of(trainer, store)
    assert resumed.run() == "all steps"
    assert len(trainer.seen) == 8
    assert resumed.state.curve == undisturbed.state.curve
    assert torch.equal(resumed.state.best["weight"], undisturbed.state.best["weight"])


def test_a_stopped_training_saves_between_two_points(store: RunStore) -> None:
    undisturbed = loop_of(StandInTrainer(), RunStore("memory://other"))
    undisturbed.run()
    stopped = loop_of(StandInTrainer(), store)
    stopped.watch = lambda state: stopped.notices.stop.set() if state.step == 6 else None
    assert stopped.run() == "stopped"
    resumed = loop_of(trainer := StandInTrainer(), store)
    assert (resumed.run(), len(trainer.seen)) == ("all steps", 6)
    assert resumed.state.curve == undisturbed.state.curve


def test_notice_of_a_node_is_answered_by_a_checkpoint(store: RunStore) -> None:
    loop = loop_of(StandInTrainer(), store)
    saved: list[int] = []

    def watch(state: TrainingState) -> None:
        if state.step == 2:
            loop.notices.leave.set()
        if state.step == 3:
            saved.append(load_checkpoint(store, "f")[0].step)

    loop.watch = watch
    assert (loop.run(), saved) == ("all steps", [2])


def test_training_ends_when_the_held_out_loss_stops_falling(store: RunStore) -> None:
    trainer = StandInTrainer(held_out=lambda step: abs(step - 8) + 1.0)
    loop = loop_of(trainer, store, steps=100, patience=2)
    assert loop.run() == "no better for long"
    assert [point.step for point in loop.state.curve] == [4, 8, 12, 16]
    assert loop.state.best_point is not None
    assert loop.state.best_point.step == 8
    again = loop_of(StandInTrainer(), store, steps=100, patience=2)
    assert (again.run(), again.state.step) == ("no better for long", 16)  # the first one died before its record


def test_a_poisoned_concept_is_named_and_left_out(store: RunStore) -> None:
    loop = loop_of(StandInTrainer(poisoned=["c03", "h1"]), store)
    assert loop.run() == "all steps"
    assert loop.state.left_out == {"c03": NOT_FINITE, "h1": NOT_FINITE}
    assert [point.held_out for point in loop.state.curve] == pytest.approx([1 / 4, 1 / 8, 1 / 12])
    assert load_checkpoint(store, "f")[0].left_out == loop.state.left_out


def test_a_bounded_number_of_held_out_concepts_is_measured(store: RunStore) -> None:
    loop = loop_of(StandInTrainer(poisoned=["h2"]), store, evaluated=2)
    assert loop.run() == "all steps"
    assert loop.state.left_out == {}  # h0 and h1 are measured


def test_held_out_losses_that_are_not_finite_are_never_the_best(store: RunStore) -> None:
    loop = loop_of(StandInTrainer(poisoned=SPLIT.held_out), store, steps=8, patience=1)
    assert loop.run() == "no better for long"
    assert [point.held_out for point in loop.state.curve] == [inf, inf]


@pytest.mark.parametrize("damage", ["other settings", "cut short", "no checkpoint"])
def test_a_checkpoint_that_does_not_count(store: RunStore, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    loop_of(StandInTrainer(), store).run()
    data = store.get(CHECKPOINT)
    if damage == "cut short":
        store.put(CHECKPOINT, data[: len(data) // 2])
    elif damage == "no checkpoint":
        store.put(CHECKPOINT, b"nothing")
    with caplog.at_level(logging.WARNING):
        state, trainer = load_checkpoint(store, "g" if damage == "other settings" else "f")
    assert (state.step, trainer) == (0, {})
    assert "training starts anew" in caplog.text
