"""Base of the families with one text encoder, a U-Net with cross-attention and an autoencoder, in diffusers' layout.

A family adds how its text encoder is loaded and run, and how its autoencoder encodes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from textual_inversion import model_files
from textual_inversion.compiled import Compiled
from textual_inversion.conditioning import Conditioning
from textual_inversion.cross_attention import CrossAttentionLayers
from textual_inversion.lora import AdaptableLayers, AdapterBatch
from textual_inversion.noise import Noise, from_scheduler_config
from textual_inversion.prompts import Vocabularies
from textual_inversion.tokens import TokenTable
from textual_inversion.weights import load_pretrained

GUIDANCE_SCALE = 5.0
"""Guidance scale of a model whose scheduler config gives none, from Gal et al. 2022."""


class UNetBackbone(ABC):
    """A frozen checkpoint of these parts as a `Backbone`."""

    def __init__(
        self,
        *,
        key: str,
        table: TokenTable,
        vocabulary: Any,
        text_encoder: Any,
        unet: Any,
        vae: Any,
        scheduler_config: Mapping[str, Any],
        digest: str,
    ) -> None:
        """Freeze the modules, which come on their device and in their precision; let the text encoder's linear layers
        and the U-Net's cross-attention take adapters.

        `key`: key of the text encoder, in which `table` stands in for the lookup of token vectors. `vocabulary`: a
        `prompts.Vocabulary` that has `single_token_words`, too.
        """
        for module in (text_encoder, unet, vae):
            module.requires_grad_(False).eval()
        if unet.device.type == "cuda":  # convolutions are fastest in this layout; on a CPU they choose their own
            unet = unet.to(memory_format=torch.channels_last)
            vae = vae.to(memory_format=torch.channels_last)
        self._text_encoder = text_encoder
        self._unet = unet
        self._vae = vae
        self._denoiser: Any = unet
        self._digest = digest

        self._key = key
        self._table = table
        self.token_tables: Mapping[str, TokenTable] = {key: table}
        self._vocabulary = vocabulary
        self.vocabularies: Vocabularies = {key: vocabulary}
        self._adaptable = AdaptableLayers(text_encoder, key)
        self._cross_attention = CrossAttentionLayers(unet)
        layers = {**self._adaptable.layers, **self._cross_attention.layers}
        self.adapter_layers: Mapping[str, tuple[int, int]] = layers

        self.device: torch.device = unet.device
        self.dtype: torch.dtype = unet.dtype
        self.latent_shape, self.resolution = _shape(unet.config, vae.config)
        self.noise: Noise = from_scheduler_config(scheduler_config, self.device)
        self.guidance_scale = float(scheduler_config.get("_guidance_scale", GUIDANCE_SCALE))

    def single_token_words(self) -> list[str]:
        """Return the single-token words of letters a-z alone."""
        words: list[str] = self._vocabulary.single_token_words()
        return words

    @abstractmethod
    def _states(self, ids: Tensor) -> Tensor:
        """Return the text encoder's states at every position, as the denoiser reads them, [batch, length, dim]."""

    def encode_prompts(
        self, ids: Mapping[str, Tensor], rows: Mapping[str, Tensor], adapters: Sequence[AdapterBatch] = ()
    ) -> Conditioning:
        """Encode prompts: the states at every position, final norm included, as the pipelines of diffusers use them."""
        rows_in_use = rows.get(self._key)
        rows_in_use = None if rows_in_use is None else rows_in_use.to(self.device)
        with self._table.reading(rows_in_use), self._adaptable.using(adapters), self._products():
            hidden = self._states(ids[self._key].to(self.device))
        changes = self._cross_attention.changes(hidden, adapters, self._key)
        return Conditioning(hidden=hidden.to(self.dtype), changes=changes and changes.to(self.dtype))

    def encoder_states(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the text encoder's states for prompts without rows: key -> [batch, length, dim]."""
        return {self._key: self.encode_prompts(ids, {}).hidden}

    def _products(self) -> AbstractContextManager[None]:
        """Let the text encoder multiply in bfloat16 where the denoiser does: an accelerator is many times faster at
        that. Sums, norms and rows, with their gradients, stay float32; float16 could overflow."""
        half = self.dtype == torch.bfloat16
        return torch.autocast(self.device.type, dtype=self.dtype) if half else nullcontext()

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Encode pictures [batch, 3, resolution, resolution] in [-1, 1] as moments [batch, 2, *latent_shape] float32:
        mean and standard deviation, times the autoencoder's scaling factor (these pipelines have no shift)."""
        with torch.no_grad():
            mean, std = self._moments(self._vae.encode(pixels.to(self.device, self._vae.dtype)))
        scaling: float = self._vae.config.scaling_factor
        return torch.stack([mean, std], dim=1) * scaling

    def _moments(self, encoded: Any) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of what a KL autoencoder's `encode` returned (untyped), float32."""
        posterior = encoded.latent_dist
        return posterior.mean.float(), (0.5 * posterior.logvar.float()).exp()

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the U-Net's output for [batch, *latent_shape] at integer timesteps [batch]; same shape, float32."""
        output: Tensor = self._denoiser(
            noisy_latents.to(self.dtype),
            timesteps,
            encoder_hidden_states=conditioning.hidden,
            return_dict=False,
            **self._cross_attention.keywords(conditioning.changes),
        )[0]
        return output.float()

    def compile(self, *, backend: str = "inductor", or_plain: bool = False, graphs: bool = False) -> None:
        """Run `predict` through torch.compile in all later calls; see `Compiled`."""
        self._denoiser = Compiled(self._unet, backend=backend, or_plain=or_plain, graphs=graphs)

    def uncompile(self) -> None:
        """Run `predict` without torch.compile in all later calls."""
        self._denoiser = self._unet

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [batch, *latent_shape] to pixels [batch, 3, resolution, resolution] in [-1, 1], float32.
        Gradients reach the latents."""
        unscaled = latents.to(self._vae.dtype) / self._vae.config.scaling_factor
        pixels: Tensor = self._vae.decode(unscaled, return_dict=False)[0]
        return pixels.float().clamp(-1, 1)

    def model_hash(self) -> str:
        """Return the digest of the files this model was loaded from (`model_files.model_hash`)."""
        return self._digest


def read_component(files: model_files.ModelFiles, component: str, cls: Any, **options: Any) -> Any:
    """Load a component (by its name in `model_index.json`) as a class of diffusers or transformers, on the CPU.

    `options`: handed to `load_pretrained`. Raises ValueError if it lacks weights or has unknown ones.
    """
    directory = str(files.directory)
    if component not in files.variants:
        raise ValueError(f"model {directory}: folder {component!r} has no .safetensors weights")
    variant = files.variants[component]
    return load_pretrained(cls, directory, subfolder=component, variant=variant, local_files_only=True, **options)


def autoencoder_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the autoencoder's precision beside a denoiser's: its activations leave float16's range."""
    return torch.float32 if dtype == torch.float16 else dtype


def device_named(name: str) -> torch.device:
    """Return the torch device of a setting; `auto` is CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def dtype_named(precision: str, device: torch.device) -> torch.dtype:
    """Return the denoiser's precision for a setting. Raises ValueError for an unknown one."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if precision not in known:
        raise ValueError(f"precision {precision!r} must be 'auto' or one of {', '.join(map(repr, known))}")
    return known[precision]


def _shape(unet: Any, vae: Any) -> tuple[tuple[int, int, int], int]:
    """Read latent shape and picture side (px) off the U-Net's and the autoencoder's configs."""
    channels = vae.get("vq_embed_dim") or vae.latent_channels
    if unet.in_channels != channels:
        raise ValueError(
            f"the U-Net takes {unet.in_channels} channels but the autoencoder has {channels} (an inpainting "
            "or depth model?); a plain text-to-image checkpoint is needed"
        )
    scale = 2 ** (len(vae.block_out_channels) - 1)
    side = unet.sample_size or vae.sample_size // scale
    if not isinstance(side, int):
        raise ValueError(f"the U-Net's sample_size {side!r} is not one number; only square pictures are supported")
    return (unet.in_channels, side, side), side * scale
