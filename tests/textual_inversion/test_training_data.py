from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from tests.toy_backbone import VOCAB_SIZE, VOCABULARY, ToyBackbone
from textual_inversion.augment_config import AugmentConfig
from textual_inversion.concept import Concept
from textual_inversion.config import InversionConfig
from textual_inversion.latents import EncodedViews
from textual_inversion.objective import Batch
from textual_inversion.paired_augment import TRANSFORM_SETS, Augmentation
from textual_inversion.prompts import OBJECT_TEMPLATES
from textual_inversion.timesteps import uniform
from textual_inversion.training_data import TrainingData, progressive_schedule

BACKBONE = ToyBackbone()
CONCEPT = Concept(concept_id="c", placeholder_token="<c>", images=("x", "y"), initializer="toy", num_vectors=2)
ROWS = [VOCAB_SIZE, VOCAB_SIZE + 1]
VIEWS = EncodedViews(
    moments=torch.randn(4, 2, *BACKBONE.latent_shape, generator=torch.Generator().manual_seed(0)),
    photo_indices=(0, 0, 1, 1),
    augmentations=(
        Augmentation(),
        Augmentation(before=("hflip",)),
        Augmentation(),
        Augmentation(before=("zoom-in",), after=("left",)),
    ),
)
SIZE = 400


def ids_of(*pieces: str | int) -> list[int]:
    """A prompt as ids: words by the toy's tokenizer, numbers as they are."""
    return VOCABULARY.assemble(
        [token for piece in pieces for token in ([piece] if isinstance(piece, int) else VOCABULARY.tokenize(piece))]
    )


def draw(what: TrainingData, size: int = SIZE, step: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return what.draw(generator, size, step, BACKBONE.latent_shape, lambda n, generator: uniform(n, 0, 100, generator))


def views_of(drawn: Batch) -> Tensor:
    """Which view each sample shows, by the first of its draws."""
    return torch.randint(len(VIEWS), (len(drawn),), generator=torch.Generator().manual_seed(1))


def test_the_order_of_the_draws() -> None:
    drawn = draw(TrainingData.from_views(CONCEPT, VIEWS, InversionConfig(), BACKBONE), size=8)
    generator = torch.Generator().manual_seed(1)
    view = torch.randint(4, (8,), generator=generator)
    eps, noise = (torch.randn(8, *BACKBONE.latent_shape, generator=generator) for _ in range(2))
    t = torch.randint(100, (8,), generator=generator)
    template = torch.randint(27, (8,), generator=generator)
    assert torch.equal(drawn.latents, VIEWS.moments[view, 0] + VIEWS.moments[view, 1] * eps)
    assert torch.equal(drawn.noise, noise)
    assert torch.equal(drawn.timesteps, t)
    assert drawn.ids["long"].tolist() == [ids_of(*OBJECT_TEMPLATES[i].split("{}")[:1], *ROWS) for i in template]
    assert drawn.mask is None
    assert drawn.features is None


def test_a_view_keeps_its_mask() -> None:
    mask = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 4, 4)
    drawn = draw(TrainingData.from_views(CONCEPT, dataclasses.replace(VIEWS, masks=mask), InversionConfig(), BACKBONE))
    assert drawn.mask is not None
    assert torch.equal(drawn.mask[:, 0, 0, 0], views_of(drawn).float())


def test_a_caption_goes_with_its_photo() -> None:
    concept = dataclasses.replace(CONCEPT, captions=("a {} on a sofa", "my {} outside"))
    drawn = draw(TrainingData.from_views(concept, VIEWS, InversionConfig(), BACKBONE))
    expected = [ids_of("a", *ROWS, "on a sofa"), ids_of("my", *ROWS, "outside")]
    assert drawn.ids["long"].tolist() == [expected[VIEWS.photo_indices[view]] for view in views_of(drawn)]


