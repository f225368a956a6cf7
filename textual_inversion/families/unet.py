"""Bases of the families with a U-Net with cross-attention, in diffusers' layout.

A family adds how its text encoders are loaded and run, and what else its U-Net and its autoencoder take.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from textual_inversion.compiled import Compiled
from textual_inversion.conditioning import Conditioning
from textual_inversion.cross_attention import CrossAttentionLayers
from textual_inversion.families.base import sized_latents
from textual_inversion.families.latent import LatentBackbone, downscaling
from textual_inversion.families.parts import DISTILLED_STEPS, SAMPLING_STEPS, drawing_defaults, products_in
from textual_inversion.lora import AdaptableLayers, AdapterBatch
from textual_inversion.memory_layout import convolution_layout, lay_out
from textual_inversion.noise import from_scheduler_config
from textual_inversion.prompts import Vocabularies
from textual_inversion.tokens import TokenTable
from textual_inversion.unet_parts import down_path_alone, up_path_alone

GUIDANCE_SCALE = 5.0
"""Guidance scale of a model whose scheduler config gives none: Gal et al. 2022, and StableDiffusionXLPipeline's
default."""

_LARGEST = 2
"""Largest side of a picture, in sides of the model's resolution: beyond, U-Nets repeat what they draw."""

_DISTILLED_SCHEDULERS = ("LCMScheduler", "TCDScheduler")
"""Schedulers of models that were distilled to draw in a few steps."""


class UNetBackbone(LatentBackbone):
    """A frozen U-Net and autoencoder as a `Backbone`; subclasses add the text encoders."""

    has_up_path = True

    def __init__(self, *, unet: Any, vae: Any, scheduler_config: Mapping[str, Any], digest: str) -> None:
        """Freeze the modules, which come on their device and in their precision, in the layout that is fastest there,
        and let the U-Net's cross-attention take adapters."""
        self._plain_layout = convolution_layout(unet.device, unet.dtype, is_compiled=False)
        self._compiled_layout = convolution_layout(unet.device, unet.dtype, is_compiled=True)
        lay_out(unet, self._plain_layout)
        lay_out(vae, convolution_layout(vae.device, vae.dtype, is_compiled=False))
        super().__init__(denoiser=unet, vae=vae, digest=digest)
        self._cross_attention = CrossAttentionLayers(unet)
        self._up_path = up_path_alone(unet)
        self._up_path_denoiser: Any = self._up_path
        self._down_path: Any = down_path_alone(unet)
        scale = downscaling(vae.config)
        side = unet.config.sample_size or vae.config.sample_size // scale
        self.latent_shape, self.resolution = (unet.config.in_channels, side, side), side * scale
        self.noise = from_scheduler_config(scheduler_config, self.device)
        is_distilled = _is_distilled(scheduler_config)
        self.guidance_scale, self.sampling_steps = drawing_defaults(
            scheduler_config,
            guidance_scale=1.0 if is_distilled else GUIDANCE_SCALE,
            steps=DISTILLED_STEPS if is_distilled else SAMPLING_STEPS,
        )

    def latent_shape_for(self, width: int, height: int) -> tuple[int, int, int]:
        """Return the shape of a picture's latents: sides are multiples of what the U-Net's lowest level divides them
        by, and at most twice the model's resolution."""
        cell_px = self.resolution // self.latent_shape[1]
        multiple_px = cell_px * 2 ** (len(self._network.config.block_out_channels) - 1)
        return sized_latents(self, width, height, multiple_px=multiple_px, most_px=_LARGEST * self.resolution)

    def compile(self, *, backend: str = "inductor", or_plain: bool = False, graphs: bool = False) -> None:
        """Run `predict` through torch.compile in all later calls; see `Compiled`."""
        lay_out(self._network, self._compiled_layout)
        super().compile(backend=backend, or_plain=or_plain, graphs=graphs)
        self._up_path_denoiser = Compiled(self._up_path, backend=backend, or_plain=or_plain, graphs=graphs)

    def uncompile(self) -> None:
        """Run `predict` without torch.compile in all later calls."""
        super().uncompile()
        self._up_path_denoiser = self._up_path
        lay_out(self._network, self._plain_layout)

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the U-Net's output for [batch, *latent_shape] at integer timesteps [batch]; same shape, float32."""
        denoiser = self._up_path_denoiser if conditioning.gradient_path == "up_path" else self._denoiser
        return self._run(denoiser, noisy_latents, timesteps, conditioning)

    def middle_features(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the features behind the U-Net's middle block, [batch, channels, height, width] float32."""
        return self._run(self._down_path, noisy_latents, timesteps, conditioning)

    def _run(self, denoiser: Any, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the output of the U-Net, or of a part of it, float32."""
        output: Tensor = denoiser(
            noisy_latents.to(self.dtype),
            timesteps,
            encoder_hidden_states=conditioning.hidden,
            return_dict=False,
            **self._cross_attention.keywords(conditioning.changes),
            **self._further_inputs(conditioning, noisy_latents),
        )[0]
        return output.float()

    def _further_inputs(self, conditioning: Conditioning, noisy_latents: Tensor) -> dict[str, Any]:
        """Return what the U-Net takes besides latents and states, as keyword arguments."""
        del conditioning, noisy_latents
        return {}


class OneEncoderBackbone(UNetBackbone):
    """A frozen checkpoint with one text encoder as a `Backbone`."""

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
        super().__init__(unet=unet, vae=vae, scheduler_config=scheduler_config, digest=digest)
        self._text_encoder = text_encoder.requires_grad_(False).eval()
        self._key = key
        self._table = table
        self.token_tables: Mapping[str, TokenTable] = {key: table}
        self._vocabulary = vocabulary
        self.vocabularies: Vocabularies = {key: vocabulary}
        self._adaptable = AdaptableLayers(text_encoder, key)
        self.adapter_layers: Mapping[str, tuple[int, int]] = {**self._adaptable.layers, **self._cross_attention.layers}

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
        products = products_in(self.dtype, self.device)
        with self._table.reading(rows_in_use), self._adaptable.using(adapters), products:
            hidden = self._states(ids[self._key].to(self.device))
        changes = self._cross_attention.changes(hidden, adapters, self._key)
        return Conditioning(hidden=hidden.to(self.dtype), changes=changes and changes.to(self.dtype))

    def encoder_states(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the text encoder's states for prompts without rows: key -> [batch, length, dim]."""
        return {self._key: self.encode_prompts(ids, {}).hidden}


def _is_distilled(scheduler: Mapping[str, Any]) -> bool:
    """Return whether the scheduler's config is that of a model that was distilled to draw in a few steps without
    guidance.

    The published SD-Turbo, SDXL-Turbo and SDXL-Lightning begin to draw at the last timestep ("trailing"); of the other
    models, only those whose last timestep is pure noise do.
    """
    is_trailing = scheduler.get("timestep_spacing") == "trailing" and not scheduler.get("rescale_betas_zero_snr")
    return scheduler.get("_class_name") in _DISTILLED_SCHEDULERS or (
        is_trailing and scheduler.get("prediction_type", "epsilon") == "epsilon"
    )
