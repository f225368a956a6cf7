"""The record of a trained encoder: written last, and the only truth about whether a training is done."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from pipeline.ledger.records import StoredFile
from pipeline.store.storage import RunStore

ENCODER = "encoder.safetensors"
"""Path of the trained encoder."""

RECORD = "encoder.json"
"""Path of its record."""

CURVE = "curve.parquet"
"""Path of the learning curve, which grows at every checkpoint: `step`, `loss` and `held_out`."""

CHECKPOINT = "training/checkpoint.pt"
"""Path of the checkpoint, which exists while the encoder is trained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderRecord:
    """A finished training. Unknown keys are ignored on reading, so that older code reads newer records."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="ignore")

    fingerprint: str
    """Digest of all that the encoder depends on: settings, models, concepts and the start."""
    model_hash: str
    extractor_hash: str
    data: str
    """Digest of the concepts that it was trained and evaluated on."""
    settings: Mapping[str, Any]
    """The settings that the encoder depends on."""
    trained: int
    """Number of concepts that it was trained on."""
    held_out: tuple[str, ...]
    """Ids of the concepts that it was never trained on."""
    left_out: Mapping[str, str]
    """Concept id or manifest row -> the reason why it could not be used."""
    ending: str
    """Reason for the end of the training."""
    steps: int
    """Steps taken."""
    best_step: int
    """Step of the lowest held-out loss, whose weights these are."""
    held_out_loss: float
    curve: Sequence[tuple[int, float, float]]
    """Step, training loss and held-out loss at each checkpoint."""
    file: StoredFile
    """The encoder's file."""
    pictures: tuple[str, ...] = ()
    """Paths of the pictures of held-out concepts."""
    finished_at: str = ""
    """UTC, ISO 8601."""


_ADAPTER = TypeAdapter(EncoderRecord)


def put_record(store: RunStore, record: EncoderRecord) -> None:
    """Write the record; the encoder's file is there before."""
    store.put(RECORD, json.dumps(dataclasses.asdict(record), indent=1).encode())


def read_record(store: RunStore) -> EncoderRecord | None:
    """Return the record of an output, or None if there is none. Raises ValueError for something else in its place."""
    try:
        data = store.get(RECORD)
    except FileNotFoundError:
        return None
    try:
        return _ADAPTER.validate_json(data)
    except ValidationError as error:
        raise ValueError(f"{store.uri(RECORD)} is no record of an encoder: {error}; delete it") from error
