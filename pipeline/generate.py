"""The bulk stage on Ray Data: (concept, prompt, seed) rows of a Parquet plan -> pictures, and a metadata row for each.

The stage itself writes every picture, under a key made of what the picture depends on, so that drawing one again
overwrites the same bytes. The metadata rows are the record of what is done: those that say `ok` are left out of the
next plan. A row that cannot be drawn becomes a row that says why; it never takes its block with it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from PIL import Image

from pipeline.actors import to_png
from pipeline.config import RunConfig
from pipeline.models import load_model
from pipeline.progress import Progress
from pipeline.prompts import Prompt
from pipeline.records import ConceptRecord
from pipeline.storage import RunStore, open_for_reading, open_store
from textual_inversion.concept import LearnedEmbedding
from textual_inversion.formats import parse_diffusers
from textual_inversion.generate import EncodedRequest, ImageRequest, draw, encode_request
from textual_inversion.rng import seed_for

log = logging.getLogger(__name__)

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
_PLAN_ROWS = 65_536
_PUT_THREADS = 8
_EMBEDDINGS_KEPT = 256
_LOOK_EVERY_S = 5.0
_RETRIES = 3
"""Of an actor, and of a batch on another actor. Ray's own default is for ever: a row that kills would never end."""


@dataclass(frozen=True, slots=True)
class ImageCounts:
    """What became of the pictures asked for."""

    done_before: int
    drawn: int
    failed: int
    first_errors: tuple[str, ...] = ()


