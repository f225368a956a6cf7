"""CLIP-I and CLIP-T by hand-made features with known angles."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from textual_inversion.metrics import (
    clip_i,
    clip_i_between_photos,
    clip_i_per_picture,
    clip_t,
    clip_t_per_picture,
    mean_and_standard_error,
    mirror_margin,
    mirror_margin_between_photos,
)


def test_clip_i_is_the_mean_over_all_pairs() -> None:
    generated = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    photos = torch.tensor([[3.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    half = 0.5**0.5
    assert clip_i(generated, photos) == pytest.approx((1 + half - 1 + 0 + half + 0) / 6)


def test_clip_i_equals_the_cosine_of_every_pair() -> None:
    generated, photos = torch.randn(5, 8), torch.randn(3, 8)
    pairs = F.cosine_similarity(generated[:, None], photos[None], dim=2)
    assert clip_i(generated, photos) == pytest.approx(pairs.mean().item(), abs=1e-6)
    assert clip_i(photos, generated) == pytest.approx(clip_i(generated, photos), abs=1e-6)
    assert clip_i(generated[:1], generated[:1] * 7) == pytest.approx(1)


def test_each_pictures_score_averages_to_the_whole() -> None:
    generated, photos = torch.randn(5, 8), torch.randn(3, 8)
    assert clip_i_per_picture(generated, photos).mean().item() == pytest.approx(clip_i(generated, photos))
    assert clip_i_per_picture(generated, photos)[2].item() == pytest.approx(clip_i(generated[2:3], photos), abs=1e-6)
    assert clip_t_per_picture(generated, photos[:1]).mean().item() == pytest.approx(clip_t(generated, photos[:1]))


def test_photos_among_themselves_leave_out_the_pair_with_itself() -> None:
    photos = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
    assert clip_i_between_photos(photos).tolist() == pytest.approx([0.5, 0.0, 0.5])
    with pytest.raises(ValueError, match="1 photos cannot be compared"):
        clip_i_between_photos(photos[:1])


def test_mirror_margin_is_positive_for_the_photos_own_side() -> None:
    left, right = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    photos, mirrored = left.expand(3, 2), right.expand(3, 2)
    turned = torch.cat([left, right, left + right])
    assert mirror_margin(turned, photos, mirrored).tolist() == pytest.approx([1, -1, 0])
    assert mirror_margin_between_photos(photos, mirrored).tolist() == pytest.approx([1, 1, 1])
    facing = torch.cat([left, left, right])  # the third photo is the second's mirror image
    assert mirror_margin_between_photos(facing, facing.flip(1)).tolist() == pytest.approx([0, 0, -1])
    with pytest.raises(ValueError, match="1 photos cannot be compared"):
        mirror_margin_between_photos(left, right)


def test_mean_and_standard_error() -> None:
    mean, error = mean_and_standard_error(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert mean == pytest.approx(3)
    assert error == pytest.approx((14 / 3) ** 0.5 / 2)  # sample deviation over the root of n
    assert mean_and_standard_error(torch.tensor([0.5])) == (0.5, None)


def test_clip_t_with_one_text_for_all_or_one_for_each() -> None:
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert clip_t(images, torch.tensor([[2.0, 0.0]])) == pytest.approx(0.5)
    assert clip_t(images, images * 3) == pytest.approx(1)
    with pytest.raises(ValueError, match="3 texts for 2 pictures"):
        clip_t(images, torch.ones(3, 2))


@pytest.mark.parametrize("metric", [clip_i, clip_t])
@pytest.mark.parametrize(("a", "b"), [((2, 3), (2, 4)), ((0, 3), (2, 3)), ((2, 3), (0, 3)), ((3,), (2, 3))])
def test_features_that_do_not_fit_are_refused(metric, a, b) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="feature matrices"):
        metric(torch.ones(a), torch.ones(b))
