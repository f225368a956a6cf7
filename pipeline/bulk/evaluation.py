"""The rows that an evaluation draws and scores, and the table of their scores."""

from __future__ import annotations

import dataclasses
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
from pipeline.bulk.rows import done_row_ids, read_results, row_id
from pipeline.config import RunConfig
from pipeline.config_file import shown_tree
from pipeline.inputs.models import extractor_hash, model_hash
from pipeline.inputs.prompt_table import INITIALIZER, TOKEN, Prompt
from pipeline.ledger.records import ConceptRecord
from pipeline.store.redact import redacted
from pipeline.store.storage import RunStore
from textual_inversion.prompts import HOLE, without_placeholder
from textual_inversion.rng import seed_for

LEARNED = "learned"
INITIAL = "initializer"
PROMPT_ONLY = "prompt only"
IMAGE_ONLY = "image only"
SETUPS = (IMAGE_ONLY, LEARNED, INITIAL, PROMPT_ONLY)
PIXEL_SCORES = ("psnr_db", "edge_strength", "edge_ratio")
"""Names of the scores of `fidelity.pixel_scores`; that module needs torch, which a command's `--help` does not load."""

DINO_SCORES = ("dino", "mirror_margin")
"""Names of the scores that the second feature extractor gives, if one is named."""
SCORES = ("clip_i", "clip_t", *DINO_SCORES, *PIXEL_SCORES)
FOLDER = "evaluation"
PLAN = f"{FOLDER}/plan"
PARTS = f"{FOLDER}/parts"

_PLANNED = [
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
        *_PLANNED,
        ("drawn", pa.string()),
        ("embedding", pa.string()),
        ("images", pa.list_(pa.string())),
        ("seeds", pa.list_(pa.int64())),
        ("are_pixels_compared", pa.bool_()),
        ("image_hashes", pa.list_(pa.string())),
    ]
)
RESULT_SCHEMA = pa.schema(
    [
        *_PLANNED,
        *((name, pa.float64()) for score in SCORES for name in (score, f"{score}_se")),
        ("status", pa.string()),
        ("error", pa.string()),
    ]
)
_TABLE_COLUMNS = [name for name in RESULT_SCHEMA.names if name not in ("row_id", "status", "error")]


@dataclass
class Totals:
    """Scores of one concept in one setup."""

    reconstruction: dict[str, list[float]] = field(default_factory=lambda: {score: [] for score in SCORES})
    """Score -> its values for the protocol's reconstruction prompts."""

    editing: dict[str, list[float]] = field(default_factory=lambda: {score: [] for score in SCORES})
    """Score -> its values for all other prompts."""

    def add(self, row: Mapping[str, Any], protocol: Protocol) -> None:
        """Add the scores of one result row."""
        kind = self.reconstruction if protocol.is_reconstruction(row["prompt"]) else self.editing
        for score in SCORES:
            if row.get(score) is not None:  # parts written before a score existed have no such column
                kind[score].append(row[score])

    def score(self, name: str) -> float:
        """Return a score's mean: CLIP-T over the editing prompts, any other score over the reconstruction prompts.

        Where there are no prompts of that kind, the mean is over those of the other; NaN where there are none at all.
        """
        reconstruction = self.reconstruction[name]
        editing = self.editing[name]
        values = editing or reconstruction if name == "clip_t" else reconstruction or editing
        return fmean(values or [nan])


def plan_rows(config: RunConfig, protocol: Protocol, records: Iterable[ConceptRecord]) -> Iterator[dict[str, Any]]:
    """Yield one PLAN_SCHEMA row for every concept, setup and prompt, in that order.

    The prompt alone seeds the initial noise: all concepts and setups start from the same noise, so that their pictures
    differ by the text alone, and a picture that several concepts are compared with is drawn once. Whether a row's
    pixels are compared is no part of its id: rows scored before there were pixel scores are not drawn again.
    """
    sampling = dataclasses.asdict(protocol.sampling)
    del sampling["batch_size"]
    settings = [
        sampling,
        config.precision,
        model_hash(config.model),
        extractor_hash(config.extractor),
        extractor_hash(config.evaluation.dino),
    ]
    setups = (LEARNED, INITIAL, PROMPT_ONLY, IMAGE_ONLY) if config.evaluation.references else (LEARNED,)
    for record in records:
        prompts = [prompt for prompt in protocol.prompts if prompt.is_for(record.concept_id, record.category)]
        for setup in setups:
            for prompt in prompts:
                template = prompt.template(record.initializer)
                text = without_placeholder(template, HOLE)
                drawn = prompt_to_draw(setup, record, prompt, text)
                if drawn is None:
                    continue
                seeds = evaluation_seeds(prompt, protocol.images_per_prompt, config.seed)
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
                yield {
                    "row_id": row_id(row, settings),
                    **row,
                    "are_pixels_compared": are_pixels_compared(setup, prompt, record, protocol),
                    "image_hashes": list(record.inputs.get("images", ())),  # part of the id through the fingerprint
                }


