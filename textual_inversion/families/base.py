"""What the engine and the generator may ask of a model, whatever its family.

A family module turns a diffusers directory into a `Backbone`; nothing outside `families/` names a family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from textual_inversion.lora import AdapterBatch
from textual_inversion.tokens import TokenTable


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditioning:
    """All that the denoiser takes from the text."""

    hidden: Tensor
    """[batch, length, dim] encoder states, in the denoiser's dtype."""


class Backbone(Protocol):
    """A loaded, frozen model on one device. Calls share no state, so several threads may use one backbone."""

    device: torch.device
    dtype: torch.dtype
    """Of the denoiser and autoencoder."""
    resolution: int
    """Side of a square picture, px."""
    latent_shape: tuple[int, int, int]
    """[channels, height, width] of one picture's latents at `resolution`."""
    max_length: int
    """Tokens in a prompt, start and end included."""
    vocab_size: int
    """Ids below it read the frozen table; ids from it up read the rows in use."""
    alphas_cumprod: Tensor
    """[num_train_timesteps] float32, on `device`."""
    end_of_text: int
    """Vocabulary id after a prompt's last word; what follows it is padding."""
    prediction_type: str
    """`epsilon` or `v_prediction`."""
    guidance_scale: float
    """What its pictures are drawn with where no setting says otherwise."""
    token_tables: Mapping[str, TokenTable]
    """Text encoder key -> its token table."""
    adapter_layers: Mapping[str, tuple[int, int]]
    """Name of each linear layer of the text encoder that can be adapted -> (inputs, outputs)."""

    def tokenize(self, text: str) -> list[int]:
        """The vocabulary ids of a text, without start, end or padding."""
        ...

    def words(self) -> list[str]:
        """The words of three lower-case letters a-z or more that are one token each, in alphabetic order; rare ends of
        longer words are among them."""
        ...

    def assemble(self, ids: Sequence[int]) -> list[int]:
        """Add start, end and padding: `max_length` ids. Raises BadInput if they do not fit."""
        ...

    def encode_prompts(
        self, ids: Tensor, rows: Mapping[str, Tensor], adapters: Sequence[AdapterBatch] = ()
    ) -> Conditioning:
        """[batch, max_length] ids -> conditioning. Id `vocab_size + i` reads `rows[key][i]` of each text encoder
        ([num_rows, dim] float32); the changes of all `adapters` are added to its linear layers, prompt by prompt: one
        for each concept of a prompt, and for each rank in the batch. Gradients reach those two and nothing else."""
        ...

    def encode_images(self, pixels: Tensor) -> Tensor:
        """[batch, 3, resolution, resolution] in [-1, 1] -> moments [batch, 2, *latent_shape] float32:
        mean and standard deviation, both in the denoiser's scale."""
        ...

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's output for [batch, *latent_shape] at integer timesteps [batch]; same shape, float32."""
        ...

    def compile(self, *, backend: str = "inductor", or_plain: bool = False, graphs: bool = False) -> None:
        """From now on `predict` runs through torch.compile, shape by shape, and with `graphs` as CUDA graphs; with
        `or_plain` it goes on without where compiling fails."""
        ...

    def uncompile(self) -> None:
        """From now on it runs as it is."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """[batch, *latent_shape] -> pixels [batch, 3, resolution, resolution] in [-1, 1], float32. Gradients reach the
        latents."""
        ...

    def scheduler(self, solver: str) -> Any:
        """A fresh diffusers scheduler for sampling, set up from the model's own schedule; diffusers is untyped."""
        ...

    def model_hash(self) -> str:
        """Digest of the weights' content; enters fingerprints and provenance."""
        ...
