"""Rows of the bulk pictures: one for each concept, prompt and seed, with all that its picture depends on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import pyarrow as pa

from pipeline.bulk.negatives import NegativeConcepts
from pipeline.bulk.rows import row_id
from pipeline.config import RunConfig
from pipeline.inputs.prompt_table import Prompt, fill_holes, slug
from pipeline.ledger.records import ConceptRecord
from textual_inversion.prompts import without_placeholder
from textual_inversion.rng import seed_for

PLAN_SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("concept_id", pa.string()),
        ("fingerprint", pa.string()),
        ("embedding", pa.string()),
        ("prompt", pa.string()),
        ("seed", pa.int64()),
        ("negative_prompt", pa.string()),
        ("negative_digest", pa.string()),
        ("guidance_scale", pa.float64()),
        ("steps", pa.int64()),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("carried", pa.string()),
    ]
)
"""Columns of the plan; of a prompt's own settings those are empty that are the run's. `carried` is a JSON object of the
prompt table's other columns."""
RESULT_SCHEMA = pa.schema(
    [
        *(field for field in PLAN_SCHEMA if field.name not in ("embedding", "negative_digest")),
        pa.field("status", pa.string()),
        pa.field("error", pa.string()),
        pa.field("path", pa.string()),
        pa.field("bytes", pa.int64()),
        pa.field("sha256", pa.string()),
        pa.field("png", pa.binary()),
    ]
)

_NAME_DIGITS = 8
"""Digits of the row id at the end of a picture's name."""


def plan_rows(
    config: RunConfig, records: Iterable[ConceptRecord], prompts: Sequence[Prompt]
) -> Iterator[dict[str, Any]]:
    """Yield one PLAN_SCHEMA row a picture, concept by concept; the same arguments give the same rows."""
    negatives = NegativeConcepts(config)
    settings = _settings_digested(config)
    for record in records:
        result = record.result
        for prompt in prompts:
            if not prompt.is_for(record.concept_id, record.category):
                continue
            text = prompt.filled(record.placeholder_token, record.initializer, record.name_in_prompts)
            own = _own_settings(config, record, prompt, negatives)
            digested = settings | own  # a row whose own settings are the run's has the same digest
            for index in range(config.generation.images_per_prompt):
                if prompt.seed is None:
                    seed = seed_for(config.seed, record.concept_id, f"image\x1f{text}", index)
                else:
                    seed = prompt.seed + index
                yield {
                    "row_id": row_id(result.fingerprint, text, seed, digested),
                    "concept_id": record.concept_id,
                    "fingerprint": result.fingerprint,
                    "embedding": result.embedding,
                    "prompt": text,
                    "seed": seed,
                    **own,
                    "carried": prompt.carried,
                }


def picture_path(row: Mapping[str, Any]) -> str:
    """Return the path of a PLAN_SCHEMA row's picture, `images/<concept_id>/<prompt slug>-<seed>-<digest>.png`.

    The digest tells apart pictures of one prompt and seed that differ in anything else, such as their guidance.
    """
    name = "-".join(filter(None, [slug(row["prompt"]), str(row["seed"]), row["row_id"][:_NAME_DIGITS]]))
    return f"images/{row['concept_id']}/{name}.png"


def _own_settings(
    config: RunConfig, record: ConceptRecord, prompt: Prompt, negatives: NegativeConcepts
) -> dict[str, Any]:
    """Return what decides a picture besides its concept, its prompt, its seed and the run's settings: the columns of
    PLAN_SCHEMA that have a value."""
    own: dict[str, Any] = {"guidance_scale": prompt.guidance_scale, "steps": prompt.steps}
    if prompt.size_px:
        own |= dict(zip(("width", "height"), prompt.size_px, strict=True))
    token = record.placeholder_token
    negative = prompt.negative or config.generation.negative_prompt
    if negative:
        negative = fill_holes(negative, token, record.initializer, record.name_in_prompts)
        own["negative_prompt"] = negative
        with suppress(ValueError, OSError):  # the worker meets the same error, which then is this row's alone
            own["negative_digest"] = negatives.digest_of(without_placeholder(negative, token))
    return {name: value for name, value in own.items() if value}


def _settings_digested(config: RunConfig) -> dict[str, Any]:
    """Return the run's settings that a picture depends on."""
    settings: dict[str, Any] = dataclasses.asdict(config.generation.sampling) | {"packed": config.generation.packed}
    del settings["batch_size"]
    return settings