def prompt_to_draw(setup: str, record: ConceptRecord, prompt: Prompt, text: str) -> str | None:
    """Return the prompt that a setup draws: empty for the photos' own setup, None where the setup has no meaning.

    `text` is the prompt without its placeholder and without the class noun that a concept was learned with. So setups
    and concepts have the same text; a class that the prompt itself names, as in `dreambench`, is part of it.
    """
    if setup == LEARNED:
        return prompt.filled(record.placeholder_token, record.initializer, record.name_in_prompts)
    if setup == PROMPT_ONLY:
        return text or None
    if setup == IMAGE_ONLY:
        return "" if len(record.images) > 1 else None
    if not record.initializer or INITIALIZER in prompt.text:  # "prompt only" draws the same text then
        return None
    return prompt.filled(record.initializer, record.initializer)


def are_pixels_compared(setup: str, prompt: Prompt, record: ConceptRecord, protocol: Protocol) -> bool:
    """Return True for the rows that get PIXEL_SCORES: a concept's own pictures or photos, by a reconstruction prompt.

    A style has no pixels in common with its photos. The pictures of the initializer and of the prompt alone are shared
    by concepts and kept as features only, so they have no pixels to compare.
    """
    return setup in (LEARNED, IMAGE_ONLY) and record.category != "style" and protocol.is_reconstruction(prompt.text)


def evaluation_seeds(prompt: Prompt, count: int, seed: int) -> list[int]:
    """Return the seeds of a prompt's pictures; `seed` is the run's. A prompt has the same with `{}` and with
    `{token}`."""
    if prompt.seed is not None:
        return [prompt.seed + i for i in range(count)]
    return [seed_for(seed, "", f"evaluation\x1f{prompt.text.replace(TOKEN, HOLE)}", i) for i in range(count)]


def write_table(
    store: RunStore, config: RunConfig, protocol: Protocol, wanted: set[str]
) -> dict[str, dict[str, Totals]]:
    """Write one table of the good results whose row ids are `wanted`; return setup -> concept id -> its totals."""
    totals: dict[str, dict[str, Totals]] = {setup: {} for setup in SETUPS}
    settings = json.dumps(redacted(shown_tree(config)))
    metadata = {"extractor": config.extractor, "dino": config.evaluation.dino, "config": settings}
    schema = pa.schema([RESULT_SCHEMA.field(name) for name in _TABLE_COLUMNS], metadata=metadata)
    buffer = io.BytesIO()
    left = set(wanted)
    with pq.ParquetWriter(buffer, schema) as writer:
        for rows in read_results(store, PARTS):
            good = [row for row in rows if row["status"] == "ok" and row["row_id"] in left]
            left -= {row["row_id"] for row in good}
            writer.write_table(pa.Table.from_pylist(good, schema))
            for row in good:
                total = totals[row["setup"]].setdefault(row["concept_id"], Totals())
                total.add(row, protocol)
    store.put(table_path(config), buffer.getvalue())
    return totals


def unscored(store: RunStore, wanted: Mapping[str, str]) -> dict[str, str]:
    """Return the concepts with a row that has no scores: concept id -> the error. `wanted`: row id -> concept id."""
    missing = wanted.keys() - done_row_ids(store, PARTS)
    errors = {wanted[each]: "not scored" for each in missing}
    for rows in read_results(store, PARTS, ["row_id", "error"]) if missing else ():
        errors |= {wanted[row["row_id"]]: row["error"] for row in rows if row["row_id"] in missing and row["error"]}
    return errors


def table_path(config: RunConfig) -> str:
    """Return the table's path in the run's output."""
    return f"{FOLDER}/{config.evaluation.protocol}.parquet"
