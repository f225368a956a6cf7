"""A concept's views with the prompts that go with each view, and the drawing of training samples from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from textual_inversion.concept import Concept
from textual_inversion.config import InversionConfig
from textual_inversion.families.base import Backbone
from textual_inversion.knowledge import FrozenPrompts, KnowledgePreservation
from textual_inversion.latents import AUTOENCODER_BATCH_SIZE, EncodedViews, sample_latents
from textual_inversion.objective import Batch
from textual_inversion.paired_augment import augmentation_tokens
from textual_inversion.prompts import (
    HOLE,
    augmentation_word,
    encode_prompt,
    training_templates,
    with_augmentation_words,
)
from textual_inversion.timesteps import DrawTimesteps
from textual_inversion.transfer import to_device

PER_IMAGE_PROBABILITY = 0.25
"""Probability that a prompt names its photo's own token (Gal et al. 2022, released code)."""

ImageFeatures = Callable[[Tensor], Tensor]
"""A differentiable image encoder: pixels [batch, 3, height, width] in [-1, 1] -> features [batch, dim]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingData:
    """The views and prompts that one concept's samples are drawn from.

    A view's samples take their prompts from one of several lists of prompts: the templates, the caption of the view's
    photo, the templates with the view's augmentation, the templates with the photo's token. Tensors are on the
    backbone's device, except the two list indices, which are used on the CPU.
    """

    moments: Tensor
    """Mean and standard deviation of each view's latents, [views, 2, *latent_shape]."""
    mask: Tensor | None
    """Weight of each latent pixel in the denoising loss, [views, 1, height, width] in [0, 1]; None counts all."""
    features: Tensor | None
    """Image features of the views, [views, dim], if the objective compares them."""
    prompts: Mapping[str, Tensor]
    """Token ids of all prompts, text encoder key -> [stages, lists, prompts, length].

    Id `size + j` of a vocabulary is the concept's row j. Under `progressive` there is a stage for each number of active
    vectors, the fewest first; else there is one stage.
    """
    list_index: Tensor
    """Index of the list of prompts for each view, [views]."""
    photo_list_index: Tensor | None
    """Index of the list that names the view's photo, [views], used instead with `PER_IMAGE_PROBABILITY`."""
    first_steps: tuple[int, ...]
    """Number of steps that the concept has taken when each of its vectors becomes active."""
    knowledge: KnowledgePreservation | None = None
    """Source of the prompts for which the adapted text encoder is held to the frozen one."""
    framings: Tensor | None = None
    """Part of its photo that each view shows, [views, 4] (`EncodedViews.framings`)."""
    class_prompts: FrozenPrompts | None = None
    """The same kind of prompts, with the name of the concept's class in each."""

    @classmethod
    def from_views(
        cls,
        concept: Concept,
        views: EncodedViews,
        config: InversionConfig,
        backbone: Backbone,
        image_features: ImageFeatures | None = None,
        knowledge: KnowledgePreservation | None = None,
    ) -> TrainingData:
        """Encode the prompts and move everything to the device. Raises BadInput if a prompt does not fit the model.

        `image_features` is given where the objective compares features, `knowledge` where it preserves knowledge.
        """
        device = backbone.device
        moments = to_device(views.moments, device).float()
        prompts, list_index, photo_list_index = _prompts(concept, views, config, backbone)
        return cls(
            moments=moments,
            mask=None if views.masks is None else to_device(views.masks, device).float(),
            features=None if image_features is None else _features(moments, backbone, image_features),
            framings=None if views.framings is None else to_device(views.framings, device),
            prompts={key: to_device(ids, device) for key, ids in prompts.items()},
            list_index=list_index,
            photo_list_index=photo_list_index,
            first_steps=progressive_schedule(config.steps if config.progressive else 0, concept.num_vectors),
            knowledge=knowledge,
            class_prompts=None if knowledge is None else knowledge.class_prompts(concept, config.templates),
        )

    def active_vectors(self, step: int) -> int:
        """Return how many of the concept's vectors are in its prompts after this many steps."""
        return sum(first <= step for first in self.first_steps)

    @property
    def _num_prompts(self) -> int:
        """Number of prompts in each list."""
        return next(iter(self.prompts.values())).shape[2]

    def draw(
        self, generator: torch.Generator, size: int, step: int, latent_shape: Sequence[int], timesteps: DrawTimesteps
    ) -> Batch:
        """Draw `size` samples for a concept that has taken `step` steps.

        The order of the draws is part of every result: a new kind of draw goes to the end.
        """
        device = self.moments.device
        view = torch.randint(len(self.moments), (size,), generator=generator)
        eps = torch.randn(size, *latent_shape, generator=generator)
        noise = torch.randn(size, *latent_shape, generator=generator)
        t = timesteps(size, generator)
        prompt = torch.randint(self._num_prompts, (size,), generator=generator)
        chosen_list = self.list_index[view]
        if self.photo_list_index is not None:
            names_photo = torch.rand(size, generator=generator) < PER_IMAGE_PROBABILITY
            chosen_list = torch.where(names_photo, self.photo_list_index[view], chosen_list)

        view, chosen_list, prompt = (to_device(indices, device) for indices in (view, chosen_list, prompt))
        stage = self.active_vectors(step) - len(self.first_steps) - 1
        others = None if self.knowledge is None else self.knowledge.draw(size, self.class_prompts, generator)
        return Batch(
            latents=sample_latents(self.moments[view], to_device(eps, device)),
            noise=to_device(noise, device),
            timesteps=to_device(t, device),
            ids={key: prompts[stage][chosen_list, prompt] for key, prompts in self.prompts.items()},
            mask=None if self.mask is None else self.mask[view],
            features=None if self.features is None else self.features[view],
            framing=None if self.framings is None else self.framings[view],
            others=others,
        )


