"""Failures that a later run knows again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pipeline.inputs.manifest import BadRow, content_digest
from pipeline.ledger.known_failures import PATH, key_of, read_known, write_known
from pipeline.ledger.records import ConceptRecord
from pipeline.store.storage import RunStore

ROW = BadRow(file="m.parquet", row=7, concept_id="mug", reason="no photo", content=content_digest({"images": []}))


def test_a_row_is_known_wherever_it_stands() -> None:
    assert key_of(dataclasses.replace(ROW, file="n.parquet", row=9)) == key_of(ROW)
    assert key_of(dataclasses.replace(ROW, reason="no photo \udcff")) != key_of(ROW)
    assert key_of(dataclasses.replace(ROW, content=content_digest({"images": ["a.png"]}))) != key_of(ROW)
    assert key_of(dataclasses.replace(ROW, content="")) == ""


def test_a_concept_is_known_if_its_input_is_to_blame() -> None:
    record = ConceptRecord(
        concept_id="mug", fingerprint="f", status="failed", placeholder_token="<m>", error="x", error_kind="bad_input"
    )
    assert key_of(record) != key_of(dataclasses.replace(record, fingerprint="g"))
    assert key_of(dataclasses.replace(record, error_kind="lost_worker")) == ""


def test_keys_come_back(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    assert read_known(store) == frozenset()
    write_known(store, ["b", "", "a", "b"])
    assert read_known(store) == {"a", "b"}
    store.put(PATH, b"[]")
    with pytest.raises(ValueError, match="delete it"):
        read_known(store)
