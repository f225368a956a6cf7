"""The T5 text encoder of a model that has one beside its CLIPs, as Stable Diffusion 3 and FLUX use it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import T5EncoderModel

from textual_inversion.families.parts import read_text_encoder, replaced_table
from textual_inversion.model_files import ModelFiles


class T5Encoder:
    """A frozen T5 with rows beside its vocabulary."""

    def __init__(self, encoder: Any) -> None:
        """Freeze a T5EncoderModel, and replace its vocabulary by a token table whose rows are not learned unless a
        setting says so."""
        self._encoder = encoder.requires_grad_(False).eval()
        self.token_table = replaced_table(encoder, learns_rows=False)

    def states(self, ids: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return the states at every position, [batch, length, dim]. No mask hides the padding, as in the pipelines of
        diffusers."""
        device = self.token_table.weight.device
        with self.token_table.reading(None if rows is None else rows.to(device)):
            states: Tensor = self._encoder(ids.to(device)).last_hidden_state
        return states


def read_t5(files: ModelFiles, component: str, dtype: torch.dtype) -> Any:
    """Load a T5 beside a denoiser of this precision, on the CPU: in bfloat16 beside one of half precision, because it
    overflows in float16."""
    own = torch.float32 if dtype == torch.float32 else torch.bfloat16
    return read_text_encoder(files, component, T5EncoderModel, own)
