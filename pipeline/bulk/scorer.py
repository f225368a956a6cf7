"""An actor of the evaluation: draws a batch of (concept, prompt, setup) rows and scores their pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import pyarrow as pa
from PIL import Image
from torch import Tensor

from pipeline.bulk.evaluation import RESULT_SCHEMA
from pipeline.bulk.generate import Drawer
from pipeline.config import RunConfig
from pipeline.inputs.models import locate
from pipeline.inputs.photos import fetch
from textual_inversion.extractors import ClipExtractor, ImageExtractor, load_extractor
from textual_inversion.metrics import (
    clip_i_between_photos,
    clip_i_per_picture,
    clip_t_per_picture,
    mean_and_standard_error,
)
from textual_inversion.photos import open_photo

_CONCEPTS_KEPT = 64
_REFERENCES_KEPT = 4096
"""Features of pictures that several concepts share; some hundred kilobytes for each row of 64 pictures."""

Features = dict[str, Tensor]
"""`clip` and `dino` -> [n, dim] of the same pictures."""


class Scorer:
    """A model and its judges on one device; called with a batch of plan rows, returns as many scored rows."""

    def __init__(self, config: RunConfig) -> None:
        self._sampling, self._limits = config.generation.sampling, config.photos
        self._drawer = Drawer(config)
        self._clip = ClipExtractor(locate(config.extractor), config.device)
        self._judges: dict[str, ImageExtractor] = {"clip": self._clip}
        if config.evaluation.dino:
            self._judges["dino"] = load_extractor(locate(config.evaluation.dino), config.device)
        self._photos = lru_cache(_CONCEPTS_KEPT)(self._load_photos)
        self._references: dict[str, Features | str] = {}

    def __call__(self, batch: pa.Table) -> pa.Table:
        """PLAN_SCHEMA rows -> RESULT_SCHEMA rows, in order. Raises only for what no row can be blamed for."""
        rows = batch.to_pylist()
        pictures = self._draw(row for row in rows if row["drawn"])
        return pa.Table.from_pylist([self._finish(row, pictures) for row in rows], RESULT_SCHEMA)

    def _draw(self, rows: Iterable[Mapping[str, Any]]) -> dict[str, Features | str]:
        """Key of what is drawn -> the pictures' features, or what is wrong with it. Pictures without an embedding are
        kept for the concepts to come."""
        wanted = {_key(row): row for row in rows}
        missing = {key: row for key, row in wanted.items() if key not in self._references}
        requests = [
            {"prompt": row["drawn"], "seed": seed, "embedding": row["embedding"]}
            for row in missing.values()
            for seed in row["seeds"]
        ]
        drawn = self._drawer.draw(requests, self._sampling)
        found = {key: self._describe([next(drawn) for _ in row["seeds"]]) for key, row in missing.items()}
        found |= {key: self._references[key] for key in wanted if key in self._references}
        if len(self._references) > _REFERENCES_KEPT:
            self._references.clear()
        self._references |= {key: found[key] for key, row in missing.items() if not row["embedding"]}
        return found

    def _describe(self, pictures: list[Image.Image | str]) -> Features | str:
        errors = [picture for picture in pictures if isinstance(picture, str)]
        if errors:
            return errors[0]
        good = [picture for picture in pictures if not isinstance(picture, str)]
        return {name: judge.images(good) for name, judge in self._judges.items()}

    def _load_photos(self, images: tuple[str, ...]) -> Features:
        """Of one concept's photos."""
        photos = []
        for uri in images:
            try:
                photos.append(open_photo(fetch(uri, self._limits), max_pixels=self._limits.max_pixels))
            except (ValueError, OSError) as error:
                raise ValueError(f"photo {uri}: {error}") from error
        return {name: judge.images(photos) for name, judge in self._judges.items()}

    def _finish(self, row: Mapping[str, Any], pictures: Mapping[str, Features | str]) -> dict[str, Any]:
        known = {name: row[name] for name in RESULT_SCHEMA.names if name in row}
        try:
            photos = self._photos(tuple(row["images"]))
        except ValueError as error:
            return known | {"status": "failed", "error": str(error)}
        seen = pictures[_key(row)] if row["drawn"] else photos
        if isinstance(seen, str):
            return known | {"status": "failed", "error": seen}
        each = {
            "clip_i": clip_i_per_picture(seen["clip"], photos["clip"])
            if row["drawn"]
            else clip_i_between_photos(photos["clip"]),
        }
        if "dino" in seen:
            each["dino"] = (
                clip_i_per_picture(seen["dino"], photos["dino"])
                if row["drawn"]
                else clip_i_between_photos(photos["dino"])
            )
        if row["text"]:
            each["clip_t"] = clip_t_per_picture(seen["clip"], self._clip.texts([row["text"]]))
        scores: dict[str, float | None] = {}
        for name, values in each.items():
            scores[name], scores[f"{name}_se"] = mean_and_standard_error(values)
        return known | scores | {"status": "ok"}


def _key(row: Mapping[str, Any]) -> str:
    """Of what a row's pictures depend on."""
    return f"{row['embedding']}\x1f{row['drawn']}\x1f{row['seeds']}"
