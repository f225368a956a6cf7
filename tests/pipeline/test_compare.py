"""Two runs side by side: their scores concept by concept, the settings that differ, and the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline import compare
from pipeline.config import RunConfig
from pipeline.config_file import load_config, to_tree
from pipeline.exit_codes import OK, USAGE
from pipeline.report.comparison import Comparison, Side
from pipeline.store.storage import RunStore
from tests.pipeline.report.report_pages import Page
from tests.pipeline.report.test_page import fail, finish

CHANGES = {"a": 0.1, "b": 0.2, "c": -0.06}


def run_with(root: Path, name: str, changes: dict[str, float], *settings: str) -> str:
    """Make the output of a run whose concepts have these CLIP-I above 0.5, and return its place."""
    store = RunStore(str(root / name))
    for number, (concept, change) in enumerate(changes.items()):
        finish(store, concept, number, clip_i=0.5 + change)
    store.put("run.json", json.dumps({"config": to_tree(load_config("", settings, output=store.root))}).encode())
    return store.root


def test_scores_are_paired_by_concept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run_with(tmp_path, "first", {**dict.fromkeys(CHANGES, 0.0), "gone": 0.4})
    second = run_with(tmp_path, "second", {**CHANGES, "new": 0.1}, "inversion.steps=60")
    fail(RunStore(second), "bad", 9, "its photos are gone")
    assert compare.main([first, second, "--output", str(tmp_path / "page.html")]) == OK
    said = capsys.readouterr().out
    lines = [line.split() for line in said.splitlines()]
    assert ["CLIP-I", "0.500", "0.580", "+0.080", "±", "0.326", "2", "1"] in lines
    assert ["steps", "100.0", "100.0", "+0.0", "±", "0.0", "0", "0"] in lines
    assert "4 concepts learned, 1 failed" in said
    assert "3 concepts" in said
    assert "settings inversion.steps: first 500, second 60" in said
    assert "output:" not in said
    page = Page((tmp_path / "page.html").read_text())
    assert [row["concept"] for row in page.data["rows"]] == ["b", "a", "c"], "the largest difference first"
    assert [values["clip_i"] for values in page.data["rows"][0]["values"]] == [0.5, 0.7]
    assert all(sheet["sheet"].startswith("data:") for row in page.data["rows"] for sheet in row["sheets"])
    assert page.data["names"] == ["first", "second"]
    assert "+0.080 ± 0.326" in page.text
    assert "Setting first second inversion.steps 500 60" in " ".join(page.text.split())


def test_a_bounded_number_of_concepts_has_pictures(tmp_path: Path) -> None:
    first, second = (run_with(tmp_path, name, {"a": 0.0, "b": change}) for name, change in (("x", 0.1), ("y", 0.3)))
    page = Page(Comparison.of(Side.read(first), Side.read(second)).page(1))
    assert [[bool(sheet) for sheet in row["sheets"]] for row in page.data["rows"]] == [[True] * 2, [False] * 2]
    RunStore(first).delete(f"concepts/b/{1:032x}/grid.png")
    row = Page(Comparison.of(Side.read(first), Side.read(second)).page(1)).data["rows"][0]
    assert row["sheets"][0]["note"].startswith("no sample grid")
    assert row["sheets"][1]["sheet"]


def test_foreign_text_stays_text(tmp_path: Path) -> None:
    nasty = "</script><script>alert(1)</script>"
    for name in ("x", "y"):
        store = RunStore(str(tmp_path / name))
        finish(store, "duck", 1, placeholder_token=nasty)
        config = to_tree(RunConfig(manifest=nasty, model=f"{nasty}{name}"))
        store.put("run.json", json.dumps({"config": config}).encode())
    html = Comparison.of(Side.read(str(tmp_path / "x")), Side.read(str(tmp_path / "y"))).page(9)
    assert "<script>alert" not in html
    assert html.count("</script>") == 2
    assert Page(html).data["rows"][0]["names"] == [nasty, nasty]


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run_with(tmp_path, "first", {"a": 0.0})
    other = run_with(tmp_path, "other", {"b": 0.0})
    page = ["--output", str(tmp_path / "page.html")]
    assert compare.main([first, other, *page]) == USAGE
    assert "no concept of the same id" in capsys.readouterr().err
    assert compare.main([first, str(tmp_path / "nothing"), *page]) == USAGE
    assert "no learned concepts there" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()
