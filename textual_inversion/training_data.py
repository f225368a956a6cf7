"""What a concept's samples are drawn from, and the drawing: its views, and the prompts that go with each view."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from textual_inversion.concept import Concept
from textual_inversion.config import InversionConfig
from textual_inversion.families.base import Backbone
from textual_inversion.knowledge import FrozenPrompts, KnowledgePreservation
from textual_inversion.latents import VIEWS_PER_PASS, Views, sample
from textual_inversion.objective import Batch
from textual_inversion.optim import join_steps
from textual_inversion.paired_augment import AUGMENTATION_TOKENS
from textual_inversion.prompts import HOLE, augmentation_word, augmented, encode_prompt, training_templates
from textual_inversion.timesteps import Sampler
from textual_inversion.transfer import to_device

PER_IMAGE_PROBABILITY = 0.25
"""With which a prompt names its photo's own token (Gal et al. 2022, released code)."""

ImageFeatures = Callable[[Tensor], Tensor]
"""Pixels [batch, 3, height, width] in [-1, 1] -> features [batch, dim], with gradients."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingData:
    """One concept's, on the backbone's device, but for `plain` and `per_image`, which are used on the CPU.

    A view's samples take their prompt from one of several lists of prompts: the templates, its photo's caption, the
    templates with its augmentation, the templates with its photo's token.
    """

    moments: Tensor
    """[views, 2, *latent_shape]"""
    mask: Tensor | None
    """[views, 1, height, width] in [0, 1]"""
    features: Tensor | None
    """[views, dim] image features of the views, if the objective compares them."""
    prompts: Tensor
    """[stages, lists, prompts, max_length] ids; id `vocab_size + j` is the concept's row j. The last stage is for all
    of its vectors, those before it for ever fewer, if they join one by one."""
    plain: Tensor
    """[views] which list each view's samples take."""
    per_image: Tensor | None
    """[views] the list that names the view's photo, taken with `PER_IMAGE_PROBABILITY`."""
    joins: tuple[int, ...]
    """After how many steps each of the concept's vectors joins."""
    knowledge: KnowledgePreservation | None = None
    """Where the prompts come from at which the adapted text encoder is to stay as it was."""
    of_class: FrozenPrompts | None = None
    """Those of them that name the concept's class."""

    def active_vectors(self, step: int) -> int:
        """How many of the concept's vectors are in its prompts after this many steps."""
        return sum(joins <= step for joins in self.joins)

    def draw(
        self, generator: torch.Generator, size: int, step: int, latent_shape: Sequence[int], timesteps: Sampler
    ) -> Batch:
        """`size` samples for a concept that has taken `step` steps. The order of the draws is part of every result: new
        ones go to the end."""
        device = self.moments.device
        view = torch.randint(len(self.moments), (size,), generator=generator)
        eps = torch.randn(size, *latent_shape, generator=generator)
        noise = torch.randn(size, *latent_shape, generator=generator)
        t = timesteps(size, generator)
        number = torch.randint(self.prompts.shape[2], (size,), generator=generator)
        listed = self.plain[view]
        if self.per_image is not None:
            named = torch.rand(size, generator=generator) < PER_IMAGE_PROBABILITY
            listed = torch.where(named, self.per_image[view], listed)

        view = to_device(view, device)
        others = None if self.knowledge is None else self.knowledge.draw(size, self.of_class, generator)
        return Batch(
            latents=sample(self.moments[view], to_device(eps, device)),
            noise=to_device(noise, device),
            timesteps=to_device(t, device),
            ids=self.prompts[self.active_vectors(step) - len(self.joins) - 1][
                to_device(listed, device), to_device(number, device)
            ],
            mask=None if self.mask is None else self.mask[view],
            features=None if self.features is None else self.features[view],
            other_ids=None if others is None else others.ids,
            other_states=None if others is None else others.states,
        )


def material(
    concept: Concept,
    views: Views,
    config: InversionConfig,
    backbone: Backbone,
    image_features: ImageFeatures | None = None,
    knowledge: KnowledgePreservation | None = None,
) -> TrainingData:
    """Raises ValueError if a prompt does not fit the model."""
    device = backbone.device
    moments = to_device(views.moments, device).float()
    prompts, plain, per_image = _prompts(concept, views, config, backbone)
    return TrainingData(
        moments=moments,
        mask=None if views.mask is None else to_device(views.mask, device).float(),
        features=None if image_features is None else _features(moments, backbone, image_features),
        prompts=to_device(prompts, device),
        plain=plain,
        per_image=per_image,
        joins=join_steps(config.steps, concept.num_vectors) if config.progressive else (0,) * concept.num_vectors,
        knowledge=knowledge,
        of_class=None if knowledge is None else knowledge.of_class(concept),
    )


def photo_word(photo: int) -> str:
    """What stands in a prompt for a photo's own token."""
    return f"<photo:{photo}>"


def _prompts(
    concept: Concept, views: Views, config: InversionConfig, backbone: Backbone
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`TrainingData.prompts`, `plain` and `per_image`."""
    templates = training_templates(concept, class_cue=config.class_cue)
    lists: dict[tuple[str, ...], int] = {}

    def place(texts: Sequence[str]) -> int:
        return lists.setdefault(tuple(texts), len(lists))

    plain, named = [], []
    for photo, augmentation in zip(views.photo, views.augmentation, strict=True):
        texts = [templates[photo]] if concept.captions else templates
        names = augmentation if config.augment.paired else ()
        plain.append(place([augmented(text, names) for text in texts]))
        named.append(place([f"{text} with {photo_word(photo)}" for text in texts]) if config.per_image_tokens else 0)

    first = backbone.vocab_size + concept.num_vectors
    words = [photo_word(photo) for photo in range(max(views.photo) + 1)] if config.per_image_tokens else []
    words += [augmentation_word(name) for name in AUGMENTATION_TOKENS] if config.augment.paired else []
    placeholders = {word: range(first + i, first + i + 1) for i, word in enumerate(words)}

    def encode(num_active: int) -> list[list[list[int]]]:
        own = {HOLE: range(backbone.vocab_size, backbone.vocab_size + num_active)}
        return [[encode_prompt(text, placeholders | own, backbone) for text in texts] for texts in lists]

    stages = range(1, concept.num_vectors + 1) if config.progressive else [concept.num_vectors]
    ids = torch.tensor([encode(num_active) for num_active in stages])
    return ids, torch.tensor(plain), torch.tensor(named) if config.per_image_tokens else None


def _features(moments: Tensor, backbone: Backbone, image_features: ImageFeatures) -> Tensor:
    """Features of the views as the autoencoder gives them back: what a perfect prediction would be decoded to."""
    with torch.no_grad():
        parts = torch.split(moments[:, 0], VIEWS_PER_PASS)
        return torch.cat([image_features(backbone.decode(part)) for part in parts])
