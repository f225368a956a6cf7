from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps

from textual_inversion.augment import photo_views, to_pixels, to_weights
from textual_inversion.augment_config import AugmentConfig

RESOLUTION = 16


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def photo(width: int = 40, height: int = 24) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def views(photo: Image.Image, config: AugmentConfig, resolution: int, generator: torch.Generator) -> torch.Tensor:
    """The pictures alone, as pixels [views, 3, resolution, resolution]."""
    return torch.stack([to_pixels(view.picture) for view in photo_views(photo, config, resolution, generator)])


def test_pixels_span_minus_one_to_one() -> None:
    black_and_white = Image.new("RGB", (2, 1), "black")
    black_and_white.putpixel((1, 0), (255, 255, 255))
    assert torch.equal(to_pixels(black_and_white), torch.tensor([-1.0, 1.0]).expand(3, 1, 2))


def test_the_central_square_comes_first_never_squashed() -> None:
    whole = views(photo(), AugmentConfig(flip=False), RESOLUTION, generator())
    centre = photo().crop((8, 0, 32, 24)).resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS)
    inside = (..., slice(3, -3))  # at the cut edges the filter also sees what lies beyond them
    assert torch.equal(whole[0][inside], to_pixels(centre)[inside])


def test_a_photo_of_the_right_size_is_not_touched() -> None:
    exact = photo(RESOLUTION, RESOLUTION)
    assert torch.equal(views(exact, AugmentConfig(flip=False), RESOLUTION, generator())[0], to_pixels(exact))


def test_flip_adds_the_mirror_image() -> None:
    both = views(photo(), AugmentConfig(), RESOLUTION, generator())
    assert torch.equal(both[1], both[0].flip(-1))
    assert torch.equal(both[0], views(ImageOps.mirror(photo()), AugmentConfig(), RESOLUTION, generator())[1])


def test_crops_are_drawn_from_the_generator_alone() -> None:
    config = AugmentConfig(crops=4)
    first = views(photo(), config, RESOLUTION, generator())
    assert first.shape == (6, 3, RESOLUTION, RESOLUTION)
    assert torch.equal(first, views(photo(), config, RESOLUTION, generator()))
    assert not torch.equal(first, views(photo(), config, RESOLUTION, generator(1)))
    assert len({view.numpy().tobytes() for view in first}) == 6


def test_crops_are_mirrored_only_where_flips_are_allowed() -> None:
    """A photo that grows lighter to the right stays so in every view."""
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], (64, 1, 3)))
    straight = views(ramp, AugmentConfig(flip=False, crops=12), RESOLUTION, generator())
    assert (straight[:, 0, :, -1] > straight[:, 0, :, 0]).all()
    mirrored = views(ramp, AugmentConfig(crops=12), RESOLUTION, generator())[2:]
    assert 0 < (mirrored[:, 0, 0, -1] < mirrored[:, 0, 0, 0]).sum() < 12


def test_crops_keep_to_their_scale() -> None:
    """On a ramp, the range of greys in a crop is its side."""
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], (64, 1, 3)))
    crops = views(ramp, AugmentConfig(flip=False, crops=20, min_crop_scale=0.5), RESOLUTION, generator())[1:]
    sides = (crops[:, 0, 0, -1] - crops[:, 0, 0, 0]) / 2
    assert sides.min() > 0.4
    assert sides.max() <= 1
    assert sides.max() - sides.min() > 0.2


def test_colours_move_within_their_strength() -> None:
    """Of a flat grey, contrast and saturation change nothing but brightness does."""
    flat = Image.new("RGB", (20, 20), (100, 100, 100))
    config = AugmentConfig(flip=False, colours=30, colour_strength=0.3)
    changed = (views(flat, config, RESOLUTION, generator())[1:, 0, 0, 0] + 1) * 127.5
    assert changed.min() >= 69
    assert changed.max() <= 131
    assert changed.max() - changed.min() > 30
    coloured = views(photo(), AugmentConfig(flip=False, colours=30), RESOLUTION, generator())
    assert len({view.numpy().tobytes() for view in coloured}) == 31


def test_what_is_switched_on_leaves_the_draws_before_it_alone() -> None:
    """Results learned with crops stay what they were when colours or paired views are added behind them."""
    crops = views(photo(), AugmentConfig(crops=3), RESOLUTION, generator())
    more = views(photo(), AugmentConfig(crops=3, colours=2, paired=2), RESOLUTION, generator())
    assert torch.equal(more[:5], crops)
    assert len(more) == 9


def test_a_mask_goes_where_its_photo_goes() -> None:
    """Here the photo is its own mask: white on black; but for paired views, which may change its colours."""
    white = Image.new("L", (40, 24), 0)
    white.paste(255, (10, 4, 20, 16))
    config = AugmentConfig(crops=6, colours=0)
    for view in photo_views(white.convert("RGB"), config, RESOLUTION, generator(), white):
        assert view.mask is not None
        shown = to_pixels(view.picture)[:1] / 2 + 0.5
        assert (shown - to_weights(view.mask)).abs().mean() < 0.05  # filters differ at edges
    assert all(view.mask is None for view in photo_views(photo(), config, RESOLUTION, generator()))


def test_only_paired_views_have_names_and_beside_them_mirror_images_too() -> None:
    plain = photo_views(photo(), AugmentConfig(crops=5, colours=5), RESOLUTION, generator())
    assert {view.augmentation.names for view in plain} == {()}
    beside = photo_views(photo(), AugmentConfig(crops=8, colours=8, paired=1), RESOLUTION, generator())
    assert [view.augmentation.names for view in beside[:2]] == [(), ("hflip",)]
    assert {view.augmentation.names for view in beside[2:-1]} == {(), ("hflip",)}
