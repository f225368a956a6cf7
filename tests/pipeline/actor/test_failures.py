"""Every exception ends a concept in one way."""

from __future__ import annotations

import pytest
import torch
from botocore.exceptions import NoCredentialsError

from pipeline.actor.failures import broken_by, failure_of, is_device_error
from pipeline.store.errors import ActorBroken, ActorLeaving, InputChanged, PhotosUnreachable, RunAborted, StoreFailed
from textual_inversion.errors import BUG, LOST_WORKER, BadInput, NotFinite

LOG = "s3://bucket/concepts/toy/f/log.jsonl"


class Unknown(Exception):
    """An exception that no code knows of."""


@pytest.mark.parametrize(
    ("error", "kind"), [(BadInput("the photo is empty"), "bad_input"), (NotFinite("latents"), "numerics")]
)
def test_what_judges_a_concept_blames_it(error: Exception, kind: str) -> None:
    failure = failure_of(error, LOG)
    assert (failure.kind, failure.text, failure.trace) == (kind, str(error), "")


@pytest.mark.parametrize(
    "error", [ValueError("x"), TypeError("x"), KeyError("x"), RuntimeError("shapes (3) and (4)"), Unknown("x")]
)
def test_anything_unforeseen_is_a_bug_with_its_place_and_trace(error: Exception) -> None:
    try:
        raise error
    except Exception as raised:
        failure = failure_of(raised, LOG)
    assert failure.kind == BUG
    assert failure.text.startswith(f"bug in this software, not a fault of the concept: {type(error).__name__}: ")
    assert "(test_failures.py, line " in failure.text
    assert failure.text.endswith(f"the traceback is in {LOG}")
    assert "\n" not in failure.text
    assert "Traceback" in failure.trace
    assert type(error).__name__ in failure.trace


@pytest.mark.parametrize(
    "error",
    [
        ActorBroken("x", BUG),
        ActorLeaving("x"),
        StoreFailed("x"),
        PhotosUnreachable("x"),
        InputChanged("x"),
        RunAborted("x"),
    ],
)
def test_what_the_driver_decides_about_is_raised_as_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as raised:
        failure_of(error, LOG)
    assert raised.value is error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    ],
)
def test_a_lost_device_breaks_the_actor(error: Exception) -> None:
    assert is_device_error(error)
    with pytest.raises(ActorBroken) as raised:
        failure_of(error, LOG)
    assert raised.value.kind == LOST_WORKER


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "on .+: No space left on device; the disk is full: free some space"),
        (NoCredentialsError(), "on .+: Unable to locate credentials; give the store's client credentials"),
    ],
)
def test_errors_of_stores_and_their_clients_are_storage_errors(error: Exception, said: str) -> None:
    """They name the node, whose clock, disk or credentials may differ from the others'."""
    with pytest.raises(StoreFailed, match=said):
        failure_of(error, LOG)


@pytest.mark.parametrize(
    ("error", "kind"), [(Unknown("x"), BUG), (MemoryError(), LOST_WORKER), (SystemExit(1), LOST_WORKER)]
)
def test_an_actor_is_broken_by_a_bug_or_by_its_device(error: BaseException, kind: str) -> None:
    assert broken_by(error).kind == kind
    assert type(error).__name__ in str(broken_by(error))
