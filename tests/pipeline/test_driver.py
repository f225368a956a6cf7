"""The scheduling loop on real Ray with actors that fail in every way: each task settled once, the innocent unharmed."""

from __future__ import annotations

import inspect
import io
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from pipeline.actor.interface import LearnerActor
from pipeline.ledger.plan import ConceptTask
from pipeline.ledger.records import ConceptRecord
from pipeline.model_actor import ModelActor
from pipeline.report.progress import Progress, ProgressNumbers
from pipeline.store.errors import RunAborted
from pipeline.verdict import Policy
from tests.pipeline.fleets import drive_alone
from tests.pipeline.runs import task
from tests.pipeline.stand_ins import StandIn
from textual_inversion.errors import BadInput

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def actors(notes: Path, capacity: int = 2) -> Callable[[], Any]:
    actor_class = ray.remote(max_restarts=0, max_task_retries=0, num_cpus=1)(StandIn)
    return lambda: actor_class.remote(str(notes), capacity)


def settle(names: list[str], notes: Path, progress: Progress | None = None, **policy: Any) -> dict[str, ConceptRecord]:
    limits = Policy(**{"max_actors": 2, "backoff_s": 0.01} | policy)
    records = list(drive_alone((task(name) for name in names), actors(notes), limits, progress))
    assert len({record.concept_id for record in records}) == len(records)
    return {record.concept_id: record for record in records}


def calls(notes: Path, name: str) -> list[tuple[int, set[str]]]:
    """(attempt, what ran on the actor meanwhile) of every call for a concept."""
    found = [(path, path.name.split(".")) for path in notes.glob(f"{name}.*")]
    return sorted((int(parts[1]), set(path.read_text().split())) for path, parts in found)


def test_every_way_to_end(tmp_path: Path) -> None:
    names = ["fine-0", "killer-0", "fine-1", "bad-0", "unlucky-0", "fine-2", "bug-0", "offline-0", "broken-0", "fine-3"]
    told = list[ProgressNumbers]()
    progress = Progress("learning", lambda: 10, stream=io.StringIO(), observe=told.append)
    records = settle(names, tmp_path, progress, max_attempts=4)

    assert set(records) == set(names)
    failed = {name: record for name, record in records.items() if record.status == "failed"}
    assert set(failed) == {"killer-0", "bad-0", "bug-0"}
    assert failed["killer-0"].attempts == 4
    # alone the first time, too, if the driver had all other answers of the actor before it knew of the death
    assert re.search(r"given up after 4 lost calls, [34] of them alone", failed["killer-0"].error)
    assert failed["bad-0"].error == "no such photo"
    assert "bug in this software, not a fault of the concept: KeyError" in failed["bug-0"].error
    assert {name: record.error_kind for name, record in failed.items()} == {
        "killer-0": "lost_worker", "bad-0": "", "bug-0": "bug"
    }  # fmt: skip
    assert records["offline-0"].attempts in (3, 4)  # one may be lost with an actor
    assert records["unlucky-0"].attempts >= 2
    counts = told[-1]
    assert (counts["done"], counts["failed"], counts["quarantined"], counts["in_flight"]) == (7, 3, 1, 0)
    assert counts["retried"] >= 3 + 2 + 1 + 1  # of killer, offline, unlucky and broken; and of who was beside them
    # after its first death, the killer ran with nobody beside it
    assert [company for attempt, company in calls(tmp_path, "killer-0") if attempt > 1] == [{"killer-0"}] * 3


def test_what_fails_by_itself_is_not_called_again(tmp_path: Path) -> None:
    records = settle(["bad-0", "bug-0", "fine-0"], tmp_path)
    assert {name for name, record in records.items() if record.status == "failed"} == {"bad-0", "bug-0"}
    assert len(calls(tmp_path, "bug-0")) == len(calls(tmp_path, "bad-0")) == 1


def test_a_bug_that_stops_actors_is_found_alone_and_told(tmp_path: Path) -> None:
    records = settle(["fine-0", "buggy-0", "fine-1"], tmp_path, max_actors=1)
    assert {name for name, record in records.items() if record.status == "done"} == {"fine-0", "fine-1"}
    bug = records["buggy-0"]
    assert (bug.error_kind, bug.attempts, bug.quarantined) == ("bug", 2, False)
    assert "which stopped its actor again when the concept was alone: ActorBroken: KeyError: 'rows'" in bug.error
    assert calls(tmp_path, "buggy-0")[-1][1] == {"buggy-0"}


def anew(old: ConceptTask) -> ConceptTask:
    return replace(old, fingerprint=f"f-{old.concept.concept_id}-anew")


def test_a_concept_whose_photos_changed_is_planned_anew_twice_at_most(tmp_path: Path) -> None:
    limits = Policy(max_actors=1)
    tasks = map(task, ("moved-0", "fine-0", "moving-0"))
    records = {one.concept_id: one for one in drive_alone(tasks, actors(tmp_path), limits, replan=anew)}
    assert (records["moved-0"].status, records["moved-0"].fingerprint) == ("done", "f-moved-0-anew")
    assert records["moved-0"].attempts == 2
    assert records["fine-0"].status == "done"
    moving = records["moving-0"]
    assert (moving.status, moving.error_kind, moving.attempts) == ("failed", "bad_input", 3)
    assert "photo a.png has changed since the plan, 3 times in this run" in moving.error
    assert "run the same command again" in moving.error


