"""Draws pictures for several who ask at once, on one thread: whatever waits shares batches."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from PIL import Image

from textual_inversion.config import SamplingConfig
from textual_inversion.families.base import Backbone
from textual_inversion.generate import EncodedRequest, ImageRequest, draw, encode_request
from textual_inversion.prompt_encoder import PromptEncoder

_LINGER_S = 0.05
"""How long a batch with room waits for company. Concepts that began together end together, and a batch costs the same
full or not; it is short against any batch."""


@dataclass(eq=False, slots=True)
class _Order:
    """What was asked for in one call."""

    drawn: list[Image.Image] = field(default_factory=list)
    future: Future[list[Image.Image]] = field(default_factory=Future)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """One of its pictures."""

    request: EncodedRequest
    order: _Order
    is_last: bool


class ImageBatcher:
    """Pictures in the order asked for, each as if drawn alone (see `generate`)."""

    def __init__(self, backbone: Backbone, config: SamplingConfig) -> None:
        self._backbone, self._config = backbone, config
        self._encoder = PromptEncoder(backbone)
        self._waiting: queue.Queue[_Wanted | None] = queue.Queue()
        threading.Thread(target=self._run, name="painter", daemon=True).start()

    def draw(self, requests: Sequence[ImageRequest]) -> Future[list[Image.Image]]:
        """Raises ValueError for a bad request. What goes wrong later ends all that share the batch, in their futures;
        asking again is no harm."""
        order, encoded = _Order(), [encode_request(self._backbone, request) for request in requests]
        order.future.set_running_or_notify_cancel()  # from now on nobody cancels it
        if not encoded:
            order.future.set_result([])
        for request in encoded:
            self._waiting.put(_Wanted(request, order, request is encoded[-1]))
        return order.future

    def close(self) -> None:
        """End when all that was asked for is drawn."""
        self._waiting.put(None)

    def _run(self) -> None:
        while batch := self._next_batch():
            try:
                pictures = draw(self._encoder, [wanted.request for wanted in batch], self._config)
            except BaseException as error:
                for order in {wanted.order for wanted in batch}:
                    order.future.set_exception(error)
                continue
            for wanted, picture in zip(batch, pictures, strict=True):
                wanted.order.drawn.append(picture)
                if wanted.is_last:
                    wanted.order.future.set_result(wanted.order.drawn)

    def _next_batch(self) -> list[_Wanted]:
        """Waits for one picture at least; none at the end."""
        batch: list[_Wanted] = []
        until = 0.0
        while len(batch) < self._config.batch_size:
            try:
                wanted = self._waiting.get(timeout=max(0.0, until - time.monotonic()) if batch else None)
            except queue.Empty:
                break
            if wanted is None:
                self._waiting.put(None)
                break
            if not wanted.order.future.done():  # else an earlier batch of it has failed
                until = until or time.monotonic() + _LINGER_S
                batch.append(wanted)
        return batch
