"""An exception of an unknown class, raised where something foreign is touched before and after the learning: it ends
the row or the concept that it belongs to, and nothing else. `tests/pipeline/actor/test_learner.py` does the same inside
an actor, `tests/pipeline/report/test_page.py` for the report's pictures."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipeline.config import PhotoConfig, RunConfig
from pipeline.inputs import content_hash
from pipeline.inputs.content_hash import content_hashes
from pipeline.inputs.manifest import BadRow, ManifestRow
from pipeline.inputs.photos import fetch
from pipeline.ledger import preflight
from pipeline.ledger.plan import Plan
from pipeline.ledger.preflight import examine
from pipeline.ledger.records import load_records
from pipeline.store import addresses, s3
from pipeline.store.storage import RunStore
from tests.pipeline import outputs
from tests.pipeline.runs import task, write_photo
from textual_inversion.concept import Concept
from textual_inversion.errors import BadInput


class UnknownError(Exception):
    """An error that nobody foresaw."""


def failing_for(name: str, instead_of: Any) -> Any:
    """Return a function that raises UnknownError if an argument mentions `name`, and else calls the original."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        if any(name in str(argument) for argument in arguments):
            raise UnknownError("of a library, at s3://key:hunter2@bucket/x")
        return instead_of(*arguments, **keywords)

    return call


def rows_of(*photos: str) -> list[ManifestRow | BadRow]:
    return [
        ManifestRow(
            file="m.parquet",
            row=number,
            concept=Concept(concept_id=f"c{number}", placeholder_token=f"<c{number}>", images=(photo,)),
            carried={},
            carried_json=b"{}",
        )
        for number, photo in enumerate(photos, 1)
    ]


@pytest.mark.parametrize(("module", "place"), [(content_hash, "fetch"), (addresses, "call_with_retries")])
def test_reading_a_photo_for_the_plan(module: Any, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd, good = write_photo(tmp_path / "odd.png", 1), write_photo(tmp_path / "good.png", 2)
    if place == "fetch":
        monkeypatch.setattr(module, place, failing_for("odd.png", getattr(module, place)))
    else:
        monkeypatch.setattr(module, "_read_up_to", failing_for("odd.png", module._read_up_to))
    plan = Plan("s", set(), partial(content_hashes, photos=PhotoConfig()))
    assert [one.concept.concept_id for one in plan.tasks(rows_of(odd, good))] == ["c2"]
    (bad,) = plan.bad
    assert bad.concept_id == "c1"
    assert "UnknownError" in bad.reason
    assert "hunter2" not in bad.reason


def test_listing_the_photos_of_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise UnknownError

    monkeypatch.setattr(s3, "list_page", fail)
    monkeypatch.setattr(content_hash, "fetch", lambda uri, _: uri.encode())
    found = content_hashes(["s3://bucket/a.png"], PhotoConfig())
    assert found == {"s3://bucket/a.png": content_hash.content_md5(b"s3://bucket/a.png")}


@pytest.mark.parametrize(
    "uri",
    ["s3://a b/x.png", "s3://buck!/x", "s3://key:hunter2@buck/x", "s3://Bücket/x", "s3:///x", f"s3://{'a' * 300}/x",
     "s3a://a b/x", "s3://arn:aws:s3:us-west-2:123456789012:accesspoint/x/y", "s3://"],
)  # fmt: skip
def test_addresses_that_name_no_bucket(uri: str) -> None:
    found = content_hashes([uri, "memory://absent"], PhotoConfig())
    assert isinstance(found[uri], ValueError)
    assert "names no bucket" in str(found[uri])
    assert "hunter2" not in str(found[uri])
    assert len(str(found[uri])) < 500
    with pytest.raises(BadInput, match="names no bucket"):
        fetch(uri, PhotoConfig())


def test_an_access_point_is_a_bucket() -> None:
    uri = "s3://arn:aws:s3:us-west-2:123456789012:accesspoint:photos/x.png"
    assert addresses.absolute(uri) == uri


@pytest.mark.parametrize("place", ["open_pictures", "check_placeholder"])
def test_a_dry_run(place: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.inputs.models import load_model_vocabularies

    config = RunConfig(model=str(tiny_model), extractor="")
    photo = write_photo(tmp_path / "a.png", 1)
    monkeypatch.setattr(preflight, place, failing_for("<odd>", getattr(preflight, place)))
    tasks = [task("odd", (photo,)), task("good", (photo,))]
    (finding,) = examine(tasks, config, [], load_model_vocabularies(config), photos=True)
    assert (finding.concept_id, finding.is_fatal) == ("odd", True)
    assert "UnknownError" in finding.text
    assert "hunter2" not in finding.text


def test_reading_records(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.filesystem("memory").store.clear()
    store = RunStore("memory://unforeseen")
    for one in (task("odd"), task("good")):
        outputs.end(store, one)
    fs = type(fsspec.filesystem("memory"))
    cat_ranges = fs.cat_ranges

    def answering(self: Any, paths: list[str], *arguments: Any, **keywords: Any) -> list[Any]:
        answers = cat_ranges(self, paths, *arguments, **keywords)
        return [
            UnknownError("of a library") if "/odd/" in path else answer
            for path, answer in zip(paths, answers, strict=True)
        ]

    monkeypatch.setattr(fs, "cat_ranges", answering)
    found = {record.concept_id: record for record in load_records(store)}
    assert found["good"].status == "done"
    assert found["odd"].status == "failed"
    assert "UnknownError: of a library" in found["odd"].error
