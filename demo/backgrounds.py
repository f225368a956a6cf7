"""Draw the demo world's backgrounds, flat colours and places, smooth so that the model's capacity goes to objects."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from demo.captions import COLOURS

Canvas = np.ndarray
"""Picture in float32 (height, width, 3), 0..255."""


def _gradient(px: int, top: tuple[int, int, int], bottom: tuple[int, int, int]) -> Canvas:
    ramp = np.linspace(0, 1, px, dtype=np.float32)[:, None, None]
    column = np.asarray(top, np.float32) * (1 - ramp) + np.asarray(bottom, np.float32) * ramp
    return np.repeat(column, px, axis=1)


def _coordinates(px: int) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y of the pixel centres, 0..1."""
    axis = (np.arange(px, dtype=np.float32) + 0.5) / px
    return axis[None, :], axis[:, None]


def _cover(canvas: Canvas, mask: np.ndarray, colour: tuple[float, float, float] | Canvas) -> Canvas:
    """Blend a colour over the canvas where mask is 1 (mask: height x width, 0..1)."""
    weight = np.broadcast_to(mask, canvas.shape[:2])[..., None]
    return canvas * (1 - weight) + np.asarray(colour, np.float32) * weight


def _below(px: int, edge: np.ndarray | float) -> np.ndarray:
    """Return a mask that is 1 below the horizon `edge` (fraction of the height), with a one-pixel soft rim."""
    x, y = _coordinates(px)
    return np.clip((y - edge) * px + 0.5 + 0 * x, 0, 1)


def _dots(px: int, rng: np.random.Generator, count: int, radius_px: float, top: float, bottom: float) -> np.ndarray:
    """Return a mask of small soft discs between two heights (fractions)."""
    x, y = _coordinates(px)
    mask = np.zeros((px, px), np.float32)
    for centre_x, centre_y in zip(rng.uniform(0, 1, count), rng.uniform(top, bottom, count), strict=True):
        distance_px = np.hypot(x - centre_x, y - centre_y) * px
        mask = np.maximum(mask, np.clip(radius_px * px / 64 + 0.5 - distance_px, 0, 1))
    return mask


def _beach(px: int, rng: np.random.Generator) -> Canvas:
    horizon = rng.uniform(0.28, 0.36)
    shore = horizon + rng.uniform(0.14, 0.2)
    x, _ = _coordinates(px)
    canvas = _gradient(px, (115, 190, 250), (215, 238, 252))
    canvas = _cover(canvas, _below(px, horizon), (35, 125, 185))
    return _cover(canvas, _below(px, shore + 0.012 * np.sin(7 * x + rng.uniform(0, 6))), (236, 212, 155))


def _snow(px: int, rng: np.random.Generator) -> Canvas:
    x, _ = _coordinates(px)
    canvas = _gradient(px, (140, 170, 205), (185, 205, 228))
    canvas = _cover(canvas, _dots(px, rng, 14, 0.9, 0, 0.6), (250, 252, 255))
    horizon = rng.uniform(0.48, 0.58) + 0.03 * np.sin(4 * x + rng.uniform(0, 6))
    return _cover(canvas, _below(px, horizon), (244, 247, 252))


def _grass(px: int, rng: np.random.Generator) -> Canvas:
    x, _ = _coordinates(px)
    canvas = _gradient(px, (125, 190, 248), (205, 232, 252))
    horizon = rng.uniform(0.42, 0.52)
    canvas = _cover(canvas, _below(px, horizon), (112, 180, 72))
    return _cover(canvas, _below(px, horizon + 0.22 + 0.02 * np.sin(5 * x + rng.uniform(0, 6))), (84, 155, 58))


def _night(px: int, rng: np.random.Generator) -> Canvas:
    canvas = _gradient(px, (10, 12, 45), (45, 48, 110))
    return _cover(canvas, _dots(px, rng, 16, 0.8, 0, 1), (255, 248, 205))


def _brick(px: int, rng: np.random.Generator) -> Canvas:
    x, y = _coordinates(px)
    rows, columns = 8, 4  # bricks of 8 x 16 px at 64 px, so that the pattern meets the latent grid
    shift = rng.integers(0, 4) / 16
    row = np.floor(y * rows)
    along = (x * columns + 0.5 * (row % 2) + shift) % 1.0
    across = (y * rows) % 1.0
    joint = np.maximum((along < 0.0625).astype(np.float32), (across < 0.125).astype(np.float32))
    return _cover(np.full((px, px, 3), (176, 82, 62), np.float32), joint, (218, 200, 188))


def _wood(px: int, rng: np.random.Generator) -> Canvas:
    x, y = _coordinates(px)
    table = rng.uniform(0.44, 0.52)
    wall = _gradient(px, (240, 232, 218), (228, 216, 198))
    planks = np.floor((y - table) / 0.16)
    grain = 7 * np.sin(6 * x + 40 * y + rng.uniform(0, 6))[..., None]
    top = np.asarray((172, 116, 64), np.float32) + grain + 10 * ((planks % 2)[..., None] - 0.5)
    canvas = _cover(wall, _below(px, table), top)
    return _cover(canvas, _below(px, table) - _below(px, table + 0.035), (118, 74, 38))


def _water(px: int, rng: np.random.Generator) -> Canvas:
    x, _ = _coordinates(px)
    canvas = _gradient(px, (70, 180, 215), (10, 70, 140))
    canvas = _cover(canvas, 0.5 * _dots(px, rng, 9, 1.6, 0.05, 0.8), (190, 232, 245))
    return _cover(canvas, _below(px, 0.9 + 0.025 * np.sin(6 * x + rng.uniform(0, 6))), (205, 190, 140))


def _moon(px: int, rng: np.random.Generator) -> Canvas:
    x, y = _coordinates(px)
    canvas = _gradient(px, (8, 8, 14), (14, 14, 24))
    canvas = _cover(canvas, _dots(px, rng, 10, 0.7, 0, 0.45), (240, 240, 240))
    horizon = rng.uniform(0.48, 0.56) + 0.10 * (x - 0.5) ** 2
    canvas = _cover(canvas, _below(px, horizon), (150, 150, 154))
    for centre_x, centre_y in ((rng.uniform(0.05, 0.25), 0.82), (rng.uniform(0.7, 0.95), 0.72), (0.5, 0.94)):
        crater = np.hypot(x - centre_x, 1.9 * (y - centre_y)) * px
        canvas = _cover(canvas, np.clip(0.1 * px - crater, 0, 1), (118, 118, 124))
    return canvas


_PLACES: dict[str, Callable[[int, np.random.Generator], Canvas]] = {
    "beach": _beach,
    "snow": _snow,
    "grass": _grass,
    "night": _night,
    "brick": _brick,
    "wood": _wood,
    "water": _water,
    "moon": _moon,
}


def draw_background(background: str, px: int, rng: np.random.Generator) -> Canvas:
    """Draw a place or a flat colour, float32 (px, px, 3) in 0..255."""
    if background in COLOURS:
        colour = np.asarray(COLOURS[background], np.float32) + rng.uniform(-5, 5, 3).astype(np.float32)
        return np.clip(np.broadcast_to(colour, (px, px, 3)), 0, 255)
    return np.clip(_PLACES[background](px, rng), 0, 255)
