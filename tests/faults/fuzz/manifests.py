"""Manifests of odd columns, values, layouts and bytes, as a dry run, the results and the report take them."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from pipeline.config import RunConfig
from pipeline.dry_run import dry_run
from pipeline.inputs.manifest import read_manifest
from pipeline.inputs.manifest_files import UNDERSTOOD
from pipeline.ledger.plan import ConceptTask
from pipeline.report.page import RunFigures, build_report
from pipeline.stages import make_plan
from pipeline.store.storage import RunStore
from tests.faults.fuzz.campaign import Area
from tests.faults.fuzz.damage import BYTE_DAMAGE, ByteDamage, damaged
from tests.faults.fuzz.outcomes import Undocumented, run_command
from tests.pipeline.outputs import end
from tests.pipeline.runs import tiny_config, write_photo

PHOTOS = ("photos/a.png", "photos/b.png", "photos/c.png")
"""Photos that are there."""

_ODD_PHOTOS = (
    "photos/absent.png",
    "photos",
    "/dev/zero",
    "s3://a b/x.png",
    "http://127.0.0.1:9/x",
    "ssh://h/x",
    "",
    " ",
)
_ODD_TEXTS = (
    "", " ", "a {}", "{}", "<x>", "<a> <b>", "é", "e\u0301", "\x1b[2J", "a\x00b", "\u202e", "\ufeff", "x" * 300,
    "../up", "cat " * 60, "<|endoftext|>", "nan", "None", "{initializer}", "12.0", "12", "a/b", ".hidden",
    "user:pw@host", "=1+1", "<script>alert(1)</script>", "\U0001f431", "object", "style",
)  # fmt: skip
TEXTS = st.one_of(st.sampled_from(_ODD_TEXTS), st.text(max_size=6))
_INTEGERS = st.one_of(
    st.sampled_from((0, 1, 2, 4, 9, 10, -1, 2**31, 2**53 + 1, 2**63 - 1, -(2**63))), st.integers(-9, 9)
)
_FLOATS = st.one_of(st.floats(), st.sampled_from((1.0, 2.0, 1e300)))
_MOMENTS = st.integers(-(2**62), 2**62)
_DAYS = st.integers(-(2**31), 2**31 - 1)


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of column with its values."""

    values: st.SearchStrategy[Any]
    to_array: Callable[[list[Any]], pa.Array]


def _plain(values: st.SearchStrategy[Any], arrow_type: pa.DataType) -> Kind:
    return Kind(values, lambda cells: pa.array(cells, arrow_type))


def _viewed(values: st.SearchStrategy[Any], stored: pa.DataType, seen: pa.DataType) -> Kind:
    return Kind(values, lambda cells: pa.array(cells, stored).view(seen))


def _uuids(cells: list[Any]) -> pa.Array:
    return pa.ExtensionArray.from_storage(pa.uuid(), pa.array(cells, pa.binary(16)))


def _twice(cells: list[Any]) -> pa.Array:
    """Return structs that have the same field twice."""
    return pa.StructArray.from_arrays([pa.array(cells, pa.int64())] * 2, ["a", "a"])


