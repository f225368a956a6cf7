"""The bulk stage on Ray Data: (concept, prompt, seed) rows of a Parquet plan -> pictures, and a metadata row for each.

The stage itself writes every picture, under a key made of what the picture depends on, so that drawing one again
overwrites the same bytes. The metadata rows are the record of what is done: those that say `ok` are left out of the
next plan. A row that cannot be drawn becomes a row that says why; it never takes its block with it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

import pyarrow as pa
from PIL import Image

from pipeline.actor.model_loading import load_model
from pipeline.actor.publish import to_png
from pipeline.actor.tuning import compile_where_wanted, drawing_pass
from pipeline.bulk.stage import Stage, finished_rows, first_errors, put_plan, run_stage
from pipeline.config import RunConfig
from pipeline.inputs.prompt_table import Prompt
from pipeline.ledger.records import ConceptRecord
from pipeline.store.storage import RunStore
from pipeline.times import interrupting
from textual_inversion.adapter_formats import with_adapter
from textual_inversion.concept import LearnedEmbedding
from textual_inversion.conditioning import PromptEncoder
from textual_inversion.config import SamplingConfig
from textual_inversion.formats import parse_diffusers
from textual_inversion.generate import EncodedRequest, ImageRequest, draw, encode_request
from textual_inversion.rng import seed_for

PLAN, METADATA = "images/plan", "images/metadata"

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
    """What became of the pictures asked for."""

    done_before: int
    drawn: int
    failed: int
    first_errors: tuple[str, ...] = ()


def generate_images(
    config: RunConfig, records: Iterable[ConceptRecord], prompts: Sequence[Prompt], gpus: float, until: float = math.inf
) -> ImageCounts:
    """Draw every prompt with every finished concept, as far as that is not done. `gpus`: in the cluster; 0 draws on
    CPUs. Raises ray's errors when the stage cannot go on, and DeadlinePassed if it has something to draw at `until`, in
    seconds since 1970; what is written by then counts on the next run."""
    store = RunStore(config.output)
    before = finished_rows(store, METADATA)
    planned, asked = write_plan(store, config, records, prompts, before)
    if planned:
        with interrupting(until):
            run_stage(config, drawing(config), len(planned), gpus)
    after = finished_rows(store, METADATA) if planned else before
    missing = planned - after
    errors = first_errors(store, METADATA, missing) if missing else ()
    return ImageCounts(
        done_before=asked - len(planned), drawn=len(planned & after), failed=len(missing), first_errors=errors
    )


def drawing(config: RunConfig) -> Stage:
    """The bulk pictures as a stage."""
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
    """One row a picture, concept by concept; the same rows whenever the same is asked for."""
    settings = dataclasses.asdict(config.generation.sampling) | {"packed": config.generation.packed}
    del settings["batch_size"]
    for record in records:
        for prompt in prompts:
            if not prompt.is_for(record.concept_id, record.category):
                continue
            text = prompt.filled(record.placeholder_token, record.initializer)
            for index in range(config.generation.images_per_prompt):
                if prompt.seed is None:
                    seed = seed_for(config.seed, record.concept_id, f"image\x1f{text}", index)
                else:
                    seed = prompt.seed + index
                yield {
                    "row_id": _digest([record.result.fingerprint, text, seed, settings]),
                    "concept_id": record.concept_id,
                    "fingerprint": record.result.fingerprint,
                    "embedding": record.result.embedding,
                    "prompt": text,
                    "seed": seed,
                }


def write_plan(
    store: RunStore,
    config: RunConfig,
    records: Iterable[ConceptRecord],
    prompts: Sequence[Prompt],
    done: set[str],
) -> tuple[set[str], int]:
    """Put the rows that are not done in `images/plan`; returns their ids and how many pictures there are in all."""
    wanted: set[str] = set()
    todo: set[str] = set()

    def missing() -> Iterator[dict[str, Any]]:
        for row in plan_rows(config, records, prompts):
            if row["row_id"] not in wanted and row["row_id"] not in done:
                todo.add(row["row_id"])
                yield row
            wanted.add(row["row_id"])

    put_plan(store, PLAN, missing(), PLAN_SCHEMA)
    return todo, len(wanted)


class Drawer:
    """One model on one device; called with a batch of plan rows, returns as many metadata rows."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._store = RunStore(config.output)
        self._backbone = load_model(config)
        compile_where_wanted(self._backbone, config, [drawing_pass(self._backbone, config.generation.sampling)])
        self._encoder = PromptEncoder(self._backbone)
        self._embedding = lru_cache(_EMBEDDINGS_KEPT)(self._load)
        self._pool = ThreadPoolExecutor(_STORE_THREADS)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """PLAN_SCHEMA rows -> RESULT_SCHEMA rows, in order. Raises only for what no row can be blamed for."""
        rows = batch.to_pylist()
        results = self.draw(rows, self._config.generation.sampling)
        # handed to the pool as they are drawn: the next are drawn while these are encoded and stored
        finishing = [self._pool.submit(self._finish, row, result) for row, result in zip(rows, results, strict=True)]
        return pa.Table.from_pylist([finished.result() for finished in finishing], RESULT_SCHEMA)

    def draw(self, rows: Sequence[Mapping[str, Any]], sampling: SamplingConfig) -> Iterator[Image.Image | str]:
        """Rows with a `prompt`, a `seed` and an `embedding` (a path in the run, or none) -> for each a picture, or what
        is wrong with it; a batch is drawn when its first picture is asked for."""
        paths = dict.fromkeys(row["embedding"] for row in rows if row["embedding"])
        embeddings = dict(zip(paths, self._pool.map(self._found, paths), strict=True))  # a store's waits side by side
        checked = [self._check(row, embeddings.get(row["embedding"])) for row in rows]
        good = [request for request in checked if isinstance(request, EncodedRequest)]
        size = sampling.batch_size
        batches = (draw(self._encoder, good[start : start + size], sampling) for start in range(0, len(good), size))
        pictures = chain.from_iterable(batches)
        return (request if isinstance(request, str) else next(pictures) for request in checked)

    def _load(self, path: str) -> LearnedEmbedding:
        folder = path.rpartition("/")[0]
        return with_adapter(parse_diffusers(self._store.get(path)), lambda name: self._store.get(f"{folder}/{name}"))

    def _found(self, path: str) -> LearnedEmbedding | str:
        """What is there, or why it cannot be used."""
        try:
            return self._embedding(path)
        except (ValueError, OSError) as error:
            return f"{type(error).__name__}: {error}"

    def _check(self, row: Mapping[str, Any], embedding: LearnedEmbedding | str | None) -> EncodedRequest | str:
        """The row as the model takes it, or what is wrong with it."""
        if isinstance(embedding, str):
            return embedding
        try:
            request = ImageRequest(row["prompt"], row["seed"], (embedding,) if embedding else ())
            return encode_request(self._backbone, request)
        except ValueError as error:
            return f"{type(error).__name__}: {error}"

    def _finish(self, row: Mapping[str, Any], result: Image.Image | str) -> dict[str, Any]:
        """Store a picture and describe it."""
        known = {name: row[name] for name in RESULT_SCHEMA.names if name in row}
        if isinstance(result, str):
            return known | {"status": "failed", "error": result}
        data = to_png(result)
        facts = {"status": "ok", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        if self._config.generation.packed:
            return known | facts | {"png": data}
        path = f"images/{row['concept_id']}/{row['row_id']}.png"
        try:
            self._store.put(path, data)
        except OSError as error:
            return known | {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        return known | facts | {"path": path}


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
