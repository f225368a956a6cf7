"""A folder of photos as a manifest: one concept, or one in each of its folders.

Photos may be described in `metadata.jsonl` or `metadata.csv`, as in the ImageFolder convention of Hugging Face
datasets: a row with `file_name` describes a photo, and `text` is its caption. Further columns describe the photo's
concept. A row without `file_name` but with `concept_id` describes the concept alone.
"""

from __future__ import annotations

import csv
import json
import posixpath
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.inputs.cells import check_names, id_text
from pipeline.inputs.text_tables import table_rows
from pipeline.store.redact import redact
from textual_inversion.concept import whole_word_pattern
from textual_inversion.errors import BadInput
from textual_inversion.photo_files import SUFFIXES

METADATA = ("metadata.jsonl", "metadata.csv")
"""Names of the files that describe photos."""

PHOTO_COLUMNS = ("file_name", "text", "mask_file_name")
"""Columns of a metadata file that describe one photo."""

CONCEPT_COLUMNS = ("concept_id", "placeholder", "initializer", "category", "num_vectors", "start_from", "priority")
"""Columns of a metadata file that describe the photo's concept; all others are carried to the results."""

_LISTS = ("images", "masks", "captions")


@dataclass(slots=True)
class _Photos:
    """Photos of one concept and what the metadata says of them."""

    masks: dict[str, str] = field(default_factory=dict)
    """Path of each photo -> path of its mask, or an empty text."""
    texts: dict[str, str] = field(default_factory=dict)
    """Path of a photo -> its text."""
    values: dict[str, list[Any]] = field(default_factory=dict)
    """Column -> the different values that the metadata gives it, in their order."""

    def add(self, row: Mapping[str, Any]) -> None:
        """Add the values of a row of metadata."""
        for name, value in row.items():
            if name not in (*PHOTO_COLUMNS, "concept_id") and value is not None:
                known = self.values.setdefault(name, [])
                if value not in known:
                    known.append(value)


def has_pictures(paths: Sequence[str]) -> bool:
    """Return whether one of a folder's files is a photo."""
    return any(path.lower().endswith(SUFFIXES) for path in paths)


def folder_rows(folder: str, paths: Sequence[str]) -> tuple[list[dict[str, Any] | BadInput], list[str]]:
    """Return the manifest rows of a folder of photos, and remarks on what is not used.

    `folder` is its address with `/` at the end, `paths` are its files, relative to it. Raises ValueError for a
    metadata file that cannot be read, and for photos of which the folders do not say to which concept they belong.
    """
    rows: list[dict[str, Any] | BadInput] = []
    concepts: dict[str, _Photos] = {}
    described: dict[str, Mapping[str, Any]] = {}
    for place, row in _metadata(folder, paths):
        if isinstance(row, BadInput):
            rows.append(BadInput(f"{place}: {row}"))
        elif row.get("file_name") in described:
            rows.append(BadInput(f"{place}: {row['file_name']!r} has an earlier row"))
        elif row.get("file_name"):
            described[row["file_name"]] = row
        elif row.get("concept_id"):
            concepts.setdefault(str(id_text(row["concept_id"])), _Photos()).add(row)
        else:
            rows.append(BadInput(f"{place}: it has neither file_name, for a photo, nor concept_id, for a concept"))
    masks = {row["mask_file_name"] for row in described.values() if row.get("mask_file_name")}
    photos = sorted({path for path in paths if path.lower().endswith(SUFFIXES)} - masks | described.keys())
    name_of = _names_from_folders(folder, [path for path in photos if not described.get(path, {}).get("concept_id")])
    for path in photos:
        row = described.get(path, {})
        concept_id = name_of.get(path) or str(id_text(row["concept_id"]))
        concept = concepts.setdefault(concept_id, _Photos())
        concept.masks[path] = row.get("mask_file_name") or ""
        if row.get("text"):
            concept.texts[path] = row["text"]
        concept.add(row)
    rows += [_row(name, concepts[name]) for name in sorted(concepts)]
    return rows, _notes(rows, concepts)


def concept_name(folder_name: str) -> str:
    """Return a concept id made of a folder's name: letters without their accents, and `-` for what an id cannot have.
    The name itself if nothing of it would be left."""
    plain = unicodedata.normalize("NFKD", folder_name).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("-.") or folder_name


