"""FLUX.1: a CLIP, T5 and a transformer that learned rectified flow and was distilled (Black Forest Labs 2024).

The family serves any diffusers `FluxPipeline` directory. Of the CLIP, the transformer reads one vector for the whole
prompt; the sequence of states that its layers attend to is T5's. FLUX.1 dev reads a guidance scale as well, by which it
imitates guided pictures in one pass (`guidance_embeds` in its config). While a concept is learned the scale is 1, as in
the recipes of diffusers for FLUX (examples/dreambooth/README_flux.md) and for their reason: the flow of the data has no
guidance in it (black-forest-labs/flux issue 79). Pictures are drawn with 3.5, the pipeline's default. FLUX.1 schnell
reads none.

Rows are learned in the CLIP unless `text_encoders` of the configuration names T5; T5's rows then keep their initial
values (`families.sd3` says which). That is the default of diffusers' training script for FLUX
(train_dreambooth_lora_flux_advanced, whose `enable_t5_ti` is off), and what users report speaks for it: with rows in
both, most of the likeness is the CLIP's, and T5's alone change next to nothing (huggingface/diffusers issue 10313).
One also reports that rows alone do less on FLUX than on Stable Diffusion, until weights are trained as well
(kohya-ss/sd-scripts issue 1588). An adapter trains weights of a text encoder, and is the stronger option: one of the
CLIP changes the vector that the transformer reads, one of T5 (`adapter.targets`) every state.

Pictures have the size that the autoencoder's config names (`sample_size`, 1024 px as published), on which the shift of
the noise levels depends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextModel

from textual_inversion import model_files
from textual_inversion.conditioning import GUIDANCE, Conditioning
from textual_inversion.families.clips import ClipEncoders
from textual_inversion.families.latent import LatentBackbone, downscaling
from textual_inversion.families.parts import (
    DISTILLED_STEPS,
    SAMPLING_STEPS,
    UNUSED_CLIP_PARTS,
    device_named,
    drawing_defaults,
    dtype_named,
    read_autoencoder,
    read_component,
    read_text_encoder,
)
from textual_inversion.families.t5 import T5Encoder, read_t5
from textual_inversion.lora import AdapterBatch
from textual_inversion.model_checks import PACKED_RESOLUTION, read_config
from textual_inversion.noise import RectifiedFlow
from textual_inversion.prompts import Vocabularies
from textual_inversion.text_encoders import CLIP_KEYS, T5_KEY, load_vocabularies

_GUIDANCE_SCALE = 3.5
"""Guidance scale that a transformer reads where its scheduler's config gives none: the default of FluxPipeline."""

_CLIP = CLIP_KEYS[0]