def test_where_no_plan_can_be_made_anew_the_concept_fails_with_the_remedy(tmp_path: Path) -> None:
    def gone(_: ConceptTask) -> ConceptTask:
        raise BadInput("photo a.png cannot be read: it is not there")

    limits = Policy(max_actors=1)
    for replan, said in ((None, "has changed since the plan; run the same command again"), (gone, "it is not there")):
        (record,) = drive_alone([task("moved-0")], actors(tmp_path), limits, replan=replan)
        assert (record.status, record.error_kind) == ("failed", "bad_input")
        assert said in record.error


def test_an_actor_that_cannot_serve_the_run_ends_it(tmp_path: Path) -> None:
    with pytest.raises(RunAborted, match="the model here is not the model of the plan"):
        settle(["refusing-0"], tmp_path)


@pytest.mark.parametrize("actor_class", [StandIn, ModelActor])
@pytest.mark.parametrize("method", ["prepare", "learn", "progress", "drain", "notice"])
def test_an_actor_takes_the_calls_that_the_driver_makes(actor_class: type, method: str) -> None:
    promised = inspect.signature(getattr(LearnerActor, method))
    given = inspect.signature(getattr(actor_class, method))
    names = [name for name in given.parameters if name != "_ray_trace_ctx"]  # which ray.remote adds
    assert names == list(promised.parameters)
    assert given.return_annotation == promised.return_annotation


def test_calls_in_flight_are_bounded_and_tasks_are_pulled_lazily(tmp_path: Path) -> None:
    pulled: list[str] = []

    def stream() -> Iterator[ConceptTask]:
        for i in range(30):
            pulled.append(f"fine-{i}")
            yield task(f"fine-{i}")

    ahead = []
    for settled, _ in enumerate(drive_alone(stream(), actors(tmp_path), Policy(max_actors=1)), 1):
        ahead.append(len(pulled) - settled)
    assert len(ahead) == 30
    assert max(ahead) <= 2 * 2  # in flight and waiting, for one actor of capacity two
    assert max(len(company) for i in range(30) for _, company in calls(tmp_path, f"fine-{i}")) <= 2


def test_work_is_shared_by_all_actors(tmp_path: Path) -> None:
    """None ends before both have begun one."""
    names = [f"held-{i}" for i in range(4)]

    def processes() -> set[str]:
        return {path.name.split(".")[2] for path in tmp_path.glob("held-*")}

    def let_go() -> None:
        until = time.monotonic() + 300
        while len(processes()) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        for name in names:
            (tmp_path / f"end.{name}").touch()

    threading.Thread(target=let_go).start()
    settle(names, tmp_path, max_actors=2)
    assert len(processes()) == 2


def test_actors_that_find_no_node_keep_nothing_waiting(tmp_path: Path) -> None:
    nowhere = ray.remote(max_restarts=0, max_task_retries=0, num_cpus=1000)(StandIn)
    started: list[Any] = []

    def new_actor() -> Any:
        started.append(actors(tmp_path)() if not started else nowhere.remote(str(tmp_path), 2))
        return started[-1]

    assert len(list(drive_alone([task(f"fine-{i}") for i in range(12)], new_actor, Policy(max_actors=4)))) == 12


def test_actors_that_cannot_start_abort_the_run_with_the_cause(tmp_path: Path) -> None:
    (tmp_path / "no-start").touch()
    with pytest.raises(RunAborted, match=r"3 actors in a row did not start.*the model is not where it should be"):
        settle(["fine-0"], tmp_path)


def test_an_actor_that_hangs_is_replaced(tmp_path: Path) -> None:
    records = settle(["hung-0", "fine-0"], tmp_path, stall_s=5.0, max_actors=1)
    assert {record.status for record in records.values()} == {"done"}
    assert records["hung-0"].attempts == 2


def test_only_the_concept_that_hangs_is_to_blame(tmp_path: Path) -> None:
    steady = [f"steady-{i}" for i in range(7)]  # 1.5 s each and more on a busy machine, one after the other
    records = settle(["stuck-0", *steady], tmp_path, stall_s=8.0, max_actors=1, max_attempts=2)
    assert records["stuck-0"].status == "failed"
    # alone both times if the time is up just between two of the others
    assert re.search(r"given up after 2 lost calls, [12] of them alone", records["stuck-0"].error)
    assert "not learned within 8 s (actors.stall_s)" in records["stuck-0"].error
    assert {records[name].attempts for name in steady} == {1}
    assert [company for attempt, company in calls(tmp_path, "stuck-0") if attempt > 1] == [{"stuck-0"}]


