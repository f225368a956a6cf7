"""Draw sample pictures of a learned concept and score them: do they show the thing, and do they follow the prompt?

Gal et al. 2022, section 5.2: CLIP-I compares samples with the concept's photos; CLIP-T compares them with the prompt
without its placeholder. The initializer word alone, drawn from the same noise, is the score to beat; the photos among
themselves are the ceiling. A concept with a class noun is drawn with it ("V* cat") and compared with the same words as
any other: the initializer alone ("cat"), and the prompt that names no concept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from PIL import Image
from torch import Tensor

from pipeline.sample_config import GridConfig
from textual_inversion.concept import Concept, LearnedEmbedding
from textual_inversion.extractors import ClipExtractor
from textual_inversion.families.base import Backbone
from textual_inversion.generate import ImageRequest, generate
from textual_inversion.grids import grid
from textual_inversion.metrics import clip_i, clip_i_between_photos, clip_t
from textual_inversion.prompts import HOLE, fill, name_in_prompt, with_class_noun, without_placeholder
from textual_inversion.rng import seed_for


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """Sample pictures of a concept, by prompt."""

    prompts: tuple[str, ...]
    """Templates of `GridConfig`, with a hole for the concept."""
    learned: list[list[Image.Image]]
    initial: list[list[Image.Image]]
    """Pictures of the same prompts and noise, or of the first prompts alone, with the initializer word in the concept's
    place; empty if the concept has no initializer, or they were not asked for."""
    name: str = HOLE
    """Text in the prompts' hole that names the concept: "<tiger>", or "<tiger> cat" with a class cue."""

    @classmethod
    def from_pictures(
        cls, pictures: Sequence[Image.Image], category: str, config: GridConfig, embedding: LearnedEmbedding
    ) -> Samples:
        """Group the pictures of `sample_requests`, given in their order, by prompt."""
        prompts = config.prompts_for(category)
        width = config.images_per_prompt
        columns = [list(pictures[i : i + width]) for i in range(0, len(pictures), width)]
        learned = columns[: len(prompts)]
        name = name_in_prompt(embedding.placeholder_token, embedding.class_noun)
        return cls(prompts=prompts, learned=learned, initial=columns[len(prompts) :], name=name)

    def sheet(self, photos: Sequence[Image.Image]) -> Image.Image:
        """Lay out the photos and the pictures of each prompt, under the prompt."""
        labels = [fill(prompt, self.name) for prompt in self.prompts]
        return grid(photos, list(zip(labels, self.learned, strict=True)))


def sample_requests(
    concept: Concept, embedding: LearnedEmbedding, config: GridConfig, seed: int, *, initial: bool = True
) -> list[ImageRequest]:
    """Return the requests of one concept's sample grid; they are the same whatever else is drawn.

    `initial` adds those of its initializer word, which are needed for scores only.
    """
    prompts = config.prompts_for(concept.category)
    requests = [_request(prompt, noise, embedding) for prompt in prompts for noise in _noise_seeds(config, seed)]
    return requests + (initializer_requests(concept, config, seed) if initial else [])


def initializer_requests(concept: Concept, config: GridConfig, seed: int) -> list[ImageRequest]:
    """Return the requests of the initializer word in those sample prompts that are drawn of it, the same for all
    concepts that start from it; none without an initializer."""
    if not concept.initializer:
        return []
    prompts = config.prompts_for(concept.category)[: config.initializer_prompts or None]
    filled = [fill(prompt, concept.initializer) for prompt in prompts]
    return [ImageRequest(prompt, noise) for prompt in filled for noise in _noise_seeds(config, seed)]


def preview_request(concept: Concept, embedding: LearnedEmbedding, config: GridConfig, seed: int) -> ImageRequest:
    """Return the request of a preview: the first prompt and noise of the sample grid, at any step of the concept."""
    return _request(config.prompts_for(concept.category)[0], _noise_seeds(config, seed)[0], embedding)


def _request(prompt: str, seed: int, embedding: LearnedEmbedding) -> ImageRequest:
    """Return the request of a prompt with a hole for the concept."""
    embedding = replace(embedding, placeholder_token=HOLE)  # a prompt may have the placeholder's word elsewhere, too
    [named] = with_class_noun([prompt], embedding.class_noun)
    return ImageRequest(named, seed, (embedding,))


def _noise_seeds(config: GridConfig, seed: int) -> list[int]:
    """Return the seed of each picture of a prompt.

    All concepts have the same: pictures of an initializer word can then be shared, and a difference between two
    concepts' grids is none of the noise.
    """
    return [seed_for(seed, "", "grid", number) for number in range(config.images_per_prompt)]


def draw_samples(
    backbone: Backbone, concept: Concept, embedding: LearnedEmbedding, config: GridConfig, seed: int
) -> Samples:
    """Draw the sample grid of one concept."""
    pictures = generate(backbone, sample_requests(concept, embedding, config, seed), config.sampling)
    return Samples.from_pictures(pictures, concept.category, config, embedding)


def score(
    extractor: ClipExtractor,
    photos: Sequence[Image.Image],
    samples: Samples,
    nearest_other: Callable[[Tensor], float | None] | None = None,
) -> dict[str, float]:
    """Return CLIP-I of the first prompt's pictures and CLIP-T over all prompts that say something besides the concept.

    The names are `clip_i` and `clip_t`, the same two with `_initializer` for the initializer word, where it has
    pictures of all those prompts, `clip_i_photos`, each photo against the others, if there are several, and
    `clip_i_others`, what `nearest_other` returns for the features [pictures, dim] of the first prompt's pictures: their
    highest CLIP-I to the photos of another concept, or None if there is none.
    """
    sets = [photos, *samples.learned, *samples.initial]
    features = extractor.images([picture for pictures in sets for picture in pictures])  # in as few passes as can be
    real, *columns = torch.split(features, [len(pictures) for pictures in sets])
    learned, initial = columns[: len(samples.learned)], columns[len(samples.learned) :]
    texts = {place: text for place, prompt in enumerate(samples.prompts) if (text := without_placeholder(prompt, HOLE))}
    wanted = dict(zip(texts, extractor.texts(list(texts.values())).unsqueeze(1).unbind(), strict=True)) if texts else {}
    scores = _pair(learned, real, wanted, "")
    if initial:
        scores |= _pair(initial, real, wanted if len(initial) == len(learned) else {}, "_initializer")
    if len(photos) > 1:
        scores["clip_i_photos"] = float(clip_i_between_photos(real).mean())
    if nearest_other and (others := nearest_other(learned[0])) is not None:
        scores["clip_i_others"] = others
    return scores


def _pair(columns: Sequence[Tensor], real: Tensor, texts: Mapping[int, Tensor], suffix: str) -> dict[str, float]:
    """Return CLIP-I and CLIP-T under names with this suffix.

    `columns` are features [pictures, dim] by prompt. `texts` are features [1, dim] of the prompts that say something
    besides the concept, by their index.
    """
    scores = {f"clip_i{suffix}": clip_i(columns[0], real)}
    if texts:
        scores[f"clip_t{suffix}"] = fmean(clip_t(columns[place], text) for place, text in texts.items())
    return scores
