"""The T5 text encoder of a model that has one beside its CLIPs, as Stable Diffusion 3 and FLUX use it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import T5EncoderModel

from textual_inversion.families.parts import products_in, read_text_encoder, replaced_table
from textual_inversion.lora import AdaptableLayers, AdapterBatch
from textual_inversion.model_files import ModelFiles
from textual_inversion.text_encoders import T5_KEY


class T5Encoder:
    """A frozen T5 with rows beside its vocabulary and adapters on its linear layers."""

    def __init__(self, encoder: Any) -> None:
        """Freeze a T5EncoderModel, replace its vocabulary by a token table whose rows are not learned unless a setting
        says so, and let its linear layers take adapters."""
        self._encoder = encoder.requires_grad_(False).eval()
        self.token_table = replaced_table(encoder, learns_rows=False)
        self._adaptable = AdaptableLayers(encoder, T5_KEY, prefix=f"{T5_KEY}.")
        self.adapter_layers = self._adaptable.layers

    def states(self, ids: Tensor, rows: Tensor | None = None, adapters: Sequence[AdapterBatch] = ()) -> Tensor:
        """Return the states at every position, [batch, length, dim]. No mask hides the padding, as in the pipelines of
        diffusers."""
        weight = self.token_table.weight
        with (
            self.token_table.reading(None if rows is None else rows.to(weight.device)),
            self._adaptable.using(adapters),
            products_in(weight.dtype, weight.device),  # adapters are float32
        ):
            states: Tensor = self._encoder(ids.to(weight.device)).last_hidden_state
        return states


def read_t5(files: ModelFiles, component: str, dtype: torch.dtype) -> Any:
    """Load a T5 beside a denoiser of this precision, on the CPU: in bfloat16 beside one of half precision, because it
    overflows in float16."""
    own = torch.float32 if dtype == torch.float32 else torch.bfloat16
    return read_text_encoder(files, component, T5EncoderModel, own)
