"""Contact sheets: pictures of several prompts with learned concepts, drawn and written with a list of their origin."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from PIL import Image

from pipeline.actor.library import LearnedConcept, Library
from pipeline.actor.publish import to_png
from pipeline.config import RunConfig
from pipeline.inputs.models import locate, model_hash
from pipeline.inputs.prompt_table import slug
from pipeline.store.addresses import absolute, read_bytes
from pipeline.store.redact import redacted
from pipeline.store.storage import RunStore
from textual_inversion.concept import LearnedEmbedding
from textual_inversion.config import SamplingConfig
from textual_inversion.families.base import Backbone
from textual_inversion.generate import ImageRequest
from textual_inversion.grids import grid
from textual_inversion.photos import open_photo

SHEET = "sheet.png"
"""Name of the labelled sheet of all rows."""

LIST = "pictures.json"
"""Name of the list of pictures with their prompts, seeds, model and concepts."""

_SHEET_COLUMNS = 12

DrawFunction = Callable[[Backbone, list[ImageRequest], SamplingConfig], list[Image.Image]]
"""Function that draws one picture for each request, such as `generate`."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class ContactSheet:
    """Prompts, each drawn from the same seeds, under a row of given pictures."""

    prompts: tuple[str, ...]
    concepts: tuple[tuple[LearnedConcept, ...], ...]
    """Concepts whose placeholder tokens stand in each prompt."""
    seeds: tuple[int, ...]
    """Seeds of each prompt's pictures."""
    title: str = "photos"
    """Label of the given pictures."""
    given: tuple[Image.Image, ...] = ()
    """Pictures shown in the first row, such as the concept's photos."""
    embeddings: dict[LearnedConcept, LearnedEmbedding] = field(default_factory=dict)
    """Embedding of every concept on the sheet."""
    negative_prompt: str = ""
    """Negative prompt of all pictures."""
    negative_concepts: tuple[LearnedConcept, ...] = ()
    """Concepts whose placeholder tokens stand in the negative prompt."""

    @classmethod
    def for_prompts(
        cls,
        library: Library,
        prompts: Sequence[str],
        seeds: Sequence[int],
        title: str = "photos",
        given: Sequence[Image.Image] = (),
        negative_prompt: str = "",
    ) -> ContactSheet:
        """Look up the concepts of the prompts and of the negative prompt, and read their embeddings.

        Raises ValueError for a prompt that names an unknown concept, and if no prompt has a learned concept although
        the library has some.
        """
        concepts = tuple(library.in_prompt(prompt) for prompt in prompts)
        if library.concepts and not any(concepts):
            words = ", ".join(concept.placeholder_token for concept in library.concepts[:8])
            raise ValueError(f"no prompt has a learned concept's placeholder token in it; write one of {words}")
        negative_concepts = library.in_prompt(negative_prompt)
        named = dict.fromkeys([*(concept for row in concepts for concept in row), *negative_concepts])
        return cls(
            prompts=tuple(prompts),
            concepts=concepts,
            seeds=tuple(seeds),
            title=title,
            given=tuple(given),
            embeddings={concept: concept.read() for concept in named},
            negative_prompt=negative_prompt,
            negative_concepts=negative_concepts,
        )

    def draw(self, backbone: Backbone, sampling: SamplingConfig, draw: DrawFunction) -> list[list[Image.Image]]:
        """Draw a row of pictures for each prompt."""
        away = tuple(self.embeddings[concept] for concept in self.negative_concepts)
        requests = [
            ImageRequest(
                prompt, seed, tuple(self.embeddings[concept] for concept in concepts), self.negative_prompt, away
            )
            for prompt, concepts in zip(self.prompts, self.concepts, strict=True)
            for seed in self.seeds
        ]
        pictures = draw(backbone, requests, sampling)
        width = len(self.seeds)
        return [pictures[start : start + width] for start in range(0, len(pictures), width)]

    def paths(self) -> list[list[str]]:
        """Return the path of each picture in rows, made of its prompt's number and words and its seed."""
        return [
            [f"{number:02d}-{slug(prompt)}-{seed}.png" for seed in self.seeds]
            for number, prompt in enumerate(self.prompts, 1)
        ]

    def grid(self, rows: Sequence[Sequence[Image.Image]], labels: Sequence[str] = ()) -> Image.Image:
        """Draw a grid of the first 12 given pictures and the first 12 of every row, under its prompt or its label."""
        shown = [list(row[:_SHEET_COLUMNS]) for row in rows]
        return grid(
            self.given[:_SHEET_COLUMNS], list(zip(labels or self.prompts, shown, strict=True)), title=self.title
        )


