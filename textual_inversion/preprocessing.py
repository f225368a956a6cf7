"""Convert pictures to the pixels that a feature extractor was trained on, as transformers' PIL image processors do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

_UNCROPPED_SIDE_PX = 384
"""Side from which ConvNextImageProcessor resizes the whole picture in place of cropping it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """Resizing, central crop and normalisation of pictures."""

    size: tuple[int, ...]
    """Size to resize to, px: (height, width), or (shorter edge,) with the aspect ratio kept."""
    crop: tuple[int, int] | None
    """Size of the central crop, (height, width) px; None for no crop."""
    resample: Image.Resampling
    """Filter for resizing."""
    scale: float
    """Factor that levels 0 to 255 are multiplied by before they are normalised."""
    mean: Tensor
    """[3, 1, 1] mean that is subtracted from the scaled levels."""
    std: Tensor
    """[3, 1, 1] deviation that the difference is divided by."""

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], image_size: int) -> Preprocessing:
        """Read the entries of a preprocessor_config.json; `image_size` (px) stands in for sizes that are not given."""
        if "crop_pct" in settings:
            settings = {**settings, **_cropped_share(settings, image_size)}
        has_crop = bool(settings["do_center_crop"])
        size = settings.get("size") or image_size
        if isinstance(size, int):  # the old form: the shorter edge for models with a crop, a square for the others
            size = {"shortest_edge": size} if has_crop else {"height": size, "width": size}
        shorter = size.get("shortest_edge")
        if settings.get("do_normalize", True):
            mean, std = settings["image_mean"], settings["image_std"]
        else:
            mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        return cls(
            size=(int(shorter),) if shorter else (int(size["height"]), int(size["width"])),
            crop=_height_width(settings.get("crop_size") or image_size) if has_crop else None,
            resample=Image.Resampling(settings["resample"]),
            scale=settings.get("rescale_factor", 1 / 255),
            mean=torch.tensor(mean).view(3, 1, 1),
            std=torch.tensor(std).view(3, 1, 1),
        )

    def __call__(self, picture: Image.Image) -> Tensor:
        """Convert a picture to pixels [3, height, width]."""
        picture = picture.convert("RGB")
        picture = picture.resize(self._resized(*picture.size), self.resample)
        if self.crop:
            height, width = self.crop
            left, top = (picture.width - width) // 2, (picture.height - height) // 2
            picture = picture.crop((left, top, left + width, top + height))
        levels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        pixels = levels.view(picture.height, picture.width, 3).permute(2, 0, 1).float() * self.scale
        return (pixels - self.mean) / self.std

    def tensor(self, pixels: Tensor) -> Tensor:
        """Convert pixels [batch, 3, height, width] in [-1, 1] as `__call__` does a picture, with gradients.

        Torch resizes here and PIL in `__call__`, so that the results differ slightly.
        """
        width, height = self._resized(pixels.shape[3], pixels.shape[2])
        mode = "bilinear" if self.resample == Image.Resampling.BILINEAR else "bicubic"
        levels = F.interpolate((pixels + 1) / 2, size=(height, width), mode=mode, antialias=True).clamp(0, 1)
        if self.crop:
            top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
            levels = levels[:, :, top : top + self.crop[0], left : left + self.crop[1]]
        return (levels * 255 * self.scale - self.mean.to(pixels.device)) / self.std.to(pixels.device)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Return the size (width, height) that a picture of this size is resized to, px."""
        if len(self.size) == 2:
            return self.size[1], self.size[0]
        edge, shorter = self.size[0], min(width, height)
        width, height = (edge if side == shorter else edge * side // shorter for side in (width, height))
        return width, height


def _cropped_share(settings: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """Return size and crop of settings that name the share of a picture to keep, as ConvNextImageProcessor has them."""
    size = settings.get("size") or image_size
    side = int(size if isinstance(size, int) else size["shortest_edge"])
    if side >= _UNCROPPED_SIDE_PX:
        return {"size": {"height": side, "width": side}, "do_center_crop": False}
    resized = {"shortest_edge": int(side / settings["crop_pct"])}
    return {"size": resized, "do_center_crop": True, "crop_size": side}


def _height_width(size: int | Mapping[str, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size["height"]), int(size["width"]))
