"""The scheduling loop with tries on several rungs, when calls end, and actors start and die, in any order. Ray is made
up, so that an order is repeated by its seed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from pipeline import fleet as fleets
from pipeline.actor.publish import record_of
from pipeline.config import RunConfig
from pipeline.driver import drive
from pipeline.fleet import Fleet
from pipeline.ledger.plan import ConceptTask
from pipeline.verdict import Policy
from pipeline.work_queue import WorkQueue
from tests.pipeline.runs import task

CONCEPTS, RUNGS, ACTORS, CAPACITY = 40, 3, 4, 3


class Ref:
    """Reference to an answer, which is there when `has_ended`."""

    def __init__(self, actor: Actor, answer: Any) -> None:
        self.actor, self.answer = actor, answer
        self.has_ended = False


class Actor:
    """An actor that refuses calls which the driver must not make."""

    def __init__(self, ray: RandomRay) -> None:
        self.ray = ray
        self.rung = -1
        self.calls = 0
        self.num_prepared = 0
        self.prepare = SimpleNamespace(remote=self._prepare)
        self.learn = SimpleNamespace(remote=self._learn)
        self.notice = SimpleNamespace(remote=lambda: Ref(self, None))

    def _prepare(self, config: RunConfig) -> Ref:
        assert not self.calls, "it has calls by other settings"
        assert config.seed != self.rung, "it is prepared for these already"
        self.rung = config.seed
        self.num_prepared += 1
        return self.ray.start(Ref(self, CAPACITY))

    def _learn(self, task: ConceptTask, attempt: int) -> Ref:
        assert task.rung == self.rung
        self.calls += 1
        assert self.calls <= CAPACITY
        return self.ray.start(Ref(self, record_of(task, "done", attempt)))


class RandomRay:
    """As much of Ray as the loop uses. Of what is under way something ends at random in each wait; now and then an
    actor dies with all that it has."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._under_way: list[Ref] = []
        self._dead = set[Actor]()

    def start(self, ref: Ref) -> Ref:
        self._under_way.append(ref)
        return ref

    def wait(self, refs: Sequence[Ref], num_returns: int, timeout: float, **_: Any) -> tuple[list[Ref], list[Ref]]:
        if timeout:  # otherwise the loop asks what else has ended
            ref = self._under_way.pop(self._random.randrange(len(self._under_way)))
            ref.has_ended = True
            ref.actor.calls -= not isinstance(ref.answer, int)
            if self._random.random() < 0.05:
                self._dead.add(ref.actor)
        return [ref for ref in refs if ref.has_ended or ref.actor in self._dead][:num_returns], []

    def get(self, ref: Ref) -> Any:
        if not ref.has_ended:
            raise RayActorError
        return ref.answer

    def kill(self, actor: Actor) -> None:
        self._under_way = [ref for ref in self._under_way if ref.actor is not actor]


@pytest.mark.parametrize("seed", range(30))
def test_each_try_ends_once_whatever_the_order(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = RandomRay(seed)
    monkeypatch.setattr(fleets, "ray", ray)
    tries = {f"c{number}": random.Random(seed + number).randint(0, RUNGS) for number in range(CONCEPTS)}
    actors: list[Actor] = []

    def new_actor() -> Any:
        actors.append(Actor(ray))
        return actors[-1]

    never = 10**6
    policy = Policy(
        max_actors=ACTORS, max_attempts=never, max_fruitless_deaths=never, max_start_failures=never, backoff_s=0.0
    )
    fleet = Fleet(new_actor, policy, keeps_idle=seed % 2 == 0)
    queue = WorkQueue(map(task, tries))
    ended = Counter[tuple[str, int]]()
    for one, record in drive(queue, fleet, [RunConfig(seed=rung) for rung in range(RUNGS + 1)]):
        name = one.concept.concept_id
        assert (record.concept_id, record.status) == (name, "done")
        ended[name, one.rung] += 1
        if one.rung < tries[name]:
            queue.add(replace(one, rung=one.rung + 1))
    assert ended == {(name, rung): 1 for name, last in tries.items() for rung in range(last + 1)}
    assert len(fleet.workers) <= ACTORS
    fleet.dismiss()
    num_prepared = sum(actor.num_prepared for actor in actors)
    assert num_prepared < len(actors) + sum(tries.values()) / 2, "actors take several concepts a change"
