"""Stable Diffusion 3 and 3.5: two CLIP text encoders, T5 if it is there, a transformer (MMDiT), rectified flow (Esser
et al. 2024).

The family serves any diffusers `StableDiffusion3Pipeline` directory. Rows are learned in the two CLIPs. In T5, unless
`text_encoders` of the configuration names it, a placeholder's rows keep their initial values, the mean of the
initializer's vectors: T5 reads the initializer's word, and the file of the embedding has that row, too, under T5's key.
T5 then takes no part in the gradient (4.8 billion weights).
On FLUX, a user of diffusers found that rows learned in T5 hardly change pictures, and that the CLIP's row alone gives
most of the likeness (huggingface/diffusers issue 10313).

A model whose `model_index.json` has null for `text_encoder_3` and `tokenizer_3` does without T5. The transformer then
reads zeros in place of T5's states, as in the pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor
from transformers import CLIPTextModelWithProjection

from textual_inversion import model_files
from textual_inversion.conditioning import Conditioning
from textual_inversion.families.base import sized_latents
from textual_inversion.families.clips import ClipEncoders
from textual_inversion.families.latent import LatentBackbone, downscaling
from textual_inversion.families.parts import (
    SAMPLING_STEPS,
    device_named,
    drawing_defaults,
    dtype_named,
    read_autoencoder,
    read_component,
    read_text_encoder,
)
from textual_inversion.families.t5 import T5Encoder, read_t5
from textual_inversion.lora import AdapterBatch
from textual_inversion.noise import from_scheduler_config
from textual_inversion.prompts import Vocabularies
from textual_inversion.text_encoders import CLIP_KEYS, T5_KEY, T5_LENGTH, components, load_vocabularies

_GUIDANCE_SCALE = 7.0
"""Guidance scale of a model whose scheduler config gives none: the default of StableDiffusion3Pipeline."""


class StableDiffusion3(LatentBackbone):
    """A frozen Stable Diffusion 3 checkpoint as a `Backbone`; build it with `load`."""

    def __init__(
        self,
        *,
        text_encoders: Mapping[str, Any],
        vocabularies: Vocabularies,
        transformer: Any,
        vae: Any,
        scheduler_config: Mapping[str, Any],
        digest: str,
    ) -> None:
        """Freeze the modules, which come on their device and in their precision; replace the text encoders'
        vocabularies by token tables, and let their linear layers take adapters.

        `text_encoders` and `vocabularies`: by text encoder key.
        """
        super().__init__(denoiser=transformer, vae=vae, digest=digest)
        self._text_width: int = transformer.config.joint_attention_dim
        self.vocabularies = vocabularies
        self._clips = ClipEncoders({key: text_encoders[key] for key in CLIP_KEYS}, vocabularies, self.dtype)
        self._t5 = T5Encoder(text_encoders[T5_KEY]) if T5_KEY in text_encoders else None
        self.token_tables = self._clips.token_tables | ({T5_KEY: self._t5.token_table} if self._t5 else {})
        self.adapter_layers = {**self._clips.adapter_layers, **(self._t5.adapter_layers if self._t5 else {})}
        side = transformer.config.sample_size
        self.latent_shape = (transformer.config.in_channels, side, side)
        self.resolution = side * downscaling(vae.config)
        self.noise = from_scheduler_config(scheduler_config, self.device)
        self.guidance_scale, self.sampling_steps = drawing_defaults(
            scheduler_config, guidance_scale=_GUIDANCE_SCALE, steps=SAMPLING_STEPS
        )

    def latent_shape_for(self, width: int, height: int) -> tuple[int, int, int]:
        """Return the shape of a picture's latents: whole patches, and no more of them on a side than there are
        positions."""
        patch_px = self.resolution // self.latent_shape[1] * self._network.config.patch_size
        most_px = patch_px * self._network.config.pos_embed_max_size
        return sized_latents(self, width, height, multiple_px=patch_px, most_px=most_px)

    def single_token_words(self) -> list[str]:
        """Return the words of `ClipEncoders.single_token_words`."""
        return self._clips.single_token_words()

    def encode_prompts(
        self, ids: Mapping[str, Tensor], rows: Mapping[str, Tensor], adapters: Sequence[AdapterBatch] = ()
    ) -> Conditioning:
        """Encode prompts as StableDiffusion3Pipeline does.

        The states before the last layer of the two CLIPs lie side by side, filled up with zeros to the width of T5's,
        which follow along the sequence. Without T5 its states are left to `predict`. The pooled vectors of both CLIPs
        lie side by side, too.
        """
        encoded = self._clips.encode(ids, rows, adapters).values()
        clips = torch.cat([each.states for each in encoded], dim=-1)
        states = [F.pad(clips, (0, self._text_width - clips.shape[-1])).to(self.dtype)]
        if self._t5:
            states.append(self._t5.states(ids[T5_KEY], rows.get(T5_KEY), adapters).to(self.dtype))
        pooled = torch.cat([each.pooled for each in encoded], dim=-1).to(self.dtype)
        return Conditioning(hidden=torch.cat(states, dim=1), pooled=pooled)

    def encoder_states(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return each text encoder's states for prompts without rows: key -> [batch, length, dim]; of the CLIPs, those
        before the last layer."""
        states = {key: encoded.states for key, encoded in self._clips.encode(ids, {}).items()}
        return states | ({T5_KEY: self._t5.states(ids[T5_KEY])} if self._t5 else {})

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the transformer's output for [batch, *latent_shape] at timesteps [batch]; same shape, float32."""
        hidden = conditioning.hidden
        if not self._t5:  # zeros have no part in comparing encodings, so they come in here
            hidden = F.pad(hidden, (0, 0, 0, T5_LENGTH))
        output: Tensor = self._denoiser(
            hidden_states=noisy_latents.to(self.dtype),
            timestep=timesteps,
            encoder_hidden_states=hidden,
            pooled_projections=conditioning.pooled,
            return_dict=False,
        )[0]
        return output.float()


def load(files: model_files.ModelFiles, *, device: str, precision: str) -> StableDiffusion3:
    """Load the components one by one, from safetensors only; see `families.load_backbone`.

    The CLIPs' weights are always float32, as the rows are. T5 is bfloat16 beside a denoiser of half precision. The
    autoencoder is float32 beside a float16 denoiser.
    """
    torch_device = device_named(device)
    dtype = dtype_named(precision, torch_device)
    directory = files.directory
    encoders = {key: encoder for key, (_, encoder) in components(directory).items()}
    text_encoders = {
        key: read_t5(files, folder, dtype)
        if key == T5_KEY
        else read_text_encoder(files, folder, CLIPTextModelWithProjection, torch.float32)
        for key, folder in encoders.items()
    }
    # torch_dtype and not dtype, which diffusers takes only from 0.42 on
    transformer = read_component(files, "transformer", SD3Transformer2DModel, torch_dtype=dtype)
    vae = read_autoencoder(files, "vae", AutoencoderKL, dtype)
    return StableDiffusion3(
        text_encoders={key: encoder.to(torch_device) for key, encoder in text_encoders.items()},
        vocabularies=load_vocabularies(directory),
        transformer=transformer.to(torch_device),
        vae=vae.to(torch_device),
        scheduler_config=FlowMatchEulerDiscreteScheduler.load_config(
            str(directory), subfolder="scheduler", local_files_only=True
        ),
        digest=files.digest(),
    )
