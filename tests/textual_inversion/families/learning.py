"""Learning of a few concepts with a backbone, shared by the tests of families."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from textual_inversion.adapter_formats import dump_adapter, with_adapter
from textual_inversion.batch_invariance import choose_sampling, choose_slots_per_pass
from textual_inversion.concept import Concept, LearnedEmbedding
from textual_inversion.config import AdapterConfig, InversionConfig, SamplingConfig
from textual_inversion.engine import Assignment, Engine, Outcome
from textual_inversion.families import load_vocabularies
from textual_inversion.families.base import Backbone
from textual_inversion.formats import dump_diffusers, parse_diffusers
from textual_inversion.generate import ImageRequest, generate
from textual_inversion.latents import encode_views
from textual_inversion.slot_state import SlotState


def edit(path: Path, **changes: Any) -> None:
    """Change entries of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def some_rows(backbone: Backbone, num_rows: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {key: torch.randn(num_rows, table.dim, generator=generator) for key, table in backbone.token_tables.items()}


def photo(seed: int, width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def concept(number: int, num_vectors: int = 1) -> Concept:
    return Concept(concept_id=f"c{number}", placeholder_token=f"<c{number}>", images=("x",), initializer="red cat",
                   num_vectors=num_vectors)  # fmt: skip


def config(steps: int = 4, **changes: Any) -> InversionConfig:
    return InversionConfig(steps=steps, batch_size=2, learning_rate=0.05, **changes)


def assignment(backbone: Backbone, concept: Concept, config: InversionConfig, **state: Any) -> Assignment:
    """Make an assignment of a photo that is wider than high, except for concept 0, whose photo is a square."""
    number, side = int(concept.concept_id[1:]), backbone.resolution
    pictures = [photo(number, side + 7 * number, side)]
    return Assignment(concept, encode_views(backbone, pictures, config.augment, "c", 0), **state)


def run(backbone: Backbone, config: InversionConfig, *assignments: Assignment, **options: Any) -> dict[str, Outcome]:
    """Learn concepts in one engine of three slots, without failures."""
    work: Iterator[Assignment] = iter(assignments)
    outcomes: dict[str, Outcome] = {}
    slots_per_pass, _ = choose_slots_per_pass(backbone, config, slots=3)
    engine = Engine(backbone, config, slots=3, seed=1, slots_per_pass=slots_per_pass)
    engine.run(lambda _: next(work, None), lambda o: outcomes.update({o.concept.concept_id: o}), **options)
    assert [outcome.error for outcome in outcomes.values()] == [None] * len(assignments)
    return outcomes


def learn(backbone: Backbone, config: InversionConfig, *concepts: Concept, **options: Any) -> dict[str, Outcome]:
    return run(backbone, config, *(assignment(backbone, each, config) for each in concepts), **options)


def embedding_of(outcome: Outcome) -> LearnedEmbedding:
    assert outcome.embedding is not None
    return outcome.embedding


def through_files(embedding: LearnedEmbedding) -> LearnedEmbedding:
    """Write an embedding with its adapter, and read both."""
    files = {"adapter.safetensors": dump_adapter(embedding)}
    return with_adapter(parse_diffusers(dump_diffusers(embedding)), files.__getitem__)


def assert_equal(ours: LearnedEmbedding, theirs: LearnedEmbedding) -> None:
    """Compare rows and adapters to the bit."""
    assert ours.vectors.keys() == theirs.vectors.keys()
    for key, rows in ours.vectors.items():
        assert torch.equal(rows, theirs.vectors[key])
    assert (ours.adapter is None) == (theirs.adapter is None)
    if ours.adapter and theirs.adapter:
        assert ours.adapter.tensors.keys() == theirs.adapter.tensors.keys()
        for name, (down, up) in ours.adapter.tensors.items():
            assert torch.equal(down, theirs.adapter.tensors[name][0])
            assert torch.equal(up, theirs.adapter.tensors[name][1])


def learned_alone_as_together(
    backbone: Backbone, config: InversionConfig, *concepts: Concept
) -> list[LearnedEmbedding]:
    """Learn concepts together and each alone, compare the results to the bit, and return them."""
    together = learn(backbone, config, *concepts)
    alone = [embedding_of(learn(backbone, config, each)[each.concept_id]) for each in concepts]
    for each, ours in zip(concepts, alone, strict=True):
        assert_equal(ours, embedding_of(together[each.concept_id]))
    return alone


def assert_resumes(backbone: Backbone, config: InversionConfig, concept: Concept) -> None:
    """Learn a concept in one go and from a checkpoint after half of the steps, and compare the results to the bit."""
    half, name = config.steps // 2, concept.concept_id
    saved: dict[int, SlotState] = {}
    whole = learn(backbone, config, concept, on_checkpoint=lambda _, state: saved.update({state.step: state}),
                  checkpoint_steps=half)  # fmt: skip
    resumed = run(backbone, config, assignment(backbone, concept, config, state=saved[half]))
    assert_equal(embedding_of(whole[name]), embedding_of(resumed[name]))


def assert_pictures_depend_on_no_company_and_survive_files(backbone: Backbone, adapter: AdapterConfig) -> None:
    """Draw two concepts together, and each alone after it went through its files, and compare the pictures' bytes."""
    outcomes = learn(backbone, config(adapter=adapter), concept(0), concept(1, 2))
    embeddings = [embedding_of(outcome) for _, outcome in sorted(outcomes.items())]
    read = [through_files(embedding) for embedding in embeddings]
    for pair in zip(embeddings, read, strict=True):
        assert_equal(*pair)
    sampling, _ = choose_sampling(backbone, SamplingConfig(steps=2, batch_size=4), adapter)
    asked = [
        [ImageRequest("a photo of a <c0>", 0, (first,)), ImageRequest("a <c1> and a <c0>", 1, (first, second))]
        for first, second in (embeddings, read)
    ]
    together = [picture.tobytes() for picture in generate(backbone, asked[0], sampling)]
    assert together == [generate(backbone, [each], sampling)[0].tobytes() for each in asked[1]]


def assert_vocabularies_alone_are_the_models(backbone: Backbone, model: Path) -> None:
    """Compare the vocabularies that are read without torch with a backbone's."""
    alone = load_vocabularies(str(model))
    assert list(alone) == list(backbone.token_tables)
    for key, vocabulary in alone.items():
        ids = vocabulary.tokenize("A close-up photo of my red statue")
        assert ids == backbone.vocabularies[key].tokenize("A close-up photo of my red statue")
        assert vocabulary.assemble(ids) == backbone.vocabularies[key].assemble(ids)
        assert vocabulary.size == backbone.vocabularies[key].size


def golden_losses(backbone: Backbone, number: int = 0) -> list[float]:
    """Return the losses of ten steps of a concept with two vectors."""
    curve = learn(backbone, config(10), concept(number, 2))[f"c{number}"].curve
    return [round(loss, 5) for loss in curve[:, 1].tolist()]
