"""Every transform goes with its own token, and no token or transform comes alone: the released code failed in this."""

from __future__ import annotations

from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from tests.toy_backbone import VOCAB_SIZE, VOCABULARY, ToyBackbone
from textual_inversion import paired_augment
from textual_inversion.augment_config import AugmentConfig, TransformSet
from textual_inversion.concept import Concept
from textual_inversion.initialise import augmentation_rows
from textual_inversion.paired_augment import TRANSFORM_SETS, AugmentedPhoto, augment_paired
from textual_inversion.prompts import augmentation_word, encode_prompt, training_templates, with_augmentation_words

SIDE = 32


def picture() -> Image.Image:
    """Noise of low contrast, in which every transform shows."""
    return Image.fromarray(np.random.default_rng(0).integers(60, 140, (SIDE, SIDE, 3), dtype=np.uint8))


def whole() -> AugmentedPhoto:
    mask = Image.new("L", (SIDE, SIDE), 0)
    mask.paste(255, (4, 8, 20, 24))
    return AugmentedPhoto(picture=picture(), mask=mask)


@cache
def drawn(count: int, probability: float, transforms: TransformSet = "release") -> list[AugmentedPhoto]:
    config = AugmentConfig(paired=1, paired_probability=probability, paired_set=transforms)
    generator = torch.Generator().manual_seed(0)
    return [augment_paired(whole(), config, generator) for _ in range(count)]


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def left_to_right(view: AugmentedPhoto) -> float:
    """Where the mask's white is across the picture, from 0 to 1."""
    across = pixels(view.mask).sum(0)
    return float((across * np.linspace(0, 1, SIDE)).sum() / across.sum())


# What each token says was done, seen in the picture alone.
SEEN = {
    "grayscale": lambda view: (np.ptp(pixels(view.picture), axis=2) == 0).all(),
    "bright": lambda view: 1.25 < pixels(view.picture).mean() / pixels(picture()).mean() < 1.55,
    "dimmed": lambda view: 0.35 < pixels(view.picture).mean() / pixels(picture()).mean() < 0.65,
    "hflip": lambda view: view.picture == ImageOps.mirror(picture()) and view.mask == ImageOps.mirror(whole().mask),
    "vflip": lambda view: view.picture == ImageOps.flip(picture()) and view.mask == ImageOps.flip(whole().mask),
    "left": lambda view: left_to_right(view) < left_to_right(whole()) - 0.05,
    "right": lambda view: left_to_right(view) > left_to_right(whole()) + 0.1,
    "zoom-in": lambda view: pixels(view.mask).sum() > 1.3 * pixels(whole().mask).sum(),
    "zoom-out": lambda view: pixels(view.mask).sum() < 0.5 * pixels(whole().mask).sum(),
    "cutout": lambda view: 9 <= (pixels(view.picture) == 0).all(2).sum() <= 121,  # sides of 0.1 to 0.33 of 32 px
    "grid": lambda view: repeats(view, 2) or repeats(view, 4),
    "collage": lambda view: (repeats(view, 2) or repeats(view, 3)) and (pixels(view.picture)[0] == 0).all(),
    "crop": lambda view: view.picture != picture(),
}


