"""Stable Diffusion 1.x and 2.x: a CLIP text encoder, a U-Net and a KL autoencoder (Rombach et al. 2022).

The family serves any diffusers `StableDiffusionPipeline` directory, epsilon or v-prediction. SD2 conditions on the
next-to-last layer of its text encoder by a config with one layer less, so SD2 needs no code of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from textual_inversion import model_files
from textual_inversion.compiled import Compiled
from textual_inversion.conditioning import Conditioning
from textual_inversion.cross_attention import CrossAttentionLayers
from textual_inversion.lora import AdaptableLayers, AdapterBatch
from textual_inversion.noise import Noise, from_scheduler_config
from textual_inversion.prompts import Vocabularies
from textual_inversion.tokenizer import TEXT_ENCODER_KEY, Tokenizer, read_tokenizer
from textual_inversion.tokens import TokenTable
from textual_inversion.weights import load_pretrained

_UNUSED = [r"^(text_projection|visual_projection|vision_model|logit_scale)\b"]
"""Parts of a whole CLIP that a text encoder saved with them has, and that this family does not read."""

_GUIDANCE_SCALE = 5.0
"""Guidance scale of a model whose scheduler config gives none, from Gal et al. 2022."""


class StableDiffusion:
    """A frozen Stable Diffusion checkpoint as a `Backbone`; build it with `load`."""

    def __init__(
        self,
        *,
        tokenizer: Any,
        text_encoder: Any,
        unet: Any,
        vae: Any,
        scheduler_config: Mapping[str, Any],
        digest: str,
    ) -> None:
        """Freeze the modules, which come on their device and in their precision; replace the text encoder's vocabulary
        by a token table, and let its linear layers and the U-Net's cross-attention take adapters."""
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

        self._table = TokenTable(text_encoder.get_input_embeddings().weight)
        text_encoder.set_input_embeddings(self._table)
        self.token_tables: Mapping[str, TokenTable] = {TEXT_ENCODER_KEY: self._table}
        positions = text_encoder.config.max_position_embeddings
        self._tokenizer = Tokenizer(tokenizer, positions, self._table.vocab_size)
        self.vocabularies: Vocabularies = {TEXT_ENCODER_KEY: self._tokenizer}
        self._adaptable = AdaptableLayers(text_encoder, TEXT_ENCODER_KEY)
        self._cross_attention = CrossAttentionLayers(unet)
        layers = {**self._adaptable.layers, **self._cross_attention.layers}
        self.adapter_layers: Mapping[str, tuple[int, int]] = layers

        self.device: torch.device = unet.device
        self.dtype: torch.dtype = unet.dtype
        self.latent_shape, self.resolution = _shape(unet.config, vae.config)
        self.noise: Noise = from_scheduler_config(scheduler_config, self.device)
        self.guidance_scale = float(scheduler_config.get("_guidance_scale", _GUIDANCE_SCALE))

    def single_token_words(self) -> list[str]:
        """Return the single-token words of letters a-z alone."""
        return self._tokenizer.single_token_words()

    def encode_prompts(
        self, ids: Mapping[str, Tensor], rows: Mapping[str, Tensor], adapters: Sequence[AdapterBatch] = ()
    ) -> Conditioning:
        """Encode prompts: the states at every position, final norm included, as StableDiffusionPipeline uses them.

        The pooled output, which some configs take at the largest id and so at a learned row, is not used by this
        family.
        """
        rows_in_use = rows.get(TEXT_ENCODER_KEY)
        rows_in_use = None if rows_in_use is None else rows_in_use.to(self.device)
        with self._table.reading(rows_in_use), self._adaptable.using(adapters), self._products():
            hidden = self._text_encoder(ids[TEXT_ENCODER_KEY].to(self.device)).last_hidden_state
        changes = self._cross_attention.changes(hidden, adapters, TEXT_ENCODER_KEY)
        return Conditioning(hidden=hidden.to(self.dtype), changes=changes and changes.to(self.dtype))

    def encoder_states(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the text encoder's states for prompts without rows: key -> [batch, length, dim]."""
        return {TEXT_ENCODER_KEY: self.encode_prompts(ids, {}).hidden}

    def _products(self) -> AbstractContextManager[None]:
        """Let the text encoder multiply in bfloat16 where the denoiser does: an accelerator is many times faster at
        that. Sums, norms and rows, with their gradients, stay float32; float16 could overflow."""
        half = self.dtype == torch.bfloat16
        return torch.autocast(self.device.type, dtype=self.dtype) if half else nullcontext()

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Encode pictures [batch, 3, resolution, resolution] in [-1, 1] as moments [batch, 2, *latent_shape] float32:
        mean and standard deviation, times the autoencoder's scaling factor (StableDiffusionPipeline has no shift)."""
        with torch.no_grad():
            posterior = self._vae.encode(pixels.to(self.device, self._vae.dtype)).latent_dist
        mean, std = posterior.mean.float(), (0.5 * posterior.logvar.float()).exp()
        scaling: float = self._vae.config.scaling_factor
        return torch.stack([mean, std], dim=1) * scaling

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


def load(files: model_files.ModelFiles, *, device: str, precision: str) -> StableDiffusion:
    """Load the components one by one, from safetensors only; see `families.load_backbone`.

    The text encoder's weights are always float32, as the rows are. The autoencoder has the denoiser's precision, except
    that it is float32 beside a float16 denoiser: its activations leave float16's range.
    """
    torch_device = _device(device)
    directory = str(files.directory)
    modules = load_modules(files, _dtype(precision, torch_device))
    return StableDiffusion(
        tokenizer=read_tokenizer(directory),
        scheduler_config=DDPMScheduler.load_config(directory, subfolder="scheduler", local_files_only=True),
        digest=model_files.model_hash(directory),
        **{name: module.to(torch_device) for name, module in modules.items()},
    )


def load_modules(files: model_files.ModelFiles, dtype: torch.dtype) -> dict[str, Any]:
    """Load "text_encoder", "unet" and "vae" (by these names of diffusers' pipeline) on the CPU, for a denoiser of this
    precision. Raises ValueError if a checkpoint lacks weights or has unknown ones."""
    directory = str(files.directory)

    def read(component: str, cls: Any, **options: Any) -> Any:
        variant = files.variants.get(component)
        if component not in files.variants:
            raise ValueError(f"model {directory}: folder {component!r} has no .safetensors weights")
        return load_pretrained(cls, directory, subfolder=component, variant=variant, local_files_only=True, **options)

    text_encoder = read(
        "text_encoder",
        CLIPTextModel,
        unused=_UNUSED,
        dtype=torch.float32,  # else transformers loads in the config's precision and loses digits
        ignore_mismatched_sizes=True,  # so that the error can name them
    )
    # torch_dtype and not dtype, which diffusers takes only from 0.42 on
    unet = read("unet", UNet2DConditionModel, torch_dtype=dtype)
    vae = read("vae", AutoencoderKL, torch_dtype=torch.float32 if dtype == torch.float16 else dtype)
    return {"text_encoder": text_encoder, "unet": unet, "vae": vae}


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _dtype(precision: str, device: torch.device) -> torch.dtype:
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if precision not in known:
        raise ValueError(f"precision {precision!r} must be 'auto' or one of {', '.join(map(repr, known))}")
    return known[precision]


def _shape(unet: Any, vae: Any) -> tuple[tuple[int, int, int], int]:
    """Read latent shape and picture side (px) off the U-Net's and the autoencoder's configs."""
    if unet.in_channels != vae.latent_channels:
        raise ValueError(
            f"the U-Net takes {unet.in_channels} channels but the autoencoder has {vae.latent_channels} (an inpainting "
            "or depth model?); a plain text-to-image checkpoint is needed"
        )
    scale = 2 ** (len(vae.block_out_channels) - 1)
    side = unet.sample_size or vae.sample_size // scale
    if not isinstance(side, int):
        raise ValueError(f"the U-Net's sample_size {side!r} is not one number; only square pictures are supported")
    return (unet.in_channels, side, side), side * scale