def test_a_view_is_told_by_its_augmentation_tokens() -> None:
    """One row each, after the concept's two, where the prompt names them."""
    concept = dataclasses.replace(CONCEPT, captions=("a photo of a {}",) * 2)
    names = list(TRANSFORM_SETS["release"].tokens)
    row = {name: VOCAB_SIZE + 2 + names.index(name) for name in names}
    told = TrainingData.from_views(concept, VIEWS, InversionConfig(augment=AugmentConfig(paired=1)), BACKBONE)
    before, after = [[], [row["hflip"]], [], [row["zoom-in"]]], [[], [], [], [row["left"]]]
    drawn = draw(told)
    expected = [ids_of(*before[view], "a photo of a", *ROWS, *after[view]) for view in views_of(drawn)]
    assert drawn.ids["long"].tolist() == expected


def test_a_quarter_of_the_prompts_names_the_photo() -> None:
    concept = dataclasses.replace(CONCEPT, captions=("a photo of a {}",) * 2)
    drawn = draw(TrainingData.from_views(concept, VIEWS, InversionConfig(per_image_tokens=True), BACKBONE), size=4000)
    plain = ids_of("a photo of a", *ROWS)
    named = [ids_of("a photo of a", *ROWS, "with", VOCAB_SIZE + 2 + photo) for photo in (0, 1)]
    names_it = 0
    for ids, view in zip(drawn.ids["long"].tolist(), views_of(drawn), strict=True):
        assert ids in (plain, named[VIEWS.photo_indices[view]])
        names_it += ids != plain
    assert 1000 - 5 * 27.4 < names_it < 1000 + 5 * 27.4  # five standard deviations


def test_per_image_tokens_leave_the_other_draws_as_they_are() -> None:
    plain = draw(TrainingData.from_views(CONCEPT, VIEWS, InversionConfig(), BACKBONE))
    named = draw(TrainingData.from_views(CONCEPT, VIEWS, InversionConfig(per_image_tokens=True), BACKBONE))
    for part in ("latents", "noise", "timesteps"):
        assert torch.equal(getattr(plain, part), getattr(named, part))


def test_prompts_grow_with_the_vectors_that_have_joined() -> None:
    concept = dataclasses.replace(CONCEPT, num_vectors=3, captions=("a {}",) * 2)
    growing = TrainingData.from_views(concept, VIEWS, InversionConfig(progressive=True, steps=6), BACKBONE)
    seen = {step: draw(growing, size=1, step=step).ids["long"][0].tolist() for step in range(7)}
    one, two, three = (ids_of("a", *range(VOCAB_SIZE, VOCAB_SIZE + n)) for n in (1, 2, 3))
    assert seen == {0: one, 1: one, 2: two, 3: two, 4: three, 5: three, 6: three}
    whole = TrainingData.from_views(concept, VIEWS, InversionConfig(steps=6), BACKBONE)
    assert [draw(whole, size=1, step=step).ids["long"][0].tolist() for step in (0, 5)] == [three, three]


def test_progressive_vectors_join_as_the_paper_says() -> None:
    assert progressive_schedule(6000, 3) == (0, 2000, 4000)
    assert progressive_schedule(7, 3) == (0, 3, 5)
    assert progressive_schedule(2, 4) == (0, 1, 1, 2)
    assert progressive_schedule(500, 1) == (0,)
    assert progressive_schedule(0, 3) == (0, 0, 0)


def test_the_class_cue_follows_the_rows() -> None:
    concept = dataclasses.replace(CONCEPT, captions=("a {} here",) * 2)
    drawn = draw(TrainingData.from_views(concept, VIEWS, InversionConfig(class_cue=True), BACKBONE), size=1)
    assert drawn.ids["long"][0].tolist() == ids_of("a", *ROWS, "toy here")


def test_features_are_those_of_the_views_as_decoded() -> None:
    def features(pixels: Tensor) -> Tensor:
        return pixels.flatten(1)[:, :5]

    drawn = draw(TrainingData.from_views(CONCEPT, VIEWS, InversionConfig(), BACKBONE, features))
    expected = features(BACKBONE.decode(VIEWS.moments[:, 0]))
    torch.testing.assert_close(drawn.features, expected[views_of(drawn)])


def test_a_prompt_that_does_not_fit() -> None:
    concept = dataclasses.replace(CONCEPT, captions=("a {} " + "very " * 25,) * 2)
    with pytest.raises(ValueError, match=r"prompt 'a \{\} very"):
        TrainingData.from_views(concept, VIEWS, InversionConfig(), BACKBONE)
