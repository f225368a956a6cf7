"""Distil the demo model's U-Net into a rectified-flow transformer, and save a plain `StableDiffusion3Pipeline`.

The transformer predicts the noise minus the latents, given a mixture of both (Lipman et al. 2023; Esser et al. 2024,
section 2). The target is the U-Net's estimate of that velocity: it is the same on average, and varies far less than the
velocity of one scene. The text encoders are those of trained models and stay frozen. 10 % of captions are empty, for
guidance; some hold a word with a random row, so that rows which no word has mean the same to both (`demo.mixtures`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from demo.autoencoder import encode_pool
from demo.denoiser import mixed_precision, stratified_quantiles, velocity_loss, without_origin
from demo.flow_model import (
    DEFAULT_SIZE,
    NUM_TRAIN_TIMESTEPS,
    PROMPT_LENGTH,
    TransformerSize,
    ZerosOnce,
    encode_text,
    new_transformer,
    save_pipeline,
    standardise_inputs,
    start_text_encoders,
)
from demo.loop import Average, Budget, Randomness, Training, optimise
from demo.mixtures import mix, unname
from demo.muon import Muon, parameter_groups
from demo.pool import Pool
from demo.tokenizer import encode, load_tokenizer
from demo.unnamed import open_vocabulary, unnamed_tokenizer
from textual_inversion.noise import RectifiedFlow
from textual_inversion.text_encoders import T5_LENGTH
from textual_inversion.weights import load_pretrained

_CAPTIONS_PER_BATCH = 32
_DRAWS_PER_CAPTION = 2
_MATRIX_LR = 4e-3
_VECTOR_LR = 1.5e-3
_EMPTY_CAPTION_FRACTION = 0.1
_UNNAMED_SHARE = 0.35
_LOGIT_MEAN, _LOGIT_DEVIATION = 0.5, 1.0
_CAPTIONS_TO_STANDARDISE = 512


def logit_normal_timesteps(batch: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Draw one timestep from each of `batch` equally likely slices, in random order, int64 (batch,).

    The logit of the noise level has a normal distribution (Esser et al. 2024, Eq. 19), a little towards noise, where
    the prompt decides what the object is.
    """
    quantiles = stratified_quantiles(batch, generator, device)
    normal = torch.special.ndtri(quantiles.clamp(1e-6, 1 - 1e-6))
    levels = torch.sigmoid(_LOGIT_MEAN + _LOGIT_DEVIATION * normal)
    return (NUM_TRAIN_TIMESTEPS * levels).long().clamp(max=NUM_TRAIN_TIMESTEPS - 1)


class Teacher:
    """U-Net of a Stable Diffusion folder that predicts v, asked for velocities of a rectified flow."""

    def __init__(self, unet: UNet2DConditionModel, alphas_cumprod: Tensor) -> None:
        """Freeze the U-Net. `alphas_cumprod`: its schedule, [timesteps]."""
        self.unet = unet.requires_grad_(False).eval()
        signal, sigma = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
        self.levels = (sigma / (signal + sigma)).to(unet.device)
        """Level of the flow with the signal-to-noise ratio of each timestep, [timesteps]."""

    def timesteps(self, levels: Tensor) -> Tensor:
        """Return the timesteps, not whole, with the signal-to-noise ratios of a flow's levels, [batch] each.

        Levels beyond the schedule's ends have the end's timestep.
        """
        index = torch.searchsorted(self.levels, levels).clamp(1, len(self.levels) - 1)
        before, after = self.levels[index - 1], self.levels[index]
        return index - 1 + ((levels - before) / (after - before)).clamp(0, 1)

    @torch.no_grad()
    def velocity(self, noisy: Tensor, levels: Tensor, states: Tensor) -> Tensor:
        """Return the mean of noise minus latents, given (1 - level) latents + level noise, [batch, ...] each.

        The U-Net reads the same mixture at unit variance (Salimans & Ho 2022, appendix D, for its v).
        """
        at_level = levels.clamp(self.levels[0], self.levels[-1])[:, None, None, None]
        norm = torch.hypot(1 - at_level, at_level)
        signal, sigma = (1 - at_level) / norm, at_level / norm
        levels = levels[:, None, None, None]
        standard = noisy / torch.hypot(1 - levels, levels)
        v = self.unet(standard, self.timesteps(levels.flatten()), states).sample.float()
        return (noisy - (signal * standard - sigma * v)) / levels


def load_teacher(model: Path, device: torch.device) -> Teacher:
    """Load the U-Net of the Stable Diffusion folder `model`, in fp32."""
    unet = load_pretrained(UNet2DConditionModel, str(model / "unet")).float().to(device)
    return Teacher(unet, DDIMScheduler.from_pretrained(model / "scheduler").alphas_cumprod)


@dataclass(frozen=True, slots=True)
class Scenes:
    """Scenes that the student sees, as latents and captions."""

    latents: Tensor
    """Latents, fp16 [scenes, channels, 8, 8]."""
    named_ids: Tensor
    """Token ids of the captions, at the teacher's length, int64 [scenes, tokens]."""
    unnamed_ids: Tensor
    """Token ids of the same captions with the unnamed word in place of a name or before it."""


