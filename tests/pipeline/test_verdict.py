"""Each row of the table of verdicts."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorDiedError, NodeDiedError, RayTaskError

from pipeline.store.errors import (
    ActorBroken,
    ActorLeaving,
    InputChanged,
    PhotosUnreachable,
    RunAborted,
    StoreFailed,
)
from pipeline.verdict import MAX_REPLANS, ActorFacts, Fate, WorkFacts, actor_fate, decide, proves_nothing
from textual_inversion.errors import BUG


def raised(cause: Exception) -> Exception:
    """What `ray.get` raises for an exception of an actor's method."""
    error: Exception = RayTaskError("learn", "Traceback ...", cause).as_instanceof_cause()
    return error


class Preempted(ActorDiedError):
    """As Ray says it of an actor whose node was taken back."""

    preempted = True


DIED, HUNG = ActorDiedError(), TimeoutError("not learned within 2 s (actors.stall_s)")
NEW, ONCE, TWICE = WorkFacts(), WorkFacts(lost_calls=1), WorkFacts(lost_calls=2)
COMPANY, ALONE = ActorFacts(num_calls=3), ActorFacts(num_calls=1)


@pytest.mark.parametrize(
    "error", [DIED, HUNG, NodeDiedError(""), raised(ActorBroken("x")), raised(ActorBroken("x", BUG))]
)
def test_these_lose_the_actor(error: Exception) -> None:
    assert actor_fate(error) == "lost"


def test_an_actor_leaves_or_stays() -> None:
    assert actor_fate(raised(ActorLeaving("x"))) == "leaves"
    for cause in (StoreFailed("x"), PhotosUnreachable("x"), InputChanged("x"), KeyError("x"), RunAborted("x")):
        assert actor_fate(raised(cause)) == "stays"


@pytest.mark.parametrize(
    ("error", "actor", "is_known"),
    [(DIED, ActorFacts(is_leaving=True), True), (Preempted(), COMPANY, True), (DIED, COMPANY, False)],
)
def test_a_node_that_is_taken_back_proves_nothing(error: Exception, actor: ActorFacts, is_known: bool) -> None:
    assert proves_nothing(error, actor) is is_known


@pytest.mark.parametrize(
    ("error", "actor", "work", "is_to_blame", "fate", "after"),
    [
        (DIED, ActorFacts(num_calls=3, is_leaving=True), TWICE, True, Fate.HAND_BACK, TWICE),
        (Preempted(), COMPANY, TWICE, True, Fate.HAND_BACK, TWICE),
        (HUNG, COMPANY, TWICE, False, Fate.HAND_BACK, TWICE),
        (DIED, COMPANY, NEW, True, Fate.RETRY_ALONE, ONCE),
        (HUNG, COMPANY, NEW, True, Fate.RETRY_ALONE, ONCE),
        (DIED, ALONE, ONCE, True, Fate.RETRY_ALONE, WorkFacts(lost_calls=2, lost_alone=1)),
        (raised(ActorBroken("x", BUG)), COMPANY, ONCE, True, Fate.RETRY_ALONE, TWICE),
        (raised(ActorBroken("x", BUG)), ALONE, NEW, True, Fate.RETRY_ALONE, WorkFacts(lost_calls=1, lost_alone=1)),
        (raised(StoreFailed("x")), COMPANY, TWICE, True, Fate.WAIT_FOR_STORAGE, TWICE),
        (raised(PhotosUnreachable("x")), COMPANY, ONCE, True, Fate.RETRY, TWICE),
        (raised(ConnectionError("x")), COMPANY, ONCE, True, Fate.RETRY, TWICE),
    ],
)
def test_a_concept_is_called_again(
    error: Exception, actor: ActorFacts, work: WorkFacts, is_to_blame: bool, fate: Fate, after: WorkFacts
) -> None:
    verdict = decide(error, actor, work, 3, is_to_blame=is_to_blame)
    assert (verdict.fate, verdict.work, verdict.is_retry) == (fate, after, True)


def test_a_concept_that_was_not_begun_is_handed_back_and_no_call_is_lost() -> None:
    verdict = decide(raised(ActorLeaving("x")), COMPANY, TWICE, 3)
    assert (verdict.fate, verdict.work, verdict.is_retry) == (Fate.HAND_BACK, TWICE, False)


def test_a_concept_whose_photos_changed_is_planned_anew_and_no_call_is_lost() -> None:
    verdict = decide(raised(InputChanged("x")), COMPANY, ONCE, 3)
    after = WorkFacts(lost_calls=1, replans=1)
    assert (verdict.fate, verdict.work, verdict.is_retry) == (Fate.REPLAN, after, False)


@pytest.mark.parametrize(
    ("error", "actor", "work", "kind", "is_quarantined", "text"),
    [
        (DIED, COMPANY, TWICE, "lost_worker", True, "given up after 3 lost calls; the last: ActorDiedError"),
        (DIED, ALONE, TWICE, "lost_worker", True, "given up after 3 lost calls, 1 of them alone; the last: "),
        (HUNG, ALONE, TWICE, "lost_worker", True, "not learned within 2 s"),
        (raised(ActorBroken("no memory")), COMPANY, TWICE, "lost_worker", True, "ActorBroken: no memory"),
        (raised(ActorBroken("KeyError: 'x'", BUG)), COMPANY, TWICE, "bug", True, "given up after 3 lost calls"),
        (raised(ActorBroken("KeyError: 'x'", BUG)), ALONE, ONCE, "bug", False, "bug in this software, which stopped"),
        (raised(PhotosUnreachable("503")), COMPANY, TWICE, "storage", True, "PhotosUnreachable: 503"),
        (raised(KeyError("x")), COMPANY, NEW, "bug", False, "bug in this software, not a fault of the concept: KeyEr"),
        (raised(ValueError("x")), COMPANY, NEW, "bug", False, "ValueError: x"),
        (
            raised(InputChanged("photo a.png has changed since the plan")),
            COMPANY,
            WorkFacts(replans=MAX_REPLANS),
            "bad_input",
            False,
            "photo a.png has changed since the plan, 3 times in this run",
        ),
    ],
)
def test_a_concept_fails_with_the_true_kind(
    error: Exception, actor: ActorFacts, work: WorkFacts, kind: str, is_quarantined: bool, text: str
) -> None:
    verdict = decide(error, actor, work, 3)
    assert (verdict.fate, verdict.kind, verdict.is_quarantined) == (Fate.FAIL, kind, is_quarantined)
    assert text in verdict.text
    assert verdict.work.num_calls == work.num_calls + 1


def test_an_actor_that_refuses_the_run_ends_it() -> None:
    verdict = decide(raised(RunAborted("the model here has digest aa, the plan's bb")), COMPANY, NEW, 3)
    assert (verdict.fate, verdict.text) == (Fate.ABORT, "the model here has digest aa, the plan's bb")
