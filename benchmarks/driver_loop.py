"""Measure what a round of the scheduling loop costs with thousands of actors, Ray's own part left out.

    python -m benchmarks.driver_loop
    python -m benchmarks.driver_loop --actors 1000,3000 --calls 18 --ended 87

The loop is the driver's; actors and Ray are stand-ins in this process, which answer when they are to. All actors are
filled with `--calls` concepts each. Then in each round `--ended` calls end, and as many concepts are handed out: 87 is
what 3,000 GPUs end in a quarter of a second, for which the loop pauses between two rounds, at 8.6 s a concept. What Ray
takes to look through the references of all calls is not in it; see the page of `benchmarks.dispatch`.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise, repeat
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from benchmarks.timing import Spread, heading, parse_numbers, say, table
from pipeline import fleet
from pipeline.actor.publish import record_of
from pipeline.config import RunConfig
from pipeline.driver import drive
from pipeline.ledger.plan import ConceptTask
from pipeline.report.progress import Progress
from pipeline.verdict import Policy
from pipeline.work_queue import WorkQueue
from textual_inversion.concept import Concept

_TASK = ConceptTask(
    concept=Concept(concept_id="c", placeholder_token="<c>", images=("unused",), initializer="cat"), fingerprint="f"
)


@dataclass(eq=False, slots=True)
class Answer:
    """Reference to the answer of an actor."""

    value: object


class StandInRay:
    """As much of Ray as the loop uses: actors are ready at once, their nodes are never taken back, and the calls that
    have waited longest end, so many a round."""

    def __init__(self, ended: int) -> None:
        self._ended = ended
        self._starting: list[Answer] = []
        self._calls: deque[Answer] = deque()
        self._now: list[Answer] = []

    def actor(self, calls: int) -> Any:
        """Return the handle of an actor that takes so many calls at a time."""
        record = record_of(_TASK, "done", 1)
        return SimpleNamespace(
            prepare=SimpleNamespace(remote=lambda _settings: self._wait_for(self._starting, calls)),
            notice=SimpleNamespace(remote=lambda: Answer(None)),
            learn=SimpleNamespace(remote=lambda _task, _attempt: self._wait_for(self._calls, record)),
        )

    def wait(self, _refs: Sequence[Answer], num_returns: int, **_: object) -> tuple[list[Answer], list[Answer]]:
        if num_returns == 1:  # the loop waits for a first event, and then looks for all others
            ended = [self._calls.popleft() for _ in range(0 if self._starting else min(self._ended, len(self._calls)))]
            self._now = [*self._starting, *ended]
            self._starting.clear()
        return self._now, []

    def get(self, ref: Answer) -> object:
        return ref.value

    def kill(self, _handle: object) -> None:
        """Do nothing: there is no process."""

    def _wait_for(self, waiting: list[Answer] | deque[Answer], value: object) -> Answer:
        waiting.append(answer := Answer(value))
        return answer


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    facts = {"calls_an_actor": options.calls, "calls_that_end_a_round": options.ended, "rounds": options.rounds}
    say(heading("The scheduling loop", "benchmarks.driver_loop", arguments, **facts))
    rows = [
        [f"{actors:,}", *measure(actors, options.calls, options.ended, options.rounds)] for actors in options.actors
    ]
    say("\n" + table(["actors", "CPU ms to fill all", "CPU ms a round"], rows))
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.driver_loop",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--actors", type=parse_numbers, default=[100, 1000, 3000], metavar="N,N")
    parser.add_argument("--calls", type=int, default=18, help="an actor has at a time: 16 slots, and 2 ahead")
    parser.add_argument("--ended", type=int, default=87, help="calls that end in a round")
    parser.add_argument("--rounds", type=int, default=20)
    return parser.parse_args(arguments)


def measure(actors: int, calls: int, ended: int, rounds: int) -> tuple[float, Spread]:
    """Return the CPU time of the rounds until all actors have all their calls, and that of each later round, in ms."""
    ray = StandInRay(ended)
    ends = [time.process_time()]  # of the rounds
    noting = Progress("learning", lambda: 0, stream=io.StringIO(), observe=lambda _: ends.append(time.process_time()))
    with patch.object(fleet, "ray", ray):
        crew = fleet.Fleet(lambda: ray.actor(calls), Policy(max_actors=actors))
        ending = drive(WorkQueue(repeat(_TASK)), crew, [RunConfig()], noting)
        assert isinstance(ending, Generator)
        next(ending)  # the first call ends in the round in which all were handed out
        filled = len(ends)
        while len(ends) <= filled + rounds:
            next(ending)
        ending.close()
    costs = [1000 * (end - begin) for begin, end in pairwise(ends)]
    return sum(costs[:filled]), Spread.of(costs[filled:])


if __name__ == "__main__":
    sys.exit(main())