class Flux(LatentBackbone):
    """A frozen FLUX.1 checkpoint as a `Backbone`; build it with `load`."""

    def __init__(
        self,
        *,
        clip: Any,
        t5: Any,
        vocabularies: Vocabularies,
        transformer: Any,
        vae: Any,
        resolution: int,
        scheduler_config: Mapping[str, Any],
        digest: str,
    ) -> None:
        """Freeze the modules, which come on their device and in their precision; replace the text encoders'
        vocabularies by token tables, and let their linear layers take adapters.

        `vocabularies`: by text encoder key. `resolution`: side of a picture, px.
        """
        super().__init__(denoiser=transformer, vae=vae, digest=digest)
        self.vocabularies = vocabularies
        self._clips = ClipEncoders({_CLIP: clip}, vocabularies, self.dtype)
        self._t5 = T5Encoder(t5)
        self.token_tables = {**self._clips.token_tables, T5_KEY: self._t5.token_table}
        self.adapter_layers = {**self._clips.adapter_layers, **self._t5.adapter_layers}
        self.resolution = resolution
        side = resolution // downscaling(vae.config)
        self.latent_shape = (vae.config.latent_channels, side, side)
        self.embeds_guidance = bool(transformer.config.guidance_embeds)
        # schnell, which was distilled to draw in 1 to 4 steps, is the one that does not read the scale
        self.guidance_scale, self.sampling_steps = drawing_defaults(
            scheduler_config,
            guidance_scale=_GUIDANCE_SCALE if self.embeds_guidance else 1.0,
            steps=SAMPLING_STEPS if self.embeds_guidance else DISTILLED_STEPS,
        )

        tokens_side = torch.arange(side // 2, device=self.device)
        # each token's place among all kinds of tokens, row and column; text has zeros
        self._picture_ids = F.pad(torch.cartesian_prod(tokens_side, tokens_side), (1, 0)).float()
        self.noise = RectifiedFlow(
            scheduler_config.get("num_train_timesteps", 1000),
            _shift(scheduler_config, len(self._picture_ids)),
            even_steps=True,
            device=self.device,
        )

    def single_token_words(self) -> list[str]:
        """Return the words of `ClipEncoders.single_token_words`."""
        return self._clips.single_token_words()

    def encode_prompts(
        self, ids: Mapping[str, Tensor], rows: Mapping[str, Tensor], adapters: Sequence[AdapterBatch] = ()
    ) -> Conditioning:
        """Encode prompts as FluxPipeline does: T5's states, the CLIP's pooled vector, and guidance scale 1 if the
        transformer reads one."""
        hidden = self._t5.states(ids[T5_KEY], rows.get(T5_KEY), adapters).to(self.dtype)
        pooled = self._clips.encode(ids, rows, adapters)[_CLIP].pooled.to(self.dtype)
        scale = {GUIDANCE: torch.ones(len(hidden), device=self.device)} if self.embeds_guidance else {}
        return Conditioning(hidden=hidden, pooled=pooled, extras=scale)

    def encoder_states(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return each text encoder's states for prompts without rows: key -> [batch, length, dim]; of the CLIP, those
        before the last layer."""
        return {_CLIP: self._clips.encode(ids, {})[_CLIP].states, T5_KEY: self._t5.states(ids[T5_KEY])}

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the transformer's output for [batch, *latent_shape] at timesteps [batch]; same shape, float32."""
        hidden = conditioning.hidden
        output: Tensor = self._denoiser(
            hidden_states=_pack(noisy_latents).to(self.dtype),
            timestep=timesteps / self.noise.num_timesteps,
            guidance=conditioning.extras.get(GUIDANCE),
            encoder_hidden_states=hidden,
            pooled_projections=conditioning.pooled,
            txt_ids=self._picture_ids.new_zeros(hidden.shape[1], 3),
            img_ids=self._picture_ids,
            return_dict=False,
        )[0]
        return _unpack(output, self.latent_shape[1] // 2).float()


def load(files: model_files.ModelFiles, *, device: str, precision: str) -> Flux:
    """Load the components one by one, from safetensors only; see `families.load_backbone`.

    The CLIP's weights are always float32, as the rows are. T5 is bfloat16 beside a denoiser of half precision. The
    autoencoder is float32 beside a float16 denoiser.
    """
    torch_device = device_named(device)
    dtype = dtype_named(precision, torch_device)
    directory = files.directory
    clip = read_text_encoder(files, "text_encoder", CLIPTextModel, torch.float32, unused=UNUSED_CLIP_PARTS)
    t5 = read_t5(files, "text_encoder_2", dtype)
    transformer = read_component(files, "transformer", FluxTransformer2DModel, torch_dtype=dtype)
    vae = read_autoencoder(files, "vae", AutoencoderKL, dtype)
    return Flux(
        clip=clip.to(torch_device),
        t5=t5.to(torch_device),
        vocabularies=load_vocabularies(directory),
        transformer=transformer.to(torch_device),
        vae=vae.to(torch_device),
        resolution=read_config(directory, "vae").get("sample_size", PACKED_RESOLUTION),
        scheduler_config=read_config(directory, "scheduler"),
        digest=files.digest(),
    )


def _shift(scheduler: Mapping[str, Any], tokens: int) -> float:
    """Return the shift of the noise levels of pictures with this number of tokens.

    Where it is dynamic, mu grows linearly with the number of tokens, as in the pipeline; the shift is e^mu, or mu where
    `time_shift_type` is linear (Esser et al. 2024, section 5.3.2).
    """
    if not scheduler.get("use_dynamic_shifting"):
        return float(scheduler.get("shift", 1.0))
    fewest, most = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    least, greatest = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    mu = least + (greatest - least) * (tokens - fewest) / (most - fewest)
    return float(mu if scheduler.get("time_shift_type") == "linear" else math.exp(mu))


def _pack(latents: Tensor) -> Tensor:
    """Make a token of each square of 2 x 2 latents, [batch, channels, 2 rows, 2 columns] -> [batch, rows * columns,
    4 channels]."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def _unpack(tokens: Tensor, rows: int) -> Tensor:
    """Undo `_pack`, given the number of rows of tokens."""
    return F.pixel_shuffle(tokens.transpose(1, 2).reshape(len(tokens), tokens.shape[2], rows, -1), 2)