def _names_from_folders(folder: str, paths: Sequence[str]) -> dict[str, str]:
    """Return the concept id of each photo by the folder it lies in: `folder` itself, or one directly in it."""
    depths = {path.count("/") for path in paths}
    if max(depths, default=0) > 1:
        deep = next(path for path in paths if path.count("/") > 1)
        raise ValueError(
            f"{redact(folder)} has photos deeper than one folder for each concept ({deep}); name the folder that holds "
            "the concepts' folders, or give the photos a concept_id in metadata.jsonl"
        )
    if len(depths) > 1:
        loose = next(path for path in paths if "/" not in path)
        raise ValueError(
            f"{redact(folder)} has photos ({loose}) beside folders of photos; put them into a folder of their own, or "
            "give them a concept_id in metadata.jsonl"
        )
    own_name = posixpath.basename(folder.rstrip("/"))
    folders: dict[str, str] = {}
    for path in paths:
        name = posixpath.dirname(path) or own_name
        if folders.setdefault(concept_name(name), name) != name:
            raise ValueError(
                f"{redact(folder)} has the folders {folders[concept_name(name)]!r} and {name!r}, whose concepts would "
                f"both be called {concept_name(name)!r}; rename one"
            )
    return {path: concept_name(posixpath.dirname(path) or own_name) for path in paths}


def _metadata(folder: str, paths: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any] | BadInput]]:
    """Yield the rows of all metadata files with their places; names of files are relative to `folder`."""
    files = [path for path in paths if posixpath.basename(path) in METADATA]
    for path in files:
        below = posixpath.dirname(path)
        if sum(posixpath.dirname(other) == below for other in files) > 1:
            raise ValueError(f"{redact(folder + below)} has {' and '.join(METADATA)}; keep one of them")
        try:
            for number, row in table_rows(folder + path, _check_columns):
                place = f"{path} row {number}"
                yield place, row if isinstance(row, BadInput) else _relative_to_folder(row, below)
        except (OSError, UnicodeError, csv.Error, json.JSONDecodeError) as error:
            raise ValueError(f"{redact(folder + path)} cannot be read: {redact(str(error))}") from error
        except ValueError as error:
            raise ValueError(f"{redact(folder + path)}: {error}") from error


def _relative_to_folder(row: Mapping[str, Any], below: str) -> Mapping[str, Any] | BadInput:
    changed = dict(row)
    for name in PHOTO_COLUMNS:
        value = row.get(name)
        if value is not None and not isinstance(value, str):
            return BadInput(f"{name} is {value!r}; it must be text")
        if value and name != "text":
            changed[name] = posixpath.normpath(posixpath.join(below, value))
    return changed


def _check_columns(names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"it has two columns of the name {next(name for name in names if names.count(name) > 1)!r}")
    for name in names:
        if name in _LISTS:
            raise ValueError(f"column {name!r} belongs into a manifest; a row here is one photo, with {PHOTO_COLUMNS}")
    if "file_name" not in names and "concept_id" not in names:
        raise ValueError(f"it has no column 'file_name' and no 'concept_id'; it has {', '.join(names)}")
    check_names(names, (*PHOTO_COLUMNS, *CONCEPT_COLUMNS))


def _row(name: str, concept: _Photos) -> dict[str, Any] | BadInput:
    """Return the manifest row of a concept. A carried column whose values differ is a list of them."""
    row: dict[str, Any] = {"concept_id": name, "images": list(concept.masks)}
    for column, values in concept.values.items():
        if column in CONCEPT_COLUMNS and len(values) > 1:
            return BadInput(f"concept {name!r}: its photos' {column} differs: {', '.join(map(repr, values))}")
        row[column] = values[0] if len(values) == 1 else values
    if any(concept.masks.values()):
        row["masks"] = [mask for mask in concept.masks.values() if mask]
    if _are_captions(name, concept):
        row["captions"] = [concept.texts.get(path, "") for path in concept.masks]
    return row


def _are_captions(name: str, concept: _Photos) -> bool:
    """Return whether one of the photos' texts says where the concept is, so that all of them must."""
    placeholder = (concept.values.get("placeholder") or [f"<{name}>"])[0]
    hole = re.compile(whole_word_pattern("{}", str(placeholder)))
    return any(hole.search(text) for text in concept.texts.values())


def _notes(rows: Sequence[dict[str, Any] | BadInput], concepts: Mapping[str, _Photos]) -> list[str]:
    unused = [name for name, concept in concepts.items() if concept.texts and not _are_captions(name, concept)]
    notes = []
    if unused:
        notes.append(f"the photos' texts are no captions, as none has {{}} where the concept is: {_some(unused)}")
    plain = [row["concept_id"] for row in rows if isinstance(row, dict) and not row.get("initializer")]
    if plain:
        notes.append(
            f"no initializer, a word for what the photos show, so learning starts from the mean of all words: "
            f"{_some(plain)}; give one in metadata.jsonl, or by python -m pipeline.manifest --initializer"
        )
    return notes


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
