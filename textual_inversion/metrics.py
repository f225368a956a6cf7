"""Scores of generated pictures as functions of feature matrices (`extractors` makes them). No model in here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def clip_i(generated: Tensor, photos: Tensor) -> float:
    """Gal et al. 2022, section 5 (reconstruction): mean cosine over all pairs of a generated picture and a photo.

    `generated`: [n, dim], `photos`: [m, dim] image features. In [-1, 1], higher is more faithful. With DINO features
    the same function is Ruiz et al. 2023's DINO score.
    """
    return float(clip_i_each(generated, photos).mean())


def clip_i_each(generated: Tensor, photos: Tensor) -> Tensor:
    """[n]: the same of each picture, its mean cosine to the photos."""
    _check(generated, photos)
    return (F.normalize(generated.float(), dim=1) @ F.normalize(photos.float(), dim=1).T).mean(1)


def clip_i_among(photos: Tensor) -> Tensor:
    """[n]: each photo's mean cosine to the others (Gal et al. 2022's "image only" setup, with no photo compared with
    itself). Raises ValueError for fewer than two."""
    if len(photos) < 2:
        raise ValueError(f"{len(photos)} photos cannot be compared among themselves; give two or more")
    others = [torch.cat([photos[:i], photos[i + 1 :]]) for i in range(len(photos))]
    return torch.cat([clip_i_each(photos[i : i + 1], rest) for i, rest in enumerate(others)])


def clip_t(generated: Tensor, text: Tensor) -> float:
    """Gal et al. 2022, section 5 (editability): mean cosine between each generated picture and the prompt's text.

    `generated`: [n, dim] image features, `text`: [1, dim] of the prompt without its placeholder token
    (`prompts.without_placeholder`), or [n, dim] with each picture's own. Their released code averages cosines, as here;
    the paper's text takes the cosine of the mean.
    """
    return float(clip_t_each(generated, text).mean())


def clip_t_each(generated: Tensor, text: Tensor) -> Tensor:
    """[n]: the same of each picture."""
    _check(generated, text)
    if len(text) not in (1, len(generated)):
        raise ValueError(f"{len(text)} texts for {len(generated)} pictures; give one for all or one for each")
    return F.cosine_similarity(generated.float(), text.float(), dim=1)


def mean_and_error(values: Tensor) -> tuple[float, float | None]:
    """Mean of [n] independent values and its standard error; of a single value the error is not known."""
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
    return float(values.mean()), error


def _check(first: Tensor, second: Tensor) -> None:
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1] or not len(first) or not len(second):
        raise ValueError(
            f"feature matrices of shapes {list(first.shape)} and {list(second.shape)}; they must be [n, dim] and "
            "[m, dim] with the same dim, none empty"
        )
