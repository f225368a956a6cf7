"""The training examples of an encoder: one row a concept, made by Ray Data actors and kept in the output as Parquet.

An example is all that training needs of a concept: features of its photos, their encoded views and, where they count,
the rows that an earlier run learned of it. Photos are read and decoded once; a row whose id (the digest of all that the
example depends on) is there already is not made again.
"""

from __future__ import annotations

import dataclasses
import json
import posixpath
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import torch
from safetensors.torch import load, save

from pipeline.actor.failures import logged_as_bug
from pipeline.actor.library import read_embedding
from pipeline.actor.model_loading import load_model
from pipeline.bulk.rows import read_results, row_id
from pipeline.bulk.stage import Stage
from pipeline.config import RunConfig
from pipeline.inputs.content_hash import content_hashes
from pipeline.inputs.manifest import BadRow, ManifestRow
from pipeline.inputs.models import extractor_hash, locate, model_hash
from pipeline.inputs.photos import open_pictures
from pipeline.ledger.gate import BELOW
from pipeline.ledger.records import ConceptRecord, StoredFile
from pipeline.store.errors import InputChanged
from pipeline.store.redact import redact
from pipeline.store.storage import RunStore
from textual_inversion.concept import Concept
from textual_inversion.encoder import PhotoFeatures
from textual_inversion.encoder_training import ConceptExample, encode_example
from textual_inversion.errors import BadInput, ConceptError
from textual_inversion.extractors import load_extractor
from textual_inversion.initialise import learning_encoders

PLAN = "examples/plan"
PARTS = "examples/parts"

FORMAT = 2
"""Version of what an example holds; a change makes all of them again."""

_USED = ("concept_id", "placeholder_token", "initializer", "category", "captions")
"""Fields of a concept that its example keeps, besides the photos."""

_LEARNED = "learned_rows."
"""Beginning of the names of an example's learned rows among its tensors; the text encoder's key follows."""

_ROWS_PER_CALL = 8
_ROWS_PER_PART = 256
_HASHED_AT_ONCE = 512

PLAN_SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("concept_id", pa.string()),
        ("concept", pa.string()),
        ("image_hashes", pa.list_(pa.string())),
        ("embedding", pa.struct([("uri", pa.string()), ("bytes", pa.int64()), ("sha256", pa.string())])),
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
    """Yield a PLAN_SCHEMA row for every concept that an earlier run, `encoder.from_run`, learned from photos whose
    hashes its record has. With `encoder.training.row_weight` the row names the embedding whose rows the example has."""
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
            yield _plan_row(concept, hashes, settings, _embedding_of(record, config))


def _embedding_of(record: ConceptRecord, config: RunConfig) -> dict[str, Any] | None:
    """Return address, size and digest of the embedding whose rows the concept's example takes; None if rows do not
    count, and for a concept that is below the gate, has another number of rows, or was learned with an adapter, without
    which its rows are not the concept."""
    encoder = config.encoder
    folder = record.result
    if not encoder.training.row_weight or record.gate == BELOW or record.num_vectors != encoder.network.num_vectors:
        return None
    file = record.files.get(posixpath.basename(folder.embedding))
    if file is None or posixpath.basename(folder.adapter) in record.files:
        return None
    return {"uri": RunStore(encoder.from_run).uri(folder.embedding), **dataclasses.asdict(file)}


def _plan_row(
    concept: Concept, hashes: list[str], settings: Mapping[str, Any], embedding: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    described = {name: getattr(concept, name) for name in _USED}
    return {
        "row_id": row_id(described, hashes, settings, *([embedding["sha256"]] if embedding else [])),
        "concept_id": concept.concept_id,
        "concept": json.dumps(described | {"images": concept.images}),
        "image_hashes": hashes,
        "embedding": embedding,
    }


def _parse_concept(text: str) -> Concept:
    described = json.loads(text)
    return Concept(**described | {name: tuple(described[name]) for name in ("images", "captions")})


def parse_example(row: Mapping[str, Any]) -> ConceptExample:
    """Return the example of a RESULT_SCHEMA row."""
    tensors = load(row["tensors"])
    rows = {name.removeprefix(_LEARNED): tensors.pop(name) for name in list(tensors) if name.startswith(_LEARNED)}
    return ConceptExample(concept=_parse_concept(row["concept"]), learned_rows=rows or None, **tensors)


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
            tensors |= {f"{_LEARNED}{key}": each for key, each in self._learned_rows(row["embedding"]).items()}
            return known | {"status": "ok", "concept": row["concept"], "tensors": save(tensors)}
        except (ConceptError, InputChanged, OSError) as error:
            return known | {"status": "failed", "error": redact(str(error))}
        except Exception as error:
            return known | {"status": "failed", "error": logged_as_bug(error)}

    def _learned_rows(self, embedding: Mapping[str, Any] | None) -> dict[str, torch.Tensor]:
        """Return the rows of a plan row's embedding, text encoder key -> [num_vectors, dim]; none without one, and of
        one that another model learned. Raises BadInput if it cannot be read or is not the file of its record."""
        if embedding is None:
            return {}
        uri = embedding["uri"]
        file = StoredFile(bytes=embedding["bytes"], sha256=embedding["sha256"])
        try:
            learned = read_embedding(uri, {posixpath.basename(uri): file})
        except ValueError as error:
            raise BadInput(str(error)) from error
        if learned.metadata.get("model_hash") != self._backbone.model_hash():
            return {}
        return {key: learned.vectors[key] for key in learning_encoders(self._backbone)}


def failures(store: RunStore, wanted: Mapping[str, str], missing: Collection[str]) -> dict[str, str]:
    """Return concept id -> error of the rows in `missing`; `wanted`: row id -> concept id."""
    errors = {
        row["row_id"]: row["error"]
        for rows in read_results(store, PARTS, ["row_id", "error"])
        for row in rows
        if row["row_id"] in missing
    }
    return {wanted[each]: errors.get(each) or "its photos were not read" for each in sorted(missing)}
