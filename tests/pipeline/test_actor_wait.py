"""The wait for actors ends, with the cause, on a cluster that is gone or has no room."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from pipeline import actor_wait
from pipeline.actor_wait import ActorWait, ending_without_actors
from pipeline.store.errors import ClusterLost


def node(*, alive: bool = True, **resources: float) -> Mapping[str, Any]:
    return {"Alive": alive, "Resources": resources}


class Cluster:
    """A cluster of some nodes, with a clock that the test moves."""

    def __init__(self, nodes: Sequence[Mapping[str, Any]], *, start_s: float = 3600.0) -> None:
        self.nodes = nodes
        self.now = 0.0
        self.wait = ActorWait({"CPU": 1, "GPU": 1}, start_s, nodes=lambda: self.nodes, clock=lambda: self.now)

    def pass_time(self, seconds: float, *, ready: int = 0) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now += 1.0
            self.wait.check(ready)


def test_a_cluster_without_a_living_node_is_given_up_after_two_minutes() -> None:
    cluster = Cluster([node(CPU=2, GPU=1)])
    cluster.pass_time(500)
    cluster.nodes = [node(alive=False, CPU=2, GPU=1)]
    cluster.pass_time(100)
    with pytest.raises(ClusterLost, match=r"no node of the Ray cluster was alive for 12\d s: its raylet was killed"):
        cluster.pass_time(30)


def test_a_node_that_comes_in_time_is_waited_for() -> None:
    cluster = Cluster([node(alive=False)])
    cluster.pass_time(100)
    cluster.nodes = [node(CPU=2, GPU=1)]
    cluster.pass_time(10)
    cluster.nodes = []
    cluster.pass_time(100)


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        (
            [node(CPU=4), node(CPU=0.5, GPU=2)],
            r"1 GPU, and no living node has as much \(at most 4 CPU, 2 GPU\)",
        ),
        ([node(CPU=4, GPU=1)], "nodes that have as much are busy with other work, or slow to load models"),
    ],
)
def test_actors_that_find_no_room_have_a_bound_and_a_reason(
    nodes: Sequence[Mapping[str, Any]], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = Cluster(nodes, start_s=600)
    with caplog.at_level(logging.WARNING):
        cluster.pass_time(595)
    assert len(caplog.messages) == 1
    with pytest.raises(ClusterLost, match=rf"ready within 60\d s \(actors\.start_s\): an actor .*{reason}"):
        cluster.pass_time(10)


def test_a_ready_actor_ends_the_wait_and_its_loss_begins_another() -> None:
    cluster = Cluster([node(CPU=4, GPU=1)], start_s=600)
    cluster.pass_time(590)
    cluster.pass_time(10_000, ready=1)
    cluster.pass_time(590)
    with pytest.raises(ClusterLost):
        cluster.pass_time(20)


def test_without_a_bound_a_queue_is_waited_for() -> None:
    Cluster([node(CPU=4)], start_s=0).pass_time(10**5)


def test_the_main_thread_is_interrupted_wherever_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor_wait, "_LOOK_EVERY_S", 0.01)
    before = signal.getsignal(signal.SIGUSR1)
    wait = ActorWait({}, 0.02, nodes=lambda: [node(CPU=1)])
    with pytest.raises(ClusterLost, match="no actor was ready"), ending_without_actors(wait, lambda: 0):
        time.sleep(60)
    with ending_without_actors(ActorWait({}, 0.02, nodes=lambda: [node(CPU=1)]), lambda: 1):
        time.sleep(0.1)
    assert signal.getsignal(signal.SIGUSR1) is before


def test_the_signals_handler_comes_back_where_the_wait_ends_before_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    class SlowThread(threading.Thread):
        def start(self) -> None:
            super().start()
            time.sleep(60)

    monkeypatch.setattr(actor_wait, "_LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(threading, "Thread", SlowThread)
    before = signal.getsignal(signal.SIGUSR1)
    wait = ActorWait({}, 0.02, nodes=lambda: [node(CPU=1)])
    with pytest.raises(ClusterLost, match="no actor was ready"), ending_without_actors(wait, lambda: 0):
        pytest.fail("the block began")
    assert signal.getsignal(signal.SIGUSR1) is before
