"""A page of pictures drawn with learned concepts: what is on it, drawing it, and writing it down."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from PIL import Image

from pipeline.actor.library import LearnedConcept, Library
from pipeline.actor.publish import to_png
from pipeline.config import RunConfig
from pipeline.inputs.models import locate, model_hash
from pipeline.store.addresses import absolute, read_bytes
from pipeline.store.storage import RunStore
from textual_inversion.concept import LearnedEmbedding
from textual_inversion.config import SamplingConfig
from textual_inversion.families.base import Backbone
from textual_inversion.generate import ImageRequest
from textual_inversion.grids import grid
from textual_inversion.photos import open_photo

SHEET, LIST = "sheet.png", "pictures.json"
_SHEET_COLUMNS = 12

Paint = Callable[[Backbone, list[ImageRequest], SamplingConfig], list[Image.Image]]
"""Requests -> as many pictures: `generate`, or something that takes as much."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class ContactSheet:
    """Prompts, each drawn from the same seeds, under a row of given pictures."""

    prompts: tuple[str, ...]
    concepts: tuple[tuple[LearnedConcept, ...], ...]
    """Those whose placeholder tokens stand in each prompt."""
    seeds: tuple[int, ...]
    title: str = "photos"
    given: tuple[Image.Image, ...] = ()
    embeddings: dict[LearnedConcept, LearnedEmbedding] = field(default_factory=dict)
    """Of every concept on the page."""

    @classmethod
    def of(
        cls, library: Library, prompts: Sequence[str], seeds: Sequence[int], title: str = "photos",
        given: Sequence[Image.Image] = (),
    ) -> ContactSheet:  # fmt: skip
        """Raises ValueError for a prompt that names an unknown concept, and if there are learned concepts but no
        prompt has one."""
        concepts = tuple(library.in_prompt(prompt) for prompt in prompts)
        if library.concepts and not any(concepts):
            words = ", ".join(concept.placeholder_token for concept in library.concepts[:8])
            raise ValueError(f"no prompt has a learned concept's placeholder token in it; write one of {words}")
        return cls(
            prompts=tuple(prompts),
            concepts=concepts,
            seeds=tuple(seeds),
            title=title,
            given=tuple(given),
            embeddings={concept: concept.read() for concept in dict.fromkeys(c for row in concepts for c in row)},
        )

    def draw(self, backbone: Backbone, sampling: SamplingConfig, paint: Paint) -> list[list[Image.Image]]:
        """A row of pictures for each prompt."""
        requests = [
            ImageRequest(prompt, seed, tuple(self.embeddings[concept] for concept in concepts))
            for prompt, concepts in zip(self.prompts, self.concepts, strict=True)
            for seed in self.seeds
        ]
        pictures, width = paint(backbone, requests, sampling), len(self.seeds)
        return [pictures[start : start + width] for start in range(0, len(pictures), width)]

    def paths(self) -> list[list[str]]:
        """Where each picture goes: its prompt's number and words, and its seed."""
        return [
            [f"{number:02d}-{_slug(prompt)}-{seed}.png" for seed in self.seeds]
            for number, prompt in enumerate(self.prompts, 1)
        ]

    def sheet(self, rows: Sequence[Sequence[Image.Image]], labels: Sequence[str] = ()) -> Image.Image:
        """The first dozen of the given pictures and of every row, under its prompt or another label."""
        shown = [list(row[:_SHEET_COLUMNS]) for row in rows]
        return grid(
            self.given[:_SHEET_COLUMNS], list(zip(labels or self.prompts, shown, strict=True)), title=self.title
        )


def own_photos(concepts: Sequence[LearnedConcept], most: int | None = None) -> list[Image.Image]:
    """The photos the concepts were learned from, all or so many of each; ValueError naming one that cannot be had."""
    return [opened(uri, open_photo) for concept in concepts for uri in concept.images[:most]]


def opened(uri: str, decode: Callable[[bytes], T]) -> T:
    """An object, read and decoded; ValueError naming it if either fails."""
    try:
        return decode(read_bytes(absolute(uri)))
    except (OSError, ValueError) as error:
        raise ValueError(f"{uri}: {error}") from error


def choose_model(embeddings: Sequence[LearnedEmbedding], config: RunConfig, asked_for: str | None) -> RunConfig:
    """With the model that the embeddings were learned on, unless another was asked for.

    Raises ValueError if they name several, if it is not what it was, or if embeddings of other tools name none.
    """
    if asked_for or not embeddings:
        return config
    named = {embedding.metadata.get("model", "") for embedding in embeddings}
    if len(named) > 1 or "" in named:
        say = f"were learned on several models ({', '.join(sorted(named))})" if "" not in named else "do not all say it"
        raise ValueError(f"which model to draw with? The embeddings {say}; name one with --model")
    (model,) = named
    hashes = {embedding.metadata.get("model_hash", "") for embedding in embeddings}
    if hashes != {model_hash(model)}:
        raise ValueError(
            f"the concepts were learned on another state of model {model!r} than {locate(model)} has now; learn them "
            f"again, or draw all the same with --model {model}"
        )
    return dataclasses.replace(config, model=model)


def check_free(store: RunStore, page: ContactSheet) -> None:
    """Raises ValueError if anything the page would write is there already."""
    there = store.list()
    paths = [SHEET, LIST, *(path for row in page.paths() for path in row)]
    taken = [path for path in paths if path in there]
    if taken:
        raise ValueError(
            f"{store.uri(taken[0])} is there already ({len(taken)} of {len(paths)} files); give another --output, or "
            "--overwrite"
        )


def write(
    store: RunStore, page: ContactSheet, rows: Sequence[Sequence[Image.Image]], config: RunConfig,
    labels: Sequence[str] = (), **facts: Any,
) -> None:  # fmt: skip
    """Every picture, the sheet, and last the list of what was drawn with what; further facts go into the list."""
    for paths, row in zip(page.paths(), rows, strict=True):
        for path, picture in zip(paths, row, strict=True):
            store.put(path, to_png(picture))
    store.put(SHEET, to_png(page.sheet(rows, labels)))
    description = {
        "model": config.model,
        "model_hash": model_hash(config.model),
        "sampling": dataclasses.asdict(config.generation.sampling),
        "concepts": {concept.placeholder_token: concept.uri for concept in page.embeddings},
        "pictures": [
            {"path": path, "prompt": prompt, "seed": seed}
            for prompt, paths in zip(page.prompts, page.paths(), strict=True)
            for path, seed in zip(paths, page.seeds, strict=True)
        ],
        **facts,
    }
    store.put(LIST, json.dumps(description, indent=1, ensure_ascii=False).encode())


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:48]
