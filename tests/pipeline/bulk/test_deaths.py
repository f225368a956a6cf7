"""The counts that bound how often a stage's actors may die."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
import ray

from pipeline.bulk import deaths
from pipeline.bulk.deaths import CALL_ATTEMPTS, BoundedWorker, DeathCounter
from tests.pipeline.runs import tiny_config


class Method:
    """A remote method of an actor, called at once in this process."""

    def __init__(self, call: Any) -> None:
        self.remote = call


class Handle:
    """A handle of a counter in this process."""

    def __init__(self) -> None:
        counter = DeathCounter()
        self.start, self.begin, self.end = (Method(call) for call in (counter.start, counter.begin, counter.end))


class Worker:
    """Fails at rows named `bad`, as if its process had died."""

    def __init__(self, _config: Any) -> None: ...

    def __call__(self, batch: pa.Table) -> pa.Table:
        if "bad" in batch["row_id"].to_pylist():
            raise KeyboardInterrupt
        return batch


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(deaths.ray, "get", lambda result: result)
    return Handle()


def a_worker(counter: Any, max_starts: int = 99) -> BoundedWorker:
    return BoundedWorker(tiny_config("none", "out"), ray.cloudpickle.dumps(Worker), counter, max_starts)


def test_rows_at_which_actors_die_end_the_stage_and_no_others(counter: Any) -> None:
    good, bad = (pa.table({"row_id": ids}) for ids in (["a", "b"], ["c", "bad"]))
    for _ in range(CALL_ATTEMPTS):
        with pytest.raises(KeyboardInterrupt):
            a_worker(counter)(bad)
        assert a_worker(counter)(good) is good
    with pytest.raises(RuntimeError, match="rows c to bad were given to an actor 4 times, and each time it died"):
        a_worker(counter)(bad)
    assert a_worker(counter)(good.slice(0, 0)).num_rows == 0


def test_too_many_starts_end_the_stage_before_the_worker_is_loaded(counter: Any) -> None:
    for _ in range(2):
        a_worker(counter, max_starts=2)
    with pytest.raises(RuntimeError, match="actors have died 2 times"):
        BoundedWorker(tiny_config("none", "out"), b"nothing to load", counter, 2)
