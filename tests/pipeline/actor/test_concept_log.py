"""A concept's log: appended attempt by attempt, bounded, harmless where storage fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from botocore.exceptions import NoCredentialsError

from pipeline.actor import concept_log
from pipeline.actor.concept_log import ConceptLog
from pipeline.store.storage import ConceptFolder, RunStore

FOLDER = ConceptFolder("toy", "f-1")


def lines(store: RunStore) -> list[dict[str, object]]:
    return [json.loads(line) for line in store.get(FOLDER.log).splitlines()]


def test_attempts_follow_each_other(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    first = ConceptLog(store, FOLDER, 1)
    first.store("checkpoint", step=100)
    first.note("lost: nobody stores this one")
    second = ConceptLog(store, FOLDER, 2)
    second.note("prepared", step=100)
    second.store("failed", error="photo https://u:secret@h/x cannot be read")
    told = lines(store)
    assert [line["message"] for line in told] == ["begins", "checkpoint", "begins", "prepared", "failed"]
    assert [line.get("attempt") for line in told] == [1, None, 2, None, None]
    assert told[0]["host"]
    assert told[-1]["error"] == "photo https://***@h/x cannot be read"


def test_it_does_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concept_log, "_MOST_BYTES", 1000)
    store = RunStore(str(tmp_path))
    for attempt in range(20):
        ConceptLog(store, FOLDER, attempt).store("failed")
    told = lines(store)  # whole lines
    assert len(store.get(FOLDER.log)) < 1500
    assert [line["attempt"] for line in told if "attempt" in line][-1] == 19


@pytest.mark.parametrize("error", [PermissionError("no entry"), NoCredentialsError()])
def test_storage_that_fails_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def refuse(*_: object) -> None:
        raise error

    log = ConceptLog(RunStore(str(tmp_path)), FOLDER, 1)
    monkeypatch.setattr(RunStore, "put", refuse)
    log.store("published")
    assert f"log.jsonl was not stored: {error}" in caplog.text
