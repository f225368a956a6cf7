"""Make the parts of the demo's rectified-flow model, in Stable Diffusion 3's layout, and save them as a pipeline.

The model is a plain `StableDiffusion3Pipeline` without T5 (Esser et al. 2024): a transformer that reads pictures and
text in one sequence (MMDiT), and two CLIP text encoders. One text encoder is the denoiser's of `demo/model`, the other
the text tower of `demo/clip`. Both stay as they are; the transformer alone is learned.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from demo.autoencoder import LATENT_CHANNELS
from demo.clip_model import WIDTH, declare_float32
from demo.folders import replaced_folder
from textual_inversion.weights import load_pretrained

NUM_TRAIN_TIMESTEPS = 1000
PROMPT_LENGTH = 20
"""Tokens of every padded prompt; of the world's captions, 0.8 % are longer."""
GUIDANCE_SCALE = 3.0
"""Guidance scale that the scheduler's config names."""


@dataclass(frozen=True, slots=True)
class TransformerSize:
    """Size of the transformer; by default it has about nine million parameters."""

    layers: int = 6
    heads: int = 6
    head_width: int = 32
    patch: int = 2


DEFAULT_SIZE = TransformerSize()


def new_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Make a scheduler of straight paths. The shift is 1: a larger one (Esser et al. 2024, Eq. 23) is for latents of
    more places than 8x8."""
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=NUM_TRAIN_TIMESTEPS, shift=1.0)
    scheduler.register_to_config(_guidance_scale=GUIDANCE_SCALE)
    return scheduler


def new_transformer(text_width: int = 2 * WIDTH, size: TransformerSize = DEFAULT_SIZE) -> SD3Transformer2DModel:
    """Make an untrained transformer. One place of the latents is one token.

    Its blocks and its output start at zero (Peebles & Xie 2023, adaLN-Zero). Queries and keys are normalised, as in
    Stable Diffusion 3.5. `text_width`: width of both text encoders together.
    """
    width = size.heads * size.head_width
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=size.patch,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=size.layers,
        num_attention_heads=size.heads,
        attention_head_dim=size.head_width,
        joint_attention_dim=text_width,
        caption_projection_dim=width,
        pooled_projection_dim=text_width,
        pos_embed_max_size=8 // size.patch,
        qk_norm="rms_norm",
    )
    modulated = (AdaLayerNormZero, AdaLayerNormContinuous)
    zeroed = [module.linear for module in transformer.modules() if isinstance(module, modulated)]
    for module in (*zeroed, transformer.proj_out):
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
    return transformer


@torch.no_grad()
def standardise_inputs(layer: nn.Linear, inputs: Tensor) -> None:
    """Change an untrained layer so that it reads `inputs` [..., features] with zero mean and unit deviation.

    The text encoders' states before their last layer are not normalised: deviations of features differ by ten times.
    """
    deviation, centre = torch.std_mean(inputs.flatten(0, -2), dim=0)
    layer.weight /= deviation.clamp(min=1e-3)
    layer.bias -= layer.weight @ centre


class ZerosOnce:
    """Attention of a joint block in which the last token of the text stands for `copies` equal ones.

    The pipeline puts 256 zeros in place of T5's states. No position tells them apart, so that they stay equal through
    all blocks, and one token whose attention logit is raised by log(copies) has the effect of them all. A step over 97
    tokens then computes what diffusers' processor computes over 352.
    """

    def __init__(self, copies: int) -> None:
        self.bias = math.log(copies)

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the attention's output for the picture's and the text's tokens, [batch, tokens, width] each."""
        picture = (attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        text = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k)
        parts = zip(_heads(attn, hidden_states, *picture), _heads(attn, encoder_hidden_states, *text), strict=True)
        query, key, value = (torch.cat(part, dim=2) for part in parts)
        bias = query.new_zeros(key.shape[2])
        bias[-1] = self.bias
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.expand(query.shape[2], -1))
        mixed = mixed.transpose(1, 2).flatten(2)
        of_picture, of_text = mixed.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        return attn.to_out[0](of_picture), of_text if attn.context_pre_only else attn.to_add_out(of_text)


