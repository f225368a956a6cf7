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
from textual_inversion.concept import Concept
from textual_inversion.initialise import augmentation_rows
from textual_inversion.paired_augment import AUGMENTATION_TOKENS, AugmentedPhoto, augment_paired
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
def drawn(count: int, probability: float) -> list[AugmentedPhoto]:
    generator = torch.Generator().manual_seed(0)
    return [augment_paired(whole(), probability, generator) for _ in range(count)]


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
    "cutout": lambda view: (pixels(view.picture) == 127).all(2).sum() > 25,
    "grid": lambda view: (
        (pixels(view.picture)[:8, :8] == pixels(view.picture)[16:24, 16:24]).all()
        or (pixels(view.picture)[:8, :8] == pixels(view.picture)[11:19, 11:19]).all()
    ),
    "crop": lambda view: view.picture != picture(),
}


def test_every_token_says_what_was_done() -> None:
    seen = Counter()
    for view in drawn(2000, 0.3):
        if len(view.augmentation) == 1:
            (name,) = view.augmentation
            assert SEEN[name](view), name
            seen[name] += 1
    assert set(seen) == set(AUGMENTATION_TOKENS) == set(SEEN)
    assert min(seen.values()) > 5


def test_without_a_token_nothing_was_done_but_a_mild_rescaling() -> None:
    unnamed = [view for view in drawn(2000, 0.3) if not view.augmentation]
    untouched = sum(view.picture == picture() for view in unnamed)
    assert untouched > 200
    for view in unnamed:
        assert 0.3 < pixels(view.mask).sum() / pixels(whole().mask).sum() < 1.5
    assert 0 < len(unnamed) - untouched < untouched


def test_a_group_acts_with_its_probability_by_one_operation() -> None:
    groups = (
        {"zoom-in", "zoom-out", "crop", "left", "right", "hflip", "vflip"},
        {"grayscale", "bright", "dimmed"},
        {"cutout", "grid"},
    )
    named = [set(view.augmentation) for view in drawn(2000, 0.8)]
    assert all(len(names & group) <= 1 for names in named for group in groups)
    shares = [sum(bool(names & group) for names in named) / len(named) for group in groups]
    # a fifth of the geometry is a rescaling, of which factors from 0.6 to 1.2 have no token
    assert shares == pytest.approx([0.8 * (1 - 0.2 * 0.6 / 1.06), 0.8, 0.8], abs=0.03)
    assert {view.augmentation for view in drawn(20, 1e-9)} == {()}


def test_draws_are_the_generators_alone() -> None:
    assert drawn.__wrapped__(20, 0.8) == drawn.__wrapped__(20, 0.8)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    augment_paired(whole(), 0.01, generators[0])
    augment_paired(whole(), 1.0, generators[1])
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
    assert ((pixels(cut.picture) == 127).all(2) <= (pixels(cut.mask) == 0)).all()


def test_a_prompt_reads_the_rows_of_its_own_tokens() -> None:
    """From a view to the ids that the text encoder sees: the i-th token's row, for every token."""
    backbone = ToyBackbone()
    first = VOCAB_SIZE
    row_of = {augmentation_word(name): [i] for i, name in enumerate(AUGMENTATION_TOKENS)}
    rows = augmentation_rows(backbone)
    concept = Concept(concept_id="a", placeholder_token="<a>", images=("x",))
    for i, (name, words) in enumerate(AUGMENTATION_TOKENS.items()):
        for template in training_templates(concept, class_cue=False):
            ids = encode_prompt(with_augmentation_words(template, [name]), row_of | {"{}": [50]}, backbone.vocabularies)
            assert [token for token in ids["long"] if token >= first] == [first + i, first + 50]
        for key, table in backbone.token_tables.items():
            torch.testing.assert_close(rows[key][i], table.weight[VOCABULARY.tokenize(words)].mean(0))
