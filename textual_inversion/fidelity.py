"""Scores of generated pictures against photos by pixels alone. This module loads no model.

A feature extractor may be blind to what it was trained to ignore, such as mirror images; these measures are not. They
have a meaning only where picture and photo show the same thing in the same pose on the same background, so for prompts
that name nothing but the concept, and not for styles. No picture is mirrored before it is compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

EDGE_QUANTILE = 0.95
"""Quantile of the gradient over a picture's pixels that is its edge strength: most pixels of a plain picture have no
edge, and the largest gradient of all is one pixel's."""

_WHITE = 255.0
_ROUNDING_VARIANCE = 1 / 12
"""Variance of the error that rounding to 8 bits makes, in squared levels; PSNR tells no smaller errors apart."""
_LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the luma of ITU-R BT.601."""
_SOBEL = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))
"""Sobel and Feldman's 3x3 operator; its sum over a ramp of 1 level per px is 8."""


def to_array(picture: Image.Image, size: tuple[int, int]) -> Tensor:
    """Return the RGB picture's central part of the shape of `size`, resized to it, [height, width, 3] uint8.

    `size`: (width, height) in px. A picture of this size is returned unchanged.
    """
    fitted = picture.convert("RGB")
    if fitted.size != size:
        fitted = ImageOps.fit(fitted, size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted))


def to_arrays(pictures: Sequence[Image.Image], size: tuple[int, int]) -> Tensor:
    """Return `to_array` of each picture, [n, height, width, 3] uint8."""
    return torch.stack([to_array(picture, size) for picture in pictures])


def psnr(pictures: Tensor, photos: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of every picture to every photo in dB, [n, m].

    `pictures`: [n, height, width, 3] uint8, `photos`: [m, height, width, 3] uint8. PSNR = 10 log10(255^2 / MSE), with
    the mean squared error over pixels and channels; it is at most 58.9 dB, where the error is that of rounding to 8
    bits. Raises ValueError for arrays of other shapes or types.
    """
    _check(pictures, photos)
    errors = torch.stack([_squared_errors(picture, photos) for picture in pictures])
    return 10 * torch.log10(_WHITE**2 / errors.clamp(min=_ROUNDING_VARIANCE))


def edge_strength(pictures: Tensor) -> Tensor:
    """Return each picture's edge strength in levels of luma (0 to 255) per px, [n].

    `pictures`: [n, height, width, 3] uint8, 3 px or more a side. The gradient's magnitude is that of the Sobel operator
    divided by 8, so that a ramp of 1 level per px has the gradient 1 and a step of 255 levels 127.5, at every pixel
    with eight neighbours; the edge strength is its 95th percentile.
    """
    _check(pictures, pictures)
    across = torch.tensor(_SOBEL) / 8
    kernels = torch.stack([across, across.T])[:, None]
    return torch.stack([_edges(picture, kernels) for picture in pictures])


def pixel_scores(pictures: Tensor, photos: Tensor) -> dict[str, Tensor]:
    """Return each picture's scores against its nearest photo, the one with the highest PSNR: score -> [n].

    `psnr_db`: PSNR to it. `edge_strength`: the picture's own. `edge_ratio`: the picture's edge strength divided by that
    photo's, NaN for a photo without edges. Arguments are those of `psnr`.
    """
    nearest = psnr(pictures, photos).max(1)
    return _scores(pictures, photos, nearest.values, nearest.indices)


def pixel_scores_between_photos(photos: Tensor) -> dict[str, Tensor]:
    """Return each photo's scores against the nearest of the other photos: score -> [n]. Raises ValueError for fewer
    than two photos."""
    if len(photos) < 2:
        raise ValueError(f"{len(photos)} photos cannot be compared among themselves; give two or more")
    nearest = psnr(photos, photos).fill_diagonal_(-torch.inf).max(1)
    return _scores(photos, photos, nearest.values, nearest.indices)


def _scores(pictures: Tensor, photos: Tensor, psnr_db: Tensor, nearest: Tensor) -> dict[str, Tensor]:
    """Return the scores of pictures with this PSNR, [n], to the photos at these indices, [n]."""
    edges = edge_strength(pictures)
    of_nearest = edge_strength(photos)[nearest]
    ratio = torch.where(of_nearest > 0, edges / of_nearest, torch.nan)
    return {"psnr_db": psnr_db, "edge_strength": edges, "edge_ratio": ratio}


def _squared_errors(picture: Tensor, photos: Tensor) -> Tensor:
    """Return the mean squared error of one picture to each photo in squared levels, [m]."""
    return (picture.float() - photos.float()).square().flatten(1).mean(1)


def _edges(picture: Tensor, kernels: Tensor) -> Tensor:
    """Return the edge strength of one picture; `kernels`: [2, 1, 3, 3], across and down."""
    luma = picture.float() @ torch.tensor(_LUMA)
    gradient = F.conv2d(luma[None, None], kernels)[0]
    return gradient.square().sum(0).sqrt().flatten().quantile(EDGE_QUANTILE)


def _check(pictures: Tensor, photos: Tensor) -> None:
    shapes = pictures.shape, photos.shape
    are_pictures = all(len(shape) == 4 and shape[0] and min(shape[1:3]) >= 3 and shape[3] == 3 for shape in shapes)
    if not are_pictures or shapes[0][1:] != shapes[1][1:] or {pictures.dtype, photos.dtype} != {torch.uint8}:
        raise ValueError(
            f"arrays of shapes {list(shapes[0])} and {list(shapes[1])} and types {pictures.dtype} and {photos.dtype}; "
            "they must be [n, height, width, 3] and [m, height, width, 3] of uint8, 3 px or more a side, none empty"
        )
