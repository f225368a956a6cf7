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
from textual_inversion.batch_invariance import choose_slots_per_pass
from textual_inversion.concept import Concept, LearnedEmbedding
from textual_inversion.config import InversionConfig
from textual_inversion.engine import Assignment, Engine, Outcome
from textual_inversion.families.base import Backbone
from textual_inversion.formats import dump_diffusers, parse_diffusers
from textual_inversion.latents import encode_views


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
