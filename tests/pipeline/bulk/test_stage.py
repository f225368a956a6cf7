"""The sizes of a Ray Data pass, and what a pass leaves behind when its actors die."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
import ray
from ray.exceptions import RayError

from pipeline.bulk.rows import done_row_ids, put_plan
from pipeline.bulk.stage import Stage, await_free_core, cpus_for_actor, run_stage, stage_sizes
from pipeline.config import RunConfig
from pipeline.store.parquet import read_table
from pipeline.store.storage import RunStore
from tests.pipeline.bulk.mortal_actors import draw_or_die, note_when_done
from tests.pipeline.runs import tiny_config

RESULTS = "some/results"


@pytest.mark.parametrize(
    ("nodes", "actors", "each"),
    [
        ([2.0], 2, 0.5),
        ([1.0], 1, 0.0),
        ([16.0], 1, 0.5),
        ([0.0, 1.0, 1.0], 2, 0.0),
        ([0.0, 2.0, 2.0], 2, 0.5),
        ([4.0, 4.0], 16, 0.375),
    ],
)
def test_a_whole_core_is_left_for_reading_and_writing(nodes: list[float], actors: int, each: float) -> None:
    assert cpus_for_actor(nodes, actors) == each
    assert sum(nodes) - actors * each >= sum(cores > 0 for cores in nodes)  # so that some node has one


@pytest.mark.parametrize(
    ("num_rows", "actors", "gpus", "expected"),
    [
        (100, 0, 0.0, (4, 16, 8, 1)),  # one actor a core; a part is full before the rows are shared out evenly
        (100, 0, 2.0, (2, 16, 8, 1)),  # one actor a GPU
        (100, 3, 2.0, (3, 16, 8, 1)),  # as many as asked for
        (6, 0, 0.0, (2, 4, 4, 1)),  # no more actors than calls; a block of one call is one call at once
        (200_000, 0, 0.0, (4, 16, 8, 4)),  # the plan has several parts
    ],
)
def test_how_a_stage_is_divided(num_rows: int, actors: int, gpus: float, expected: tuple[int, ...]) -> None:
    stage = Stage(
        name="s", plan="p", results=RESULTS, worker=Mortal, rows_per_call=4, rows_per_part=16, calls_at_once=2
    )
    sizes = stage_sizes(stage, num_rows, actors_asked=actors, gpus=gpus, cpus=4.0, node_cpus=[2.0, 2.0])
    assert (sizes.num_actors, sizes.rows_per_block, sizes.rows_per_batch, sizes.plan_parts) == expected
    assert sizes.cpus_per_actor == min(0.5, 2.0 / sizes.num_actors)


class Mortal:
    """Is killed by rows named `once-...` the first time it sees them, and by `always` each time."""

    def __init__(self, config: RunConfig) -> None:
        self._notes = Path(config.output)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return draw_or_die(batch, self._notes)


def work_on(names: list[str], output: Path) -> None:
    config, schema = tiny_config("none", output, actors={"count": 1}), pa.schema([("row_id", pa.string())])
    stage = Stage(name="dying", plan="plan", results=RESULTS, worker=Mortal, rows_per_call=1, rows_per_part=2)
    put_plan(RunStore(config.output), stage.plan, ({"row_id": name} for name in names), schema)
    run_stage(config, stage, len(names), gpus=0)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_nothing_but_the_workers_is_started_and_all_parts_are_of_one_size(tmp_path: Path) -> None:
    """Ray Data may read a plan with 32 actors, each of which needs a core to start."""
    before = set(ray._private.state.actors())
    work_on([f"never-{number}" for number in range(6)], tmp_path)
    started = [each["ActorClassName"] for key, each in ray._private.state.actors().items() if key not in before]
    assert any("BoundedWorker" in name for name in started)  # by this name `actor_wait.num_alive` finds them
    assert len(started) <= 2 + 3, started  # our counter, and Ray Data's three: autoscaling, places, statistics
    assert [read_table(path).num_rows for path in (tmp_path / RESULTS).iterdir()] == [2] * 3


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_an_actor_may_die_more_often_than_a_row_may_kill(tmp_path: Path) -> None:
    names = [f"{kind}-{number}" for number in range(5) for kind in ("once", "never")]
    work_on(names, tmp_path)
    rows = [row for path in (tmp_path / RESULTS).iterdir() for row in read_table(path)["row_id"].to_pylist()]
    assert sorted(rows) == sorted(names)
    assert len(list(tmp_path.glob("died.*"))) == 5


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_row_that_kills_ends_the_stage_and_what_was_done_before_counts(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    note_when_done(tmp_path, lambda: done_row_ids(store, RESULTS) == set("abcd"))
    with pytest.raises(RayError, match="rows always to always were given to an actor 4 times, and each time it died"):
        work_on(["a", "b", "c", "d", "always"], tmp_path)
    assert len((tmp_path / "died.always").read_text()) == 4
    assert done_row_ids(store, RESULTS) == set("abcd")


def test_the_stage_begins_without_a_word_once_a_core_is_free(caplog: pytest.LogCaptureFixture) -> None:
    answers = iter([0.0, 0.0, 1.0])
    await_free_core(lambda: next(answers), longest_s=3600.0)
    assert list(answers) == []
    assert caplog.text == ""


def test_the_stage_says_that_it_waited_long_for_a_core(caplog: pytest.LogCaptureFixture) -> None:
    await_free_core(lambda: 0.0, longest_s=0.0)
    assert "no core of the cluster was free for 0 s" in caplog.text
