"""Train a `ConceptEncoder` through the frozen model, by the objective that rows are learned by.

A step takes some concepts. The network makes each one's rows from a random part of its photos; the rows stand in
prompts as trained rows do, and the loss is the denoising loss of its photos, mostly of others than those the rows were
made from, plus the squared norm of the offsets (Gal et al. 2023, arXiv 2302.12228, section 4.1) and, with a weight for
it, the squared distance from rows that were learned before. Gradients go through the denoiser and the text encoders
into the network alone.

A concept's draws are seeded by (seed, concept id, step), so that they do not depend on its company.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from textual_inversion.augment_config import AugmentConfig
from textual_inversion.concept import Concept
from textual_inversion.config import AdapterConfig, InversionConfig, PenaltyConfig, TimestepConfig
from textual_inversion.encoder import ConceptEncoder, PhotoFeatures, canonical_order
from textual_inversion.encoder_config import EncoderTrainingConfig
from textual_inversion.errors import NotFinite
from textual_inversion.families.base import Backbone, stack_prompts
from textual_inversion.initialise import class_vectors
from textual_inversion.latents import encode_views, sample_latents
from textual_inversion.objective import Batch, Trained, concatenate_batches, objective, row_distance
from textual_inversion.parameters import Layout
from textual_inversion.prompts import HOLE, encode_prompt, training_templates, with_class_noun
from textual_inversion.rng import generator_for
from textual_inversion.timesteps import timestep_sampler
from textual_inversion.transfer import to_device


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ConceptExample:
    """A concept to train the encoder on, with its photos encoded."""

    concept: Concept
    """The concept; the i-th of its captions, if it has any, describes the i-th photo."""
    features: Tensor
    """Features of the photos, [photos, width] (`PhotoFeatures`)."""
    moments: Tensor
    """Mean and deviation of the photos' latents, [photos, 2, *latent_shape]."""
    learned_rows: Mapping[str, Tensor] | None = None
    """Rows that this model learned of the concept before, text encoder key -> [num_vectors, dim] float32; None without
    any."""


def encode_example(
    concept: Concept, photos: Sequence[Image.Image], backbone: Backbone, photo_features: PhotoFeatures
) -> ConceptExample:
    """Encode a concept's photos. Raises ConceptError for a concept that cannot be trained on, such as one with a
    caption that does not fit the model."""
    rows = {HOLE: range(photo_features.config.num_vectors)}
    for noun in dict.fromkeys(("", concept.initializer)):
        for prompt in with_class_noun(_templates(concept), noun):
            encode_prompt(prompt, rows, backbone.vocabularies)
    moments = encode_views(backbone, photos, AugmentConfig(flip=False), concept.concept_id, seed=0).moments.cpu()
    features = photo_features(photos)
    if not (moments.isfinite().all() and features.isfinite().all()):
        raise NotFinite(
            f"concept {concept.concept_id!r}: latents or features of its photos are not finite; check the photos and "
            "the model's precision"
        )
    return ConceptExample(concept=concept, features=features, moments=moments)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """Losses of one step of a training, and the concepts it left out."""

    losses: Mapping[str, float]
    """Means over the concepts by name of the term, and the gradient's norm as `gradient_norm`."""
    loss: float
    """Sum of the terms: the value whose gradient the step followed."""
    left_out: tuple[str, ...]
    """Ids of the concepts whose loss was not finite; they took no part in the step."""


