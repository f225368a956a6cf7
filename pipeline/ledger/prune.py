"""`--prune`: deletes what the present manifest and settings no longer account for.

Deleted are all objects of concepts that have no row any more. Of a concept with a present result, the results of
earlier photos, rows and settings are deleted, the tries that were not kept, and the pictures drawn with any of these. A
concept without a present result keeps all that it has. Evaluations and settings stay. Nothing is deleted without the
option, and nothing if it would take more concepts than `--prune-at-most` allows.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.bounds import Bound, largest_number
from pipeline.inputs.manifest import concept_ids, short_hash
from pipeline.ledger.plan import Plan
from pipeline.ledger.records import from_json
from pipeline.store.addresses import open_for_reading
from pipeline.store.parquet import read_table
from pipeline.store.storage import ConceptFolder, RunStore

METADATA = "images/metadata"
_BATCH = 200
_SHOWN = 20


@dataclass
class _Found:
    """The objects of one concept under one fingerprint."""

    bytes: int = 0
    is_done: bool = False
    awaits_retry: bool = False
    """The concept has tries left, so all its tries are needed."""


@dataclass
class Leftovers:
    """Objects to delete."""

    removed: dict[str, int] = field(default_factory=dict)
    """Concepts without a row, by id -> bytes under `concepts/`."""
    superseded: dict[ConceptFolder, int] = field(default_factory=dict)
    """Results of other photos, rows or settings and tries that were not kept, of concepts with a row -> bytes."""
    pictures: list[str] = field(default_factory=list)
    """Paths of the pictures drawn with any of these."""
    num_rows: int = 0
    """Metadata rows of such pictures, in all parts."""
    num_concepts: int = 0
    """Concepts in the output, those of `removed` included."""

    def check(self, bound: Bound) -> None:
        """Raise ValueError if more concepts would be deleted than the bound allows: the manifest may be cut short."""
        if len(self.removed) > largest_number(bound, self.num_concepts):
            percent = math.ceil(100 * len(self.removed) / self.num_concepts)
            raise ValueError(
                f"--prune would delete {percent} % of the concepts in the output ({len(self.removed):,} of "
                f"{self.num_concepts:,}), which have no row in this manifest; nothing was deleted; if that is right, "
                f"say --prune-at-most {percent}%"
            )

    def lines(self) -> Iterator[str]:
        """Yield lines for a person: the first few by name, and counts of all."""
        names = [f"concept {name}, which has no row" for name in self.removed]
        names += [f"{folder.root}, which is not the present result" for folder in self.superseded]
        yield from names[:_SHOWN]
        if len(names) > _SHOWN:
            yield f"{len(names) - _SHOWN:,} more"
        size = sum(self.removed.values()) + sum(self.superseded.values())
        yield (
            f"{len(self.removed):,} concepts without a row, {len(self.superseded):,} results that are not the present "
            f"ones ({size / 1e6:,.1f} MB), {self.num_rows:,} pictures"
        )


def find_leftovers(store: RunStore, manifest: str, plan: Plan) -> Leftovers:
    """Find what is to be deleted. `plan` must have read the whole manifest.

    Raises ValueError if the manifest does not tell which concepts have a row.
    """
    nameless = [row for row in plan.bad if row.concept_id is None]
    if nameless or not plan.carried:
        what = f"{nameless[0].file}, row {nameless[0].row}: {nameless[0].reason}" if nameless else "it has no good row"
        raise ValueError(
            f"--prune: the manifest does not tell which concepts there still are ({what}); correct it first"
        )
    found = _scan(store)
    wanted = {short_hash(concept_id) for concept_id in concept_ids(manifest)}
    bad = {row.concept_id for row in plan.bad}
    left = Leftovers(num_concepts=len(found))
    kept = _kept_tries(store, found, plan)
    for concept_id, by_fingerprint in found.items():
        present = [fingerprint for fingerprint in by_fingerprint if fingerprint.encode() in plan.carried]
        has_result = any(by_fingerprint[each].is_done and not by_fingerprint[each].awaits_retry for each in present)
        if short_hash(concept_id) not in wanted:
            left.removed[concept_id] = sum(objects.bytes for objects in by_fingerprint.values())
        elif concept_id not in bad and has_result:
            for fingerprint, objects in by_fingerprint.items():
                folder = ConceptFolder(concept_id, fingerprint)
                if fingerprint not in present and folder not in kept:
                    left.superseded[folder] = objects.bytes
    for part in _picture_parts(store, left):
        left.num_rows += pc.sum(part.is_leftover).as_py() or 0
        left.pictures += part.pictures
    with_row = set(left.pictures)
    of_removed = (path for concept_id in left.removed for path, _ in store.scan(f"images/{concept_id}"))
    left.pictures += [path for path in of_removed if path not in with_row]
    return left


def delete_leftovers(store: RunStore, left: Leftovers) -> None:
    """Delete metadata rows first, then their pictures, then results.

    In this order, an interruption leaves no row whose picture is gone.
    """
    for part in _picture_parts(store, left):
        if pc.all(part.is_leftover).as_py():
            store.delete(part.path)
        elif pc.any(part.is_leftover).as_py():
            buffer = io.BytesIO()
            pq.write_table(part.table.filter(pc.invert(part.is_leftover)), buffer)
            store.put(part.path, buffer.getvalue())
    for path in left.pictures:
        store.delete(path)
    roots = [folder.root for folder in left.superseded] + [f"concepts/{name}" for name in left.removed]
    for root in roots:
        # Records go first: without its record, a folder counts as nothing.
        for path in sorted(store.list(root), key=lambda path: not path.endswith("/record.json")):
            store.delete(path)


def _scan(store: RunStore) -> dict[str, dict[str, _Found]]:
    """Return the objects under `concepts/`: concept id -> fingerprint -> facts from a listing."""
    found: dict[str, dict[str, _Found]] = {}
    for path, size in store.scan("concepts"):
        folder = ConceptFolder.from_path(path)
        if folder is not None:
            objects = found.setdefault(folder.concept_id, {}).setdefault(folder.fingerprint, _Found())
            objects.bytes += size
            objects.is_done |= path == folder.record and size > 0
            objects.awaits_retry |= path == folder.ladder
    return found


def _kept_tries(store: RunStore, found: dict[str, dict[str, _Found]], plan: Plan) -> set[ConceptFolder]:
    """Return the tries that present records keep, of concepts with several results."""
    folders = [
        ConceptFolder(concept_id, fingerprint)
        for concept_id, by_fingerprint in found.items()
        if len(by_fingerprint) > 1
        for fingerprint, objects in by_fingerprint.items()
        if objects.is_done and fingerprint.encode() in plan.carried
    ]
    kept = set()
    for start in range(0, len(folders), _BATCH):
        batch = folders[start : start + _BATCH]
        for folder, content in zip(batch, store.get_many(one.record for one in batch).values(), strict=True):
            if isinstance(content, OSError):
                raise content
            kept.add(ConceptFolder(folder.concept_id, from_json(content).kept))
    return kept


@dataclass(frozen=True, slots=True)
class _PicturePart:
    """One part of the pictures' metadata."""

    path: str
    table: pa.Table
    is_leftover: pa.ChunkedArray
    """Rows whose picture is to be deleted, [rows] bool."""
    pictures: list[str]
    """Paths of the pictures to delete."""


def _picture_parts(store: RunStore, left: Leftovers) -> Iterator[_PicturePart]:
    """Read every part of the pictures' metadata."""
    superseded = {folder.fingerprint for folder in left.superseded}
    for path in sorted(store.list(METADATA)):
        with open_for_reading(store.uri(path)) as file:
            table = read_table(file)
        rows = zip(table["concept_id"].to_pylist(), table["fingerprint"].to_pylist(), strict=True)
        mask = [concept_id in left.removed or fingerprint in superseded for concept_id, fingerprint in rows]
        pictures = [
            picture for picture, is_left in zip(table["path"].to_pylist(), mask, strict=True) if is_left and picture
        ]
        yield _PicturePart(path, table, pa.chunked_array([mask], pa.bool_()), pictures)
