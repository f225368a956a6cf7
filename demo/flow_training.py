"""Train the demo's rectified-flow transformer, and save a plain `StableDiffusion3Pipeline`.

The loss is conditional flow matching (Lipman et al. 2023; Esser et al. 2024, section 2): the transformer predicts the
noise minus the latents. 10 % of captions are empty, for guidance. The text encoders are those of trained models and
stay frozen; some captions hold a word that is made from a picture (`demo.unnamed`), and the networks that make it are
learned along.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from demo.denoiser import copy_of, mixed_precision, stratified_quantiles, velocity_loss, without_origin
from demo.flow_model import (
    DEFAULT_SIZE,
    NUM_TRAIN_TIMESTEPS,
    TransformerSize,
    ZerosOnce,
    conditioning,
    new_transformer,
    save_pipeline,
    standardise_inputs,
    start_text_encoders,
)
from demo.latent_pool import LatentPool
from demo.loop import Average, Budget, Randomness, Training, optimise
from demo.muon import Muon, parameter_groups
from demo.tokenizer import encode
from demo.unnamed import WordsFromPictures, open_vocabulary
from textual_inversion.noise import RectifiedFlow
from textual_inversion.text_encoders import T5_LENGTH

_CAPTIONS_PER_BATCH = 96
_MATRIX_LR = 4e-3
_VECTOR_LR = 1.5e-3
_WORDS_LR = 1e-3
_EMPTY_CAPTION_FRACTION = 0.1
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


class FlowTraining:
    """Modules of one training, and the loss of one step."""

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        text_encoders: Sequence[CLIPTextModelWithProjection],
        pool: LatentPool,
        empty_ids: Tensor,
        randomness: Randomness,
        captions: int = _CAPTIONS_PER_BATCH,
    ) -> None:
        """Freeze the text encoders and let them read unnamed words, in place. `captions`: size of a batch."""
        self.device = randomness.device
        self.transformer = transformer
        self.transformer.set_attn_processor(ZerosOnce(T5_LENGTH))
        self.encoders = nn.ModuleList(text_encoders).requires_grad_(False).to(self.device).eval()
        self.vocabularies = [open_vocabulary(each) for each in self.encoders]
        tables = (each.table.weight for each in self.vocabularies)
        self.words = nn.ModuleList(WordsFromPictures(pool.features.shape[1], table) for table in tables)
        self.words.to(self.device)
        self.pool = pool
        self.empty_ids = empty_ids
        self.randomness = randomness
        self.noise = RectifiedFlow(NUM_TRAIN_TIMESTEPS, device=self.device)
        self.captions = captions if self.device.type == "cpu" else 8 * captions

    def continue_words(self, state: Mapping[str, Tensor]) -> None:
        """Start both networks that make words from the denoiser's, whose state is given.

        The second table was the first one's start: their rows, less the mean, have a cosine of 0.84 on average.
        """
        for network in self.words:
            own = {"centre": network.centre, "deviation": network.deviation}
            network.load_state_dict({**state, **own})

    @torch.no_grad()
    def standardise(self) -> None:
        """Let the untrained transformer read states and pooled vectors of captions with mean 0 and deviation 1."""
        named = torch.nonzero(self.pool.objects < 0)[:_CAPTIONS_TO_STANDARDISE, 0]
        hidden, pooled = conditioning(self.encoders, self.pool.input_ids[named].to(self.device))
        standardise_inputs(self.transformer.context_embedder, hidden[:, :-1])
        standardise_inputs(self.transformer.time_text_embed.text_embedder.linear_1, pooled)

    def encode(self, ids: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return hidden states and pooled vectors of captions, whose unnamed words come from the features."""
        for vocabulary, words in zip(self.vocabularies, self.words, strict=True):
            vocabulary.rows = words(features, self.randomness.torch).float()
        return conditioning(self.encoders, ids)

    def loss(self, fraction_done: float) -> tuple[Tensor, dict[str, float]]:
        """Return the mean loss of one batch, and figures to log."""
        rows = self.pool.sample(self.captions, self.randomness.numpy)
        latents = self.pool.latents[rows].to(self.device).float()
        ids = self.pool.input_ids[rows].clone()
        ids[self.randomness.numpy.random(self.captions) < _EMPTY_CAPTION_FRACTION] = self.empty_ids
        features = self.pool.features[self.pool.objects[rows].clamp(min=0)].to(self.device)
        noise = torch.randn(latents.shape, generator=self.randomness.torch, device=self.device)
        timesteps = logit_normal_timesteps(self.captions, self.randomness.torch, self.device)
        noisy, target = self.noise.corrupt(latents, noise, timesteps)
        with mixed_precision(self.device):
            hidden, pooled = self.encode(ids.to(self.device), features)
            prediction = self.transformer(
                hidden_states=noisy,
                timestep=self.noise.model_timesteps(timesteps),
                encoder_hidden_states=hidden,
                pooled_projections=pooled,
            ).sample
        losses = velocity_loss(prediction, target)
        figures = {"loss": losses.mean().item()}
        is_unnamed = (self.pool.objects[rows] >= 0).to(self.device)
        if is_unnamed.any():
            figures["unnamed"] = losses[is_unnamed].mean().item()
        return losses.mean(), figures

    def optimizer(self) -> Muon:
        """Make an optimizer of the transformer and of the networks that make words."""
        groups = parameter_groups(self.transformer, matrix_lr=_MATRIX_LR, vector_lr=_VECTOR_LR)
        return Muon([*groups, {"params": list(self.words.parameters()), "lr": _WORDS_LR, "is_matrix": False}])

    def save(
        self, folder: Path, transformer: SD3Transformer2DModel, vae: AutoencoderKL, tokenizer: CLIPTokenizer
    ) -> None:
        """Write a pipeline of `transformer`, which becomes fp16, the text encoders and a copy of the autoencoder."""
        encoders = [_plain_copy(encoder) for encoder in self.encoders]
        save_pipeline(folder, transformer=transformer, text_encoders=encoders, vae=copy_of(vae), tokenizer=tokenizer)