class EncoderTrainer:
    """The state of a training: the network, its optimizer, and the average of its weights over the steps."""

    def __init__(self, network: Any, backbone: Backbone, config: EncoderTrainingConfig, *, seed: int = 0) -> None:
        """Begin a training.

        network: a ConceptEncoder on the backbone's device, or one wrapped for data-parallel training (`module`).
        seed: seed of every random draw, together with the concept's id and the step.
        """
        self._network = network
        self._backbone = backbone
        self._config = config
        self._encoder: ConceptEncoder = getattr(network, "module", network)
        self.averaged: ConceptEncoder = copy.deepcopy(self._encoder).requires_grad_(False)
        """The network with the average of the weights over the steps."""
        self.step_number = 0
        """Steps taken."""
        matrices = [each for each in network.parameters() if each.ndim > 1]
        vectors = [each for each in network.parameters() if each.ndim <= 1]
        self._optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=config.learning_rate,
        )
        self._draws = _Draws(backbone, config, self._encoder.config.num_vectors, seed)
        self._penalties = PenaltyConfig(class_distance=config.offset_weight)
        adapter = AdapterConfig(**dataclasses.asdict(self._encoder.adapter))
        self._layout = Layout.from_config(backbone, InversionConfig(adapter=adapter), self._encoder.config.num_vectors)

    def step(self, examples: Sequence[ConceptExample]) -> StepResult:
        """Take one step on these concepts.

        The gradient is that of the mean over the concepts, so that of n workers with equal numbers of concepts, whose
        gradients are averaged, is that of one worker with all of them. A concept whose loss is not finite counts as
        zero in the mean. A gradient that is not finite changes nothing.
        """
        config = self._config
        good = list(examples)
        terms = self._terms(self._network, good, "encoder", self.step_number)
        is_finite = _sum(terms).isfinite().tolist()
        if not all(is_finite):  # a loss that is not finite would spoil the gradient even with weight zero
            good = [example for example, fine in zip(examples, is_finite, strict=True) if fine]
            terms = self._terms(self._network, good, "encoder", self.step_number) if good else self._nothing()
        loss = _sum(terms).sum() / len(examples)
        for group in self._optimizer.param_groups:
            group["lr"] = config.learning_rate * config.rate_factor(self.step_number)
        self._optimizer.zero_grad()
        with self._attention():
            loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self._network.parameters(), config.max_grad_norm)
        if norm.isfinite():
            self._optimizer.step()
        self.step_number += 1
        decay = min(config.averaging, self.step_number / (self.step_number + 10))
        with torch.no_grad():
            for mean, value in zip(self.averaged.parameters(), self._encoder.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)
        means = {name: float(values.detach().sum()) / len(examples) for name, values in terms.items()}
        return StepResult(
            losses=means | {"gradient_norm": float(norm)},
            loss=float(loss.detach()),
            left_out=tuple(
                example.concept.concept_id for example, fine in zip(examples, is_finite, strict=True) if not fine
            ),
        )

    @torch.no_grad()
    def held_out_losses(self, examples: Sequence[ConceptExample], draws: int = 4) -> Tensor:
        """Return the denoising loss of the averaged network for each concept, [concepts], on the same draws in every
        call."""
        passes = [self._terms(self.averaged, examples, "encoder-evaluation", draw) for draw in range(draws)]
        return torch.stack([terms["denoising"] for terms in passes]).mean(0)

    def evaluate(self, examples: Sequence[ConceptExample]) -> float:
        """Return the mean of `held_out_losses`, computed for as many concepts at once as a step has."""
        size = self._config.concepts_per_step
        chunks = (examples[first : first + size] for first in range(0, len(examples), size))
        return float(torch.cat([self.held_out_losses(chunk) for chunk in chunks]).mean())

    def state_dict(self) -> dict[str, Any]:
        """Return all that a training goes on from."""
        return {
            "step": self.step_number,
            "network": self._encoder.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of a training with an equal network."""
        self.step_number = state["step"]
        self._encoder.load_state_dict(state["network"])
        self.averaged.load_state_dict(state["averaged"])
        self._optimizer.load_state_dict(state["optimizer"])

    def _attention(self) -> AbstractContextManager[None]:
        """Let torch take the plain product form of attention in bfloat16 on a CPU, whose fused form has a backward pass
        several times as slow there (measured with torch 2.9: a third of a step)."""
        is_slow = self._backbone.device.type == "cpu" and self._backbone.dtype == torch.bfloat16
        plain: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
        return plain if is_slow else nullcontext()

    def _nothing(self) -> dict[str, Tensor]:
        """Return a term that is zero and has a gradient for every parameter, which other workers wait for."""
        return {"denoising": 0.0 * torch.stack([each.sum() for each in self._network.parameters()]).sum()[None]}

    def _terms(
        self, network: nn.Module, examples: Sequence[ConceptExample], purpose: str, step: int
    ) -> dict[str, Tensor]:
        """Return the terms of the objective for each concept: name -> [concepts]."""
        backbone = self._backbone
        drawn = [self._draws(example, purpose, step) for example in examples]
        features, is_present = _padded([each.features for each in drawn], backbone.device)
        classes = {
            key: to_device(torch.stack([each.classes[key] for each in drawn]), backbone.device)
            for key in backbone.token_tables
        }
        values = network(features, is_present, classes)
        num_vectors = self._encoder.config.num_vectors
        class_vector = {key: vectors[:, None] for key, vectors in classes.items()}
        vocab_sizes = {key: vocabulary.size for key, vocabulary in backbone.vocabularies.items()}
        batch = concatenate_batches([each.batch for each in drawn], vocab_sizes, num_vectors)
        is_placeholder_row = features.new_ones(len(examples), num_vectors)
        trained = Trained(
            rows={key: values[key] for key in backbone.token_tables},
            start=class_vector,
            class_vector=class_vector,
            is_placeholder_row=is_placeholder_row,
            adapters=self._layout.adapters(values, batch.ids, is_placeholder_row),
        )
        with self._attention():
            terms = objective(backbone, batch, trained, self._penalties)
        found = {name: each.reshape(len(examples), -1).mean(1) for name, each in terms.items()}
        if self._config.row_weight:
            made = {key: values[key] for key in self._encoder.offsets}
            is_learned = torch.tensor([float(each.learned_rows is not None) for each in examples])
            distance = row_distance(made, _learned_rows(examples, made), to_device(is_learned, backbone.device))
            found["row_distance"] = self._config.row_weight * distance
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class _Drawn:
    """The draws of one concept for one step."""

    features: Tensor
    """Features of the photos that rows are made from, [photos, width]."""
    classes: Mapping[str, Tensor]
    """Vectors that the offsets are added to, text encoder key -> [dim]."""
    batch: Batch
    """Samples of the denoising loss."""


class _Draws:
    """Draws the photos, prompts, noise and timesteps of a concept for a step."""

    def __init__(self, backbone: Backbone, config: EncoderTrainingConfig, num_vectors: int, seed: int) -> None:
        self._backbone = backbone
        self._seed = seed
        self._config = config
        self._timesteps = timestep_sampler(TimestepConfig(), backbone.noise)
        rows = {HOLE: range(num_vectors)}
        self._encode = lru_cache(maxsize=50_000)(lambda text: encode_prompt(text, rows, backbone.vocabularies))

    def __call__(self, example: ConceptExample, purpose: str, step: int) -> _Drawn:
        """Draw for a concept. The order of the draws is part of every result."""
        config = self._config
        concept = example.concept
        backbone = self._backbone
        generator = generator_for(self._seed, concept.concept_id, purpose, step)
        num_photos = len(example.features)
        size = config.samples_per_concept
        most = min(num_photos, config.max_photos)
        num_seen = int(torch.randint(1, most + 1, (), generator=generator))
        order = torch.randperm(num_photos, generator=generator)
        seen, others = order[:num_seen], order[num_seen:]
        has_class, *_ = (torch.rand(1, generator=generator) >= config.no_initializer_share).tolist()
        coins = torch.rand(3, size, generator=generator)
        place = torch.rand(2, size, generator=generator)
        eps = torch.randn(size, *backbone.latent_shape, generator=generator)
        noise = torch.randn(size, *backbone.latent_shape, generator=generator)
        timesteps = self._timesteps(size, generator)

        targets = []
        for is_other, where in zip((coins[0] < config.other_photo_share).tolist(), place[0].tolist(), strict=True):
            options = others if is_other and len(others) else seen
            targets.append(int(options[int(where * len(options))]))
        nouns = [concept.initializer if named else "" for named in (coins[1] < config.class_noun_share).tolist()]
        prompts = [
            self._prompt(concept, photo, noun, where)
            for photo, noun, where in zip(targets, nouns, place[1].tolist(), strict=True)
        ]
        classes = class_vectors(concept, backbone) if has_class else _means(backbone)
        moments = example.moments[targets].float()
        batch = Batch(
            latents=to_device(sample_latents(moments, eps), backbone.device),
            noise=to_device(noise, backbone.device),
            timesteps=to_device(timesteps, backbone.device),
            ids={key: to_device(ids, backbone.device) for key, ids in stack_prompts(prompts).items()},
        )
        return _Drawn(features=example.features[seen].float(), classes=classes, batch=batch)

    def _prompt(self, concept: Concept, photo: int, noun: str, where: float) -> dict[str, list[int]]:
        """Return the ids of the photo's caption, or of the template at `where` in [0, 1) of the list."""
        templates = _templates(concept)
        template = templates[photo if concept.captions else int(where * len(templates))]
        encoded: dict[str, list[int]] = self._encode(with_class_noun([template], noun)[0])
        return encoded


def _templates(concept: Concept) -> Sequence[str]:
    """Return the concept's captions, one a photo, or the templates of its category."""
    return training_templates(concept, class_cue=False)


def _learned_rows(examples: Sequence[ConceptExample], made: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stack the learned rows of concepts as the rows made for them are, text encoder key -> [concepts, num_vectors,
    dim]; zero for a concept without any."""
    stacked = {}
    for key, tensor in made.items():
        zeros = torch.zeros(tensor.shape[1:])
        rows = [each.learned_rows[key] if each.learned_rows else zeros for each in examples]
        stacked[key] = to_device(torch.stack(rows), tensor.device)
    return stacked


def _sum(terms: Mapping[str, Tensor]) -> Tensor:
    """Return the sum of the terms of each concept, [concepts]."""
    return torch.stack(list(terms.values())).sum(0)


def _means(backbone: Backbone) -> dict[str, Tensor]:
    """Return the mean of each vocabulary's vectors, text encoder key -> [dim]."""
    return {key: table.mean for key, table in backbone.token_tables.items()}


def _padded(features: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Stack sets of photos of unequal sizes: features [concepts, photos, width], and which of them are there."""
    padded = nn.utils.rnn.pad_sequence(list(features), batch_first=True)
    counts = torch.tensor([len(each) for each in features])
    is_present = torch.arange(padded.shape[1]) < counts[:, None]
    return to_device(padded, device), to_device(is_present, device)


__all__ = ["ConceptExample", "EncoderTrainer", "EncoderTrainingConfig", "canonical_order", "encode_example"]
