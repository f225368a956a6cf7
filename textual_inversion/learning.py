"""Learn concepts from pictures in memory, without Ray and without a store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from PIL import Image

from textual_inversion.batch_invariance import choose_slots_per_pass
from textual_inversion.concept import Concept, LearnedEmbedding
from textual_inversion.config import InversionConfig
from textual_inversion.engine import Assignment, Engine, OnStep, Outcome
from textual_inversion.families.base import Backbone
from textual_inversion.latents import encode_views
from textual_inversion.slots import Preview
from textual_inversion.start_choice import StartChooser

if TYPE_CHECKING:
    from textual_inversion.encoder_file import TrainedEncoder
    from textual_inversion.extractors import ClipExtractor

OnPreview = Callable[[Concept, int, LearnedEmbedding], None]


def learn(
    backbone: Backbone,
    concepts: Sequence[tuple[Concept, Sequence[Image.Image]]],
    config: InversionConfig,
    *,
    slots: int = 4,
    seed: int = 0,
    extractor: ClipExtractor | None = None,
    encoder: TrainedEncoder | None = None,
) -> list[LearnedEmbedding]:
    """Learn the embedding of every (concept, its pictures), and return the embeddings in the same order.

    `slots` and `seed` are those of `Engine`. `extractor` is the feature extractor of `StartChooser` and of
    `penalties.clip`, `encoder` the encoder of `StartChooser`. Raises ValueError naming the first concept that failed.
    """
    outcomes = learn_outcomes(backbone, concepts, config, slots=slots, seed=seed, extractor=extractor, encoder=encoder)
    return [outcome.embedding for outcome in outcomes if outcome.embedding]


def learn_outcomes(
    backbone: Backbone,
    concepts: Sequence[tuple[Concept, Sequence[Image.Image]]],
    config: InversionConfig,
    *,
    slots: int,
    seed: int,
    extractor: ClipExtractor | None,
    masks: Mapping[str, Sequence[Image.Image]] | None = None,
    encoder: TrainedEncoder | None = None,
    on_step: OnStep | None = None,
    on_preview: OnPreview | None = None,
    preview_steps: int = 50,
) -> list[Outcome]:
    """Do what `learn` does, and return the whole outcome of each concept.

    masks: concept id -> the masks of its pictures (`encode_views`), for concepts that have some.
    on_step: see `Engine.run`.
    on_preview: called every `preview_steps` of a concept's steps with the concept, its step and its embedding.
    """
    outcomes: dict[str, Outcome] = {}
    waiting = iter(concepts)
    choose_start = StartChooser(backbone, config.init, extractor, seed=seed, encoder=encoder)

    def next_assignment(_wait: bool) -> Assignment | None:
        for concept, pictures in waiting:
            start = choose_start(concept, pictures)
            shapes = (masks or {}).get(concept.concept_id, ())
            views = encode_views(backbone, pictures, config.augment, concept.concept_id, seed, shapes)
            return Assignment(start.concept, views, start=start.embedding, steps=start.steps)
        return None

    def on_outcome(outcome: Outcome) -> None:
        if outcome.embedding is None:
            raise ValueError(f"concept {outcome.concept.concept_id!r}: {outcome.error}")
        outcomes[outcome.concept.concept_id] = outcome

    features = extractor.pixel_features if extractor else None
    slots = min(slots, len(concepts)) or 1
    slots_per_pass, _ = choose_slots_per_pass(backbone, config, slots, features)
    engine = Engine(backbone, config, slots=slots, seed=seed, slots_per_pass=slots_per_pass, image_features=features)

    def on_engine_preview(previews: Sequence[Preview]) -> None:
        for concept, step, embedding in previews:
            if on_preview and step:
                on_preview(concept, step, embedding)

    engine.run(
        next_assignment,
        on_outcome,
        on_step=on_step,
        on_preview=on_engine_preview if on_preview else None,
        preview_steps=preview_steps,
    )
    return [outcomes[concept.concept_id] for concept, _ in concepts]
