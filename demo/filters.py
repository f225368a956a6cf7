"""Filters of the demo world: styles that are a function of the plain picture."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter, ImageOps


def _grey(picture: Image.Image) -> np.ndarray:
    return np.asarray(ImageOps.grayscale(picture), np.float32)


def _blurred_grey(picture: Image.Image, radius_px: float) -> np.ndarray:
    return np.asarray(ImageOps.grayscale(picture).filter(ImageFilter.GaussianBlur(radius_px)), np.float32)


def _to_picture(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).convert("RGB")


def _edges(picture: Image.Image) -> np.ndarray:
    """Return the strength of the largest colour edge at every pixel, 0..1 (height, width)."""
    values = np.asarray(picture.filter(ImageFilter.GaussianBlur(0.6 * picture.width / 64)), np.float32)
    padded = np.pad(values, ((1, 1), (1, 1), (0, 0)), "edge")
    across = padded[1:-1, 2:] - padded[1:-1, :-2]
    down = padded[2:, 1:-1] - padded[:-2, 1:-1]
    return np.clip(np.hypot(across, down).max(2) * picture.width / 64 / 110, 0, 1)


def _blend(under: np.ndarray, over: tuple[int, int, int] | np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Blend a colour or a picture over another one by a weight, (height, width) in 0..1."""
    return under * (1 - weight[..., None]) + np.asarray(over, np.float32) * weight[..., None]


def _mono(picture: Image.Image) -> Image.Image:
    return ImageOps.grayscale(picture).convert("RGB")


def _oil(picture: Image.Image) -> Image.Image:
    smooth = picture.filter(ImageFilter.MedianFilter(5 * picture.width // 64 | 1))
    return smooth.point(lambda value: min(255, max(0, round(1.2 * value - 16))))


def _pixel(picture: Image.Image) -> Image.Image:
    return picture.resize((16, 16), Image.Resampling.BOX).resize(picture.size, Image.Resampling.NEAREST)


def _sketch(picture: Image.Image) -> Image.Image:
    """Draw lines where the picture is darker than its surroundings."""
    dodged = np.clip(255 * (_grey(picture) + 12) / (_blurred_grey(picture, 2.5 * picture.width / 64) + 12), 0, 255)
    return _to_picture(255 * (dodged / 255) ** 1.6)


def _watercolor(picture: Image.Image) -> Image.Image:
    """Wash the colours out towards the paper, with darker rims where a wash ends and white paper at the border."""
    px = picture.width
    soft = np.asarray(
        picture.filter(ImageFilter.ModeFilter(5 * px // 64 | 1)).filter(ImageFilter.GaussianBlur(px / 64))
    )
    washed = 255 - 0.62 * (255 - soft.astype(np.float32))
    rimmed = washed * (1 - 0.3 * _edges(picture)[..., None])
    axis = np.abs((np.arange(px, dtype=np.float32) + 0.5) / px - 0.5)
    rim = np.maximum(axis[None, :] + 0.012 * np.sin(31 * axis)[:, None], axis[:, None] + 0.012 * np.sin(23 * axis))
    return _to_picture(_blend(rimmed, (252, 250, 244), np.clip((rim - 0.42) * 18, 0, 1)))


def _blueprint(picture: Image.Image) -> Image.Image:
    """Draw white lines on blue."""
    ground = np.full((*picture.size[::-1], 3), (24, 70, 160), np.float32)
    shade = 0.16 * (1 - _grey(picture) / 255)
    return _to_picture(_blend(_blend(ground, (120, 170, 240), shade), (240, 246, 255), _edges(picture)))


def _neon(picture: Image.Image) -> Image.Image:
    """Draw glowing edges in the picture's saturated colours on black."""
    hue, saturation, _ = ImageOps.posterize(picture, 6).convert("HSV").split()
    vivid = Image.merge(
        "HSV", (hue, saturation.point(lambda value: min(255, 90 + 2 * value)), Image.new("L", picture.size, 255))
    ).convert("RGB")
    spread = np.asarray(vivid.filter(ImageFilter.MedianFilter(3)), np.float32)
    lines = _edges(picture)
    glow = np.asarray(Image.fromarray((255 * lines).astype(np.uint8)).filter(ImageFilter.GaussianBlur(2)), np.float32)
    light = np.clip(lines + 0.8 * glow / 255, 0, 1)
    return _to_picture(_blend(np.full_like(spread, (14, 10, 24)), spread, light))


def _carving(picture: Image.Image) -> Image.Image:
    """Light the picture's heights (dark is high) from the upper left, in stone."""
    height = _blurred_grey(picture, 0.5 * picture.width / 64)
    step = max(1, picture.width // 64)
    relief = height - np.roll(height, (step, step), (0, 1))
    relief[:step], relief[:, :step] = 0, 0
    lit = 176 + 1.5 * np.clip(relief, -75, 75) + 0.3 * (height - 255)
    return _to_picture(lit[..., None] * np.asarray((1.0, 0.96, 0.88), np.float32))


def _chalk(picture: Image.Image) -> Image.Image:
    """Draw pale coloured lines on a blackboard."""
    board = np.full((*picture.size[::-1], 3), (38, 58, 50), np.float32)
    pale = 0.5 * np.asarray(picture, np.float32) + 125
    inside = 0.3 * np.clip((255 - _grey(picture)) / 160, 0, 1)
    return _to_picture(_blend(_blend(board, pale, inside), pale + 10, _edges(picture)))


def _stained_glass(picture: Image.Image) -> Image.Image:
    """Make the colours vivid and flat, with dark leads along edges and between irregular cells."""
    px, cells = picture.width, 5
    rng = np.random.default_rng(0)
    grid = (np.stack(np.meshgrid(np.arange(cells), np.arange(cells)), -1) + 0.5).reshape(-1, 2)
    centres = (grid + rng.uniform(-0.36, 0.36, grid.shape)) * px / cells
    axis = np.arange(px) + 0.5
    distances = np.hypot(axis[None, :, None] - centres[:, 0], axis[:, None, None] - centres[:, 1])
    nearest = np.partition(distances, 1, -1)
    cell_leads = np.clip(1.7 - (nearest[..., 1] - nearest[..., 0]) * 64 / px, 0, 1)
    flat = np.asarray(ImageOps.posterize(picture.filter(ImageFilter.ModeFilter(5 * px // 64 | 1)), 3), np.float32)
    mean = flat.mean(2, keepdims=True)
    panes = rng.uniform(-38, 12, (len(centres), 3)).astype(np.float32)[distances.argmin(-1)]
    vivid = np.clip(mean + 1.5 * (flat - mean) + 16 + panes, 0, 255)
    return _to_picture(_blend(vivid, (25, 22, 30), np.maximum(cell_leads, _edges(picture) ** 0.7)))


FILTERS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "sketch": _sketch,
    "pixel": _pixel,
    "mono": _mono,
    "oil": _oil,
    "watercolor": _watercolor,
    "blueprint": _blueprint,
    "neon": _neon,
    "carving": _carving,
}
"""Taught styles that are filters."""
HELD_OUT_FILTERS: dict[str, Callable[[Image.Image], Image.Image]] = {"chalk": _chalk, "stained-glass": _stained_glass}
"""Styles that no training picture shows: concepts to learn. Chalk is near to taught styles (lines on a ground), stained
glass is far from all."""
