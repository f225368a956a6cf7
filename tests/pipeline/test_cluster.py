"""How many actors a cluster holds, and what they reserve. Ray itself is not started."""

from __future__ import annotations

import threading
from itertools import chain, repeat
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.cluster import (
    ActorCapacity,
    cpus_to_reserve,
    is_leaving,
    learner_actors,
    policy_from_config,
    watch_for_notice,
)
from pipeline.config_file import parse_config


@pytest.mark.parametrize(
    ("actor_settings", "nodes", "expected"),
    [
        ({}, [(0, 2)], 2),
        ({"cpus": 4}, [(0, 2)], 1),
        ({"cpus": 2}, [(0, 3), (0, 3)], 2),
        ({"count": 3}, [(0, 2)], 3),
        ({}, [(4, 32)], 4),
        ({"gpus": 0.5}, [(2, 16), (2, 16)], 8),
        ({"gpus": 0.3}, [(8, 96)], 24),
        ({"gpus": 2}, [(3, 16), (3, 16)], 2),
        ({"cpus": 4}, [(8, 16)], 4),
        ({}, [(0, 16), (1, 8)], 1),
    ],
)
def test_number_of_actors(actor_settings: dict[str, float], nodes: list[tuple[int, int]], expected: int) -> None:
    """Nodes are GPUs and cores. An actor is on one node, and a fraction of a GPU on one GPU."""
    config = parse_config({"actors": actor_settings})
    there = [{"GPU": gpus, "CPU": cpus} for gpus, cpus in nodes]
    assert policy_from_config(config, sum(gpus for gpus, _ in nodes), there).max_actors == expected


@pytest.mark.parametrize(("gpus", "device", "reserved"), [(0, "cpu", 0), (8, "cuda", 0.5)])
def test_actors_take_a_gpu_where_there_are_any(
    gpus: float, device: str, reserved: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {}
    started: list[Any] = []
    stand_in = SimpleNamespace(remote=lambda config, _on_ready: started.append(config))
    monkeypatch.setattr("pipeline.cluster.ray.remote", lambda **given: options.update(given) or (lambda _: stand_in))
    learner_actors(parse_config({"actors": {"gpus": 0.5, "cpus": 2}}), gpus, [{"GPU": gpus, "CPU": 16.0}])()
    assert options == {"max_restarts": 0, "max_task_retries": 0, "num_cpus": 2, "num_gpus": reserved}
    assert started[0].device == device


@pytest.mark.parametrize(
    ("actor_settings", "nodes", "expected"),
    [
        ({}, [(0, 2)], 0.5),
        ({}, [(0, 1)], 0.0),
        ({}, [(0, 16), (0, 4)], 0.75),
        ({}, [(0, 0), (0, 3)], 0.666),
        ({}, [(1, 16), (0, 0)], 1.0),
        ({"cpus": 4}, [(4, 16)], 3.75),
        ({}, [], 1.0),
    ],
)
def test_actors_of_a_run_that_draws_leave_a_core_of_every_node_free(
    actor_settings: dict[str, float], nodes: list[tuple[int, int]], expected: float
) -> None:
    there = [{"GPU": gpus, "CPU": cpus} for gpus, cpus in nodes]
    on_gpus = any(gpus for gpus, _ in nodes)
    for prompts, reserved in (("prompts.txt", expected), ("", actor_settings.get("cpus", 1.0))):
        config = parse_config({"actors": actor_settings, "generation": {"prompts": prompts}})
        assert cpus_to_reserve(config, there, on_gpus=on_gpus) == reserved


def test_nodes_that_join_are_seen_when_it_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, there = [0.0], {"CPU": 8.0, "GPU": 1.0}
    nodes = [{"Alive": True, "Resources": there}, {"Alive": False, "Resources": {"CPU": 8.0, "GPU": 8.0}}]
    monkeypatch.setattr("pipeline.cluster.ray.nodes", lambda: nodes)
    capacity = ActorCapacity(parse_config({"actors": {"gpus": 0.5}}), on_gpus=True, clock=lambda: seconds[0])
    told = []
    for now, gpus in ((0.0, 1.0), (9.0, 3.0), (11.0, 3.0), (12.0, 1.0), (22.0, 1.0)):
        seconds[0], there["GPU"] = now, gpus
        told.append(capacity())
    assert told == [1, 1, 6, 6, 2]


def test_a_number_that_was_asked_for_is_not_looked_up() -> None:
    assert policy_from_config(parse_config({"actors": {"count": 3}}), 0, [{"CPU": 2}]).actor_capacity is None
    assert policy_from_config(parse_config({}), 0, [{"CPU": 2}]).actor_capacity is not None


def test_an_actor_is_told_again_and_again_while_its_node_has_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.cluster._NOTICE_EVERY_S", 0.01)
    notice, told = chain([False, False, True, True], repeat(False)), threading.Semaphore(0)
    watch_for_notice(told.release, lambda: next(notice))
    assert told.acquire(timeout=60)
    assert told.acquire(timeout=60)


def test_a_ray_that_tells_no_notice_is_survived(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pipeline.cluster.ray._private.state.state.get_draining_nodes", lambda: 1 / 0)
    assert not is_leaving()
    assert "ZeroDivisionError" in caplog.text
