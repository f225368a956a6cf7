"""Pictures that several concepts ask for are drawn once, unless that failed or they have had to go."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

import pytest
from PIL import Image

from pipeline.actor import shared_pictures
from pipeline.actor.shared_pictures import SharedPictures
from textual_inversion.generate import ImageRequest

SIDE_PX = 8


class Artist:
    """Orders that stay open until somebody ends them."""

    def __init__(self) -> None:
        self.orders: list[tuple[Sequence[ImageRequest], Future[list[Image.Image]]]] = []

    def draw(self, requests: Sequence[ImageRequest]) -> Future[list[Image.Image]]:
        self.orders.append((requests, Future()))
        return self.orders[-1][1]


def asked(word: str) -> list[ImageRequest]:
    return [ImageRequest(f"a photo of a {word}", seed) for seed in (1, 2)]


@pytest.fixture
def artist() -> Artist:
    return Artist()


def test_what_is_there_or_under_way_is_shared(artist: Artist) -> None:
    pictures = SharedPictures(artist.draw, SIDE_PX)
    first = pictures.of(asked("cat"))
    assert pictures.of(asked("cat")) is first, "while it is drawn"
    first.set_result([])
    assert pictures.of(asked("cat")) is first
    assert pictures.of(asked("dog")) is not first
    assert [requests for requests, _ in artist.orders] == [asked("cat"), asked("dog")]


def test_what_failed_is_drawn_again(artist: Artist) -> None:
    pictures = SharedPictures(artist.draw, SIDE_PX)
    pictures.of(asked("cat")).set_exception(MemoryError())
    second = pictures.of(asked("cat"))
    assert not second.done()
    assert len(artist.orders) == 2


def test_the_sets_that_were_asked_for_last_are_kept(artist: Artist, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_pictures, "_MOST_BYTES", 4 * 3 * SIDE_PX**2)  # two sets of two pictures
    pictures = SharedPictures(artist.draw, SIDE_PX)
    for word in ("cat", "dog", "cat", "bird", "cat", "dog"):
        pictures.of(asked(word))
    assert [requests[0].prompt[13:] for requests, _ in artist.orders] == ["cat", "dog", "bird", "dog"]
