"""The actor of an evaluation: draws batches of (concept, prompt, setup) rows and scores their pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import pyarrow as pa
from PIL import Image, ImageOps
from torch import Tensor

from pipeline.actor.failures import logged_as_bug
from pipeline.bulk.drawer import Drawer
from pipeline.bulk.evaluation import RESULT_SCHEMA
from pipeline.config import RunConfig
from pipeline.inputs.models import locate
from pipeline.inputs.photos import fetch, fetch_as_planned
from pipeline.store.errors import InputChanged
from textual_inversion.errors import BadInput
from textual_inversion.extractors import ClipExtractor, ImageExtractor, load_extractor
from textual_inversion.fidelity import pixel_scores, pixel_scores_between_photos, to_arrays
from textual_inversion.metrics import (
    clip_i_between_photos,
    clip_i_per_picture,
    clip_t_per_picture,
    mean_and_standard_error,
    mirror_margin,
    mirror_margin_between_photos,
)
from textual_inversion.photos import open_photo

_CONCEPTS_CACHED = 16
"""Concepts whose photos' features and pixels are kept: 4 MB for five photos of 512 px."""
_REFERENCES_CACHED = 4096
"""Rows without an embedding whose features are kept, since several concepts share their pictures; some hundred
kilobytes for a row of 64 pictures."""

Features = dict[str, Tensor]
"""`clip` and `dino` -> the features of the same n pictures, [n, dim]; `pixels`, where they are compared -> the pictures
themselves, [n, height, width, 3] uint8; for photos, `mirrored` -> the `dino` features of their mirror images,
[n, dim]."""


class Scorer:
    """A diffusion model and the feature extractors on one device that draw and score batches of plan rows."""

    def __init__(self, config: RunConfig) -> None:
        self._sampling = config.generation.sampling
        self._limits = config.photos
        self._drawer = Drawer(config)
        self._clip = ClipExtractor(locate(config.extractor), config.device)
        self._extractors: dict[str, ImageExtractor] = {"clip": self._clip}
        if config.evaluation.dino:
            self._extractors["dino"] = load_extractor(locate(config.evaluation.dino), config.device)
        self._photos = lru_cache(_CONCEPTS_CACHED)(self._load_photos)
        self._references: dict[str, Features | str] = {}

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Draw and score PLAN_SCHEMA rows; return RESULT_SCHEMA rows in the same order.

        An error that is one row's own is in that row; what is raised is no row's fault.
        """
        rows = batch.to_pylist()
        features = self._draw(row for row in rows if row["drawn"])
        return pa.Table.from_pylist([self._score(row, features) for row in rows], RESULT_SCHEMA)

    def _draw(self, rows: Iterable[Mapping[str, Any]]) -> dict[str, Features | str]:
        """Draw the rows' pictures and return `_key` -> their features, or the error.

        Features of pictures without an embedding are kept for concepts to come.
        """
        wanted = {_key(row): row for row in rows}
        missing = {key: row for key, row in wanted.items() if key not in self._references}
        requests = [
            {"prompt": row["drawn"], "seed": seed, "embedding": row["embedding"]}
            for row in missing.values()
            for seed in row["seeds"]
        ]
        drawn = self._drawer.draw(requests, self._sampling)
        found = {
            key: self._features([next(drawn) for _ in row["seeds"]], keep_pixels=row["are_pixels_compared"])
            for key, row in missing.items()
        }
        found |= {key: self._references[key] for key in wanted if key in self._references}
        if len(self._references) > _REFERENCES_CACHED:
            self._references.clear()
        self._references |= {key: found[key] for key, row in missing.items() if not row["embedding"]}
        return found

    def _features(self, pictures: Sequence[Image.Image | str], *, keep_pixels: bool) -> Features | str:
        errors = [picture for picture in pictures if isinstance(picture, str)]
        if errors:
            return errors[0]
        good = [picture for picture in pictures if not isinstance(picture, str)]
        return self._describe(good, keep_pixels=keep_pixels)

    def _describe(self, pictures: list[Image.Image], *, keep_pixels: bool) -> Features:
        features = {name: extractor.images(pictures) for name, extractor in self._extractors.items()}
        if keep_pixels:
            side_px = self._drawer.resolution
            features["pixels"] = to_arrays(pictures, (side_px, side_px))
        return features

    def _load_photos(self, images: tuple[str, ...], hashes: tuple[str, ...]) -> Features:
        """Return features and pixels of one concept's photos.

        `hashes` are those of the concept's record, one for each photo, or none for a record of an earlier release.
        Raises BadInput naming a photo that cannot be read, or that is not the one the concept was learned from.
        """
        photos = []
        for uri, known in zip(images, hashes or ("",) * len(images), strict=True):
            try:
                data = fetch_as_planned(uri, self._limits, known) if known else fetch(uri, self._limits)
                photos.append(open_photo(data, max_pixels=self._limits.max_pixels))
            except InputChanged:
                raise BadInput(
                    f"photo {uri} is not the one that the concept was learned from; run pipeline.run again, then this"
                ) from None
            except (BadInput, OSError) as error:
                raise BadInput(f"photo {uri}: {error}") from error
        features = self._describe(photos, keep_pixels=True)
        if "dino" in self._extractors:
            features["mirrored"] = self._extractors["dino"].images([ImageOps.mirror(photo) for photo in photos])
        return features

    def _score(self, row: Mapping[str, Any], drawn: Mapping[str, Features | str]) -> dict[str, Any]:
        """Return the row with its scores, or with the error of its photos or pictures."""
        known = {name: row[name] for name in RESULT_SCHEMA.names if name in row}
        try:
            photos = self._photos(tuple(row["images"]), tuple(row["image_hashes"]))
            pictures = drawn[_key(row)] if row["drawn"] else photos
            if isinstance(pictures, str):
                return known | {"status": "failed", "error": pictures}
            return known | self._scores(row, photos, pictures) | {"status": "ok"}
        except BadInput as error:
            return known | {"status": "failed", "error": str(error)}
        except Exception as error:
            return known | {"status": "failed", "error": logged_as_bug(error)}

    def _scores(self, row: Mapping[str, Any], photos: Features, pictures: Features) -> dict[str, float | None]:
        """Return the row's scores and their standard errors, by column."""

        def likeness(name: str) -> Tensor:
            return (
                clip_i_per_picture(pictures[name], photos[name])
                if row["drawn"]
                else clip_i_between_photos(photos[name])
            )

        values = {"clip_i": likeness("clip")}
        if "dino" in pictures:
            values["dino"] = likeness("dino")
            values["mirror_margin"] = (
                mirror_margin(pictures["dino"], photos["dino"], photos["mirrored"])
                if row["drawn"]
                else mirror_margin_between_photos(photos["dino"], photos["mirrored"])
            )
        if row["text"]:
            values["clip_t"] = clip_t_per_picture(pictures["clip"], self._clip.texts([row["text"]]))
        if row["are_pixels_compared"]:
            values |= (
                pixel_scores(pictures["pixels"], photos["pixels"])
                if row["drawn"]
                else pixel_scores_between_photos(photos["pixels"])
            )
        scores: dict[str, float | None] = {}
        for name, of_pictures in values.items():
            scores[name], scores[f"{name}_se"] = mean_and_standard_error(of_pictures)
        return scores


def _key(row: Mapping[str, Any]) -> str:
    """Return a key of all that a row's pictures depend on."""
    return f"{row['embedding']}\x1f{row['drawn']}\x1f{row['seeds']}"
