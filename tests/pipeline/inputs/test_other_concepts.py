"""The manifest of other concepts: what is read of it, and what is refused."""

from __future__ import annotations

import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.inputs import other_concepts
from pipeline.inputs.other_concepts import read_others
from tests.pipeline.runs import write_manifest


def test_rows_that_are_no_concepts_are_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = str(write_manifest(tmp_path, ["a", "no id/", "c"]))
    with caplog.at_level(logging.WARNING, "pipeline"):
        assert [concept.concept_id for concept in read_others(manifest)] == ["a", "c"]
    assert "gate.others: row 2 of" in caplog.text


def test_without_an_address_there_are_none() -> None:
    assert read_others("") == []


def test_more_photos_than_an_actor_should_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = str(write_manifest(tmp_path, ["a", "b"]))
    monkeypatch.setattr(other_concepts, "MAX_PHOTOS", 4)
    assert len(read_others(manifest)) == 2
    monkeypatch.setattr(other_concepts, "MAX_PHOTOS", 3)
    with pytest.raises(ValueError, match=r"gate\.others = '.*manifest\.parquet' has more than 3 photos"):
        read_others(manifest)


def test_a_manifest_of_nothing(tmp_path: Path) -> None:
    pq.write_table(pa.table({"concept_id": pa.array([], pa.string()), "images": pa.array([], pa.list_(pa.string()))}),
                   tmp_path / "empty.parquet")  # fmt: skip
    with pytest.raises(ValueError, match=r"gate\.others = '.*empty\.parquet' has no concept"):
        read_others(str(tmp_path / "empty.parquet"))
    with pytest.raises((ValueError, OSError), match="absent"):
        read_others(str(tmp_path / "absent.parquet"))
