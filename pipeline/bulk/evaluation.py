"""What an evaluation asks for and what it gives: rows to draw and score, and the table of their scores."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import nan
from statistics import fmean
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.bulk.protocols import Protocol
from pipeline.bulk.stage import finished_rows, read_results
from pipeline.config import RunConfig
from pipeline.config_file import to_tree
from pipeline.inputs.models import extractor_hash, model_hash
from pipeline.inputs.prompt_table import INITIALIZER, Prompt
from pipeline.ledger.records import ConceptRecord
from pipeline.store.storage import RunStore
from textual_inversion.prompts import HOLE, without_placeholder
from textual_inversion.rng import seed_for

LEARNED, INITIAL, PROMPT_ONLY, IMAGE_ONLY = "learned", "initializer", "prompt only", "image only"
SETUPS = (IMAGE_ONLY, LEARNED, INITIAL, PROMPT_ONLY)
SCORES = ("clip_i", "clip_t", "dino")
FOLDER = "evaluation"
PLAN, PARTS = f"{FOLDER}/plan", f"{FOLDER}/parts"

_ASKED = [
    ("row_id", pa.string()),
    ("concept_id", pa.string()),
    ("fingerprint", pa.string()),
    ("setup", pa.string()),
    ("prompt", pa.string()),
    ("text", pa.string()),
    ("num_samples", pa.int64()),
    ("protocol", pa.string()),
    ("seed", pa.int64()),
]
PLAN_SCHEMA = pa.schema(
    [
        *_ASKED,
        ("drawn", pa.string()),
        ("embedding", pa.string()),
        ("images", pa.list_(pa.string())),
        ("seeds", pa.list_(pa.int64())),
    ]
)
RESULT_SCHEMA = pa.schema(
    [
        *_ASKED,
        *((name, pa.float64()) for score in SCORES for name in (score, f"{score}_se")),
        ("status", pa.string()),
        ("error", pa.string()),
    ]
)
_DERIVED = [name for name in RESULT_SCHEMA.names if name not in ("row_id", "status", "error")]


@dataclass
class Totals:
    """Scores of one concept in one setup."""

    reconstruction: dict[str, list[float]] = field(default_factory=lambda: {score: [] for score in SCORES})
    editing: dict[str, list[float]] = field(default_factory=lambda: {score: [] for score in SCORES})

    def add(self, row: Mapping[str, Any], protocol: Protocol) -> None:
        kind = self.reconstruction if row["prompt"] in protocol.reconstruction else self.editing
        for score in SCORES:
            if row[score] is not None:
                kind[score].append(row[score])

    def score(self, name: str) -> float:
        """CLIP-T over the editing prompts, the others over the reconstruction prompts; over all where there are none
        of either."""
        first, other = self.reconstruction[name], self.editing[name]
        if name == "clip_t":
            first, other = other, first
        return fmean(first or other or [nan])


def plan_rows(config: RunConfig, protocol: Protocol, records: Iterable[ConceptRecord]) -> Iterator[dict[str, Any]]:
    """One row for every concept, prompt and setup, the setups of a concept one after the other.

    Initial noise is seeded by the prompt alone: all concepts and setups start from the same, so that they differ by
    what they are told, and a reference that several concepts share is drawn once.
    """
    sampling = dataclasses.asdict(protocol.sampling)
    del sampling["batch_size"]
    settings = [sampling, config.precision, model_hash(config.model), extractor_hash(config.extractor),
                extractor_hash(config.evaluation.dino)]  # fmt: skip
    setups = (LEARNED, INITIAL, PROMPT_ONLY, IMAGE_ONLY) if config.evaluation.references else (LEARNED,)
    for record in records:
        prompts = [prompt for prompt in protocol.prompts if prompt.is_for(record.concept_id, record.category)]
        for setup in setups:
            for prompt in prompts:
                template = prompt.template(record.initializer)
                text = without_placeholder(template, HOLE)
                drawn = what_to_draw(setup, record, prompt, text)
                if drawn is None:
                    continue
                seeds = seeds_of(prompt, protocol.images_per_prompt, config.seed)
                row = {
                    "concept_id": record.concept_id,
                    "fingerprint": record.result.fingerprint,
                    "setup": setup,
                    "prompt": prompt.text,
                    "text": text,
                    "num_samples": len(seeds) if drawn else len(record.images),
                    "protocol": config.evaluation.protocol,
                    "seed": config.seed,
                    "drawn": drawn,
                    "embedding": record.result.embedding if setup == LEARNED else "",
                    "images": list(record.images),
                    "seeds": seeds if drawn else [],
                }
                yield {"row_id": digest([row, settings]), **row}


def what_to_draw(setup: str, record: ConceptRecord, prompt: Prompt, text: str) -> str | None:
    """The prompt as it is drawn; empty for photos, None where a setup has no meaning."""
    if setup == LEARNED:
        return prompt.filled(record.placeholder_token, record.initializer)
    if setup == PROMPT_ONLY:
        return text or None
    if setup == IMAGE_ONLY:
        return "" if len(record.images) > 1 else None
    if not record.initializer or INITIALIZER in prompt.text:  # then it is what "prompt only" draws
        return None
    return prompt.filled(record.initializer, record.initializer)


def seeds_of(prompt: Prompt, count: int, seed: int) -> list[int]:
    if prompt.seed is not None:
        return [prompt.seed + i for i in range(count)]
    return [seed_for(seed, "", f"evaluation\x1f{prompt.text}", i) for i in range(count)]


def write_table(
    store: RunStore, config: RunConfig, protocol: Protocol, wanted: set[str]
) -> dict[str, dict[str, Totals]]:
    """Collect the rows that are asked for now in one table; returns setup -> concept -> its totals."""
    totals: dict[str, dict[str, Totals]] = {setup: {} for setup in SETUPS}
    judges = {"extractor": config.extractor, "dino": config.evaluation.dino, "config": json.dumps(to_tree(config))}
    schema = pa.schema([RESULT_SCHEMA.field(name) for name in _DERIVED], metadata=judges)
    buffer = io.BytesIO()
    left = set(wanted)
    with pq.ParquetWriter(buffer, schema) as writer:
        for rows in read_results(store, PARTS, RESULT_SCHEMA.names):
            good = [row for row in rows if row["status"] == "ok" and row["row_id"] in left]
            left -= {row["row_id"] for row in good}
            writer.write_table(pa.Table.from_pylist(good, schema))
            for row in good:
                total = totals[row["setup"]].setdefault(row["concept_id"], Totals())
                total.add(row, protocol)
    store.put(table_path(config), buffer.getvalue())
    return totals


def causes(store: RunStore, wanted: dict[str, str]) -> dict[str, str]:
    """Concept -> why one of its rows has no scores."""
    missing = wanted.keys() - finished_rows(store, PARTS)
    found = {wanted[row_id]: "not scored" for row_id in missing}
    for rows in read_results(store, PARTS, ["row_id", "error"]) if missing else ():
        found |= {wanted[row["row_id"]]: row["error"] for row in rows if row["row_id"] in missing and row["error"]}
    return found


def table_path(config: RunConfig) -> str:
    return f"{FOLDER}/{config.evaluation.protocol}.parquet"


def digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