def test_what_crashes_or_eats_memory_is_found_alone_and_told(tmp_path: Path) -> None:
    killers = [f"segfault-{i}" for i in range(4)]
    names = ["fine-0", *killers, "memory-0", "fine-1", "fine-2"]
    # six deaths in a row at most: each pair that crashes together, then each of the four alone
    records = settle(names, tmp_path, max_actors=1, max_attempts=2, max_fruitless_deaths=7)
    assert {name for name, record in records.items() if record.status == "done"} == {"fine-0", "fine-1", "fine-2"}
    assert "MemoryError" in records["memory-0"].error
    for name in killers:
        assert "killed, out of memory, or crashed" in records[name].error
        assert calls(tmp_path, name)[-1][1] == {name}


def test_when_storage_fails_no_concept_is_to_blame(tmp_path: Path) -> None:
    """A concept may be called once; storage fails most of the first five calls."""
    names = ["nostore-3", "fine-0", "nostore-5"]
    records = settle(names, tmp_path, max_actors=1, max_attempts=1)
    assert {name: record.status for name, record in records.items()} == dict.fromkeys(names, "done")
    assert len((tmp_path / "refused").read_text()) >= 4


def test_storage_that_fails_for_good_ends_the_run_and_fails_no_concept(tmp_path: Path) -> None:
    records: list[ConceptRecord] = []
    tasks = (task(name) for name in ("fine-0", "nostore-0", "fine-1"))
    limits = Policy(max_actors=1, backoff_s=0.01, max_store_failures=4, max_attempts=1)
    with pytest.raises(RunAborted, match=r"storage failed 4 times in a row: StoreFailed: 8 calls failed"):
        records.extend(drive_alone(tasks, actors(tmp_path), limits))
    assert all(record.status == "done" for record in records)


def test_actors_that_all_die_abort_the_run(tmp_path: Path) -> None:
    with pytest.raises(RunAborted, match="4 actors in a row died"):
        settle(["killer-0", "killer-1", "killer-2"], tmp_path, max_fruitless_deaths=4, max_actors=1)


def test_stopping_lets_running_concepts_save(tmp_path: Path) -> None:
    stop = threading.Event()
    threading.Thread(target=lambda: (_wait_for(tmp_path / "slow-1.*"), stop.set())).start()
    tasks = (task(f"slow-{i}") for i in range(50))
    records = list(drive_alone(tasks, actors(tmp_path), Policy(max_actors=1, drain_s=10), stop=stop))
    assert 0 < len(records) < 50
    assert all(record.status == "done" for record in records)


def test_an_actor_with_notice_ends_what_it_has_begun_and_gets_nothing_more(tmp_path: Path) -> None:
    """What it has not begun is given to another at once, and what is lost with it is nobody's fault."""
    names = ["held-0", "lost-0", "waiting-0", *(f"fine-{i}" for i in range(4))]

    def process(name: str) -> str:
        return next(tmp_path.glob(f"{name}.*")).name.rpartition(".")[2]

    def take_back() -> None:
        for name in names[:3]:
            _wait_for(tmp_path / f"{name}.*")
        (tmp_path / f"leave.{process('held-0')}").touch()

    threading.Thread(target=take_back).start()
    ended = []
    for record in drive_alone(map(task, names), actors(tmp_path, 3), Policy(max_actors=1, max_attempts=1)):
        assert (record.status, record.attempts) == ("done", 1), record.error
        ended.append(record.concept_id)
        if len(ended) == 5:  # all that another could do
            (tmp_path / "end.held-0").touch()
        if ended[-1] == "held-0":
            (tmp_path / "end.lost-0").touch()
    assert sorted(ended[:5]) == sorted(["waiting-0", *(f"fine-{i}" for i in range(4))])
    assert ended[5:] == ["held-0", "lost-0"]
    of_the_first = {path.name.split(".")[0] for path in tmp_path.glob(f"*.{process('held-0')}")}
    assert of_the_first == {*names[:3], "prepared", "leave"}


def test_after_the_deadline_nothing_is_begun_and_what_was_begun_is_finished(tmp_path: Path) -> None:
    tasks = (task(f"fine-{i}") for i in range(100_000))
    records = list(drive_alone(tasks, actors(tmp_path), Policy(max_actors=1), until=time.time() + 8))
    begun = {path.name.partition(".")[0] for path in tmp_path.glob("fine-*")}
    assert {record.concept_id for record in records} == begun
    assert all(record.status == "done" for record in records)
    assert list(drive_alone([task("late-0")], actors(tmp_path), Policy(max_actors=1), until=time.time() - 1)) == []


def test_after_the_deadline_nobody_waits_for_what_had_not_had_its_turn(tmp_path: Path) -> None:
    """A call ahead of its turn would be begun by the actor, and last as long as any."""
    policy = Policy(max_actors=1, calls_ahead=1)
    began = time.time()
    records = list(drive_alone([task("long-0"), task("hung-0")], actors(tmp_path, 2), policy, until=began + 8))
    assert [record.concept_id for record in records] in ([], ["long-0"])  # none where actors start slowly
    assert time.time() - began < 60


def _wait_for(pattern: Path) -> None:
    while not list(pattern.parent.glob(pattern.name)):
        time.sleep(0.05)


def test_no_tasks_need_no_actors(tmp_path: Path) -> None:
    assert settle([], tmp_path) == {}
