"""The training examples of an encoder: one row a concept, made by Ray Data actors and kept in the output as Parquet.

An example is all that training needs of a concept: features of its photos and their encoded views. Photos are read and
decoded once; a row whose id (the digest of all that the example depends on) is there already is not made again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
from safetensors.torch import load, save

from pipeline.actor.failures import logged_as_bug
from pipeline.actor.model_loading import load_model
from pipeline.bulk.rows import read_results, row_id
from pipeline.bulk.stage import Stage
from pipeline.config import RunConfig
from pipeline.inputs.content_hash import content_hashes
from pipeline.inputs.manifest import BadRow, ManifestRow
from pipeline.inputs.models import extractor_hash, locate, model_hash
from pipeline.inputs.photos import open_pictures
from pipeline.ledger.records import ConceptRecord
from pipeline.store.errors import InputChanged
from pipeline.store.redact import redact
from pipeline.store.storage import RunStore
from textual_inversion.concept import Concept
from textual_inversion.encoder import PhotoFeatures
from textual_inversion.encoder_training import ConceptExample, encode_example
from textual_inversion.errors import ConceptError
from textual_inversion.extractors import load_extractor

PLAN = "examples/plan"
PARTS = "examples/parts"

FORMAT = 2
"""Version of what an example holds; a change makes all of them again."""

_USED = ("concept_id", "placeholder_token", "initializer", "category", "captions")
"""Fields of a concept that its example keeps, besides the photos."""

_ROWS_PER_CALL = 8
_ROWS_PER_PART = 256
_HASHED_AT_ONCE = 512

PLAN_SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("concept_id", pa.string()),
        ("concept", pa.string()),
        ("image_hashes", pa.list_(pa.string())),
    ]
)
RESULT_SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("concept_id", pa.string()),
        ("status", pa.string()),
        ("error", pa.string()),
        ("concept", pa.string()),
        ("tensors", pa.binary()),
    ]
)


def examples_stage() -> Stage:
    """Return the making of examples as a stage."""
    return Stage(
        name="reading photos",
        plan=PLAN,
        results=PARTS,
        worker=ExampleMaker,
        rows_per_call=_ROWS_PER_CALL,
        rows_per_part=_ROWS_PER_PART,
    )


def example_settings(config: RunConfig) -> dict[str, Any]:
    """Return all settings that an example depends on, besides its concept, as JSON values."""
    return {
        "format": FORMAT,
        "network": dataclasses.asdict(config.encoder.network),
        "model": model_hash(config.model),
        "extractor": extractor_hash(config.extractor),
        "precision": config.precision,
    }


def plan_examples(
    rows: Iterable[ManifestRow | BadRow], config: RunConfig, bad: list[BadRow]
) -> Iterator[dict[str, Any]]:
    """Yield a PLAN_SCHEMA row for every good manifest row; append the others, and those whose photos cannot be read, to
    `bad`."""
    settings = example_settings(config)
    batch: list[ManifestRow] = []

    def planned() -> Iterator[dict[str, Any]]:
        hashes = content_hashes({uri for row in batch for uri in row.concept.images}, config.photos)
        for row in batch:
            errors = {uri: error for uri in row.concept.images if not isinstance(error := hashes[uri], str)}
            if errors:
                uri, error = next(iter(errors.items()))
                reason = redact(f"photo {uri} cannot be read: {type(error).__name__}: {error}")
                bad.append(BadRow(file=row.file, row=row.row, concept_id=row.concept.concept_id, reason=reason))
            else:
                yield _plan_row(row.concept, [str(hashes[uri]) for uri in row.concept.images], settings)
        batch.clear()

    for row in rows:
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        batch.append(row)
        if len(batch) == _HASHED_AT_ONCE:
            yield from planned()
    yield from planned()


def plan_examples_of_run(records: Iterable[ConceptRecord], config: RunConfig) -> Iterator[dict[str, Any]]:
    """Yield a PLAN_SCHEMA row for every concept that an earlier run learned from photos whose hashes its record has."""
    settings = example_settings(config)
    for record in records:
        hashes = list(record.inputs.get("images", ()))
        if record.status == "done" and len(hashes) == len(record.images):
            concept = Concept(
                concept_id=record.concept_id,
                placeholder_token=record.placeholder_token,
                images=record.images,
                initializer=record.initializer,
                category=record.category,  # type: ignore[arg-type]  # Concept checks the value
                captions=tuple(record.inputs.get("concept", {}).get("captions", ())),
            )
            yield _plan_row(concept, hashes, settings)


def _plan_row(concept: Concept, hashes: list[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    described = {name: getattr(concept, name) for name in _USED}
    return {
        "row_id": row_id(described, hashes, settings),
        "concept_id": concept.concept_id,
        "concept": json.dumps(described | {"images": concept.images}),
        "image_hashes": hashes,
    }


def _parse_concept(text: str) -> Concept:
    described = json.loads(text)
    return Concept(**described | {name: tuple(described[name]) for name in ("images", "captions")})


def parse_example(row: Mapping[str, Any]) -> ConceptExample:
    """Return the example of a RESULT_SCHEMA row."""
    return ConceptExample(concept=_parse_concept(row["concept"]), **load(row["tensors"]))


class ExampleMaker:
    """A model and a feature extractor on one device that make examples of batches of plan rows."""

    def __init__(self, config: RunConfig) -> None:
        self._photos = config.photos
        self._backbone = load_model(config)
        extractor = load_extractor(locate(config.extractor), config.device)
        self._features = PhotoFeatures(self._backbone, extractor, config.encoder.network)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Make the examples of PLAN_SCHEMA rows; return RESULT_SCHEMA rows in the same order.

        An error that is one row's own is in that row; what is raised is no row's fault.
        """
        return pa.Table.from_pylist([self._finish(row) for row in batch.to_pylist()], RESULT_SCHEMA)

    def _finish(self, row: Mapping[str, Any]) -> dict[str, Any]:
        known = {"row_id": row["row_id"], "concept_id": row["concept_id"]}
        try:
            concept = _parse_concept(row["concept"])
            pictures, _ = open_pictures(concept, self._photos, {"images": row["image_hashes"]})
            example = encode_example(concept, pictures, self._backbone, self._features)
            tensors = {"features": example.features.contiguous(), "moments": example.moments.contiguous()}
            return known | {"status": "ok", "concept": row["concept"], "tensors": save(tensors)}
        except (ConceptError, InputChanged, OSError) as error:
            return known | {"status": "failed", "error": redact(str(error))}
        except Exception as error:
            return known | {"status": "failed", "error": logged_as_bug(error)}


def failures(store: RunStore, wanted: Mapping[str, str], missing: Collection[str]) -> dict[str, str]:
    """Return concept id -> error of the rows in `missing`; `wanted`: row id -> concept id."""
    errors = {
        row["row_id"]: row["error"]
        for rows in read_results(store, PARTS, ["row_id", "error"])
        for row in rows
        if row["row_id"] in missing
    }
    return {wanted[each]: errors.get(each) or "its photos were not read" for each in sorted(missing)}
