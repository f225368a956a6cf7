"""Stable Diffusion XL: two CLIP text encoders, a U-Net that is told sizes and crops, and a KL autoencoder (Podell et
al. 2023).

The family serves any diffusers `StableDiffusionXLPipeline` directory with both text encoders, epsilon or v-prediction:
base models, fine-tuned and distilled ones. Rows are learned in both encoders. The U-Net reads the states before the
last layer of the two side by side, the pooled vector of the second, and six numbers (section 2.2 there): height and
width of the whole photo, the top left corner of the crop, and the height and width of the picture. A photo is learned
with its own numbers; pictures are drawn as whole ones of the model's resolution, which is the pipeline's default.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from textual_inversion import model_files
from textual_inversion.conditioning import FRAMING, Conditioning
from textual_inversion.families.clips import ClipEncoders
from textual_inversion.families.parts import (
    UNUSED_CLIP_PARTS,
    device_named,
    dtype_named,
    read_autoencoder,
    read_component,
    read_text_encoder,
    scheduler_config,
)
from textual_inversion.families.unet import UNetBackbone
from textual_inversion.framing import Framing
from textual_inversion.lora import AdapterBatch
from textual_inversion.model_checks import component_class
from textual_inversion.prompts import Vocabularies
from textual_inversion.text_encoders import CLIP_KEYS, load_vocabularies

_FOLDERS = ("text_encoder", "text_encoder_2")
_CLASSES = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}


class StableDiffusionXL(UNetBackbone):
    """A frozen Stable Diffusion XL checkpoint as a `Backbone`; build it with `load`."""

    def __init__(
        self,
        *,
        text_encoders: Mapping[str, Any],
        vocabularies: Vocabularies,
        unet: Any,
        vae: Any,
        scheduler_config: Mapping[str, Any],
        guides_by_zeros: bool,
        digest: str,
    ) -> None:
        """Freeze the modules, which come on their device and in their precision; replace the text encoders'
        vocabularies by token tables, and let their linear layers and the U-Net's cross-attention take adapters.

        `text_encoders` and `vocabularies`: by text encoder key. `guides_by_zeros`: the pipeline's
        `force_zeros_for_empty_prompt`.
        """
        super().__init__(unet=unet, vae=vae, scheduler_config=scheduler_config, digest=digest)
        self._clips = ClipEncoders(text_encoders, vocabularies, self.dtype)
        self.vocabularies = vocabularies
        self.token_tables = self._clips.token_tables
        self.adapter_layers = {**self._clips.adapter_layers, **self._cross_attention.layers}
        self.guides_by_zeros = guides_by_zeros
        side = self.resolution
        whole = Framing(height=side, width=side, top=0, left=0, right=0)
        self._whole = torch.tensor([whole.numbers()], dtype=torch.float32, device=self.device)

    def single_token_words(self) -> list[str]:
        """Return the words of `ClipEncoders.single_token_words`."""
        return self._clips.single_token_words()

    def encode_prompts(
        self, ids: Mapping[str, Tensor], rows: Mapping[str, Tensor], adapters: Sequence[AdapterBatch] = ()
    ) -> Conditioning:
        """Encode prompts as StableDiffusionXLPipeline does, with the framing of whole pictures."""
        first, second = self._clips.encode(ids, rows, adapters).values()
        hidden = torch.cat([first.states, second.states], dim=-1)
        # both encoders have the same positions, so either tells where an adapter acts
        changes = self._cross_attention.changes(hidden, adapters, CLIP_KEYS[0])
        return Conditioning(
            hidden=hidden.to(self.dtype),
            pooled=second.pooled.to(self.dtype),
            extras={FRAMING: self._whole.expand(len(hidden), -1)},
            changes=changes and changes.to(self.dtype),
        )

    def encoder_states(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return each text encoder's states before its last layer for prompts without rows: key -> [batch, length,
        dim]."""
        return {key: encoded.states for key, encoded in self._clips.encode(ids, {}).items()}

    def _further_inputs(self, conditioning: Conditioning, noisy_latents: Tensor) -> dict[str, Any]:
        """Return the pooled vectors and the six numbers: framing, and the picture's height and width."""
        framing = conditioning.extras[FRAMING]
        is_own_size = noisy_latents.shape[1:] == self.latent_shape
        # A picture of another size is framed as the whole of itself (`generate`), so that its size is there already.
        size = self._whole[:, :2].expand(len(framing), -1) if is_own_size else framing[:, :2]
        time_ids = torch.cat([framing, size], dim=1)
        return {"added_cond_kwargs": {"text_embeds": conditioning.pooled, "time_ids": time_ids}}


def load(files: model_files.ModelFiles, *, device: str, precision: str) -> StableDiffusionXL:
    """Load the components one by one, from safetensors only; see `families.load_backbone`.

    The text encoders' weights are always float32, as the rows are. SDXL's own autoencoder is float32 beside a float16
    denoiser; one that was mended for float16 has the denoiser's precision.
    """
    torch_device = device_named(device)
    dtype = dtype_named(precision, torch_device)
    directory = files.directory
    encoders = {
        key: read_text_encoder(
            files, folder, _CLASSES[component_class(directory, folder)], torch.float32, unused=unused
        )
        for key, folder, unused in zip(CLIP_KEYS, _FOLDERS, (UNUSED_CLIP_PARTS, ()), strict=True)
    }
    unet = read_component(files, "unet", UNet2DConditionModel, torch_dtype=dtype)
    vae = read_autoencoder(files, "vae", AutoencoderKL, dtype)
    return StableDiffusionXL(
        text_encoders={key: encoder.to(torch_device) for key, encoder in encoders.items()},
        vocabularies=load_vocabularies(directory),
        unet=unet.to(torch_device),
        vae=vae.to(torch_device),
        scheduler_config=scheduler_config(directory),
        guides_by_zeros=_guides_by_zeros(directory),
        digest=files.digest(),
    )


def _guides_by_zeros(directory: Path) -> bool:
    """Return the pipeline's `force_zeros_for_empty_prompt`, which is true where the index is silent."""
    return bool(json.loads((directory / "model_index.json").read_text()).get("force_zeros_for_empty_prompt", True))
