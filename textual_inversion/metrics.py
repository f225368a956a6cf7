"""Scores of generated pictures as functions of feature matrices (made by `extractors`). This module loads no model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def clip_i(generated: Tensor, photos: Tensor) -> float:
    """Gal et al. 2022, section 5 (reconstruction): mean cosine over all pairs of a generated picture and a photo.

    `generated`: [n, dim], `photos`: [m, dim] image features. In [-1, 1], higher is more faithful. With DINO features
    this function is the DINO score of Ruiz et al. 2023.
    """
    return float(clip_i_per_picture(generated, photos).mean())


def clip_i_per_picture(generated: Tensor, photos: Tensor) -> Tensor:
    """Return CLIP-I of each picture, [n]: its mean cosine to the photos. `generated`: [n, dim], `photos`: [m, dim]."""
    _check_features(generated, photos)
    return (F.normalize(generated.float(), dim=1) @ F.normalize(photos.float(), dim=1).T).mean(1)


def clip_i_between_photos(photos: Tensor) -> Tensor:
    """Gal et al. 2022's "image only" setup: return each photo's mean cosine to the other photos, [n].

    `photos`: [n, dim]. No photo is compared with itself. Raises ValueError for fewer than two photos.
    """
    if len(photos) < 2:
        raise ValueError(f"{len(photos)} photos cannot be compared among themselves; give two or more")
    others = [torch.cat([photos[:i], photos[i + 1 :]]) for i in range(len(photos))]
    return torch.cat([clip_i_per_picture(photos[i : i + 1], rest) for i, rest in enumerate(others)])


def mirror_margin(generated: Tensor, photos: Tensor, mirrored: Tensor) -> Tensor:
    """Return each picture's mean cosine to the photos minus its mean cosine to the mirrored photos, [n].

    `generated`: [n, dim], `photos` and `mirrored`: [m, dim] features of the photos and of their mirror images. Above 0
    for a picture that faces the photos' way, below 0 for one that faces the other way, near 0 for a symmetric concept
    or for features that are blind to mirroring.
    """
    return clip_i_per_picture(generated, photos) - clip_i_per_picture(generated, mirrored)


def mirror_margin_between_photos(photos: Tensor, mirrored: Tensor) -> Tensor:
    """Return `mirror_margin` of each photo against the other photos, [n]. `photos`, `mirrored`: [n, dim], in one order.

    Raises ValueError for fewer than two photos.
    """
    own = clip_i_between_photos(photos)
    others = [torch.cat([mirrored[:i], mirrored[i + 1 :]]) for i in range(len(photos))]
    return own - torch.cat([clip_i_per_picture(photos[i : i + 1], rest) for i, rest in enumerate(others)])


def clip_t(generated: Tensor, text: Tensor) -> float:
    """Gal et al. 2022, section 5 (editability): mean cosine between each generated picture and the prompt's text.

    `generated`: [n, dim] image features, `text`: [1, dim] of the prompt without the concept's name
    (`prompts.without_placeholder`), or [n, dim] with one text for each picture. Ruiz et al. 2023 and TextBoost's
    evaluation keep the class noun in the text, as do prompts that name the class themselves. The paper's released code
    averages cosines, as this function does; the paper's text takes the cosine of the mean.
    """
    return float(clip_t_per_picture(generated, text).mean())


def clip_t_per_picture(generated: Tensor, text: Tensor) -> Tensor:
    """Return CLIP-T of each picture, [n]: its cosine to the text. Arguments are those of `clip_t`."""
    _check_features(generated, text)
    if len(text) not in (1, len(generated)):
        raise ValueError(f"{len(text)} texts for {len(generated)} pictures; give one for all or one for each")
    return F.cosine_similarity(generated.float(), text.float(), dim=1)


def mean_and_standard_error(values: Tensor) -> tuple[float, float | None]:
    """Return the mean of [n] independent values and its standard error, which is None for a single value."""
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
    return float(values.mean()), error


def _check_features(first: Tensor, second: Tensor) -> None:
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1] or not len(first) or not len(second):
        raise ValueError(
            f"feature matrices of shapes {list(first.shape)} and {list(second.shape)}; they must be [n, dim] and "
            "[m, dim] with the same dim, none empty"
        )