def progressive_schedule(steps: int, num_vectors: int) -> tuple[int, ...]:
    """Return after how many steps each vector becomes active (Gal et al. 2022, section 5, "progressive").

    Of k vectors the i-th (from 0) becomes active after i / k of the steps; the paper's second after 2,000 steps and its
    third after 4,000. With `steps` 0 all are active from the start.
    """
    return tuple(-(-vector * steps // num_vectors) for vector in range(num_vectors))


def photo_word(photo: int) -> str:
    """Return the word that stands for a photo's own token in a prompt."""
    return f"<photo:{photo}>"


def _prompts(
    concept: Concept, views: EncodedViews, config: InversionConfig, backbone: Backbone
) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
    """Return `TrainingData.prompts`, `list_index` and `photo_list_index`."""
    templates = training_templates(concept, class_cue=config.class_cue, templates=config.templates)
    lists: dict[tuple[str, ...], int] = {}

    def add_list(texts: Sequence[str]) -> int:
        """Return the index of a list of prompts; equal lists share one."""
        return lists.setdefault(tuple(texts), len(lists))

    list_index = []
    photo_list_index = []
    for photo, augmentation in zip(views.photo_indices, views.augmentations, strict=True):
        texts = [templates[photo]] if concept.captions else templates
        if config.augment.paired:
            texts = [with_augmentation_words(text, augmentation.before, augmentation.after) for text in texts]
        list_index.append(add_list(texts))
        if config.per_image_tokens:
            photo_list_index.append(add_list([f"{text} with {photo_word(photo)}" for text in texts]))

    words = [photo_word(photo) for photo in range(max(views.photo_indices) + 1)] if config.per_image_tokens else []
    words += [augmentation_word(name) for name in augmentation_tokens(config.augment)]
    placeholders = {word: range(row, row + 1) for row, word in enumerate(words, concept.num_vectors)}

    def encode(num_active: int) -> list[list[dict[str, list[int]]]]:
        rows = {HOLE: range(num_active)}
        return [[encode_prompt(text, placeholders | rows, backbone.vocabularies) for text in texts] for texts in lists]

    stages = range(1, concept.num_vectors + 1) if config.progressive else [concept.num_vectors]
    encoded = [encode(num_active) for num_active in stages]
    ids = {
        key: torch.tensor([[[prompt[key] for prompt in texts] for texts in stage] for stage in encoded])
        for key in backbone.vocabularies
    }
    return ids, torch.tensor(list_index), torch.tensor(photo_list_index) if config.per_image_tokens else None


def _features(moments: Tensor, backbone: Backbone, image_features: ImageFeatures) -> Tensor:
    """Return the features of the views' decoded means, [views, dim]: those of a perfect prediction."""
    with torch.no_grad():
        chunks = torch.split(moments[:, 0], AUTOENCODER_BATCH_SIZE)
        return torch.cat([image_features(backbone.decode(latents)) for latents in chunks])
