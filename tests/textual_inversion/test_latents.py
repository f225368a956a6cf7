from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tests.toy_backbone import ToyBackbone
from textual_inversion import latents
from textual_inversion.augment_config import AugmentConfig
from textual_inversion.paired_augment import Augmentation

BACKBONE = ToyBackbone()


def pictures(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (12, 9, 3), dtype=np.uint8)) for _ in range(count)]


def test_every_view_is_encoded_once() -> None:
    views = latents.encode_views(BACKBONE, pictures(3), AugmentConfig(crops=1), "cat", 0)
    assert views.moments.shape == (9, 2, *BACKBONE.latent_shape)
    assert views.photo_indices == (0, 0, 0, 1, 1, 1, 2, 2, 2)
    assert not views.moments.requires_grad


def test_crops_depend_on_the_concept_and_the_seed() -> None:
    config = AugmentConfig(crops=2)
    first, again, of_dog, other_seed = (
        latents.encode_views(BACKBONE, pictures(2), config, concept_id, seed).moments
        for concept_id, seed in (("cat", 0), ("cat", 0), ("dog", 0), ("cat", 1))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, of_dog)
    assert not torch.equal(first, other_seed)


def test_no_pictures() -> None:
    with pytest.raises(ValueError, match="'cat' has no pictures"):
        latents.encode_views(BACKBONE, [], AugmentConfig(), "cat", 0)


def test_masks_come_at_the_latents_size() -> None:
    mask = Image.new("L", (12, 12), 0)
    mask.paste(255, (0, 0, 6, 12))
    photo = Image.fromarray(np.zeros((12, 12, 3), dtype=np.uint8))
    views = latents.encode_views(BACKBONE, [photo], AugmentConfig(), "cat", 0, [mask])
    half = torch.tensor([1.0, 1, 0, 0]).expand(1, 4, 4)
    assert views.masks is not None
    assert torch.equal(views.masks, torch.stack([half, half.flip(-1)]))
    assert latents.encode_views(BACKBONE, [photo], AugmentConfig(), "cat", 0).masks is None


def test_views_without_the_concept_are_left_out() -> None:
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 30, 3), dtype=np.uint8))
    corner = Image.new("L", (30, 30), 0)
    corner.paste(255, (0, 0, 8, 8))
    config = AugmentConfig(crops=40, min_crop_scale=0.3)
    every = latents.encode_views(BACKBONE, [photo], config, "cat", 0)
    telling = latents.encode_views(BACKBONE, [photo], config, "cat", 0, [corner])
    assert telling.masks is not None
    assert (
        2 <= len(telling) == len(telling.masks) == len(telling.photo_indices) == len(telling.augmentations) < len(every)
    )
    assert (telling.masks.sum((1, 2, 3)) >= 1).all()
    outside = Image.new("L", (60, 30), 0)
    outside.paste(255, (0, 0, 10, 30))
    with pytest.raises(ValueError, match="'cat': its masks show nothing of it in the photos' central squares"):
        latents.encode_views(BACKBONE, [photo.resize((60, 30))], AugmentConfig(), "cat", 0, [outside])


def test_paired_views_bring_their_names() -> None:
    views = latents.encode_views(BACKBONE, pictures(2), AugmentConfig(flip=False, paired=3), "cat", 0)
    assert views.photo_indices == (0, 0, 0, 0, 1, 1, 1, 1)
    assert views.augmentations[0] == views.augmentations[4] == Augmentation()
    assert any(augmentation.names for augmentation in views.augmentations)


def test_sample_has_the_moments() -> None:
    mean, deviation = torch.randn(2, 4, 4), torch.rand(2, 4, 4)
    eps = torch.randn(20000, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    drawn = latents.sample_latents(torch.stack([mean, deviation]).expand(20000, -1, -1, -1, -1), eps)
    torch.testing.assert_close(drawn.mean(0), mean, atol=0.05, rtol=0)
    torch.testing.assert_close(drawn.std(0), deviation, atol=0.05, rtol=0)
