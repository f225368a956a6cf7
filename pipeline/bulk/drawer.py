"""Draw bulk pictures from plan rows.

It writes every picture itself, under a key made of all that the picture depends on, so that drawing it again overwrites
the same bytes. A row that cannot be drawn becomes a metadata row with the error; the other rows of its block are drawn.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import pyarrow as pa
from PIL import Image

from pipeline.actor.failures import logged_as_bug
from pipeline.actor.library import read_result
from pipeline.actor.memory_plan import fit_drawing
from pipeline.actor.model_loading import LoadedModel
from pipeline.actor.publish import to_png
from pipeline.actor.tuning import compile_where_wanted, drawing_passes
from pipeline.bulk.negatives import NegativeConcepts
from pipeline.bulk.picture_rows import RESULT_SCHEMA, picture_path
from pipeline.config import RunConfig
from pipeline.store.storage import RunStore
from textual_inversion.batch_invariance import choose_sampling
from textual_inversion.concept import LearnedEmbedding
from textual_inversion.config import SamplingConfig
from textual_inversion.errors import BadInput
from textual_inversion.generate import (
    EncodedRequest,
    ImageRequest,
    check_guided,
    compares_prompts,
    draw,
    encode_request,
)
from textual_inversion.prompt_encoder import PromptEncoder
from textual_inversion.prompts import without_placeholder, words_in

_STORE_THREADS = 8
_EMBEDDINGS_KEPT = 256


@dataclass(frozen=True, slots=True)
class _Job:
    """A row as the model takes it."""

    request: EncodedRequest
    sampling: SamplingConfig
    size_px: tuple[int, int] | None
    """Width and height of its picture; None for the model's own."""