def train_flow(
    pool: LatentPool,
    tokenizer: CLIPTokenizer,
    vae: AutoencoderKL,
    folder: Path,
    checkpoint: Path,
    *,
    budget: Budget,
    device: torch.device,
    seed: int,
    model: Path,
    clip: Path,
    words: Mapping[str, Any] | None = None,
    decay_from: float = 0.0,
    size: TransformerSize = DEFAULT_SIZE,
    captions: int = _CAPTIONS_PER_BATCH,
) -> None:
    """Train a transformer that reads the text encoders of `model` and `clip`; save its average in `folder`.

    `words`: state of the denoiser's network that makes words from pictures, to start from. A continued training takes
    the text encoders from its checkpoint, whatever `model` and `clip` hold by then.
    """
    torch.manual_seed(seed)
    randomness = Randomness(seed=seed, device=device)
    text_encoders = start_text_encoders(model, clip)
    empty_ids = encode(tokenizer, [""])[0]
    transformer = new_transformer(sum(each.config.projection_dim for each in text_encoders), size).to(device).train()
    training = FlowTraining(transformer, text_encoders, pool, empty_ids, randomness, captions)
    training.standardise()
    if words is not None:
        training.continue_words(words)
    average = Average(transformer)

    def save(step: int) -> None:
        averaged = SD3Transformer2DModel.from_config(without_origin(transformer.config))
        average.copy_to(averaged)
        training.save(folder, averaged, vae, tokenizer)

    optimise(
        Training(
            name="flow",
            loss=training.loss,
            optimizer=training.optimizer(),
            budget=budget,
            checkpoint=checkpoint,
            stateful={
                "transformer": transformer,
                "text_encoders": training.encoders,
                "words": training.words,
                "randomness": randomness,
                "average_transformer": average,
            },
            after_step=average.update,
            on_save=save,
            warmup_steps=100,
            decay_from=decay_from,
            log_every_steps=25,
            save_every_s=480,
        )
    )


@torch.no_grad()
def _plain_copy(encoder: CLIPTextModelWithProjection) -> CLIPTextModelWithProjection:
    """Return a copy with a plain token table in place of the open one."""
    plain = CLIPTextModelWithProjection(encoder.config)
    for target, value in zip(plain.parameters(), encoder.parameters(), strict=True):
        target.copy_(value)
    return plain
