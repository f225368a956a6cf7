"""Words made from pictures: scenes of objects that have no name, for a denoiser whose space of words is dense.

A model trained on the web's captions knows hundreds of thousands of words, so that a learned word has neighbours on
every side. The demo world has a few hundred. Therefore some training scenes show an *unnamed* object, a drawing in any
art set with its hue rotated, and its caption holds a word whose row a small network makes from another picture of that
object. The network is trained with the denoiser by the same loss and is thrown away afterwards. Gal et al. 2023
("Encoder-based Domain Tuning", arXiv 2302.12228) train such a network for personalisation; here it only fills the space
between the names.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from demo.autoencoder import to_tensor

UNNAMED = "<unnamed>"
"""Word of a caption whose row comes from a picture. Its token id is the size of the vocabulary."""
_HIDDEN = 1024
_FEATURE_BATCH = 250
_ROW_NOISE = 0.1
"""Deviation of the noise on a row's coordinates, relative to the vocabulary's: near rows should draw alike."""


class OpenVocabulary(nn.Module):
    """Token table that takes the row of the first id beyond the vocabulary from `rows`."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table = table
        self.rows: Tensor | None = None
        """Row of the unnamed word in every sample of the batch, [samples, width]."""

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of the ids, [samples, tokens, width]."""
        is_unnamed = ids >= self.table.num_embeddings
        hidden = self.table(ids.masked_fill(is_unnamed, 0))
        if self.rows is None:
            return hidden
        return torch.where(is_unnamed[..., None], self.rows[:, None], hidden)


def open_vocabulary(text_encoder: CLIPTextModel) -> OpenVocabulary:
    """Wrap the encoder's token table in place and return the wrapper; order and number of parameters stay."""
    wrapper = OpenVocabulary(text_encoder.get_input_embeddings())
    text_encoder.set_input_embeddings(wrapper)
    return wrapper


class WordsFromPictures(nn.Module):
    """Network from a picture's features to a row of the token table."""

    def __init__(self, num_features: int, table: Tensor) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(num_features),
            nn.Linear(num_features, _HIDDEN),
            nn.GELU(),
            nn.Linear(_HIDDEN, table.shape[1]),
        )
        self.register_buffer("centre", table.mean(0).clone())
        self.register_buffer("deviation", table.std().clone())

    def forward(self, features: Tensor, generator: torch.Generator) -> Tensor:
        """Return one row for each picture, [pictures, width], with a little noise."""
        rows = self.centre + 3 * self.deviation * self.layers(features)
        noise = torch.randn(rows.shape, generator=generator, device=rows.device)
        return rows + _ROW_NOISE * self.deviation * noise


def unnamed_tokenizer(tokenizer: CLIPTokenizer) -> CLIPTokenizer:
    """Add the unnamed word to the tokenizer, in place, and return it. Training alone uses the result."""
    tokenizer.add_tokens([UNNAMED])
    return tokenizer


@torch.no_grad()
def features_of(clip: CLIPModel, pictures: np.ndarray, latents: Tensor) -> Tensor:
    """Return features of pictures, fp32 [pictures, features]: the CLIP's, and the latents at half their resolution.

    `pictures` are uint8 [pictures, height, width, 3], `latents` [pictures, channels, h, w].
    """
    parts = []
    for start in range(0, len(pictures), _FEATURE_BATCH):
        pixels = to_tensor(pictures[start : start + _FEATURE_BATCH], torch.device("cpu"))
        pooled = clip.vision_model(pixel_values=pixels).pooler_output
        coarse = nn.functional.avg_pool2d(latents[start : start + _FEATURE_BATCH].float(), 2).flatten(1)
        parts.append(torch.cat([nn.functional.layer_norm(pooled, pooled.shape[-1:]), coarse], 1))
    return torch.cat(parts)
