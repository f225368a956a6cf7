"""The order in which waiting concepts are taken."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline import work_queue
from pipeline.verdict import WorkFacts
from pipeline.work_queue import Work, WorkQueue
from tests.pipeline.runs import task


def names(queue: WorkQueue, rung: int = 0) -> list[str]:
    taken = []
    while work := queue.take(rung):
        taken.append(work.task.concept.concept_id)
    return taken


def work(name: str, **facts: int) -> Work:
    return Work(task(name), replace(WorkFacts(), **facts))


def test_tasks_are_pulled_only_as_far_as_asked_for() -> None:
    pulled: list[str] = []
    tasks = (pulled.append(name) or task(name) for name in "abcde")  # type: ignore[func-returns-value]
    queue = WorkQueue(tasks)
    queue.look_ahead(2)
    queue.look_ahead(2)
    assert (pulled, queue.num_ahead(0), len(queue)) == (["a", "b"], 2, 2)
    queue.look_ahead(100)
    assert names(queue) == list("abcde")
    assert queue.take(0) is None


def test_what_is_handed_back_comes_first_and_what_was_lost_last() -> None:
    queue = WorkQueue(iter([task("ahead")]))
    queue.look_ahead(1)
    queue.put_again(work("lost", lost_calls=1), is_suspect=False)
    queue.put_first(work("handed-back"))
    assert names(queue) == ["handed-back", "ahead", "lost"]


def test_suspects_wait_apart_and_the_most_suspicious_comes_first() -> None:
    queue = WorkQueue(iter(()))
    queue.put_again(work("was-in-company", lost_calls=1), is_suspect=True)
    queue.put_again(work("was-alone", lost_calls=2, lost_alone=1), is_suspect=True)
    assert (queue.num_ahead(0), len(queue)) == (0, 2)
    assert queue.take(0) is None
    first, second = queue.take_suspect(0), queue.take_suspect(0)
    assert first is not None
    assert second is not None
    assert [first.task.concept.concept_id, second.task.concept.concept_id] == ["was-alone", "was-in-company"]
    assert queue.take_suspect(0) is None


def test_each_rung_has_queues_of_its_own() -> None:
    queue = WorkQueue(iter([task("a"), task("b")]))
    queue.look_ahead(2)
    queue.add(replace(task("a"), rung=2))
    queue.add(replace(task("c"), rung=1))
    queue.put_again(Work(replace(task("d"), rung=1)), is_suspect=True)
    assert (queue.num_waiting(), len(queue)) == ({0: 2, 1: 2, 2: 1}, 5)
    assert (queue.num_ahead(1), names(queue, 1)) == (1, ["c"])
    assert queue.take_suspect(0) is None
    assert queue.take_suspect(1) is not None
    assert names(queue) == ["a", "b"]
    assert (queue.num_waiting(), len(queue)) == ({0: 0, 1: 0, 2: 1}, 1)


def test_tries_that_wait_keep_no_task_from_being_pulled_unless_they_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_queue, "MOST_TRIES", 3)
    first = [task(name) for name in "abcdefg"]
    queue = WorkQueue(iter([*first, *(replace(task(name), rung=1) for name in "hijkl")]))
    for name in "xy":
        queue.add(replace(task(name), rung=1))
    queue.look_ahead(2)
    assert queue.num_waiting() == {0: 2, 1: 2}
    for name in "vw":
        queue.add(replace(task(name), rung=1))
    assert names(queue) == ["a", "b"]
    queue.look_ahead(2)
    assert queue.num_waiting() == {0: 1, 1: 4}, "no more than two and three"
    assert names(queue, 1) == ["x", "y", "v", "w"]
    queue.look_ahead(100)
    assert queue.num_waiting() == {0: 5, 1: 5}


def test_of_tries_that_an_earlier_run_left_no_more_are_pulled_than_are_enough() -> None:
    queue = WorkQueue(iter([task("a"), *(replace(task(name), rung=1 + (name in "dg")) for name in "bcdefghi")]))
    queue.look_ahead(2)
    assert queue.num_waiting() == {0: 1, 1: 2}
    assert names(queue, 1) == ["b", "c"]
    queue.look_ahead(2)
    assert queue.num_waiting() == {0: 1, 1: 2, 2: 1}
