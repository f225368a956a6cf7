"""The benchmark of the scheduling loop: all actors are full, and as many calls end a round as it says."""

from __future__ import annotations

import pytest

from benchmarks import driver_loop


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert driver_loop.main(["--actors", "2,5", "--calls", "3", "--ended", "2", "--rounds", "2"]) == 0
    said = capsys.readouterr().out
    assert "| 2 |" in said
    assert "| 5 |" in said


def test_calls_end_in_the_order_in_which_they_were_made() -> None:
    ray = driver_loop.StandInRay(ended=2)
    actor = ray.actor(3)
    ready = actor.prepare.remote(None)
    calls = [actor.learn.remote(None, 1) for _ in range(3)]
    assert ray.wait([ready, *calls], num_returns=1)[0] == [ready]
    assert ray.get(ready) == 3
    assert ray.wait(calls, num_returns=1)[0] == ray.wait(calls, num_returns=3)[0] == calls[:2]
    assert ray.wait(calls, num_returns=1)[0] == calls[2:]
