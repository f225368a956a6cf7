"""Those who ask at the same time share batches, and get what they would get alone."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.actor import image_batcher
from pipeline.actor.image_batcher import ImageBatcher
from tests.textual_inversion.example_requests import an_embedding
from textual_inversion.batch_invariance import drawing_is_invariant
from textual_inversion.config import SamplingConfig
from textual_inversion.families.base import Backbone
from textual_inversion.generate import ImageRequest, generate

CONFIG = SamplingConfig(steps=2, batch_size=4)


def asked(concept: int, count: int) -> list[ImageRequest]:
    embedding = an_embedding(concept)
    return [ImageRequest("a photo of a <c>", seed, (embedding,)) for seed in range(count)]


class Gate:
    """Lets batches be drawn when it is open, and notes their sizes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.begun = threading.Event(), threading.Event()
        self.sizes: list[int] = []
        self.errors: list[BaseException | None] = []
        """Of the batches in their order."""
        self._draw = image_batcher.draw
        monkeypatch.setattr(image_batcher, "draw", self)
        monkeypatch.setattr(image_batcher, "_LINGER_S", 0.0)

    def hold(self, shared: ImageBatcher) -> None:
        """Keep the thread at a full batch, while which all that is asked for waits together."""
        shared.draw(asked(9, CONFIG.batch_size))
        assert self.begun.wait(120)

    def __call__(self, encoder: Any, requests: Sequence[Any], config: SamplingConfig) -> list[Image.Image]:
        self.begun.set()
        assert self.open.wait(120)
        self.sizes.append(len(requests))
        if error := self.errors.pop(0) if self.errors else None:
            raise error
        return self._draw(encoder, requests, config)


def assert_as_alone(backbone: Backbone, drawn: Sequence[Image.Image], order: Sequence[ImageRequest]) -> None:
    """The pictures are those drawn alone: to the bit, or where kernels do not treat all places alike, to a level."""
    tolerance = 0 if drawing_is_invariant(backbone, CONFIG) else 1
    for ours, theirs in zip(drawn, generate(backbone, order, CONFIG), strict=True):
        assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max() <= tolerance


def test_who_asks_together_shares_batches_and_gets_what_is_drawn_alone(
    tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, shared = Gate(monkeypatch), ImageBatcher(tiny_backbone, CONFIG)
    gate.hold(shared)
    orders = [asked(0, 4), asked(1, 3), asked(2, 2), asked(3, 6), []]
    futures = [shared.draw(order) for order in orders]
    gate.open.set()
    found = [future.result(60) for future in futures]
    assert gate.sizes[1:] == [4, 4, 4, 3], "15 pictures, where concept by concept had taken five batches"
    for pictures, order in zip(found, orders, strict=True):
        assert_as_alone(tiny_backbone, pictures, order)
    shared.close()


def test_what_fails_ends_those_in_the_batch_and_no_others(
    tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, shared = Gate(monkeypatch), ImageBatcher(tiny_backbone, CONFIG)
    gate.hold(shared)
    gate.errors = [None, torch.OutOfMemoryError("CUDA out of memory")]
    long, short, last = (shared.draw(asked(concept, count)) for concept, count in enumerate((3, 6, 2)))
    gate.open.set()
    for future in (long, short):
        with pytest.raises(torch.OutOfMemoryError):
            future.result(60)
    assert_as_alone(tiny_backbone, last.result(60), asked(2, 2))
    assert gate.sizes[1:] == [4, 2], "of an order that has failed no more is drawn"
    assert len(shared.draw(asked(1, 6)).result(60)) == 6, "and it may be asked again"
    shared.close()


def test_a_bug_with_one_order_does_not_end_those_that_share_its_batch(
    tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, shared = Gate(monkeypatch), ImageBatcher(tiny_backbone, CONFIG)
    plain = gate._draw

    def unforeseen(encoder: Any, requests: Sequence[Any], config: SamplingConfig) -> list[Image.Image]:
        if any(request.seed == 99 for request in requests):
            raise KeyError("a mistake in the code")
        return plain(encoder, requests, config)

    gate._draw = unforeseen
    gate.hold(shared)
    bad = ImageRequest("a photo of a <c>", 99, (an_embedding(1),))
    well, ill, after = (shared.draw(order) for order in (asked(0, 2), [bad], asked(2, 3)))
    gate.open.set()
    with pytest.raises(KeyError, match="a mistake in the code"):
        ill.result(60)
    assert_as_alone(tiny_backbone, well.result(60), asked(0, 2))
    assert_as_alone(tiny_backbone, after.result(60), asked(2, 3))
    shared.close()


def test_a_bad_request_is_told_to_who_asks(tiny_backbone: Backbone) -> None:
    shared = ImageBatcher(tiny_backbone, CONFIG)
    with pytest.raises(ValueError, match="does not contain the placeholder token '<c>'"):
        shared.draw([ImageRequest("a cat", 0, (an_embedding(0),))])
    assert len(shared.draw(asked(0, 1)).result(60)) == 1
    shared.close()


def test_closing_lets_it_draw_what_was_asked_for(tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    others = set(threading.enumerate())
    gate, shared = Gate(monkeypatch), ImageBatcher(tiny_backbone, CONFIG)
    (thread,) = set(threading.enumerate()) - others
    waiting: list[Future[Any]] = [shared.draw(asked(0, 1))]
    assert gate.begun.wait(30)
    waiting.append(shared.draw(asked(1, 5)))
    shared.close()
    gate.open.set()
    assert [len(future.result(60)) for future in waiting] == [1, 5]
    thread.join(30)
    assert not thread.is_alive()
