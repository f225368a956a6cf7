"""PSNR and edge strength by pictures whose values are known by hand."""

from __future__ import annotations

from math import log10

import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from textual_inversion.augment import photo_views
from textual_inversion.augment_config import AugmentConfig
from textual_inversion.fidelity import (
    edge_strength,
    pixel_scores,
    pixel_scores_between_photos,
    psnr,
    to_array,
    to_arrays,
)


def flat(*levels: int, side: int = 8) -> Tensor:
    """One picture a level, of that grey everywhere."""
    return torch.stack([torch.full((side, side, 3), level, dtype=torch.uint8) for level in levels])


def half(dark: int, bright: int, side: int = 8) -> Tensor:
    """A picture with a dark left and a bright right half."""
    picture = flat(dark, side=side)
    picture[:, :, side // 2 :] = bright
    return picture


def test_psnr_of_every_pair() -> None:
    found = psnr(flat(10, 50), flat(0, 10, 255))
    assert found.shape == (2, 3)
    assert found[0, 0].item() == pytest.approx(20 * log10(255 / 10))
    assert found[1, 1].item() == pytest.approx(20 * log10(255 / 40))
    assert psnr(flat(0), flat(255)).item() == pytest.approx(0)
    assert psnr(half(0, 20), flat(0)).item() == pytest.approx(10 * log10(255**2 / 200))  # MSE 400 on half the picture


def test_psnr_of_equal_pictures_is_that_of_rounding() -> None:
    assert psnr(flat(7), flat(7)).item() == pytest.approx(10 * log10(255**2 * 12))
    assert psnr(flat(0), flat(1)).item() < 49 < psnr(flat(7), flat(7)).item() < 59


def test_edge_strength_of_a_ramp_is_its_slope() -> None:
    ramp = (3 * torch.arange(16))[None, :, None].expand(16, 16, 3).to(torch.uint8)
    assert edge_strength(torch.stack([ramp, ramp.transpose(0, 1)])).tolist() == pytest.approx([3, 3], abs=1e-4)
    diagonal = (3 * torch.arange(16)[None, :, None] + 4 * torch.arange(16)[:, None, None]).expand(16, 16, 3)
    assert edge_strength(diagonal[None].to(torch.uint8)).item() == pytest.approx(5, abs=1e-4)


def test_edge_strength_of_a_step_is_half_its_height_and_of_a_flat_picture_zero() -> None:
    assert edge_strength(torch.cat([half(0, 255), half(100, 120), flat(9)])).tolist() == pytest.approx(
        [127.5, 10, 0], abs=1e-3
    )
    assert edge_strength(half(0, 255, side=100)).item() == 0  # 2 of 98 columns are less than a twentieth


def test_luma_weighs_the_colours() -> None:
    for channel, weight in enumerate((0.299, 0.587, 0.114)):
        step = flat(0)
        step[:, :, 4:, channel] = 200
        assert edge_strength(step).item() == pytest.approx(100 * weight, abs=1e-3)


def test_scores_are_those_against_the_nearest_photo() -> None:
    photos = torch.cat([half(0, 200), half(0, 100)])
    scores = pixel_scores(torch.cat([half(0, 90), half(0, 190)]), photos)
    wanted = 10 * log10(255**2 / 50)
    assert scores["psnr_db"].tolist() == pytest.approx([wanted, wanted])
    assert scores["edge_strength"].tolist() == pytest.approx([45, 95], abs=1e-3)
    assert scores["edge_ratio"].tolist() == pytest.approx([0.9, 0.95])
    assert pixel_scores(half(0, 90), flat(0))["edge_ratio"].isnan().all()


def test_a_mirrored_picture_is_another_picture() -> None:
    scores = pixel_scores(half(0, 255).flip(2), half(0, 255))
    assert scores["psnr_db"].item() == pytest.approx(0)
    assert scores["edge_ratio"].item() == pytest.approx(1)


def test_photos_among_themselves_leave_out_the_pair_with_itself() -> None:
    scores = pixel_scores_between_photos(torch.cat([half(0, 100), half(0, 120), half(0, 200)]))
    assert scores["psnr_db"].tolist() == pytest.approx([10 * log10(255**2 / mse) for mse in (200, 200, 3200)])
    assert scores["edge_ratio"].tolist() == pytest.approx([100 / 120, 120 / 100, 200 / 120])
    with pytest.raises(ValueError, match="1 photos cannot be compared"):
        pixel_scores_between_photos(half(0, 100))


def test_a_photo_is_cropped_and_resized_to_the_pictures_size_like_in_learning() -> None:
    wide = Image.radial_gradient("L").convert("RGB").resize((32, 16))
    array = to_array(wide, (8, 8))
    assert (array.shape, array.dtype) == ((8, 8, 3), torch.uint8)
    (view,) = photo_views(wide, AugmentConfig(flip=False), 8, torch.Generator())
    assert array.tolist() == to_array(view.picture, (8, 8)).tolist()
    same = ImageOps.mirror(Image.linear_gradient("L").resize((8, 8)))
    assert to_array(same, (8, 8))[..., 0].tolist() == [[same.getpixel((x, y)) for x in range(8)] for y in range(8)]
    assert to_arrays([wide, same], (8, 6)).shape == (2, 6, 8, 3)


@pytest.mark.parametrize(
    ("pictures", "photos"),
    [
        (flat(0), flat(0, side=9)),
        (flat(0), flat(0).float()),
        (flat(0)[:0], flat(0)),
        (flat(0)[0], flat(0)[0]),
        (flat(0).permute(0, 3, 1, 2), flat(0).permute(0, 3, 1, 2)),
        (flat(0, side=2), flat(0, side=2)),
    ],
)
def test_arrays_that_do_not_fit_are_refused(pictures: Tensor, photos: Tensor) -> None:
    with pytest.raises(ValueError, match="arrays of shapes"):
        pixel_scores(pictures, photos)
