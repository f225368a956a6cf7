"""The training pool: the same for any number of workers, and read as it was drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from demo import pool
from demo.art import REQUIRED_SETS
from demo.objects import HELD_OUT, TRAINING
from demo.pool import UnnamedPool, build_pool, build_unnamed_pool, load_pool, load_unnamed_pool
from demo.unnamed import UNNAMED
from demo.world import PICTURE_PX, STYLES


@pytest.fixture
def atlas_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Atlas file of small squares; one art set holds the first object only, others hold none."""
    monkeypatch.setattr(pool, "_CHUNK", 60)
    square = np.full((32, 32, 4), (200, 60, 20, 255), np.uint8)
    things = (*TRAINING, *(held.object for held in HELD_OUT))
    keys = [f"{art_set}/{thing.slug}" for art_set in REQUIRED_SETS for thing in things]
    path = tmp_path / "atlas.npz"
    np.savez(path, **dict.fromkeys([*keys, f"noto-v1/{TRAINING[0].slug}"], square))
    return path


def test_pool_is_the_same_for_any_number_of_workers(atlas_file: Path, tmp_path: Path) -> None:
    pools = []
    for workers in (1, 2):
        work = tmp_path / str(workers)
        work.mkdir()
        (work / "atlas.npz").symlink_to(atlas_file)
        build_pool(work, count=110, seed=3, workers=workers)
        pools.append(load_pool(work))
    one, two = pools
    assert len(one.captions) == len(one.names) == len(one.attributes) == len(one.pictures) == 120  # whole chunks
    assert (one.captions, one.names, one.attributes) == (two.captions, two.names, two.attributes)
    assert (one.pictures == two.pictures).all()


def test_rows_say_what_the_scene_has(atlas_file: Path) -> None:
    build_pool(atlas_file.parent, count=240, seed=1, workers=1)
    drawn = load_pool(atlas_file.parent)
    taught = {thing.name for thing in TRAINING}
    for names, (style, *_, relation) in zip(drawn.names, drawn.attributes, strict=True):
        assert taught.issuperset(names)
        assert style in STYLES
        assert len(names) == (2 if relation else 1)
    assert {len(names) for names in drawn.names} == {1, 2}


def _unnamed(folder: Path, atlas_file: Path, seed: int = 5) -> UnnamedPool:
    folder.mkdir()
    (folder / "atlas.npz").symlink_to(atlas_file)
    build_unnamed_pool(folder, objects=60, seed=seed)
    return load_unnamed_pool(folder)


def test_every_unnamed_scene_has_its_object_and_its_word(atlas_file: Path, tmp_path: Path) -> None:
    drawn = _unnamed(tmp_path / "one", atlas_file)
    count = len(drawn.captions)
    assert 200 < count <= 4 * 60
    assert drawn.portraits.shape == (60, PICTURE_PX, PICTURE_PX, 3)
    assert drawn.pictures.shape == (count, PICTURE_PX, PICTURE_PX, 3)
    assert drawn.objects.shape == (count,)
    assert (np.diff(drawn.objects) >= 0).all()
    assert set(drawn.objects) == set(range(60))
    assert all(text.count(UNNAMED) == 1 for text in drawn.captions)


def test_an_unnamed_word_may_stand_before_its_class_noun_and_no_held_out_name_is_said(
    atlas_file: Path, tmp_path: Path
) -> None:
    texts = _unnamed(tmp_path / "one", atlas_file).captions
    taught = {thing.name for thing in TRAINING}
    with_noun = [name for text in texts for name in taught if f"{UNNAMED} {name}" in text]
    assert with_noun
    assert len(with_noun) < len(texts)
    assert not [held for held in HELD_OUT if any(f"{UNNAMED} {held.object.name}" in text for text in texts)]


def test_the_same_seed_gives_the_same_unnamed_pool(atlas_file: Path, tmp_path: Path) -> None:
    one, two, other = (_unnamed(tmp_path / name, atlas_file, seed) for name, seed in (("a", 5), ("b", 5), ("c", 6)))
    assert one.captions == two.captions != other.captions
    assert (one.pictures == two.pictures).all()
    assert (one.portraits == two.portraits).all()


def test_unnamed_objects_have_many_hues_on_white(atlas_file: Path, tmp_path: Path) -> None:
    portraits = _unnamed(tmp_path / "one", atlas_file).portraits
    assert (portraits[:, :3, :3] > 240).all()
    middles = portraits[:, PICTURE_PX // 2, PICTURE_PX // 2]
    assert len({tuple(colour) for colour in middles}) > 20
