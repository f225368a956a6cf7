"""Scores of generated pictures as functions of feature matrices (`extractors` makes them). No model in here."""

from __future__ import annotations

import re

import torch.nn.functional as F
from torch import Tensor


def clip_i(generated: Tensor, photos: Tensor) -> float:
    """Gal et al. 2022, section 5 (reconstruction): mean cosine over all pairs of a generated picture and a photo.

    `generated`: [n, dim], `photos`: [m, dim] image features. In [-1, 1], higher is more faithful. With DINO features
    the same function is Ruiz et al. 2023's DINO score.
    """
    _check(generated, photos)
    return float((F.normalize(generated.float(), dim=1) @ F.normalize(photos.float(), dim=1).T).mean())


def clip_t(generated: Tensor, text: Tensor) -> float:
    """Gal et al. 2022, section 5 (editability): mean cosine between each generated picture and the prompt's text.

    `generated`: [n, dim] image features, `text`: [1, dim] of the prompt without its placeholder token
    (`without_placeholder`), or [n, dim] with each picture's own. Their released code averages cosines, as here; the
    paper's text takes the cosine of the mean.
    """
    _check(generated, text)
    if len(text) not in (1, len(generated)):
        raise ValueError(f"{len(text)} texts for {len(generated)} pictures; give one for all or one for each")
    return float(F.cosine_similarity(generated.float(), text.float(), dim=1).mean())


def without_placeholder(prompt: str, placeholder_token: str) -> str:
    """The prompt that CLIP-T compares with: the word removed ("A photo of on the moon", Gal et al. 2022, section 5)."""
    bare = re.sub(rf"(?<![\w<]){re.escape(placeholder_token)}(?![\w>])", " ", prompt)
    return " ".join(bare.split())


def _check(first: Tensor, second: Tensor) -> None:
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1] or not len(first) or not len(second):
        raise ValueError(
            f"feature matrices of shapes {list(first.shape)} and {list(second.shape)}; they must be [n, dim] and "
            "[m, dim] with the same dim, none empty"
        )
