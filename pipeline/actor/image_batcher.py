"""Draw pictures for several callers at once, on one thread: requests that wait share batches."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from PIL import Image

from pipeline.actor.failures import is_device_error
from textual_inversion.config import SamplingConfig
from textual_inversion.families.base import Backbone
from textual_inversion.generate import EncodedRequest, ImageRequest, draw, encode_request
from textual_inversion.prompt_encoder import PromptEncoder

_LINGER_S = 0.05
"""Time that a batch which is not full waits for more requests. Concepts that began together end together, and a batch
costs the same full or not; the time is short against any batch."""


@dataclass(eq=False, slots=True)
class _Order:
    """The pictures that one call asked for."""

    drawn: list[Image.Image] = field(default_factory=list)
    future: Future[list[Image.Image]] = field(default_factory=Future)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """One picture of an order."""

    request: EncodedRequest
    order: _Order
    is_last: bool


class ImageBatcher:
    """Thread that draws pictures in the order in which they were asked for, each as if drawn alone (see `generate`)."""

    def __init__(self, backbone: Backbone, config: SamplingConfig) -> None:
        self._backbone = backbone
        self._config = config
        self._encoder = PromptEncoder(backbone, shares_passes=config.batch_size > 1)
        self._waiting: queue.Queue[_Wanted | None] = queue.Queue()
        threading.Thread(target=self._run, name="image-batcher", daemon=True).start()

    def draw(self, requests: Sequence[ImageRequest]) -> Future[list[Image.Image]]:
        """Ask for pictures. Raises BadInput for a bad request.

        An error while they are drawn is set on the future; the same may be asked for again. An order whose pictures
        cannot be drawn does not end the orders that share its batch, unless the device fails.
        """
        order = _Order()
        encoded = [encode_request(self._backbone, request) for request in requests]
        order.future.set_running_or_notify_cancel()  # from now on it cannot be cancelled
        if not encoded:
            order.future.set_result([])
        for request in encoded:
            self._waiting.put(_Wanted(request, order, request is encoded[-1]))
        return order.future

    def close(self) -> None:
        """End the thread when all pictures that were asked for are drawn."""
        self._waiting.put(None)

    def _run(self) -> None:
        while batch := self._next_batch():
            self._draw(batch)

    def _draw(self, batch: Sequence[_Wanted]) -> None:
        """Draw a batch and hand out its pictures; if that fails, draw each order's part alone."""
        try:
            pictures = draw(self._encoder, [wanted.request for wanted in batch], self._config)
        except BaseException as error:
            orders = list(dict.fromkeys(wanted.order for wanted in batch))
            if len(orders) == 1 or is_device_error(error):
                for order in orders:
                    order.future.set_exception(error)
                return
            for order in orders:
                self._draw([wanted for wanted in batch if wanted.order is order])
            return
        for wanted, picture in zip(batch, pictures, strict=True):
            wanted.order.drawn.append(picture)
            if wanted.is_last:
                wanted.order.future.set_result(wanted.order.drawn)

    def _next_batch(self) -> list[_Wanted]:
        """Wait for one picture at least, and return the next batch; empty when the thread is to end."""
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
            if not wanted.order.future.done():  # else a former batch of the order has failed
                until = until or time.monotonic() + _LINGER_S
                batch.append(wanted)
        return batch
