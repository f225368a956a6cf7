"""The interface between a model family and everything else. Nothing outside `families/` names a family.

A family module turns a diffusers directory into a `Backbone`. Three objects of it hold all that differs between
families: the text encoders' vocabularies and token tables, the `Conditioning` they make together, and the `Noise`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from textual_inversion.conditioning import Conditioning
from textual_inversion.errors import BadInput
from textual_inversion.lora import AdapterBatch
from textual_inversion.noise import Noise
from textual_inversion.prompts import Vocabularies
from textual_inversion.tokens import TokenTable


@dataclass(frozen=True, kw_only=True, slots=True)
class MemorySaving:
    """Ways to run a model's networks that take less memory and more time."""

    checkpoints_gradients: bool = False
    """True if the denoiser keeps only the inputs of its blocks for the backward pass, which computes all else again.
    Results are equal to rounding."""
    slices: bool = False
    """True if the autoencoder takes the pictures of a batch one by one. Results are equal to rounding."""
    tiles: bool = False
    """True if the autoencoder takes each picture in overlapping tiles of half its side, which are blended: pictures and
    latents differ a little."""


class Backbone(Protocol):
    """A loaded, frozen model on one device. Calls share no state, so several threads may use one backbone."""

    device: torch.device
    dtype: torch.dtype
    """Precision of the denoiser and autoencoder."""
    resolution: int
    """Side of a square picture, px."""
    latent_shape: tuple[int, int, int]
    """[channels, height, width] of one picture's latents at `resolution`."""
    noise: Noise
    """The process that adds noise to latents and undoes it."""
    guidance_scale: float
    """Guidance scale of its pictures where no setting gives one."""
    embeds_guidance: bool
    """True if the denoiser reads the guidance scale (`conditioning.GUIDANCE`), so that no output for an empty or
    negative prompt is compared with."""
    has_up_path: bool
    """True if the denoiser is a U-Net, whose gradients may pass through its up path alone
    (`Conditioning.gradient_path`)."""
    sampling_steps: int
    """Denoising steps of its pictures where no setting gives a number."""
    guides_by_zeros: bool
    """True if guidance compares the prompt with zeros in place of the empty prompt's encoding."""
    vocabularies: Vocabularies
    """Text encoder key -> its vocabulary."""
    token_tables: Mapping[str, TokenTable]
    """Text encoder key -> its token table, with as many vectors as the vocabulary has ids."""
    adapter_layers: Mapping[str, tuple[int, int]]
    """Name of each layer that can be adapted -> (inputs, outputs): linear layers of the text encoders, and the
    denoiser's cross-attention layers, if it has any, in order of execution. The last part of a name is a word of
    `adapter.targets`; names of different text encoders differ."""

    def latent_shape_for(self, width: int, height: int) -> tuple[int, int, int]:
        """Return the shape of the latents of a picture of this size, px; raise BadInput for a size that the model does
        not draw. `sized_latents` is the rule of the families here."""
        ...

    def single_token_words(self) -> list[str]:
        """Return words of three lower-case letters a-z or more that are one token each, in alphabetic order; rare ends
        of longer words are among them."""
        ...

    def encode_prompts(
        self, ids: Mapping[str, Tensor], rows: Mapping[str, Tensor], adapters: Sequence[AdapterBatch] = ()
    ) -> Conditioning:
        """Encode prompts.

        `ids`: text encoder key -> [batch, length] on the device, the length that the key's vocabulary assembles. Id
        `size + i` reads `rows[key][i]` ([num_rows, dim] float32). The changes of all `adapters` are added to the linear
        layers, prompt by prompt: one for each concept of a prompt, and for each rank in the batch. Changes of
        cross-attention layers become part of the conditioning. Gradients reach rows and adapters and nothing else;
        those of a row depend on its own text encoder's ids.
        """
        ...

    def encoder_states(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return each text encoder's own states for prompts without rows: key -> [batch, length, dim]."""
        ...

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Encode pictures [batch, 3, resolution, resolution] in [-1, 1] as moments [batch, 2, *latent_shape] float32:
        mean and standard deviation, both in the denoiser's scale."""
        ...

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the denoiser's output for [batch, *latent_shape], same shape, float32. `timesteps`: [batch], as
        `Noise.model_timesteps` and `SolverRun.timesteps` give them."""
        ...

    def middle_features(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the features behind the denoiser's middle block, [batch, channels, height, width] float32, for the
        inputs of `predict`. Raises ValueError if the denoiser is no U-Net (`has_up_path`)."""
        ...

    def compile(self, *, backend: str = "inductor", or_plain: bool = False, graphs: bool = False) -> None:
        """Run `predict` through torch.compile in all later calls, shape by shape, and with `graphs` as CUDA graphs.
        With `or_plain`, a module that cannot be compiled is run without."""
        ...

    def uncompile(self) -> None:
        """Run `predict` without torch.compile in all later calls."""
        ...

    def save_memory(self, saving: MemorySaving) -> None:
        """Run the denoiser and the autoencoder in these ways in all later calls; to be called between other calls."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [batch, *latent_shape] to pixels [batch, 3, resolution, resolution] in [-1, 1], float32.
        Gradients reach the latents."""
        ...

    def model_hash(self) -> str:
        """Return the digest of the weights' content; it enters fingerprints and provenance."""
        ...


def sized_latents(
    backbone: Backbone, width: int, height: int, *, multiple_px: int, most_px: int
) -> tuple[int, int, int]:
    """Return the shape of the latents of a picture of this size, px.

    Raises BadInput unless both sides are multiples of `multiple_px`, at which the denoiser's levels fit together, and
    at most `most_px`. The square of the model's own resolution always fits.
    """
    channels, own_height, own_width = backbone.latent_shape
    side = backbone.resolution
    is_fine = all(each % multiple_px == 0 and multiple_px <= each <= most_px for each in (width, height))
    if (width, height) != (side, side) and not is_fine:
        others = f" and others whose sides are multiples of {multiple_px} and at most {most_px}"
        raise BadInput(
            f"this model draws no pictures of {width} x {height} px, but of {side} x {side}"
            f"{others if multiple_px < most_px else ''}"
        )
    return channels, height * own_height // side, width * own_width // side


def stack_prompts(prompts: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
    """Stack tokenized prompts: text encoder key -> [prompts, length] ids on the CPU."""
    return {key: torch.tensor([prompt[key] for prompt in prompts]) for key in prompts[0]}
