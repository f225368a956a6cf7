from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tests.toy_backbone import ToyBackbone
from textual_inversion import latents
from textual_inversion.config import AugmentConfig

BACKBONE = ToyBackbone()


def pictures(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (12, 9, 3), dtype=np.uint8)) for _ in range(count)]


def test_every_view_is_encoded_once() -> None:
    views = latents.encode_views(BACKBONE, pictures(3), AugmentConfig(crops=1), "cat", 0)
    assert views.moments.shape == (9, 2, *BACKBONE.latent_shape)
    assert views.photo == (0, 0, 0, 1, 1, 1, 2, 2, 2)
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


def test_sample_has_the_moments() -> None:
    mean, deviation = torch.randn(2, 4, 4), torch.rand(2, 4, 4)
    eps = torch.randn(20000, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    drawn = latents.sample(torch.stack([mean, deviation]).expand(20000, -1, -1, -1, -1), eps)
    torch.testing.assert_close(drawn.mean(0), mean, atol=0.05, rtol=0)
    torch.testing.assert_close(drawn.std(0), deviation, atol=0.05, rtol=0)