def _heads(
    attn: Attention,
    hidden: Tensor,
    to_query: nn.Module,
    to_key: nn.Module,
    to_value: nn.Module,
    norm_query: nn.Module,
    norm_key: nn.Module,
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (
        layer(hidden).unflatten(2, (attn.heads, -1)).transpose(1, 2) for layer in (to_query, to_key, to_value)
    )
    return norm_query(query), norm_key(key), value


def encode_text(encoder: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the states before the last layer, [captions, tokens, width], and the pooled vectors, [captions, width]."""
    output = encoder(ids, output_hidden_states=True)
    return output.hidden_states[-2], output.text_embeds


def conditioning(encoders: Iterable[nn.Module], ids: Tensor) -> tuple[Tensor, Tensor]:
    """Encode captions as the pipeline does, but with one zero in place of T5's states (`ZerosOnce`).

    Returns hidden states [captions, tokens + 1, width] and pooled vectors [captions, width], of all encoders side by
    side.
    """
    hidden, pooled = zip(*(encode_text(encoder, ids) for encoder in encoders), strict=True)
    return F.pad(torch.cat(hidden, -1), (0, 0, 0, 1)), torch.cat(pooled, -1)


def start_text_encoders(model: Path, clip: Path) -> tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection]:
    """Return the text encoder of the pipeline in `model` and the text tower of the CLIP in `clip`, in fp32.

    The first one has no projection, so its pooled vector is the last state at the end of the text.
    """
    of_model = load_pretrained(CLIPTextModel, str(model / "text_encoder"))
    of_clip = load_pretrained(CLIPModel, str(clip))
    identity = torch.eye(of_model.config.hidden_size)
    return (
        _with_projection(of_model.config, of_model.state_dict(), identity),
        _with_projection(of_clip.config.text_config, of_clip.text_model.state_dict(), of_clip.text_projection.weight),
    )


def _with_projection(
    config: CLIPTextConfig, state: dict[str, Tensor], projection: Tensor
) -> CLIPTextModelWithProjection:
    config.projection_dim = len(projection)
    encoder = CLIPTextModelWithProjection(config)
    weights = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in state.items()}
    encoder.load_state_dict({**weights, "text_projection.weight": projection})
    return encoder.float()


def save_pipeline(
    folder: Path,
    *,
    transformer: SD3Transformer2DModel,
    text_encoders: Sequence[CLIPTextModelWithProjection],
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
) -> None:
    """Write an fp16 `StableDiffusion3Pipeline` directory beside `folder`, then swap it in. The modules become fp16.

    The pipeline adds the autoencoder's shift to latents, so its config names one.
    """
    vae.register_to_config(shift_factor=0.0)
    first, second = text_encoders
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=new_scheduler(),
        vae=vae,
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    ).to(torch.float16)
    with replaced_folder(folder) as temporary:
        pipeline.save_pretrained(temporary)
        declare_float32(temporary / "text_encoder")
        declare_float32(temporary / "text_encoder_2")


def load_flow_pipeline(folder: Path) -> StableDiffusion3Pipeline:
    """Load diffusers' pipeline in fp32 with all its weights. Raises ValueError if a checkpoint lacks some.

    The pipeline wants to be told that there is no T5.
    """
    parts = {
        "transformer": load_pretrained(SD3Transformer2DModel, str(folder / "transformer")),
        "text_encoder": load_pretrained(CLIPTextModelWithProjection, str(folder / "text_encoder")),
        "text_encoder_2": load_pretrained(CLIPTextModelWithProjection, str(folder / "text_encoder_2")),
        "vae": load_pretrained(AutoencoderKL, str(folder / "vae")),
    }
    return StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None, **parts)