def read_concept_photos(concepts: Sequence[LearnedConcept], limit: int | None = None) -> list[Image.Image]:
    """Read the photos the concepts were learned from, at most `limit` of each. Raises ValueError naming a photo that
    cannot be read."""
    return [read_and_decode(uri, open_photo) for concept in concepts for uri in concept.images[:limit]]


def read_and_decode(uri: str, decode: Callable[[bytes], T]) -> T:
    """Read and decode an object. Raises ValueError naming it if either fails."""
    try:
        return decode(read_bytes(absolute(uri)))
    except (OSError, ValueError) as error:
        raise ValueError(f"{uri}: {error}") from error


def choose_model(embeddings: Sequence[LearnedEmbedding], config: RunConfig, asked_for: str | None) -> RunConfig:
    """Return the configuration with the model that the embeddings were learned on, unless another was asked for.

    Raises ValueError if the embeddings name several models or, as those of other tools, none, and if the model's files
    have changed since.
    """
    if asked_for or not embeddings:
        return config
    named = {embedding.metadata.get("model", "") for embedding in embeddings}
    if len(named) > 1 or "" in named:
        what = (
            f"were learned on several models ({', '.join(sorted(named))})" if "" not in named else "do not all name one"
        )
        raise ValueError(f"which model to draw with? The embeddings {what}; name one with --model")
    (model,) = named
    hashes = {embedding.metadata.get("model_hash", "") for embedding in embeddings}
    if hashes != {model_hash(model)}:
        raise ValueError(
            f"the concepts were learned on another state of model {model!r} than {locate(model)} has now; learn them "
            f"again, or draw with it nevertheless by --model {model}"
        )
    return dataclasses.replace(config, model=model)


def check_not_written(store: RunStore, sheet: ContactSheet) -> None:
    """Raise ValueError if any file that the sheet would write exists already."""
    existing = store.list()
    paths = [SHEET, LIST, *(path for row in sheet.paths() for path in row)]
    taken = [path for path in paths if path in existing]
    if taken:
        raise ValueError(
            f"{store.uri(taken[0])} is there already ({len(taken)} of {len(paths)} files); give another --output, or "
            "--overwrite"
        )


def write(
    store: RunStore,
    sheet: ContactSheet,
    rows: Sequence[Sequence[Image.Image]],
    sampling: SamplingConfig,
    model: str,
    labels: Sequence[str] = (),
    **facts: Any,
) -> None:
    """Write every picture, the sheet, and last the list of pictures with their origin and `facts`, without
    credentials. `sampling`: the settings that the pictures were drawn with."""
    for paths, row in zip(sheet.paths(), rows, strict=True):
        for path, picture in zip(paths, row, strict=True):
            store.put(path, to_png(picture))
    store.put(SHEET, to_png(sheet.grid(rows, labels)))
    description = {
        "model": model,
        "model_hash": model_hash(model),
        "sampling": dataclasses.asdict(sampling),
        "negative_prompt": sheet.negative_prompt,
        "concepts": {concept.placeholder_token: concept.uri for concept in sheet.embeddings},
        "pictures": [
            {"path": path, "prompt": prompt, "seed": seed}
            for prompt, paths in zip(sheet.prompts, sheet.paths(), strict=True)
            for path, seed in zip(paths, sheet.seeds, strict=True)
        ],
        **facts,
    }
    store.put(LIST, json.dumps(redacted(description), indent=1, ensure_ascii=False).encode())