def read_scenes(pool: Pool, latents: Tensor, tokenizer: CLIPTokenizer, rng: np.random.Generator) -> Scenes:
    """Tokenize the pool's captions. Scenes whose captions do not fit a prompt of the flow model are left out."""
    tokenizer = unnamed_tokenizer(tokenizer)
    texts = [unname(text, names, rng) for text, names in zip(pool.captions, pool.names, strict=True)]
    named_ids, unnamed_ids = encode(tokenizer, pool.captions), encode(tokenizer, texts)
    fits = (named_ids[:, PROMPT_LENGTH - 1] == tokenizer.eos_token_id) & (
        unnamed_ids[:, PROMPT_LENGTH - 1] == tokenizer.eos_token_id
    )
    return Scenes(latents[fits], named_ids[fits], unnamed_ids[fits])


class FlowTraining:
    """Modules of one training, and the loss of one step."""

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        text_encoders: Sequence[CLIPTextModelWithProjection],
        teacher: Teacher,
        scenes: Scenes,
        words: Tensor,
        empty_ids: Tensor,
        randomness: Randomness,
        captions: int = _CAPTIONS_PER_BATCH,
    ) -> None:
        """Freeze the text encoders and let them read random rows, in place.

        `words`: ids of the words that rows are mixed of, [words]. `captions`: size of a batch.
        """
        self.device = randomness.device
        self.transformer = transformer
        self.transformer.set_attn_processor(ZerosOnce(T5_LENGTH))
        self.encoders = nn.ModuleList(text_encoders).requires_grad_(False).to(self.device).eval()
        self.vocabularies = [open_vocabulary(each) for each in self.encoders]
        self.tables = [each.table.weight[words] for each in self.vocabularies]
        self.teacher = teacher
        self.scenes = scenes
        self.empty_ids = empty_ids
        self.randomness = randomness
        self.noise = RectifiedFlow(NUM_TRAIN_TIMESTEPS, device=self.device)
        self.captions = captions if self.device.type == "cpu" else 8 * captions

    @torch.no_grad()
    def encode(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the student's hidden states and pooled vectors of captions, and the teacher's states.

        An unnamed word has one mixture of words in both encoders. The encoders are causal, so the student's states are
        the first ones of the longer caption.
        """
        mixtures = mix(len(ids), self.tables[0], self.randomness.torch)
        for vocabulary, table in zip(self.vocabularies, self.tables, strict=True):
            vocabulary.rows = mixtures.rows(table)
        first, second = self.encoders
        whole = first(ids, output_hidden_states=True)
        hidden, pooled = encode_text(second, ids[:, :PROMPT_LENGTH])
        both = torch.cat([whole.hidden_states[-2][:, :PROMPT_LENGTH], hidden], -1)
        return both, torch.cat([whole.text_embeds, pooled], -1), whole.last_hidden_state

    @torch.no_grad()
    def standardise(self) -> None:
        """Let the untrained transformer read states and pooled vectors of captions with mean 0 and deviation 1."""
        ids = self.scenes.named_ids[:_CAPTIONS_TO_STANDARDISE].to(self.device)
        hidden, pooled, _ = self.encode(ids)
        standardise_inputs(self.transformer.context_embedder, hidden)
        standardise_inputs(self.transformer.time_text_embed.text_embedder.linear_1, pooled)

    def draw_batch(self) -> tuple[Tensor, Tensor]:
        """Return latents and token ids of random scenes."""
        rng = self.randomness.numpy
        rows = torch.from_numpy(rng.integers(len(self.scenes.latents), size=self.captions))
        is_unnamed = torch.from_numpy(rng.random(self.captions) < _UNNAMED_SHARE)
        ids = torch.where(is_unnamed[:, None], self.scenes.unnamed_ids[rows], self.scenes.named_ids[rows])
        ids[rng.random(self.captions) < _EMPTY_CAPTION_FRACTION] = self.empty_ids
        return self.scenes.latents[rows].to(self.device).float(), ids.to(self.device)

    def loss(self, fraction_done: float) -> tuple[Tensor, dict[str, float]]:
        """Return the mean loss of one batch, and figures to log."""
        latents, ids = self.draw_batch()
        latents = latents.repeat_interleave(_DRAWS_PER_CAPTION, 0)
        noise = torch.randn(latents.shape, generator=self.randomness.torch, device=self.device)
        timesteps = logit_normal_timesteps(len(latents), self.randomness.torch, self.device)
        noisy, _ = self.noise.corrupt(latents, noise, timesteps)
        levels = self.noise.model_timesteps(timesteps) / NUM_TRAIN_TIMESTEPS
        with mixed_precision(self.device):
            hidden, pooled, states = (each.repeat_interleave(_DRAWS_PER_CAPTION, 0) for each in self.encode(ids))
            target = self.teacher.velocity(noisy, levels, states)
            prediction = self.transformer(
                hidden_states=noisy,
                timestep=NUM_TRAIN_TIMESTEPS * levels,
                encoder_hidden_states=nn.functional.pad(hidden, (0, 0, 0, 1)),
                pooled_projections=pooled,
            ).sample
        losses = velocity_loss(prediction, target)
        return losses.mean(), {"loss": losses.mean().item()}

    def save(self, folder: Path, transformer: SD3Transformer2DModel, model: Path) -> None:
        """Write a pipeline of `transformer`, which becomes fp16, the text encoders, and the autoencoder and vocabulary
        of the Stable Diffusion folder `model`."""
        tokenizer = load_tokenizer(model / "tokenizer")
        tokenizer.model_max_length = PROMPT_LENGTH
        save_pipeline(
            folder,
            transformer=transformer,
            text_encoders=[_plain_copy(encoder) for encoder in self.encoders],
            vae=load_pretrained(AutoencoderKL, str(model / "vae")),
            tokenizer=tokenizer,
        )


def train_flow(
    pool: Pool,
    model: Path,
    clip: Path,
    folder: Path,
    work: Path,
    *,
    budget: Budget,
    device: torch.device,
    seed: int,
    decay_from: float = 0.0,
    size: TransformerSize = DEFAULT_SIZE,
    captions: int = _CAPTIONS_PER_BATCH,
) -> None:
    """Train a transformer to draw as the Stable Diffusion folder `model` does; save its average in `folder`.

    It reads the text encoders of `model` and of the CLIP in `clip`. A continued training takes them from its checkpoint
    in `work`, whatever `model` and `clip` hold by then.
    """
    torch.manual_seed(seed)
    randomness = Randomness(seed=seed, device=device)
    tokenizer = load_tokenizer(model / "tokenizer")
    scenes = read_scenes(pool, pool_latents(pool, model, work, device), tokenizer, np.random.default_rng(seed))
    training = start_training(model, clip, scenes, tokenizer, randomness, size, captions)
    transformer = training.transformer
    average = Average(transformer)

    def save(step: int) -> None:
        averaged = SD3Transformer2DModel.from_config(without_origin(transformer.config))
        average.copy_to(averaged)
        training.save(folder, averaged, model)

    optimise(
        Training(
            name="flow",
            loss=training.loss,
            optimizer=Muon(parameter_groups(transformer, matrix_lr=_MATRIX_LR, vector_lr=_VECTOR_LR)),
            budget=budget,
            checkpoint=work / "flow.ckpt",
            stateful={
                "transformer": transformer,
                "text_encoders": training.encoders,
                "randomness": randomness,
                "average_transformer": average,
            },
            after_step=average.update,
            on_save=save,
            warmup_steps=50,
            decay_from=decay_from,
            log_every_steps=25,
            save_every_s=240,
        )
    )


def start_training(
    model: Path,
    clip: Path,
    scenes: Scenes,
    tokenizer: CLIPTokenizer,
    randomness: Randomness,
    size: TransformerSize,
    captions: int,
) -> FlowTraining:
    """Make an untrained transformer, the trained modules that it needs, and the loss."""
    device = randomness.device
    encoders = start_text_encoders(model, clip)
    transformer = new_transformer(sum(each.config.projection_dim for each in encoders), size).to(device).train()
    words, empty_ids = whole_words(tokenizer), encode(tokenizer, [""])[0]
    teacher = load_teacher(model, device)
    training = FlowTraining(transformer, encoders, teacher, scenes, words, empty_ids, randomness, captions)
    training.standardise()
    return training


def pool_latents(pool: Pool, model: Path, work: Path, device: torch.device) -> Tensor:
    """Return the scenes' latents in the autoencoder of `model`, fp16 [scenes, channels, 8, 8], kept in `work`."""
    path = work / "flow-latents.pt"
    if not path.exists():
        vae = load_pretrained(AutoencoderKL, str(model / "vae")).float().to(device).eval()
        temporary = path.with_suffix(".tmp")
        torch.save(encode_pool(vae, pool.pictures, device), temporary)
        temporary.replace(path)
    return torch.load(path)


def whole_words(tokenizer: CLIPTokenizer) -> Tensor:
    """Return the ids of the words of letters that are one token, int64 [words]."""
    vocabulary = tokenizer.get_vocab()
    end = "</w>"
    pieces = (piece for piece in vocabulary if piece.endswith(end))
    words = sorted(piece for piece in pieces if len(piece) > 2 + len(end) and piece.removesuffix(end).isalpha())
    return torch.tensor([vocabulary[word] for word in words])


@torch.no_grad()
def _plain_copy(encoder: CLIPTextModelWithProjection) -> CLIPTextModelWithProjection:
    """Return a copy with a plain token table in place of the open one."""
    plain = CLIPTextModelWithProjection(encoder.config)
    for target, value in zip(plain.parameters(), encoder.parameters(), strict=True):
        target.copy_(value)
    return plain