def generate_images(
    config: RunConfig, records: Iterable[ConceptRecord], prompts: Sequence[Prompt], gpus: float
) -> ImageCounts:
    """Draw every prompt with every finished concept, as far as that is not done. `gpus`: in the cluster; 0 draws on
    CPUs. Raises ray's errors when the stage cannot go on; what is written by then counts on the next run."""
    store = RunStore(config.output)
    before = finished_rows(store)
    planned, asked = write_plan(store, config, records, prompts, before)
    if planned:
        run_stage(config, len(planned), gpus)
    after = finished_rows(store) if planned else before
    missing = planned - after
    errors = _errors(store, missing) if missing else ()
    return ImageCounts(
        done_before=asked - len(planned), drawn=len(planned & after), failed=len(missing), first_errors=errors
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
            text = prompt.text.replace("{}", record.placeholder_token)
            for index in range(config.generation.images_per_prompt):
                if prompt.seed is None:
                    seed = seed_for(config.seed, record.concept_id, f"image\x1f{text}", index)
                else:
                    seed = prompt.seed + index
                yield {
                    "row_id": _digest([record.fingerprint, text, seed, settings]),
                    "concept_id": record.concept_id,
                    "fingerprint": record.fingerprint,
                    "embedding": record.folder.embedding,
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

    rows, paths = missing(), set[str]()
    while part := list(islice(rows, _PLAN_ROWS)):
        path = f"{PLAN}/part-{len(paths):05d}.parquet"
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(part, PLAN_SCHEMA), buffer)
        store.put(path, buffer.getvalue())
        paths.add(path)
    for stale in set(store.list(PLAN)) - paths:
        store.delete(stale)
    return todo, len(wanted)


def run_stage(config: RunConfig, num_rows: int, gpus: float) -> None:
    """Read the plan, draw, write the metadata rows: one Ray Data pipeline."""
    store = RunStore(config.output)
    plan_fs, plan_path = open_store(store.uri(PLAN))
    metadata_fs, metadata_path = open_store(store.uri(METADATA))
    batch_size = config.generation.sampling.batch_size
    num_batches = math.ceil(num_rows / batch_size)
    cpus = int(ray.cluster_resources().get("CPU", 1))
    size = min(config.actors.count or int(gpus) or cpus, num_batches)
    rows_per_block = min(config.generation.rows_per_part, math.ceil(num_batches / size) * batch_size)
    # Reading, splitting and writing are tasks of a whole core each: actors that reserve every core would starve them.
    actor_cpus = min(0.5, max(0, cpus - 1) / size)
    settings = dataclasses.replace(config, device="cuda" if gpus else "cpu")
    ray.data.DataContext.get_current().enable_progress_bars = False  # twenty lines every ten seconds in a job's log
    with _reporting(store, num_rows, rows_per_block):
        (
            ray.data.read_parquet(plan_path, filesystem=plan_fs, num_cpus=min(1, actor_cpus))
            .repartition(target_num_rows_per_block=rows_per_block)
            .map_batches(
                Drawer,
                batch_size=batch_size,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(size=size),
                fn_constructor_args=[settings],
                num_cpus=actor_cpus,
                num_gpus=config.actors.gpus if gpus else None,
                max_restarts=_RETRIES,
                max_task_retries=_RETRIES,
                udf_modifying_row_count=False,
            )
            .write_parquet(metadata_path, filesystem=metadata_fs)
        )


@contextmanager
def _reporting(store: RunStore, num_rows: int, rows_per_part: int) -> Iterator[None]:
    """Progress lines while the block runs, from the number of finished parts."""
    progress = Progress("drawing", total=lambda: num_rows)
    before = len(store.list(METADATA))
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(_LOOK_EVERY_S):
            try:
                parts = len(store.list(METADATA)) - before
            except OSError as error:
                log.warning("cannot look how far drawing is: %s", error)
                continue
            progress.update(done=min(num_rows, parts * rows_per_part))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()


class Drawer:
    """One model on one device; called with a batch of plan rows, returns as many metadata rows."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._store = RunStore(config.output)
        self._backbone = load_model(config)
        self._embedding = lru_cache(_EMBEDDINGS_KEPT)(self._load)
        self._pool = ThreadPoolExecutor(_PUT_THREADS)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """PLAN_SCHEMA rows -> RESULT_SCHEMA rows, in order. Raises only for what no row can be blamed for."""
        rows = batch.to_pylist()
        checked = [self._check(row) for row in rows]
        good = [request for request in checked if isinstance(request, EncodedRequest)]
        size = self._config.generation.sampling.batch_size
        pictures = iter(
            [
                picture
                for start in range(0, len(good), size)
                for picture in draw(self._backbone, good[start : start + size], self._config.generation.sampling)
            ]
        )
        results = [request if isinstance(request, str) else next(pictures) for request in checked]
        return pa.Table.from_pylist(list(self._pool.map(self._finish, rows, results)), RESULT_SCHEMA)

    def _load(self, path: str) -> LearnedEmbedding:
        return parse_diffusers(self._store.get(path))

    def _check(self, row: Mapping[str, Any]) -> EncodedRequest | str:
        """The row as the model takes it, or what is wrong with it."""
        try:
            request = ImageRequest(row["prompt"], row["seed"], (self._embedding(row["embedding"]),))
            return encode_request(self._backbone, request)
        except (ValueError, OSError) as error:
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


def finished_rows(store: RunStore) -> set[str]:
    """Ids of the rows whose picture is stored. A part cut short by a crash is removed: its rows are drawn again."""
    return {row_id for row_id, status, _ in _read_metadata(store) if status == "ok"}


def _errors(store: RunStore, missing: set[str], at_most: int = 5) -> tuple[str, ...]:
    """Causes of rows that have no picture, a few distinct ones."""
    causes = dict.fromkeys(error for row_id, status, error in _read_metadata(store) if row_id in missing and error)
    return tuple(islice(causes, at_most))


def _read_metadata(store: RunStore) -> Iterator[tuple[str, str, str | None]]:
    for path in sorted(store.list(METADATA)):
        try:
            with open_for_reading(store.uri(path)) as file:
                table = pq.read_table(file, columns=["row_id", "status", "error"])
        except pa.ArrowInvalid as error:
            log.warning("%s is not whole (%s): removed", store.uri(path), error)
            store.delete(path)
            continue
        yield from zip(*(table[name].to_pylist() for name in ("row_id", "status", "error")), strict=True)


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
