"""`--prune`: what the manifest and the settings of now no longer account for is deleted; nothing is without it.

That is: all of concepts that have no row any more, and, of concepts whose present result is there, the results of
earlier photos, rows and settings, tries that were not kept, and the pictures drawn with any of these. What has no
present result yet keeps what it had. Evaluations and settings stay.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.inputs.manifest import concept_ids
from pipeline.ledger.plan import Plan
from pipeline.ledger.records import from_json
from pipeline.store.addresses import open_for_reading
from pipeline.store.parquet import read_table
from pipeline.store.storage import ConceptFolder, RunStore

METADATA = "images/metadata"
_BATCH = 200
_SHOWN = 20


@dataclass
class _Folder:
    bytes: int = 0
    is_done: bool = False
    is_climbing: bool = False
    """Its ladder has not ended: all its tries are needed."""


@dataclass
class Leftovers:
    """What would be deleted."""

    removed: dict[str, int] = field(default_factory=dict)
    """Concepts without a row -> bytes under `concepts/`."""
    superseded: dict[ConceptFolder, int] = field(default_factory=dict)
    """Results of other photos, rows or settings, or tries that were not kept, of concepts with a row -> bytes."""
    pictures: list[str] = field(default_factory=list)
    """Objects drawn with any of these."""
    num_rows: int = 0
    """Rows that tell of pictures, in all parts."""

    def lines(self) -> Iterator[str]:
        """For a person: some of it by name, and counts of all."""
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
    """`plan` has seen the whole manifest. Raises ValueError if it cannot tell which concepts have a row."""
    nameless = [row for row in plan.bad if row.concept_id is None]
    if nameless or not plan.current:
        what = f"{nameless[0].file}, row {nameless[0].row}: {nameless[0].reason}" if nameless else "it has no good row"
        raise ValueError(f"--prune: the manifest does not tell which concepts there still are ({what}); mend it first")
    folders = _folders(store)
    wanted = {_short(name) for name in concept_ids(manifest)}
    bad = {row.concept_id for row in plan.bad}
    left = Leftovers()
    kept = _kept_tries(store, folders, plan)
    for name, mine in folders.items():
        present = [mark for mark in mine if mark.encode() in plan.current]
        if _short(name) not in wanted:
            left.removed[name] = sum(folder.bytes for folder in mine.values())
        elif name in bad or not any(mine[mark].is_done and not mine[mark].is_climbing for mark in present):
            continue  # it has no present result, or not yet the last
        else:
            stale = {ConceptFolder(name, mark): found.bytes for mark, found in mine.items() if mark not in present}
            left.superseded |= {folder: size for folder, size in stale.items() if folder not in kept}
    gone = {folder.fingerprint for folder in left.superseded}
    for _, _, is_gone, paths in _parts(store, left, gone):
        left.num_rows += pc.sum(is_gone).as_py() or 0
        left.pictures += paths
    told = set(left.pictures)
    stray = (path for name in left.removed for path, _ in store.scan(f"images/{name}"))
    left.pictures += [path for path in stray if path not in told]
    return left


def delete_leftovers(store: RunStore, left: Leftovers) -> None:
    """Rows that tell of pictures first, then the pictures, then results: whatever is interrupted, what is still told of
    is there."""
    gone = {folder.fingerprint for folder in left.superseded}
    for path, table, is_gone, _ in _parts(store, left, gone):
        if pc.all(is_gone).as_py():
            store.delete(path)
        elif pc.any(is_gone).as_py():
            buffer = io.BytesIO()
            pq.write_table(table.filter(pc.invert(is_gone)), buffer)
            store.put(path, buffer.getvalue())
    for path in left.pictures:
        store.delete(path)
    roots = [folder.root for folder in left.superseded] + [f"concepts/{name}" for name in left.removed]
    for root in roots:
        # the records first: without one, the rest counts as nothing
        for path in sorted(store.list(root), key=lambda path: not path.endswith("/record.json")):
            store.delete(path)


def _folders(store: RunStore) -> dict[str, dict[str, _Folder]]:
    """Concept id -> fingerprint -> what is there."""
    found: dict[str, dict[str, _Folder]] = {}
    for path, size in store.scan("concepts"):
        folder = ConceptFolder.from_path(path)
        if folder is not None:
            mine = found.setdefault(folder.concept_id, {}).setdefault(folder.fingerprint, _Folder())
            mine.bytes += size
            mine.is_done |= path == folder.record and size > 0
            mine.is_climbing |= path == folder.ladder
    return found


def _kept_tries(store: RunStore, folders: dict[str, dict[str, _Folder]], plan: Plan) -> set[ConceptFolder]:
    """Tries that present records keep; only concepts with several results can have one."""
    several = [
        ConceptFolder(name, mark)
        for name, mine in folders.items()
        if len(mine) > 1
        for mark, found in mine.items()
        if found.is_done and mark.encode() in plan.current
    ]
    kept = set()
    for start in range(0, len(several), _BATCH):
        batch = several[start : start + _BATCH]
        for folder, content in zip(batch, store.get_many(one.record for one in batch).values(), strict=True):
            if isinstance(content, OSError):
                raise content
            kept.add(ConceptFolder(folder.concept_id, from_json(content).kept))
    return kept


def _parts(
    store: RunStore, left: Leftovers, gone: set[str]
) -> Iterator[tuple[str, pa.Table, pa.ChunkedArray, list[str]]]:
    """Every part of the pictures' metadata: its path, its rows, which of them go, and those pictures' paths."""
    for path in sorted(store.list(METADATA)):
        with open_for_reading(store.uri(path)) as file:
            table = read_table(file)
        rows = zip(table["concept_id"].to_pylist(), table["fingerprint"].to_pylist(), strict=True)
        mask = [name in left.removed or mark in gone for name, mark in rows]
        paths = [each for each, is_gone in zip(table["path"].to_pylist(), mask, strict=True) if is_gone and each]
        yield path, table, pa.chunked_array([mask], pa.bool_()), paths


def _short(name: str) -> bytes:
    """A concept's id in a few bytes, as many are remembered."""
    return hashlib.blake2b(name.encode(), digest_size=8).digest()
