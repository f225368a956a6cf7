from __future__ import annotations

import datetime
import decimal
import io
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.inputs import manifest
from pipeline.inputs.cells import reason_for_text, rows
from pipeline.inputs.manifest import BadRow, ManifestRow, count_rows, manifest_notes, read_by_priority, read_manifest
from pipeline.store.storage import ConceptFolder, RunStore


def put_table(store: RunStore, path: str, table: pa.Table, **options: Any) -> str:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    store.put(path, buffer.getvalue())
    return store.uri(path)


def put_rows(store: RunStore, path: str, rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> str:
    return put_table(store, path, pa.Table.from_pylist(rows, schema))


def good(rows: list[ManifestRow | BadRow]) -> list[ManifestRow]:
    return [row for row in rows if isinstance(row, ManifestRow)]


def bad(rows: list[ManifestRow | BadRow]) -> list[BadRow]:
    return [row for row in rows if isinstance(row, BadRow)]


def test_a_full_row_and_a_bare_one(root: str) -> None:
    store = RunStore(root)
    rows = [
        {"concept_id": "cat-1", "images": ["a.png", "../b.png"], "placeholder": "<my-cat>", "initializer": "cat",
         "category": "style", "num_vectors": 3, "sku": 17, "tags": ["x", "y"], "__index_level_0__": 4},
        {"concept_id": "dog.2", "images": ["s3://elsewhere/c.png"], "placeholder": None, "initializer": None,
         "category": None, "num_vectors": None, "sku": None, "tags": None, "__index_level_0__": 9},
    ]  # fmt: skip
    uri = put_rows(store, "sets/m.parquet", rows)
    first, second = good(list(read_manifest(uri)))
    assert (first.file, first.row, second.row) == (uri, 1, 2)
    assert first.concept.images == (store.uri("sets/a.png"), store.uri("b.png"))
    assert (first.concept.placeholder_token, first.concept.category, first.concept.num_vectors) == (
        "<my-cat>",
        "style",
        3,
    )
    assert first.carried == {"sku": 17, "tags": ["x", "y"]}
    assert second.concept.images == ("s3://elsewhere/c.png",)
    assert (second.concept.placeholder_token, second.concept.initializer) == ("<dog.2>", "")
    assert (second.concept.category, second.concept.num_vectors) == ("object", 1)
    assert count_rows(uri) == 2


BASE = {"concept_id": "ok", "images": ["a.png"]}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"concept_id": None}, "concept_id None"),
        ({"concept_id": "two words"}, "concept_id 'two words' must be"),
        ({"concept_id": "../up"}, "must be 1 to 128"),
        ({"concept_id": ".hidden"}, "not beginning with '.'"),
        ({"concept_id": "x" * 129}, "must be 1 to 128"),
        ({"concept_id": "new\n"}, "must be 1 to 128"),
        ({"priority": -1}, "priority is -1; it must be from 0 to 9"),
        ({"priority": 10}, "priority is 10; it must be at most 9"),
        ({"priority": 2.5}, "priority is 2.5; it must be a whole number"),
        ({"priority": "high"}, "priority is 'high'; it must be a whole number"),
        ({"images": None}, "has no images"),
        ({"images": []}, "has no images"),
        ({"images": ["a.png", None]}, "empty or missing address"),
        ({"images": ["a.png", ""]}, "empty or missing address"),
        ({"images": ["ssh://host/a.png"]}, "ssh://"),
        ({"images": ["a.png"] * 1001}, "1,001 images"),
        ({"placeholder": "two words"}, "one word"),
        ({"category": "person"}, "category 'person'"),
        ({"num_vectors": 0}, "must be at least 1"),
        ({"num_vectors": 1.5}, "whole number"),
        ({"num_vectors": float("inf")}, "whole number"),
        ({"initializer": 3}, "initializer is 3"),
        ({"concept_id": "/etc/passwd"}, "must be 1 to 128"),
        ({"concept_id": "a/b"}, "must be 1 to 128"),
        ({"concept_id": ".."}, "not beginning with '.'"),
        ({"concept_id": ""}, "must be 1 to 128"),
        ({"concept_id": "a\x1b[2Jb"}, "concept_id 'a\\x1b[2Jb' must be"),
        ({"concept_id": "y" * 100_000}, "(100,002 characters) must be"),
        ({"images": [" "]}, "empty or missing address"),
        ({"images": ["a\n.png"]}, "images 'a\\n.png' holds a control character ('\\n')"),
        ({"images": ["a\x00.png"]}, "control character"),
        ({"images": ["a" * 4001]}, "images has 4,001 characters, more than 4,000"),
        ({"images": ["file:///x::s3://b/y"]}, "is a chained URL"),
        ({"placeholder": "<a\x07>"}, "control character"),
        ({"placeholder": "<" + "a" * 300 + ">"}, "302 characters, more than 200"),
        ({"placeholder": "{}"}, "placeholder '{}' holds {}, which is the concept's place"),
        ({"placeholder": 3}, "placeholder is 3; it must be text"),
        ({"placeholder": ["<a>"]}, "it must be text"),
        ({"initializer": "a {} cat"}, "holds {}"),
        ({"initializer": "http://u:hunter2@h/x"}, "initializer 'http://***@h/x' holds an address with credentials"),
        ({"initializer": "cat " * 300}, "1,199 characters, more than 1,000"),
        ({"category": 1.5}, "category is 1.5; it must be text"),
        ({"num_vectors": "3"}, "num_vectors is '3'; it must be a whole number"),
        ({"num_vectors": True}, "whole number"),
        ({"num_vectors": 10**12}, "num_vectors is 1000000000000; it must be at most 512"),
        ({"num_vectors": 1e300}, "at most 512"),
        ({"captions": ["a {} \x9b cat"]}, "captions 'a {} \\x9b cat' holds a control"),
        ({"masks": ["a.png", "b.png"]}, "2 masks for 1 images"),
        ({"masks": [""]}, "masks holds an empty or missing address"),
        ({"captions": ["a cat"]}, "has no {}, as a word"),
        ({"captions": ["a <{}>"]}, "has no {}, as a word"),
        ({"captions": [None]}, "captions holds an empty or missing text"),
        ({"note": "x" * 70_000}, "drop large ones"),
    ],
)
def test_a_bad_row_is_reported_and_its_neighbours_live(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    rows = [{**BASE, "concept_id": "before"}, {**BASE, **change}, {**BASE, "concept_id": "after"}]
    columns: dict[str, list[Any]] = {name: [row.get(name) for row in rows] for row in [rows[1]] for name in row}
    for name in change:
        if name not in ("concept_id", "images"):
            columns[name] = [None, change[name], None]
    path = tmp_path / "m.parquet"
    pq.write_table(pa.table(columns), path)
    found = list(read_manifest(str(path)))
    assert [row.concept.concept_id for row in good(found)] == ["before", "after"]
    (row,) = bad(found)
    assert row.row == 2
    assert reason in row.reason
    assert len(row.reason) < 1100
    shown = row.concept_id
    if change.get("concept_id") is None or shown == change["concept_id"]:
        assert shown == {**BASE, **change}["concept_id"]
    else:  # as Python writes it: nothing that a terminal obeys, nothing of many lines
        assert shown.isprintable()
        assert len(shown) < 300


def test_catalog_numbers_and_pandas_floats_are_understood(tmp_path: Path) -> None:
    table = pa.table({"concept_id": [4711, 4712], "images": [["a.png"]] * 2, "num_vectors": [2.0, float("nan")]})
    pq.write_table(table, tmp_path / "m.parquet")
    rows = good(list(read_manifest(str(tmp_path / "m.parquet"))))
    assert [(row.concept.concept_id, row.concept.num_vectors) for row in rows] == [("4711", 2), ("4712", 1)]


def test_masks_and_captions_go_with_their_photos(root: str) -> None:
    store = RunStore(root)
    rows = [
        {"concept_id": "cat", "images": ["a.png", "b.png"], "masks": ["m/a.png", "s3://m/b.png"],
         "captions": ["a {} on a sofa", " my <cat> and <cat>s "]},
        {"concept_id": "dog", "images": ["a.png"], "masks": None, "captions": []},
    ]  # fmt: skip
    first, second = good(list(read_manifest(put_rows(store, "sets/m.parquet", rows))))
    assert first.concept.masks == (store.uri("sets/m/a.png"), "s3://m/b.png")
    assert first.concept.captions == ("a {} on a sofa", "my {} and <cat>s")
    assert (second.concept.masks, second.concept.captions) == ((), ())
    assert first.carried == second.carried == {}


def test_empty_columns_of_masks_and_captions_mean_none(tmp_path: Path) -> None:
    table = pa.table({"concept_id": ["a", "b"], "images": [["a.png"]] * 2, "masks": [None, None], "captions": [[], []]})
    pq.write_table(table, tmp_path / "m.parquet")
    rows = good(list(read_manifest(str(tmp_path / "m.parquet"))))
    assert [(row.concept.masks, row.concept.captions) for row in rows] == [((), ())] * 2


def test_the_later_of_two_equal_ids_is_bad_even_in_another_file(root: str) -> None:
    store = RunStore(root)
    put_rows(store, "m/1.parquet", [BASE, {**BASE, "concept_id": "other"}, BASE])
    put_rows(store, "m/2.parquet", [{**BASE, "concept_id": "third"}, BASE])
    rows = list(read_manifest(store.uri("m")))
    assert [row.concept.concept_id for row in good(rows)] == ["ok", "other", "third"]
    assert [(row.file, row.row) for row in bad(rows)] == [(store.uri("m/1.parquet"), 3), (store.uri("m/2.parquet"), 2)]


def test_an_id_of_a_bad_row_is_still_free(tmp_path: Path) -> None:
    rows = [{"concept_id": "ok", "images": []}, BASE]
    uri = put_rows(RunStore(str(tmp_path)), "m.parquet", rows)
    assert [type(row).__name__ for row in read_manifest(uri)] == ["BadRow", "ManifestRow"]


def test_two_concepts_may_share_a_placeholder(tmp_path: Path) -> None:
    rows = [{**BASE, "placeholder": "<it>"}, {**BASE, "concept_id": "b", "placeholder": "<it>"}]
    assert len(good(list(read_manifest(put_rows(RunStore(str(tmp_path)), "m.parquet", rows))))) == 2


def test_files_are_read_in_the_order_of_their_names(root: str) -> None:
    store = RunStore(root)
    for name in ("b", "c", "a"):
        put_rows(store, f"m/{name}.parquet", [{**BASE, "concept_id": name}])
    store.put("m/_SUCCESS", b"")
    assert [row.concept.concept_id for row in good(list(read_manifest(store.uri("m"))))] == ["a", "b", "c"]
    assert [row.concept.concept_id for row in good(list(read_manifest(store.uri("m/[bc]*"))))] == ["b", "c"]
    assert count_rows(store.uri("m")) == 3


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"images": [["a.png"]]}, "no column 'concept_id'"),
        ({"concept_id": ["a"]}, "no column 'images'"),
        ({"concept_id": ["a"], "images": ["a.png"]}, "must be a list of strings"),
        ({"concept_id": ["a"], "images": [[1, 2]]}, "must be a list of strings"),
        ({"concept_id": ["a"], "images": [["a.png"]], "captions": ["a {}"]}, "column 'captions' is string; it must"),
        ({"concept_id": ["a"], "images": [["a.png"]], "masks": [[1]]}, "column 'masks' is list.*; it must be a list"),
        ({**{k: [v] for k, v in BASE.items()}, "initialiser": ["cat"]}, "'initialiser' is not .* mean 'initializer'"),
        ({**{k: [v] for k, v in BASE.items()}, "Category": ["style"]}, "did you mean 'category'"),
    ],
)
def test_a_table_that_is_no_manifest_is_refused_before_any_row(
    tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    put_rows(RunStore(str(tmp_path)), "1.parquet", [BASE])
    pq.write_table(pa.table(columns), tmp_path / "2.parquet")
    with pytest.raises(ValueError, match=message) as raised:
        next(read_manifest(str(tmp_path)))
    assert "2.parquet" in str(raised.value)


@pytest.mark.parametrize(
    "ids",
    [
        pa.array([1.5, 2.5, None]),
        pa.array([["a"], ["b"], None]),
        pa.array([True, False, None]),
        pa.array([b"a", b"b", None]),
        pa.array([datetime.date(2026, 1, 1)] * 3),
        pa.array([{"x": 1}] * 3),
        pa.nulls(3),
    ],
    ids=lambda ids: str(ids.type),
)
def test_ids_of_a_wrong_type_are_bad_rows(tmp_path: Path, ids: pa.Array) -> None:
    pq.write_table(pa.table({"concept_id": ids, "images": [["a.png"]] * 3}), tmp_path / "m.parquet")
    rows = list(read_manifest(str(tmp_path / "m.parquet")))
    assert [type(row) for row in rows] == [BadRow] * 3
    assert all("concept_id" in row.reason for row in bad(rows))


def test_a_bad_row_keeps_the_columns_that_are_carried(root: str) -> None:
    rows = [
        {"concept_id": "a", "images": ["a.png"], "num_vectors": 1, "sku": 7},
        {"concept_id": "a", "images": ["a.png"], "num_vectors": 1, "sku": 8},
        {"concept_id": "b", "images": ["b.png"], "num_vectors": -1, "sku": 9},
    ]
    _, *others = read_manifest(put_rows(RunStore(root), "m.parquet", rows))
    assert [row.carried for row in bad(others)] == [{"sku": 8}, {"sku": 9}]


def not_text(*values: bytes) -> pa.Array:
    """Return texts that are not UTF-8, as no writer should make them."""
    return pa.array(values, pa.binary()).view(pa.string())


def test_a_value_that_python_cannot_hold_costs_its_row_alone_and_only_where_it_means_something(tmp_path: Path) -> None:
    table = pa.table(
        {
            "concept_id": ["a", "b", "c"], "images": [["a.png"]] * 3, "initializer": not_text(b"x", b"\xff", b"y"),
            "day": pa.array([0, 0, 2**31 - 1], pa.int32()).cast(pa.date32()), "name": not_text(b"x", b"y", b"caf\xe9"),
        }
    )  # fmt: skip
    pq.write_table(table, tmp_path / "m.parquet")
    first, second, third = read_manifest(str(tmp_path / "m.parquet"))
    assert isinstance(first, ManifestRow)
    assert first.carried == {"day": "1970-01-01", "name": "x"}
    assert isinstance(second, BadRow)
    assert "column 'initializer' holds a value that cannot be read" in second.reason
    assert isinstance(third, ManifestRow)
    assert third.carried == {"day": "<value out of range: 2147483647>", "name": "caf\N{REPLACEMENT CHARACTER}"}


def test_columns_that_python_cannot_hold_are_carried_as_text(tmp_path: Path) -> None:
    product = uuid.UUID(int=5)
    twice = pa.StructArray.from_arrays([pa.array([1]), pa.array([b"\0"])], names=["a", "a"])
    columns = {
        "concept_id": pa.array([product.bytes], pa.uuid()),
        "images": [["a.png"]],
        "product": pa.array([product.bytes], pa.uuid()),
        "seen": pa.array([0], pa.timestamp("ms", "Mars/Phobos")),
        "twice": twice,
        "nested": pa.ListArray.from_arrays([0, 1], twice),
    }
    pq.write_table(pa.table({name: columns[name] for name in columns if name != "nested"}), tmp_path / "m.parquet")
    uri = str(tmp_path / "m.parquet")
    (row,) = good(list(read_manifest(uri)))
    assert row.concept.concept_id == str(product)
    assert list(manifest.concept_ids(uri)) == [str(product)]
    assert row.carried["product"] == str(product)
    assert row.carried["seen"].startswith("1970-01-01 00:00:00")
    assert row.carried["twice"] == '[["a", 1], ["a", "AA=="]]'
    assert [note.split(" is carried")[0] for note in manifest_notes(uri)] == [
        "column 'seen' (timestamp[ms, tz=Mars/Phobos])",
        "column 'twice' (struct<a: int64, a: binary>)",
    ]
    assert reason_for_text(columns["nested"].type) == "a field occurs twice in it"
    (values,) = rows(pa.record_batch({"x": columns["nested"]}), ())
    assert isinstance(values, dict)
    assert "1" in values["x"]


def test_no_credential_is_in_what_is_shown(tmp_path: Path) -> None:
    secret = "https://me:SeCrEt@host/1.png?sig=SeCrEt"
    rows = [
        {**BASE, "images": [secret], "source": f"from {secret}"},
        {**BASE, "concept_id": "b", "images": [secret, "ssh://me:SeCrEt@host/x"], "source": ""},
    ]
    found = list(read_manifest(put_rows(RunStore(str(tmp_path)), "m.parquet", rows)))
    assert good(found)[0].concept.images == (secret,)  # it is needed to get the photo
    assert "SeCrEt" not in str(good(found)[0].carried)
    assert "SeCrEt" not in repr(bad(found))


@settings(max_examples=80)
@given(cut=st.integers(0, 2500), changes=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=5))
def test_whatever_was_done_to_a_file_its_rows_or_a_reason_come(
    tmp_path_factory: pytest.TempPathFactory, cut: int, changes: list[tuple[int, int]]
) -> None:
    """Cut short or with bytes changed; nothing else may be raised, and no good row may be made up."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{**BASE, "concept_id": f"c{i}"} for i in range(20)]), buffer)
    data = bytearray(buffer.getvalue())
    data = data[: len(data) - cut] if cut % 3 == 0 else data
    for place, value in changes:
        if data:
            data[place % len(data)] = value
    path = tmp_path_factory.getbasetemp() / "fuzzed.parquet"
    path.write_bytes(bytes(data))
    try:
        rows = list(read_manifest(str(path)))
    except ValueError as error:
        reason = str(error)
    else:
        reason = "manifest read"
        assert len(good(rows)) <= 20
    assert reason.startswith("manifest ")


@settings(max_examples=60)
@given(
    values=st.dictionaries(
        st.sampled_from(["concept_id", "placeholder", "initializer", "category", "num_vectors"]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=5)
        | st.lists(st.text(max_size=9), max_size=3) | st.dictionaries(st.text(), st.none(), max_size=1),
    ),
    lists=st.dictionaries(
        st.sampled_from(["images", "masks", "captions"]),
        st.none() | st.lists(st.none() | st.text(max_size=9), max_size=3),
    ),
)  # fmt: skip
def test_whatever_is_in_a_row_it_is_a_concept_or_a_reason(values: dict[str, Any], lists: dict[str, Any]) -> None:
    row = manifest._parse("/m.parquet", "/m.parquet", 1, {**BASE, **values, **lists})
    if isinstance(row, BadRow):
        assert row.reason
        assert row.reason.isprintable()
    else:
        folder = ConceptFolder(row.concept.concept_id, "f" * 32)
        assert ConceptFolder.from_path(folder.record) == folder


def test_no_manifest_or_no_parquet_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no manifest at"):
        next(read_manifest(str(tmp_path / "absent.parquet")))
    (tmp_path / "x.parquet").write_text("concept_id,images")
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        next(read_manifest(str(tmp_path / "x.parquet")))


def test_a_file_damaged_in_the_middle_costs_only_its_own_rest(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    rows = [{**BASE, "concept_id": f"c{i}"} for i in range(3000)]
    put_table(store, "1.parquet", pa.Table.from_pylist(rows), row_group_size=1000, compression="zstd")
    put_rows(store, "2.parquet", [{**BASE, "concept_id": "last"}])
    group = pq.read_metadata(tmp_path / "1.parquet").row_group(2).column(0)
    damaged = bytearray(store.get("1.parquet"))
    start = group.dictionary_page_offset or group.data_page_offset
    damaged[start : start + group.total_compressed_size] = b"\xff" * group.total_compressed_size
    store.put("1.parquet", bytes(damaged))
    found = list(read_manifest(str(tmp_path)))
    (row,) = bad(found)
    assert "cannot be read from this row on" in row.reason
    assert 1000 < row.row <= 2001
    assert good(found)[-1].concept.concept_id == "last"


def test_carried_values_are_json(tmp_path: Path) -> None:
    schema = pa.schema(
        [
            ("concept_id", pa.string()), ("images", pa.list_(pa.string())), ("day", pa.date32()),
            ("at", pa.timestamp("us", tz="UTC")), ("price", pa.decimal128(8, 2)), ("raw", pa.binary()),
            ("nan", pa.float64()), ("nested", pa.struct([("a", pa.int8())])), ("map", pa.map_(pa.string(), pa.int8())),
        ]
    )  # fmt: skip
    row = {**BASE, "day": datetime.date(2026, 1, 2), "at": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
           "price": decimal.Decimal("9.90"), "raw": b"\x00\x01", "nan": float("nan"), "nested": {"a": 1},
           "map": [("k", 1)]}  # fmt: skip
    (found,) = good(list(read_manifest(put_rows(RunStore(str(tmp_path)), "m.parquet", [row], schema))))
    assert found.carried == {
        "day": "2026-01-02", "at": "2026-01-02T00:00:00+00:00", "price": "9.90", "raw": "AAE=", "nan": None,
        "nested": {"a": 1}, "map": [["k", 1]],
    }  # fmt: skip


@settings(max_examples=60)
@given(concept_id=st.text(max_size=140))
def test_whatever_id_is_accepted_is_a_safe_folder_name(concept_id: str) -> None:
    row = manifest._parse("/m.parquet", "/m.parquet", 1, {"concept_id": concept_id, "images": ["a.png"]})
    if isinstance(row, ManifestRow):
        assert concept_id == Path(concept_id).name
        assert concept_id.isascii()
        assert not concept_id.startswith(".")


@pytest.mark.slow
def test_a_large_manifest_is_streamed(tmp_path: Path) -> None:
    """60 MB of rows in groups of 3 MB: Arrow holds a few batches at a time, never the table."""
    writer = None
    for part in range(20):
        ids = [f"concept-{part}-{i}" for i in range(1000)]
        notes = [f"{i:03000d}" for i in range(1000)]
        table = pa.table({"concept_id": ids, "images": [["a.png"] * 4] * 1000, "note": notes})
        writer = writer or pq.ParquetWriter(tmp_path / "m.parquet", table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()
    pool = pa.default_memory_pool()
    before, highest, number = pool.bytes_allocated(), 0, 0
    for number, _ in enumerate(read_manifest(str(tmp_path / "m.parquet")), start=1):
        if number % 100 == 0:
            highest = max(highest, pool.bytes_allocated() - before)
    assert number == 20_000
    assert highest < 16 * 2**20


def test_the_highest_priority_comes_first_and_the_order_stays(root: str) -> None:
    store = RunStore(root)
    wanted = [0, 9, None, 3, 9, float("nan"), 3, 12]
    rows = [{"concept_id": f"c{i}", "images": ["a.png"], "priority": value} for i, value in enumerate(wanted)]
    put_rows(store, "sets/a.parquet", rows, pa.schema([("concept_id", pa.string()), ("images", pa.list_(pa.string())),
                                                       ("priority", pa.float64())]))  # fmt: skip
    put_rows(store, "sets/b.parquet", [{"concept_id": name, "images": ["a.png"]} for name in ("d0", "c1", "d1")])
    found = list(read_by_priority(store.uri("sets")))
    assert [row.concept.concept_id for row in good(found)] == ["c1", "c4", "c3", "c6", "c0", "c2", "c5", "d0", "d1"]
    assert [row.concept_id for row in bad(found)] == ["c7", "c1"], "bad ones are told once"
    assert good(found)[0].carried == {"priority": 9.0}


def test_without_priorities_files_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    store = RunStore("memory://plain")
    uri = put_rows(store, "m.parquet", [{"concept_id": "a", "images": ["a.png"], "sku": 1}])
    reads = []
    monkeypatch.setattr(manifest, "_read_file", lambda file: reads.append(file) or iter(()))
    assert list(read_by_priority(uri)) == []
    assert len(reads) == 1