class Drawer:
    """One model on one device that draws batches of plan rows."""

    def __init__(self, config: RunConfig, model: LoadedModel | None = None) -> None:
        """Get ready to draw. `model` is the run's, with which nothing is learned meanwhile; None loads it."""
        self._config = config
        self._store = RunStore(config.output)
        model = LoadedModel(config) if model is None else model
        self._backbone = model.backbone
        fit_drawing(model.estimates, config, config.generation.sampling)
        passes = drawing_passes(self._backbone, config.generation.sampling, config.inversion.adapter)
        compile_where_wanted(self._backbone, config, passes)
        self._encoder = lru_cache(partial(PromptEncoder, self._backbone))
        self._batch_size = lru_cache(self._choose_batch_size)
        self._negatives = NegativeConcepts(config)
        self._embedding = lru_cache(_EMBEDDINGS_KEPT)(self._load)
        self._pool = ThreadPoolExecutor(_STORE_THREADS)

    @property
    def resolution(self) -> int:
        """Side of the square pictures in px."""
        return self._backbone.resolution

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Draw PLAN_SCHEMA rows and store the pictures; return RESULT_SCHEMA rows in the same order.

        An error that is one row's own is in that row; what is raised is no row's fault.
        """
        rows = batch.to_pylist()
        pictures = self.draw(rows, self._config.generation.sampling)
        # Each picture goes to the pool as it is drawn, so that the next are drawn while it is encoded and stored.
        pending = [self._pool.submit(self._finish, row, picture) for row, picture in zip(rows, pictures, strict=True)]
        return pa.Table.from_pylist([future.result() for future in pending], RESULT_SCHEMA)

    def draw(self, rows: Sequence[Mapping[str, Any]], sampling: SamplingConfig) -> Iterator[Image.Image | str]:
        """Yield for each row its picture, or the error that keeps it from being drawn.

        A row has a `prompt`, a `seed`, an `embedding` (a path in the run's output, or none) and any of PLAN_SCHEMA's
        settings of its own. Rows with equal settings share batches; a batch is drawn when its first picture is asked
        for.
        """
        paths = dict.fromkeys(row["embedding"] for row in rows if row["embedding"])
        # Several at a time, because a call waits for the store.
        embeddings = dict(zip(paths, self._pool.map(self._embedding_or_error, paths), strict=True))
        checked = [self._check(row, embeddings.get(row["embedding"]), sampling) for row in rows]
        return self._pictures(checked)

    def _pictures(self, jobs: Sequence[_Job | str]) -> Iterator[Image.Image | str]:
        waiting: dict[tuple[SamplingConfig, tuple[int, int] | None], list[int]] = {}
        for index, job in enumerate(jobs):
            if not isinstance(job, str):
                waiting.setdefault((job.sampling, job.size_px), []).append(index)
        drawn: dict[int, Image.Image] = {}
        for index, job in enumerate(jobs):
            if isinstance(job, str):
                yield job
                continue
            if index not in drawn:
                batch_size = self._batch_size(self._kind_of_pass(job.sampling), job.size_px)
                sampling = replace(job.sampling, batch_size=batch_size)
                alike = waiting[job.sampling, job.size_px]
                batch = alike[:batch_size]
                del alike[:batch_size]
                requests = [each.request for each in (jobs[i] for i in batch) if not isinstance(each, str)]
                encoder = self._encoder(shares_passes=sampling.batch_size > 1)
                drawn |= zip(batch, draw(encoder, requests, sampling), strict=True)
            yield drawn.pop(index)

    def _kind_of_pass(self, sampling: SamplingConfig) -> SamplingConfig:
        """Return settings that are equal for all that draw with passes of one shape."""
        return replace(sampling, steps=1, guidance_scale=2.0 if compares_prompts(self._backbone, sampling) else 1.0)

    def _choose_batch_size(self, sampling: SamplingConfig, size_px: tuple[int, int] | None) -> int:
        """Return a batch size with which, on a CPU, a picture does not depend on its batch; a batch of larger pictures
        has no more pixels than one of the model's own."""
        if size_px:
            share = min(1.0, self._backbone.resolution**2 / math.prod(size_px))
            sampling = replace(sampling, batch_size=max(1, int(sampling.batch_size * share)))
        return choose_sampling(self._backbone, sampling, self._config.inversion.adapter, size_px)[0].batch_size

    def _load(self, path: str) -> LearnedEmbedding:
        embedding = read_result(self._store, path)
        learned_with = embedding.metadata.get("model_hash", self._backbone.model_hash())
        if learned_with != self._backbone.model_hash():
            raise ValueError(
                f"it was learned with the model {learned_with}, but this worker has loaded "
                f"{self._backbone.model_hash()}; give all machines the same model"
            )
        return embedding

    def _embedding_or_error(self, path: str) -> LearnedEmbedding | str:
        try:
            return self._embedding(path)
        except (ValueError, OSError) as error:  # of a file that is no embedding, is another model's, or is not there
            return f"{type(error).__name__}: {error}"
        except Exception as error:
            return logged_as_bug(error)

    def _check(
        self, row: Mapping[str, Any], embedding: LearnedEmbedding | str | None, sampling: SamplingConfig
    ) -> _Job | str:
        """Return the row as the model takes it, or the error of its embedding, prompt or settings."""
        if isinstance(embedding, str):
            return embedding
        try:
            own = {name: row[name] for name in ("guidance_scale", "steps") if row.get(name)}
            sampling = replace(sampling, **own)
            request = self._request(row, (embedding,) if embedding else ())
            check_guided(self._backbone, request, sampling)
            return _Job(encode_request(self._backbone, request), sampling, request.size_px)
        except BadInput as error:
            return str(error)
        except Exception as error:
            return logged_as_bug(error)

    def _request(self, row: Mapping[str, Any], own: tuple[LearnedEmbedding, ...]) -> ImageRequest:
        """Return a row's request with the embeddings of its concept and of its negative prompt's.

        Raises BadInput if those of the negative prompt cannot be read, or are others than were planned.
        """
        negative = row.get("negative_prompt") or ""
        named = [each for each in own if words_in(negative, [each.placeholder_token])]
        others = negative
        for each in own:
            others = without_placeholder(others, each.placeholder_token)
        try:
            if self._negatives.digest_of(others) != (row.get("negative_digest") or ""):
                raise BadInput(f"negative prompt {negative!r}: its concepts changed meanwhile; run again")
            size_px = (row["width"], row["height"]) if row.get("width") else None
            return ImageRequest(
                row["prompt"],
                row["seed"],
                own,
                negative,
                (*named, *self._negatives.named_in(others)),
                None if size_px == (self._backbone.resolution,) * 2 else size_px,
            )
        except (ValueError, OSError) as error:
            raise BadInput(f"{type(error).__name__}: {error}") from error

    def _finish(self, row: Mapping[str, Any], picture: Image.Image | str) -> dict[str, Any]:
        """Store the picture and return its metadata row."""
        known = {name: row[name] for name in RESULT_SCHEMA.names if name in row}
        if isinstance(picture, str):
            return known | {"status": "failed", "error": picture}
        try:
            return known | self._stored(row, picture)
        except OSError as error:
            return known | {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        except Exception as error:
            return known | {"status": "failed", "error": logged_as_bug(error)}

    def _stored(self, row: Mapping[str, Any], picture: Image.Image) -> dict[str, Any]:
        """Store the picture, unless it is packed into its row, and return what the row says of it."""
        data = to_png(picture)
        facts = {"status": "ok", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        if self._config.generation.packed:
            return facts | {"png": data}
        path = picture_path(row)
        self._store.put(path, data)
        return facts | {"path": path}
