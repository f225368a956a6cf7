"""Folders of photos, and tables in text, as manifests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.inputs.manifest import (
    BadRow,
    ManifestRow,
    concept_ids,
    count_rows,
    manifest_notes,
    read_by_priority,
    read_manifest,
)
from pipeline.inputs.photo_folders import concept_name
from pipeline.store.storage import RunStore


def fill(root: str, *paths: str, metadata: list[dict[str, Any]] | None = None) -> str:
    """Put small objects at the paths below a folder `photos`, and the rows of metadata.jsonl; return its address."""
    store = RunStore(root)
    for path in paths:
        store.put(f"photos/{path}", b"not looked at")
    if metadata is not None:
        store.put("photos/metadata.jsonl", "".join(json.dumps(row) + "\n" for row in metadata).encode())
    return store.uri("photos")


def read(uri: str) -> list[ManifestRow]:
    rows = list(read_manifest(uri))
    assert all(isinstance(row, ManifestRow) for row in rows), rows
    return [row for row in rows if isinstance(row, ManifestRow)]


def reasons(uri: str) -> list[str]:
    return [row.reason for row in read_manifest(uri) if isinstance(row, BadRow)]


def test_a_folder_of_photos_is_one_concept(root: str) -> None:
    uri = fill(root, "2.JPG", "1.png", "notes.txt", ".DS_Store", "_old/3.png")
    (row,) = read(uri)
    assert (row.file, row.row) == (f"{uri}/", 1)
    assert (row.concept.concept_id, row.concept.placeholder_token, row.concept.initializer) == (
        "photos",
        "<photos>",
        "",
    )
    assert row.concept.images == (f"{uri}/1.png", f"{uri}/2.JPG")
    assert count_rows(uri) == count_rows(f"{uri}/") == 1
    (note,) = manifest_notes(uri)
    assert note.startswith("no initializer, a word for what the photos show, so learning starts from the mean")


def test_a_folder_of_folders_is_a_concept_each(root: str) -> None:
    uri = fill(root, "My dog/b.webp", "My dog/a.heic", "café/1.jpeg")
    dog, cafe = read(uri)
    assert (dog.concept.concept_id, dog.concept.images) == ("My-dog", (f"{uri}/My dog/a.heic", f"{uri}/My dog/b.webp"))
    assert cafe.concept.concept_id == "cafe"
    assert list(concept_ids(uri)) == ["My-dog", "cafe"]


def test_metadata_describes_photos_and_concepts(root: str) -> None:
    metadata = [
        {"file_name": "tiger/1.png", "text": "a {} in the snow", "initializer": "cat", "shelf": 4,
         "mask_file_name": "masks/1.png"},
        {"file_name": "tiger/2.png", "text": "a <tiger> asleep", "shelf": 5, "mask_file_name": "masks/2.png"},
        {"concept_id": "ink", "category": "style", "priority": 3},
        {"file_name": "loose.png", "concept_id": "other", "text": "a box"},
    ]  # fmt: skip
    uri = fill(
        root, "tiger/1.png", "tiger/2.png", "masks/1.png", "masks/2.png", "ink/a.png", "loose.png", metadata=metadata
    )
    ink, other, tiger = read(uri)
    assert tiger.concept.captions == ("a {} in the snow", "a {} asleep")
    assert tiger.concept.masks == (f"{uri}/masks/1.png", f"{uri}/masks/2.png")
    assert (tiger.concept.initializer, tiger.carried) == ("cat", {"shelf": [4, 5]})
    assert (ink.concept.category, ink.priority) == ("style", 3)
    assert (other.concept.concept_id, other.concept.images, other.concept.captions) == (
        "other",
        (f"{uri}/loose.png",),
        (),
    )
    assert next(row.concept.concept_id for row in read_by_priority(uri) if isinstance(row, ManifestRow)) == "ink"
    notes = manifest_notes(uri)
    assert notes[0] == "the photos' texts are no captions, as none has {} where the concept is: other"
    assert "ink, other; give one" in notes[1]


def test_metadata_may_be_csv_and_lie_beside_the_photos(root: str) -> None:
    uri = fill(root, "a/1.png", "b/1.png")
    RunStore(root).put("photos/a/metadata.csv", b"file_name,initializer,num_vectors,sku\n1.png,cat,2,007\n")
    a, b = read(uri)
    assert (a.concept.initializer, a.concept.num_vectors, a.carried) == ("cat", 2, {"sku": "007"})
    assert (b.concept.initializer, b.carried) == ("", {})


def test_what_is_wrong_with_one_concept_stays_its_own(root: str) -> None:
    metadata: list[dict[str, Any]] = [
        {"file_name": "a/1.png", "initializer": "cat"},
        {"file_name": "a/2.png", "initializer": "dog"},
        {"file_name": "b/1.png", "text": "a {}"},
        {"file_name": "b/1.png"},
        {"initializer": "cat"},
        {"file_name": 3},
    ]
    uri = fill(root, "a/1.png", "a/2.png", "b/1.png", "b/2.png", "c/1.png", metadata=metadata)
    assert [row.concept.concept_id for row in read_manifest(uri) if isinstance(row, ManifestRow)] == ["c"]
    assert reasons(uri) == [
        "metadata.jsonl row 4: 'b/1.png' has an earlier row",
        "metadata.jsonl row 5: it has neither file_name, for a photo, nor concept_id, for a concept",
        "metadata.jsonl row 6: file_name is 3; it must be text",
        "concept 'a': its photos' initializer differs: 'cat', 'dog'",
        "captions holds an empty or missing text",
    ]


@pytest.mark.parametrize(
    ("paths", "metadata", "message"),
    [
        (["1.png", "a/1.png"], None, r"has photos \(1.png\) beside folders of photos"),
        (["x/a/1.png"], None, r"deeper than one folder for each concept \(x/a/1.png\)"),
        (["a b/1.png", "a-b/1.png"], None, "the folders 'a b' and 'a-b', whose concepts would both be called 'a-b'"),
        (["a/1.png", "metadata.csv"], [{"file_name": "a/1.png"}], "metadata.jsonl and metadata.csv; keep one"),
        (["a/1.png"], [{"file_name": "a/1.png", "initialiser": "cat"}], "did you mean 'initializer'"),
        (["a/1.png"], [{"file_name": "a/1.png", "images": "cat"}], "column 'images' belongs into a manifest"),
        (["a/1.png"], [{"name": "a/1.png"}], "no column 'file_name' and no 'concept_id'; it has name"),
        (["notes.txt"], None, "no manifest at .*photos: give a folder of photos"),
    ],
)
def test_folders_that_say_nothing_clear_are_refused(
    root: str, paths: list[str], metadata: list[dict[str, Any]] | None, message: str
) -> None:
    uri = fill(root, *paths, metadata=metadata)
    with pytest.raises(ValueError, match=message):
        list(read_manifest(uri))


def test_a_folder_with_parquet_files_stays_a_table(root: str) -> None:
    uri = fill(root, "1.png", "m.parquet")
    with pytest.raises(ValueError, match=r"m.parquet cannot be read as Parquet"):
        list(read_manifest(uri))


@pytest.mark.parametrize("name", ["m.csv", "m.tsv", "m.json", "m.jsonl"])
def test_tables_in_text(root: str, name: str) -> None:
    rows = [
        {"concept_id": "007", "images": ["a b.png", "../c.png"], "num_vectors": 2, "shelf": "4", "priority": 1},
        {"concept_id": "cat", "images": ["d.png"], "captions": ["a {}, or|so"], "num_vectors": None, "shelf": None},
    ]
    header = ["concept_id", "images", "captions", "num_vectors", "priority", "shelf"]
    cells = [["007", "a b.png | ../c.png", "", "2", "1", "4"], ["cat", "d.png", '"[""a {}, or|so""]"', "", "", ""]]
    text = {
        "m.csv": "\n".join(",".join(row) for row in [header, *cells]),
        "m.tsv": "\n".join("\t".join(row) for row in [header, *cells]),
        "m.json": json.dumps(rows),
        "m.jsonl": "\n".join(json.dumps(row) for row in rows),
    }[name]
    store = RunStore(root)
    store.put(f"sets/{name}", text.encode())
    uri = store.uri(f"sets/{name}")
    first, second = read(uri)
    assert (first.file, first.row, second.row) == (uri, 1, 2)
    assert first.concept.images == (store.uri("sets/a b.png"), store.uri("c.png"))
    assert (first.concept.concept_id, first.concept.num_vectors, first.priority) == ("007", 2, 1)
    assert first.carried == {"shelf": "4", "priority": 1}
    assert (second.concept.captions, second.concept.num_vectors) == (("a {}, or|so",), 1)
    assert list(concept_ids(uri)) == ["007", "cat"]
    assert count_rows(uri) == 2


def test_bad_rows_of_tables_in_text(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("concept_id,images,num_vectors\na,1.png,many\nb\nc,,\nd,1.png,1\n")
    assert [row.row for row in read_manifest(str(tmp_path / "m.csv")) if isinstance(row, BadRow)] == [1, 2, 3]
    assert reasons(str(tmp_path / "m.csv")) == [
        "num_vectors is 'many'; it must be a whole number",
        "it does not have 3 cells, as the header has",
        "concept 'c' has no images; give it 3 to 5 photos",
    ]
    (tmp_path / "m.jsonl").write_text('{"concept_id": "a", "images": {"x": 1}}\n{"images": ["x.png"]}\nhello\n')
    first, second, third = reasons(str(tmp_path / "m.jsonl"))
    assert first == "images is {'x': 1}; it must be a list of texts"
    assert second.startswith("concept_id None must be")
    assert third.startswith("'hello' is no JSON object")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.csv", "concept_id,image\na,1.png\n", "m.csv: column|m.csv: it has no column 'images'"),
        ("m.json", '{"concept_id": "a"}', "m.json: it must be a list of objects"),
        ("m.csv", "concept_id,images\n\xe9", "m.csv cannot be read"),
    ],
)
def test_text_that_is_no_manifest(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        list(read_manifest(str(tmp_path / name)))


def test_names_of_concepts() -> None:
    assert [concept_name(name) for name in ("Müsli (neu)", "a.b_c", "..x", "собака")] == [
        "Musli-neu",
        "a.b_c",
        "x",
        "собака",
    ]
