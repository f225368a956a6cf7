"""The CLIP text encoders of a model that has several, as Stable Diffusion XL and 3 use them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from textual_inversion.families.parts import products_in, replaced_table
from textual_inversion.lora import AdaptableLayers, AdapterBatch
from textual_inversion.prompts import Vocabularies
from textual_inversion.tokens import TokenTable


class Encoded(NamedTuple):
    """A CLIP's output for a batch of prompts."""

    states: Tensor
    """States before the last layer, [batch, length, dim]."""
    pooled: Tensor
    """Last state at the end of the text, projected if the encoder has a projection, [batch, pooled_dim]."""


class ClipEncoders:
    """Frozen CLIPs with rows beside their vocabularies and adapters on their linear layers."""

    def __init__(self, encoders: Mapping[str, Any], vocabularies: Vocabularies, dtype: torch.dtype) -> None:
        """Freeze the encoders, replace their vocabularies by token tables, and let their linear layers take adapters.

        `encoders`: CLIPTextModel or CLIPTextModelWithProjection, by text encoder key. `dtype`: the denoiser's
        precision.
        """
        for each in encoders.values():
            each.requires_grad_(False).eval()
        self._encoders = encoders
        self._dtype = dtype
        self._vocabularies = vocabularies
        self._end = {key: vocabularies[key].end_of_text for key in encoders}
        self.token_tables: dict[str, TokenTable] = {key: replaced_table(each) for key, each in encoders.items()}
        self._adaptable = {key: AdaptableLayers(each, key, prefix=f"{key}.") for key, each in encoders.items()}
        self.adapter_layers: Mapping[str, tuple[int, int]] = {
            name: size for adaptable in self._adaptable.values() for name, size in adaptable.layers.items()
        }

    def single_token_words(self) -> list[str]:
        """Return the words of letters a-z that are one token of the first CLIP; the others have the same vocabulary."""
        first = next(iter(self._encoders))
        words: list[str] = self._vocabularies[first].single_token_words()  # type: ignore[attr-defined]
        return words

    def encode(
        self, ids: Mapping[str, Tensor], rows: Mapping[str, Tensor], adapters: Sequence[AdapterBatch] = ()
    ) -> dict[str, Encoded]:
        """Encode prompts with each CLIP (see `Backbone.encode_prompts`), by text encoder key.

        The vectors of whole prompts are taken at the true end of the text. Many configs name the id 2 as the end, and
        transformers then takes the largest id, which is a learned row's where a prompt has one.
        """
        return {key: self._encode(key, ids[key], rows.get(key), adapters) for key in self._encoders}

    def _encode(self, key: str, ids: Tensor, rows: Tensor | None, adapters: Sequence[AdapterBatch]) -> Encoded:
        encoder = self._encoders[key]
        device = self.token_tables[key].weight.device
        ids = ids.to(device)
        in_use = None if rows is None else rows.to(device)
        with (
            self.token_tables[key].reading(in_use),
            self._adaptable[key].using(adapters),
            products_in(self._dtype, device),
        ):
            # CLIPTextModel has an inner module up to transformers 4
            output = getattr(encoder, "text_model", encoder)(input_ids=ids, output_hidden_states=True)
            end = (ids == self._end[key]).int().argmax(1)
            pooled = output.last_hidden_state[torch.arange(len(end), device=device), end]
            if hasattr(encoder, "text_projection"):
                pooled = encoder.text_projection(pooled)
        return Encoded(output.hidden_states[-2], pooled)