_ADDRESSES = st.one_of(st.sampled_from(PHOTOS), st.sampled_from((*PHOTOS, *_ODD_PHOTOS)), TEXTS)
_PAIRS = st.fixed_dictionaries({"a": st.integers(-9, 9), "b": TEXTS})
KINDS = {
    "text": _plain(TEXTS, pa.string()),
    "large text": _plain(TEXTS, pa.large_string()),
    "broken text": _viewed(st.binary(max_size=6), pa.binary(), pa.string()),
    "dictionary": Kind(TEXTS, lambda cells: pa.array(cells, pa.string()).dictionary_encode()),
    "int64": _plain(_INTEGERS, pa.int64()),
    "uint64": _plain(st.one_of(st.integers(0, 3), st.just(2**64 - 1)), pa.uint64()),
    "int8": _plain(st.integers(-128, 127), pa.int8()),
    "float64": _plain(_FLOATS, pa.float64()),
    "float32": _plain(st.floats(width=32), pa.float32()),
    "bool": _plain(st.booleans(), pa.bool_()),
    "decimal": _plain(st.decimals(-99, 99, places=2), pa.decimal128(38, 2)),
    "wide decimal": _plain(st.integers(-(10**60), 10**60).map(decimal.Decimal), pa.decimal256(76, 0)),
    "date": _viewed(_DAYS, pa.int32(), pa.date32()),
    "time": _viewed(st.integers(-1, 2**62), pa.int64(), pa.time64("us")),
    "moment": _viewed(_MOMENTS, pa.int64(), pa.timestamp("us")),
    "moment somewhere": _viewed(_MOMENTS, pa.int64(), pa.timestamp("ns", "Mars/Phobos")),
    "moment in UTC": _plain(st.datetimes().map(lambda at: at.replace(tzinfo=datetime.UTC)), pa.timestamp("us", "UTC")),
    "duration": _viewed(_MOMENTS, pa.int64(), pa.duration("us")),
    "bytes": _plain(st.binary(max_size=20), pa.binary()),
    "uuid": Kind(st.binary(min_size=16, max_size=16), _uuids),
    "null": _plain(st.none(), pa.null()),
    "addresses": _plain(st.lists(st.one_of(_ADDRESSES, st.none()), max_size=3), pa.list_(pa.string())),
    "large addresses": _plain(st.lists(_ADDRESSES, max_size=3), pa.large_list(pa.large_string())),
    "two addresses": _plain(st.lists(_ADDRESSES, min_size=2, max_size=2), pa.list_(pa.string(), 2)),
    "numbers": _plain(st.lists(_FLOATS, max_size=3), pa.list_(pa.float64())),
    "nested lists": _plain(st.lists(st.lists(TEXTS, max_size=2), max_size=2), pa.list_(pa.list_(pa.string()))),
    "struct": _plain(_PAIRS, pa.struct({"a": pa.int64(), "b": pa.string()})),
    "structs": _plain(st.lists(_PAIRS, max_size=2), pa.list_(pa.struct({"a": pa.int64(), "b": pa.string()}))),
    "struct with a field twice": Kind(st.integers(-9, 9), _twice),
    "map": _plain(st.lists(st.tuples(TEXTS, TEXTS), max_size=2), pa.map_(pa.string(), pa.string())),
}  # fmt: skip
"""Kinds of columns by name: every type that Parquet stores, with values that its Python type cannot always hold."""

_OWN_KINDS = {
    "concept_id": ("text", "large text", "dictionary", "uuid", "int64"),
    "images": ("addresses", "large addresses", "two addresses"),
    "masks": ("addresses",),
    "captions": ("addresses",),
    "num_vectors": ("int64", "float64", "int8"),
    "priority": ("int64", "int8", "float64"),
}
"""Kinds that a column understood here is of in most cases."""

LAYOUTS = ("file", "folder", "two files", "partitioned", "glob")


@dataclass(frozen=True)
class Column:
    """A column as it is drawn."""

    name: str
    kind: str
    cells: tuple[Any, ...]

    def to_array(self) -> pa.Array:
        return KINDS[self.kind].to_array(list(self.cells))


@dataclass(frozen=True)
class ManifestCase:
    """A manifest as it is drawn."""

    columns: tuple[Column, ...]
    num_rows: int
    layout: str
    damages: tuple[ByteDamage, ...] = ()

    def to_bytes(self) -> bytes:
        """Return it as Parquet, damaged."""
        arrays = [column.to_array() for column in self.columns]
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_arrays(arrays, [column.name for column in self.columns]), sink)
        return damaged(sink.getvalue().to_pybytes(), self.damages)


