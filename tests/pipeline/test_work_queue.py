"""The order in which waiting concepts are taken."""

from __future__ import annotations

from dataclasses import replace

from pipeline.verdict import WorkFacts
from pipeline.work_queue import Work, WorkQueue
from tests.pipeline.runs import task


def names(queue: WorkQueue) -> list[str]:
    taken = []
    while work := queue.take():
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
    assert (pulled, queue.num_ahead, len(queue)) == (["a", "b"], 2, 2)
    queue.look_ahead(100)
    assert names(queue) == list("abcde")
    assert queue.take() is None


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
    assert (queue.num_ahead, len(queue)) == (0, 2)
    assert queue.take() is None
    first, second = queue.take_suspect(), queue.take_suspect()
    assert first is not None
    assert second is not None
    assert [first.task.concept.concept_id, second.task.concept.concept_id] == ["was-alone", "was-in-company"]
    assert queue.take_suspect() is None
