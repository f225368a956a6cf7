"""The README's lines from a product table to a manifest, and from the results back to the table."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.inputs.manifest import ManifestRow, read_manifest
from pipeline.store.parquet import read_table

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def _blocks(language: str, word: str) -> tuple[str, str]:
    """Return the two parts of the README's only block in a language that has the word."""
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    (block,) = (block for block in blocks if word in block and "products.parquet" in block)
    before, after = block.rsplit("\n\n", 1)
    return before, after


def _python(word: str, module: str) -> Callable[[], list[Callable[[], None]]]:
    def parts() -> list[Callable[[], None]]:
        pytest.importorskip(module)
        names: dict[str, object] = {}
        return [lambda code=code: exec(code, names) for code in _blocks("python", word)]  # type: ignore[misc]

    return parts


def _duckdb() -> list[Callable[[], None]]:
    duckdb = pytest.importorskip("duckdb")
    return [lambda code=code: duckdb.sql(code) for code in _blocks("sql", "COPY")]  # type: ignore[misc]


@pytest.mark.parametrize(
    "parts",
    [_python("import pandas", "pandas"), _python("import polars", "polars"), _duckdb],
    ids=["pandas", "polars", "duckdb"],
)
def test_a_product_table_there_and_back(
    parts: Callable[[], list[Callable[[], None]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_manifest, join = parts()
    monkeypatch.chdir(tmp_path)
    products = {
        "sku": [17, 18],
        "photos": [["/a.png", "/b.png"], ["/c.png"]],
        "kind": ["cat", None],
        "price": [2.5, 3.0],
    }
    pq.write_table(pa.table(products), "products.parquet")
    make_manifest()
    rows = list(read_manifest(str(tmp_path / "manifest.parquet")))
    good = [row for row in rows if isinstance(row, ManifestRow)]
    assert [(row.concept.concept_id, row.concept.images, row.concept.initializer) for row in good] == [
        ("17", ("/a.png", "/b.png"), "cat"),
        ("18", ("/c.png",), ""),
    ]
    assert [row.carried for row in good] == [{"sku": 17}, {"sku": 18}]
    (tmp_path / "out").mkdir()
    results = {"concept_id": ["17"], "status": ["done"], "sku": [17]}
    pq.write_table(pa.table(results), "out/results.parquet")
    join()
    learned = sorted(read_table(tmp_path / "learned.parquet").to_pylist(), key=lambda row: row["sku"])
    assert [(row["sku"], row["price"], row["status"]) for row in learned] == [(17, 2.5, "done"), (18, 3.0, None)]