@st.composite
def columns(draw: st.DrawFn, names: Sequence[str], own_kinds: dict[str, Sequence[str]], num_rows: int) -> Column:
    """Draw a column of `num_rows` cells, mostly of the kind that belongs to its name."""
    letters = st.characters(exclude_categories=["Cs"])
    name = draw(st.one_of(st.sampled_from(tuple(names)), st.text(letters, max_size=8)))
    kind = draw(st.sampled_from(tuple(KINDS)))
    if draw(st.integers(0, 3)):
        kind = draw(st.sampled_from(own_kinds.get(name, ("text",))))
    cell = st.one_of(KINDS[kind].values, st.none())
    return Column(name, kind, tuple(draw(st.lists(cell, min_size=num_rows, max_size=num_rows))))


@st.composite
def manifests(draw: st.DrawFn) -> ManifestCase:
    """Draw a manifest: mostly with ids and photos that are there, and further columns of any name and kind."""
    num_rows = draw(st.integers(1, 4))
    ids = tuple(f"c{number}" for number in range(num_rows))
    good = [Column("concept_id", "text", ids), Column("images", "addresses", tuple([PHOTOS[0]] for _ in ids))]
    kept = [column for column in good if draw(st.integers(0, 4))]
    names = (*UNDERSTOOD, *UNDERSTOOD, "category_2", "Image", "catagory", "split", "hash", "", "a.b", "a=b")
    more = draw(st.lists(columns(names, _OWN_KINDS, num_rows), max_size=4))
    damages: tuple[ByteDamage, ...] = ()
    if not draw(st.integers(0, 4)):
        damages = tuple(draw(st.lists(BYTE_DAMAGE, min_size=1, max_size=2)))
    return ManifestCase((*kept, *more), num_rows, draw(st.sampled_from(LAYOUTS)), damages)


def manifest_area(folder: Path, model: Path) -> Area:
    """Return the area of manifests, which works in a folder with a tiny model."""
    for number, photo in enumerate(PHOTOS):
        write_photo(folder / photo, number)
    numbers = count()

    def check(case: ManifestCase) -> str:
        root = folder / f"case-{next(numbers)}"
        config = tiny_config(model, root / "out")
        manifest = _write(case, root)
        config = dataclasses.replace(config, manifest=manifest)
        said = run_command(lambda: dry_run(config, photos=True), codes=(0, 1, 2))
        if said.code == 2:
            return said.outcome
        counts = re.search(r"(\d+) done, (\d+) to do, (?:.*, )?(\d+) bad rows", said.out)
        assert counts is not None, said.out
        told = sum(map(int, counts.groups()))
        if not case.damages and told != case.num_rows * (2 if case.layout == "two files" else 1):
            raise Undocumented(f"not every row is told: {told} of {case.num_rows}")
        check_report(config)
        return said.outcome

    return Area("manifests", manifests(), check)


def _write(case: ManifestCase, root: Path) -> str:
    """Write a manifest in its layout and return its address."""
    folder = root / "category=style" / "split=a%20b" if case.layout == "partitioned" else root
    folder.mkdir(parents=True)
    (folder / "photos").symlink_to(root.parent / "photos")
    data = case.to_bytes()
    for number in range(2 if case.layout == "two files" else 1):
        (folder / f"part-{number}.parquet").write_bytes(data)
    match case.layout:
        case "file":
            return str(folder / "part-0.parquet")
        case "glob":
            return str(root / "part-*.parquet")
        case _:
            return str(root)


def check_report(config: RunConfig) -> None:
    """Check that results and report are written for the rows of a manifest, whatever they carry: every good one as a
    concept that was learned or that failed, in turn, and every bad one."""
    store = RunStore(config.output)
    plan, _ = make_plan(config, store)
    for number, task in enumerate(plan.tasks(read_manifest(config.manifest))):
        _end(store, task, number)
    build_report(store, config, RunFigures(), plan.carried, plan.bad)
    assert (Path(config.output) / "report.html").read_bytes().decode()


def _end(store: RunStore, task: ConceptTask, number: int) -> None:
    status = "failed" if number % 2 else "done"
    end(store, task, status=status, carried=task.carried, error="it failed" if number % 2 else "")
