"""The bulk stage on Ray Data: (concept, prompt, seed) rows of a Parquet plan -> pictures, and a metadata row for each.

The actors write every picture themselves, under a key made of all that the picture depends on, so that drawing it again
overwrites the same bytes. The metadata rows are the record of what is done: rows that say `ok` are left out of the next
plan. A row that cannot be drawn becomes a metadata row with the error; the other rows of its block are drawn.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

import pyarrow as pa
from PIL import Image

from pipeline.actor.failures import logged_as_bug
from pipeline.actor.library import read_result
from pipeline.actor.memory_plan import fit_drawing
from pipeline.actor.model_loading import load_model
from pipeline.actor.publish import to_png
from pipeline.actor.tuning import compile_where_wanted, drawing_passes
from pipeline.bulk.rows import done_row_ids, first_errors, plan_missing, row_id
from pipeline.bulk.stage import Stage, run_stage
from pipeline.config import RunConfig
from pipeline.inputs.prompt_table import Prompt
from pipeline.ledger.records import ConceptRecord
from pipeline.store.storage import RunStore
from pipeline.times import interrupting
from textual_inversion.batch_invariance import choose_sampling
from textual_inversion.concept import LearnedEmbedding
from textual_inversion.config import SamplingConfig
from textual_inversion.errors import BadInput
from textual_inversion.generate import EncodedRequest, ImageRequest, draw, encode_request
from textual_inversion.prompt_encoder import PromptEncoder
from textual_inversion.rng import seed_for

PLAN = "images/plan"
METADATA = "images/metadata"

PLAN_SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("concept_id", pa.string()),
        ("fingerprint", pa.string()),
        ("embedding", pa.string()),
        ("prompt", pa.string()),
        ("seed", pa.int64()),
    ]
)
RESULT_SCHEMA = pa.schema(
    [
        *(field for field in PLAN_SCHEMA if field.name != "embedding"),
        pa.field("status", pa.string()),
        pa.field("error", pa.string()),
        pa.field("path", pa.string()),
        pa.field("bytes", pa.int64()),
        pa.field("sha256", pa.string()),
        pa.field("png", pa.binary()),
    ]
)
_STORE_THREADS = 8
_BATCHES_PER_CALL = 8
_EMBEDDINGS_KEPT = 256


@dataclass(frozen=True, slots=True)
class ImageCounts:
    """Numbers of the pictures that were asked for, by how they ended."""

    done_before: int
    drawn: int
    failed: int
    first_errors: tuple[str, ...] = ()


def generate_images(
    config: RunConfig, records: Iterable[ConceptRecord], prompts: Sequence[Prompt], gpus: float, until: float = math.inf
) -> ImageCounts:
    """Draw every prompt with every concept of `records`, except the pictures that are drawn already.

    `gpus` is the cluster's number; with 0 the actors draw on CPUs. Raises Ray's errors when the stage cannot go on, and
    DeadlinePassed if it has something to draw at `until`, in seconds since 1970; the next run keeps what is written by
    then.
    """
    store = RunStore(config.output)
    done = done_row_ids(store, METADATA)
    rows = plan_missing(store, PLAN, plan_rows(config, records, prompts), PLAN_SCHEMA, done)
    if rows.missing:
        with interrupting(until):
            run_stage(config, drawing_stage(config), len(rows.missing), gpus)
        done = done_row_ids(store, METADATA)
    failed = [each for each in rows.missing if each not in done]
    return ImageCounts(
        done_before=rows.num_done,
        drawn=len(rows.missing) - len(failed),
        failed=len(failed),
        first_errors=first_errors(store, METADATA, set(failed)) if failed else (),
    )


def drawing_stage(config: RunConfig) -> Stage:
    """Return the drawing of bulk pictures as a stage."""
    return Stage(
        name="drawing",
        plan=PLAN,
        results=METADATA,
        worker=Drawer,
        rows_per_call=config.generation.sampling.batch_size,
        rows_per_part=config.generation.rows_per_part,
        calls_at_once=_BATCHES_PER_CALL,
    )


def plan_rows(
    config: RunConfig, records: Iterable[ConceptRecord], prompts: Sequence[Prompt]
) -> Iterator[dict[str, Any]]:
    """Yield one PLAN_SCHEMA row a picture, concept by concept; the same arguments give the same rows."""
    settings = dataclasses.asdict(config.generation.sampling) | {"packed": config.generation.packed}
    del settings["batch_size"]
    for record in records:
        for prompt in prompts:
            if not prompt.is_for(record.concept_id, record.category):
                continue
            text = prompt.filled(record.placeholder_token, record.initializer, record.name_in_prompts)
            for index in range(config.generation.images_per_prompt):
                if prompt.seed is None:
                    seed = seed_for(config.seed, record.concept_id, f"image\x1f{text}", index)
                else:
                    seed = prompt.seed + index
                yield {
                    "row_id": row_id(record.result.fingerprint, text, seed, settings),
                    "concept_id": record.concept_id,
                    "fingerprint": record.result.fingerprint,
                    "embedding": record.result.embedding,
                    "prompt": text,
                    "seed": seed,
                }


class Drawer:
    """One model on one device that draws batches of plan rows."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._store = RunStore(config.output)
        self._backbone = load_model(config)
        fit_drawing(self._backbone, config, config.generation.sampling)
        passes = drawing_passes(self._backbone, config.generation.sampling, config.inversion.adapter)
        compile_where_wanted(self._backbone, config, passes)
        self._passes = lru_cache(self._choose_passes)
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

        A row has a `prompt`, a `seed` and an `embedding` (a path in the run's output, or none). A batch is drawn when
        its first picture is asked for.
        """
        paths = dict.fromkeys(row["embedding"] for row in rows if row["embedding"])
        # Several at a time, because a call waits for the store.
        embeddings = dict(zip(paths, self._pool.map(self._embedding_or_error, paths), strict=True))
        checked = [self._check(row, embeddings.get(row["embedding"])) for row in rows]
        good = [request for request in checked if isinstance(request, EncodedRequest)]
        encoder, chosen = self._passes(sampling)
        size = chosen.batch_size
        batches = (draw(encoder, good[start : start + size], chosen) for start in range(0, len(good), size))
        pictures = chain.from_iterable(batches)
        return (request if isinstance(request, str) else next(pictures) for request in checked)

    def _choose_passes(self, sampling: SamplingConfig) -> tuple[PromptEncoder, SamplingConfig]:
        """Return an encoder and settings with which, on a CPU, a picture does not depend on its batch."""
        chosen, _ = choose_sampling(self._backbone, sampling, self._config.inversion.adapter)
        return PromptEncoder(self._backbone, shares_passes=chosen.batch_size > 1), chosen

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

    def _check(self, row: Mapping[str, Any], embedding: LearnedEmbedding | str | None) -> EncodedRequest | str:
        """Return the row as the model takes it, or the error of its embedding or prompt."""
        if isinstance(embedding, str):
            return embedding
        try:
            request = ImageRequest(row["prompt"], row["seed"], (embedding,) if embedding else ())
            return encode_request(self._backbone, request)
        except BadInput as error:
            return str(error)
        except Exception as error:
            return logged_as_bug(error)

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
        path = f"images/{row['concept_id']}/{row['row_id']}.png"
        self._store.put(path, data)
        return facts | {"path": path}
