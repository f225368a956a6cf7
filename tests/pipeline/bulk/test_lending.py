"""Actors that are lent to the workers of a stage: who gets which, and what becomes of a stage whose actors die."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
from ray.exceptions import RayError

from pipeline.bulk import lending as lent
from pipeline.bulk.generate import METADATA, PLAN, draw_plan
from pipeline.bulk.lending import Desk
from pipeline.bulk.rows import done_row_ids, put_plan
from pipeline.fleet import Fleet
from pipeline.store.storage import RunStore
from pipeline.verdict import Policy
from tests.pipeline.bulk.mortal_actors import Mortal, note_when_done
from tests.pipeline.runs import tiny_config


def test_an_actor_is_lent_to_one_borrower_at_a_time() -> None:
    async def lend() -> None:
        desk = Desk()
        first = asyncio.create_task(desk.borrow("a"))
        await desk.lend(["one"])  # type: ignore[list-item]
        assert await first == "one"
        second = asyncio.create_task(desk.borrow("b"))
        await asyncio.sleep(0)
        assert not second.done()
        await desk.give_back("a", is_lost=False)
        assert await second == "one"

    asyncio.run(lend())


def test_what_a_borrower_had_is_free_when_it_comes_again() -> None:
    """It was killed, and started again by Ray under its name."""

    async def lend() -> None:
        desk = Desk()
        await desk.lend(["one"])  # type: ignore[list-item]
        assert await desk.borrow("a") == "one"
        assert await desk.borrow("a") == "one"

    asyncio.run(lend())


def test_a_lost_actor_is_lent_no_more_and_another_is() -> None:
    async def lend() -> None:
        desk = Desk()
        await desk.lend(["one"])  # type: ignore[list-item]
        await desk.borrow("a")
        await desk.give_back("a", is_lost=True)
        again = asyncio.create_task(desk.borrow("a"))
        await asyncio.sleep(0)
        assert not again.done()
        await desk.lend(["one", "two"])  # type: ignore[list-item]
        assert await again == "two"

    asyncio.run(lend())


def test_at_the_end_those_who_wait_are_told_why() -> None:
    async def lend() -> None:
        desk = Desk()
        waiting = asyncio.create_task(desk.borrow("a"))
        await asyncio.sleep(0)
        await desk.end("no actor starts")
        await desk.end("the stage is over")
        for call in (waiting, desk.borrow("b")):
            with pytest.raises(RuntimeError, match="no actor starts"):
                await call

    asyncio.run(lend())


@pytest.fixture
def work_on(tmp_path: Path) -> Any:
    """Have the named rows drawn by one actor at a time."""
    actor_class = ray.remote(max_restarts=0, max_task_retries=0, num_cpus=0.5)(Mortal)
    fleet = Fleet(lambda: actor_class.remote(str(tmp_path)), Policy(max_actors=1, backoff_s=0.01), keeps_idle=True)

    def work(names: list[str]) -> None:
        config = tiny_config("none", tmp_path, generation={"rows_per_part": 2})
        sampling = replace(config.generation.sampling, batch_size=1)
        config = replace(config, generation=replace(config.generation, sampling=sampling))
        put_plan(RunStore(config.output), PLAN, ({"row_id": name} for name in names), SCHEMA)
        draw_plan(config, len(names), fleet)

    yield work
    fleet.dismiss()


SCHEMA = pa.schema([("row_id", pa.string())])


def done(output: Path) -> set[str]:
    return set(done_row_ids(RunStore(str(output)), METADATA))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_actors_that_die_are_replaced_and_those_that_live_are_used_again(
    work_on: Callable[[list[str]], None], tmp_path: Path
) -> None:
    names = [f"{kind}-{number}" for number in range(2) for kind in ("once", "never")]
    work_on(names)
    assert done(tmp_path) == set(names)
    assert len(list(tmp_path.glob("start.*"))) == 2 + 1
    work_on(["another"])
    assert len(list(tmp_path.glob("start.*"))) == 2 + 1


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_an_actor_that_lives_but_was_lost_to_its_borrower_is_replaced(
    work_on: Callable[[list[str]], None], tmp_path: Path
) -> None:
    work_on(["a", "away", "b"])
    assert done(tmp_path) == {"a", "away", "b"}
    assert len(list(tmp_path.glob("start.*"))) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_row_that_kills_ends_the_stage_and_what_was_done_before_counts(
    work_on: Callable[[list[str]], None], tmp_path: Path
) -> None:
    note_when_done(tmp_path, lambda: done(tmp_path) == set("abcd"))
    with pytest.raises(RayError, match="rows always to always were given to an actor 4 times, and each time it died"):
        work_on(["a", "b", "c", "d", "always"])
    assert len((tmp_path / "died.always").read_text()) == 4
    assert done(tmp_path) == set("abcd")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_too_many_deaths_end_the_stage(work_on: Callable[[list[str]], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lent, "STARTS_PER_ACTOR", 2)
    with pytest.raises(RayError, match="the stage's actors have died 2 times"):
        work_on([f"once-{number}" for number in range(5)])


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_actors_that_do_not_start_end_the_stage(work_on: Callable[[list[str]], None], tmp_path: Path) -> None:
    (tmp_path / "no-start").touch()
    with pytest.raises(RayError, match=r"3 actors in a row did not start.*the model is not where it should be"):
        work_on(["a"])
