"""Pixels against those of transformers' image processors, for every form their settings are stated in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from textual_inversion.preprocessing import Preprocessing

SIDE = 32
CROPPED = {"resample": 3, "do_center_crop": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
SQUARE = {**CROPPED, "resample": 2, "do_center_crop": False}
SHORTER_EDGE = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
BOTH_SIDES = {"size": {"height": SIDE, "width": SIDE}}


def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0)
    sizes = [(SIDE, SIDE), (64, 48), (40, 70), (16, 20)]
    return [Image.fromarray(noise.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def theirs(name: str, **options: Any) -> torch.Tensor:
    """Pixels [pictures, 3, height, width] of transformers' PIL image processor, under the name this version has."""
    cls = getattr(transformers, f"{name}ImageProcessorPil", None) or getattr(transformers, f"{name}ImageProcessor")
    return cls(**options)(pictures(), return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize(
    ("name", "settings", "options"),
    [
        ("CLIP", CROPPED, {**CROPPED, **SHORTER_EDGE}),
        (
            "CLIP",
            {**CROPPED, **SHORTER_EDGE, "size": {"shortest_edge": SIDE + 9}},
            {**CROPPED, **SHORTER_EDGE, "size": {"shortest_edge": SIDE + 9}},
        ),
        ("CLIP", {**CROPPED, "size": SIDE + 4}, {**CROPPED, **SHORTER_EDGE, "size": {"shortest_edge": SIDE + 4}}),
        ("CLIP", {**CROPPED, "size": SIDE, "crop_size": SIDE}, {**CROPPED, **SHORTER_EDGE}),
        (
            "CLIP",
            {**CROPPED, **BOTH_SIDES, "do_center_crop": False, "do_normalize": False},
            {**CROPPED, **BOTH_SIDES, "do_center_crop": False, "do_normalize": False},
        ),
        ("ViT", SQUARE, {**SQUARE, **BOTH_SIDES}),
        ("ViT", {**SQUARE, "size": SIDE, "resample": 3}, {**SQUARE, **BOTH_SIDES, "resample": 3}),
        ("ViT", {**SQUARE, "rescale_factor": 1 / 127.5}, {**SQUARE, **BOTH_SIDES, "rescale_factor": 1 / 127.5}),
    ],
)
def test_pixels_equal_transformers_own(name: str, settings: dict[str, Any], options: dict[str, Any]) -> None:
    ours = Preprocessing.from_settings(settings, SIDE)
    pixels = torch.stack([ours(picture) for picture in pictures()])
    torch.testing.assert_close(pixels, theirs(name, **options), rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [CROPPED, SQUARE])
def test_pixels_of_a_tensor_are_near_those_of_the_picture(settings: dict[str, Any]) -> None:
    preprocessing = Preprocessing.from_settings(settings, SIDE)
    ramp = np.linspace(0, 255, 48)
    picture = Image.fromarray(np.stack(np.broadcast_arrays(ramp, ramp[:, None], 128), 2).astype(np.uint8))
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
    torch.testing.assert_close(preprocessing.tensor(pixels)[0], preprocessing(picture), rtol=0, atol=0.06)
