"""Base of every family: a denoiser of latents and an autoencoder, in diffusers' layout.

A family, or the base of several, adds its text encoders, its noise process and what its denoiser takes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from textual_inversion.compiled import Compiled
from textual_inversion.conditioning import Conditioning
from textual_inversion.families.base import MemorySaving, sized_latents
from textual_inversion.families.parts import save_memory
from textual_inversion.lora import AdapterBatch
from textual_inversion.model_checks import NO_MIDDLE_BLOCK
from textual_inversion.noise import Noise
from textual_inversion.prompts import Vocabularies
from textual_inversion.tokens import TokenTable


class LatentBackbone(ABC):
    """A frozen denoiser and autoencoder as a `Backbone`; subclasses add the rest."""

    token_tables: Mapping[str, TokenTable]
    vocabularies: Vocabularies
    adapter_layers: Mapping[str, tuple[int, int]]
    noise: Noise
    latent_shape: tuple[int, int, int]
    resolution: int
    guidance_scale: float
    sampling_steps: int
    embeds_guidance = False
    has_up_path = False
    guides_by_zeros = False

    def __init__(self, *, denoiser: Any, vae: Any, digest: str) -> None:
        """Freeze the modules, which come on their device and in their precision."""
        for module in (denoiser, vae):
            module.requires_grad_(False).eval()
        self._network = denoiser
        self._denoiser: Any = denoiser
        self._vae = vae
        self._digest = digest
        self.device: torch.device = denoiser.device
        self.dtype: torch.dtype = denoiser.dtype

    def latent_shape_for(self, width: int, height: int) -> tuple[int, int, int]:
        """Return the shape of a picture's latents: of the model's own size alone, unless a family draws others."""
        return sized_latents(self, width, height, multiple_px=self.resolution, most_px=self.resolution)

    @abstractmethod
    def single_token_words(self) -> list[str]:
        """See `Backbone.single_token_words`."""

    @abstractmethod
    def encode_prompts(
        self, ids: Mapping[str, Tensor], rows: Mapping[str, Tensor], adapters: Sequence[AdapterBatch] = ()
    ) -> Conditioning:
        """See `Backbone.encode_prompts`."""

    @abstractmethod
    def encoder_states(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Backbone.encoder_states`."""

    @abstractmethod
    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """See `Backbone.predict`."""

    def middle_features(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """See `Backbone.middle_features`."""
        del noisy_latents, timesteps, conditioning
        raise ValueError(NO_MIDDLE_BLOCK)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Encode pictures [batch, 3, resolution, resolution] in [-1, 1] as moments [batch, 2, *latent_shape] float32:
        mean, less the autoencoder's shift if it has one, and standard deviation, both times its scaling factor."""
        with torch.no_grad():
            mean, std = self._moments(self._vae.encode(pixels.to(self.device, self._vae.dtype)))
        shift, scaling = self._scale()
        return torch.stack([mean - shift, std], dim=1) * scaling

    def _moments(self, encoded: Any) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of what a KL autoencoder's `encode` returned (untyped), float32."""
        posterior = encoded.latent_dist
        return posterior.mean.float(), (0.5 * posterior.logvar.float()).exp()

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [batch, *latent_shape] to pixels [batch, 3, resolution, resolution] in [-1, 1], float32.
        Gradients reach the latents."""
        shift, scaling = self._scale()
        pixels: Tensor = self._vae.decode(latents.to(self._vae.dtype) / scaling + shift, return_dict=False)[0]
        return pixels.float().clamp(-1, 1)

    def _scale(self) -> tuple[float, float]:
        """Return the shift and the factor that turn the autoencoder's latents into the denoiser's."""
        config = self._vae.config
        return float(config.get("shift_factor") or 0), float(config.scaling_factor)

    def compile(self, *, backend: str = "inductor", or_plain: bool = False, graphs: bool = False) -> None:
        """Run `predict` through torch.compile in all later calls; see `Compiled`."""
        self._denoiser = Compiled(self._network, backend=backend, or_plain=or_plain, graphs=graphs)

    def uncompile(self) -> None:
        """Run `predict` without torch.compile in all later calls."""
        self._denoiser = self._network

    def save_memory(self, saving: MemorySaving) -> None:
        """Run the denoiser and the autoencoder in these ways in all later calls; see `parts.save_memory`."""
        save_memory(saving, self._network, self._vae, self.latent_shape)

    def model_hash(self) -> str:
        """Return the digest of the files this model was loaded from (`model_files.model_hash`)."""
        return self._digest


def downscaling(vae: Any) -> int:
    """Return how many pixels lie side by side in one latent, from an autoencoder's config."""
    return int(2 ** (len(vae.block_out_channels) - 1))
