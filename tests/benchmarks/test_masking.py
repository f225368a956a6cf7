"""Photos on a busy background with masks, made from photos on white."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.concepts import held_out_objects, read_masks, read_photos
from benchmarks.masking import busy_concept, is_on_white, mask_on_white
from pipeline.store.storage import RunStore
from textual_inversion.concept import Concept


def ring() -> Image.Image:
    """A red frame around white, on a white that is not quite even."""
    picture = Image.new("RGB", (32, 32), (250, 252, 249))
    picture.paste((248, 250, 252), (0, 0, 16, 32))
    picture.paste((200, 30, 30), (8, 8, 24, 24))
    picture.paste((250, 250, 250), (12, 12, 20, 20))
    return picture


def test_white_inside_the_thing_belongs_to_it() -> None:
    mask = np.asarray(mask_on_white(ring()))
    assert set(np.unique(mask)) == {0, 255}
    wanted = np.zeros((32, 32), int)
    wanted[8:24, 8:24] = 255
    assert (mask == wanted).all()


def test_a_photo_on_a_colour_is_not_on_white() -> None:
    assert is_on_white(ring())
    assert not is_on_white(Image.new("RGB", (32, 32), "blue"))


def test_a_concept_on_a_busy_background(tmp_path: Path) -> None:
    concept = next(held_out_objects())
    busy = busy_concept(concept, RunStore(str(tmp_path)))
    photos, before = read_photos(busy), [photo for photo in read_photos(concept) if is_on_white(photo)]
    masks = read_masks(busy, photos)
    assert 2 <= len(photos) == len(masks) == len(before) < len(concept.images)
    for photo, mask, old in zip(photos, masks, before, strict=True):
        shown = np.asarray(mask) > 127
        assert (np.asarray(photo)[shown] == np.asarray(old)[shown]).all()
        assert np.abs(np.asarray(photo).astype(int) - np.asarray(old))[~shown].mean() > 40
    assert busy_concept(concept, RunStore(str(tmp_path / "again"))).concept_id == concept.concept_id


def test_a_concept_without_white_photos_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "0.png")
    concept = Concept(concept_id="sea", placeholder_token="<sea>", images=(str(tmp_path / "0.png"),))
    with pytest.raises(ValueError, match="'sea' has no photo on white"):
        busy_concept(concept, RunStore(str(tmp_path)))