def repeats(view: AugmentedPhoto, tiles: int) -> bool:
    """Whether the picture's second tile is its first."""
    tile = -(-SIDE // tiles)
    shown = pixels(view.picture)
    return bool((shown[:tile, : SIDE - tile][:, :tile] == shown[:tile, tile : 2 * tile][:, : SIDE - tile]).all())


@pytest.mark.parametrize(
    ("transforms", "acting"),
    [("release", {*TRANSFORM_SETS["release"].tokens} - {"hflip"}), ("late", {*TRANSFORM_SETS["late"].tokens})],
)
def test_every_token_says_what_was_done(transforms: TransformSet, acting: set[str]) -> None:
    """The release's mirror image has a token and never acts."""
    seen = Counter()
    for view in drawn(2000, 0.3, transforms):
        if len(view.augmentation.names) == 1:
            (name,) = view.augmentation.names
            assert SEEN[name](view), name
            seen[name] += 1
    assert set(seen) == acting
    assert min(seen.values()) > 5


def test_without_a_token_nothing_was_done_but_a_mild_rescaling() -> None:
    unnamed = [view for view in drawn(2000, 0.3) if not view.augmentation.names]
    untouched = sum(view.picture == picture() for view in unnamed)
    assert untouched > 200
    for view in unnamed:
        assert 0.3 < pixels(view.mask).sum() / pixels(whole().mask).sum() < 1.5
    assert 0 < len(unnamed) - untouched < untouched


GEOMETRY = {"zoom-in", "zoom-out", "crop", "left", "right", "hflip", "vflip"}
UNNAMED = 0.6 / 1.06  # share of the rescalings, factors from 0.6 to 1.2, that have no token


@pytest.mark.parametrize(
    ("transforms", "shares"),
    [("release", (0.8 * (1 - UNNAMED / 4), 0.8, 0.8)), ("late", (0.8 * (1 - UNNAMED / 4), 0.2, 0.8))],
)
def test_a_group_acts_with_its_probability_by_one_operation(transforms: TransformSet, shares: tuple[float]) -> None:
    groups = (GEOMETRY, {"grayscale", "bright", "dimmed"}, {"cutout", "grid", "collage"})
    named = [set(view.augmentation.names) for view in drawn(2000, 0.8, transforms)]
    assert all(len(names & group) <= 1 for names in named for group in groups)
    found = [sum(bool(names & group) for names in named) / len(named) for group in groups]
    assert found == pytest.approx(shares, abs=0.03)


def test_an_operation_is_drawn_as_often_as_in_the_released_code() -> None:
    """One of four, of two and of two; brightness is one operation that dims and brightens equally often."""
    of = Counter(name for view in drawn(4000, 1.0) for name in view.augmentation.names)
    expected = {"vflip": 1 / 4, "crop": 1 / 4, "grayscale": 1 / 2, "bright": 1 / 4, "dimmed": 1 / 4, "cutout": 1 / 2}
    assert {name: of[name] / 4000 for name in expected} == pytest.approx(expected, abs=0.03)
    assert of["left"] / 4000 == pytest.approx(1 / 8, abs=0.02)


def test_a_token_stands_where_the_released_code_writes_it() -> None:
    """Shifts behind the prompt, zooms and grids in front, all others on either side; the last to act is foremost."""
    places = Counter()
    for view in drawn(2000, 0.8):
        places.update((name, "before") for name in view.augmentation.before)
        places.update((name, "after") for name in view.augmentation.after)
    always = {"left": "after", "right": "after", "zoom-in": "before", "zoom-out": "before", "grid": "before"}
    for name in {*TRANSFORM_SETS["release"].tokens} - {"hflip"}:
        share = places[name, "before"] / (places[name, "before"] + places[name, "after"])
        expected = {"before": 1.0, "after": 0.0}.get(always.get(name, ""), 0.5)
        assert share == pytest.approx(expected, abs=0.06), name
    twice = [view.augmentation.before for view in drawn(2000, 0.8) if len(view.augmentation.before) == 2]
    assert all(first not in GEOMETRY for first, _ in twice)


def test_a_crop_has_a_uniform_area() -> None:
    """From 0.08 to 1 of the photo's: the mask, which the photo's place does not change on average, tells how much."""
    generator = torch.Generator().manual_seed(2)
    config = AugmentConfig(paired=1, paired_probability=1.0)
    white = AugmentedPhoto(picture=Image.new("RGB", (SIDE, SIDE)), mask=Image.linear_gradient("L").resize((SIDE, SIDE)))
    views = [augment_paired(white, config, generator) for _ in range(3000)]
    crops = [pixels(view.mask) for view in views if {*view.augmentation.names} & {"crop"}]
    heights = [(mask.max() - mask.min()) / 255 for mask in crops]
    assert float(np.mean([height**2 for height in heights])) == pytest.approx(0.54, abs=0.12)
    assert min(heights) < 0.4


def test_draws_are_the_generators_alone() -> None:
    assert drawn.__wrapped__(20, 0.8) == drawn.__wrapped__(20, 0.8)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    augment_paired(whole(), AugmentConfig(paired=1, paired_probability=0.01), generators[0])
    augment_paired(whole(), AugmentConfig(paired=1, paired_probability=1.0), generators[1])
    assert torch.equal(*(torch.rand(3, generator=generator) for generator in generators))


def test_operations_leave_what_they_are_given() -> None:
    view = whole()
    for changed in (
        paired_augment.cutout(view, 0.3, 0.5, 0.5),
        paired_augment.brightness(view, 1.4),
        paired_augment.grid(view, 3),
    ):
        assert changed.picture != view.picture
    assert view == whole()


def test_shifting_bares_the_edge() -> None:
    shifted = paired_augment.shift(whole(), 0.25)
    assert (pixels(shifted.picture)[:, 8:] == pixels(picture())[:, :-8]).all()
    assert (pixels(shifted.picture)[:, :8] == pixels(picture())[:, :1]).all()
    assert (pixels(shifted.mask)[:, :8] == 0).all()
    assert (pixels(paired_augment.shift(whole(), -0.25).picture)[:, :-8] == pixels(picture())[:, 8:]).all()


def test_zooming_keeps_the_size_and_out_keeps_the_edge() -> None:
    small = paired_augment.rescale(whole(), 0.5)
    assert small.picture.size == small.mask.size == (SIDE, SIDE)
    assert (pixels(small.picture)[:8, :8] == pixels(small.picture)[8, 8]).all()
    assert pixels(small.mask)[:8].sum() == 0
    near = paired_augment.rescale(whole(), 2.0)
    assert pixels(near.mask).sum() > 2 * pixels(whole().mask).sum()
    assert paired_augment.rescale(whole(), 1.0) == whole()


def test_a_cut_out_part_is_not_the_concept() -> None:
    cut = paired_augment.cutout(whole(), 0.4, 0.3, 0.5)
    assert 0 < pixels(cut.mask).sum() < pixels(whole().mask).sum()
    assert ((pixels(cut.picture) == 0).all(2) <= (pixels(cut.mask) == 0)).all()


@pytest.mark.parametrize("transforms", TRANSFORM_SETS)
def test_a_prompt_reads_the_rows_of_its_own_tokens(transforms: TransformSet) -> None:
    """From a view to the ids that the text encoder sees: the i-th token's row, for every token."""
    backbone = ToyBackbone()
    first = VOCAB_SIZE
    tokens = TRANSFORM_SETS[transforms].tokens
    row_of = {augmentation_word(name): [i] for i, name in enumerate(tokens)}
    rows = augmentation_rows(backbone, tokens)
    concept = Concept(concept_id="a", placeholder_token="<a>", images=("x",))
    for i, (name, words) in enumerate(tokens.items()):
        for template in training_templates(concept, class_cue=False):
            before, after = (with_augmentation_words(template, *places) for places in (([name], []), ([], [name])))
            for prompt, expected in ((before, [first + i, first + 50]), (after, [first + 50, first + i])):
                ids = encode_prompt(prompt, row_of | {"{}": [50]}, backbone.vocabularies)
                assert [token for token in ids["long"] if token >= first] == expected
        for key, table in backbone.token_tables.items():
            torch.testing.assert_close(rows[key][i], table.weight[VOCABULARY.tokenize(words)].mean(0))
