"""Keep pictures that several concepts ask for: an actor draws an initializer word once, however many concepts start
from it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from PIL import Image

from textual_inversion.generate import ImageRequest

_MOST_BYTES = 128 * 1024**2

Drawn = Future[list[Image.Image]]


class SharedPictures:
    """The pictures of the sets of requests that were asked for last. To be used from one thread."""

    def __init__(self, draw: Callable[[Sequence[ImageRequest]], Drawn], side_px: int) -> None:
        """Draw pictures of `side_px` pixels a side by `draw`, and keep 128 MB of them; the last set in any case."""
        self._draw = draw
        self._most_pictures = _MOST_BYTES // (3 * side_px * side_px)
        self._kept: OrderedDict[tuple[ImageRequest, ...], Drawn] = OrderedDict()

    def of(self, requests: Sequence[ImageRequest]) -> Drawn:
        """Return the pictures of requests: those that are there or being drawn, else those of a new order.

        Pictures that could not be drawn are not kept. Raises what `draw` raises.
        """
        key = tuple(requests)
        found = self._kept.pop(key, None)
        if found is None or (found.done() and found.exception()):
            found = self._draw(requests)
        self._kept[key] = found
        while len(self._kept) > 1 and sum(map(len, self._kept)) > self._most_pictures:
            self._kept.popitem(last=False)
        return found
