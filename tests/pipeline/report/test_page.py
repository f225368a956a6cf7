from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config import RunConfig
from pipeline.config_file import load_config
from pipeline.inputs.manifest import BadRow
from pipeline.ledger.records import ConceptRecord, Try, put_record
from pipeline.report import page
from pipeline.report.page import RunFigures, build_report
from pipeline.store.storage import RunStore

FIGURES = RunFigures(learned=3, skipped=4, seconds=1800.0, facts={"device": "8 cores"})


def png(colour: str, size: tuple[int, int] = (300, 200)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def curve(steps: int = 100) -> bytes:
    buffer = io.BytesIO()
    table = {"step": np.arange(1, steps + 1), "loss": np.linspace(0.9, 0.25, steps), "norm": np.full(steps, 0.4)}
    pq.write_table(pa.table(table), buffer)
    return buffer.getvalue()


def finish(store: RunStore, concept_id: str, number: int, clip_i: float = 0.8, **values: Any) -> ConceptRecord:
    """A finished concept with its photo, grid and curve in the store."""
    store.put(f"photos/{concept_id}.png", png("red"))
    scores = {"clip_i": clip_i, "clip_t": 0.3, "clip_i_initializer": 0.6, "clip_t_initializer": 0.31}
    defaults: dict[str, Any] = {
        "placeholder_token": f"<{concept_id}>",
        "initializer": "toy",
        "images": (store.uri(f"photos/{concept_id}.png"),),
        "steps": 100,
        "seconds": 61.0,
        "scores": scores,
        "status": "done",
    }
    record = ConceptRecord(concept_id=concept_id, fingerprint=f"{number:032x}", **{**defaults, **values})
    store.put(record.folder.grid, png("blue", (500, 800)))
    store.put(record.folder.curve, curve())
    put_record(store, record)
    return record


def fail(store: RunStore, concept_id: str, number: int, error: str, kind: str = "") -> None:
    record = ConceptRecord(
        concept_id=concept_id,
        fingerprint=f"{number:032x}",
        status="failed",
        placeholder_token="<x>",
        error=error,
        error_kind=kind,
    )
    put_record(store, record)


class Page(HTMLParser):
    """Tags, attributes and text of the page, in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def values(self, tag: str, name: str) -> list[str]:
        return [attributes[name] or "" for each, attributes in self.tags if each == tag and name in attributes]

    def count(self, name: str) -> int:
        return sum((attributes.get("class") or "").split().count(name) for _, attributes in self.tags)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


def build(store: RunStore, config: RunConfig | None = None, **values: Any) -> Page:
    build_report(store, config or RunConfig(manifest="m.parquet", output=store.root), FIGURES, **values)
    return Page(store.get("report.html").decode())


def rows(page: Page) -> list[list[Any]]:
    (data,) = [text for text in page.texts if text.startswith('{"columns"')]
    found: list[list[Any]] = json.loads(data)["rows"]
    return found


def test_everything_about_a_concept_is_on_its_card(root: str) -> None:
    store = RunStore(root)
    record = finish(store, "duck", 1, clip_i=0.8125, carried={"sku": 4711})
    page = build(store)
    assert page.count("card") == 1
    assert len(page.values("img", "src")) == 2
    assert page.count("loss") == page.count("norm") == 1
    for text in ("duck", "<duck>", "0.812", "0.300", "100 steps", "1 min 01 s", "8 cores", "concepts an hour"):
        assert text in page.text
    assert {record.folder.grid, record.folder.embedding, record.folder.record} <= set(page.values("a", "href"))
    assert rows(page) == [
        ["duck", "<duck>", "toy", 0.812, 0.213, 0.3, 100, 61.0, "", 4711, *[None] * 3, record.folder.root]
    ]
    assert store.exists("results.parquet")


def test_the_prompts_of_the_grids_are_told_for_the_categories_that_are_there(root: str) -> None:
    store = RunStore(root)
    finish(store, "duck", 1)
    assert "of a style" not in build(store).text
    finish(store, "ink", 2, category="style")
    assert "of a style: the photos; “a picture in the style of …”; “a picture of a cat" in build(store).text


def test_the_page_needs_nothing_from_outside(root: str) -> None:
    store = RunStore(root)
    finish(store, "duck", 1)
    page = build(store)
    assert all(source.startswith("data:image/webp;base64,") for source in page.values("img", "src"))
    assert all(re.match(r"(concepts/|results\.parquet)", link) for link in page.values("a", "href"))
    assert page.values("script", "src") == page.values("link", "href") == []
    (policy,) = [a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv")]
    assert policy is not None
    assert "default-src 'none'" in policy


def test_failures_come_first_with_causes_counted_together() -> None:
    store = RunStore("memory://failures")
    finish(store, "duck", 1)
    for i in range(12):
        fail(store, f"c{i}", 10 + i, f"loss of c{i} is not finite at step {i}", "numerics")
    fail(store, "lamp", 99, "out of memory", "lost_worker")
    fail(store, "chair", 98, "of before kinds")
    bad = [BadRow(file="s3://b/m.parquet", row=17, concept_id="blue mug", reason="concept_id 'blue mug' is bad")]
    page = build(store, bad=bad)
    assert "1 concept learned, 15 failed" in page.text
    assert page.text.index("is not finite") < page.text.index("out of memory") < page.text.index("Sample grids")
    assert page.text.count("is not finite") == 1
    assert "and 9 more" in page.text
    assert "blue mug (row 17 of m.parquet)" in page.text
    kinds = ("numbers that are not finite", "lost worker", "bad input", "unknown kind")
    assert all(kind in page.text for kind in kinds)
    assert page.count("kind") == 4
    assert "12 numbers that are not finite · lower inversion.learning_rate" in page.text


def test_what_failed_besides_concepts_is_told() -> None:
    store = RunStore("memory://problems")
    build_report(store, RunConfig(), RunFigures(problems={"the run": "no actor starts: no GPU"}))
    page = Page(store.get("report.html").decode())
    assert "no actor starts" in page.text
    assert "0 concepts learned, 1 failed" in page.text


def test_missing_pictures_are_noted_and_nothing_else_suffers(root: str) -> None:
    store = RunStore(root)
    record = finish(store, "duck", 1, images=(store.uri("photos/duck.png"), store.uri("gone.png"), "ftp://x/y.png"))
    store.put("photos/duck.png", b"no picture at all")
    store.delete(record.folder.grid)
    store.put(record.folder.curve, b"no parquet")
    page = build(store)
    assert page.count("missing") == 3
    assert page.values("img", "src") == []
    assert "no sample grid" in page.text
    assert "no learning curve" in page.text


def test_an_unforeseen_error_of_a_picture_is_noted_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    class UnknownError(Exception):
        pass

    def fail(*_: object) -> None:
        raise UnknownError("s3://key:pw@bucket/x failed")

    for name in ("fetch", "embed", "read_curve"):
        monkeypatch.setattr(page, name, fail)
    store = RunStore("memory://unforeseen")
    finish(store, "duck", 1, images=("a.png",))
    built = build(store)
    assert built.count("missing") == 1
    assert "no sample grid: s3://***@bucket/x failed" in built.text
    assert "no learning curve" in built.text


def test_large_whole_numbers_are_shown_digit_by_digit() -> None:
    store = RunStore("memory://large")
    finish(store, "duck", 1, carried={"hash": 2**64 - 1, "sku": 7})
    assert rows(build(store))[0][-5:-1] == ["18446744073709551615", 7, None, None]


def test_text_from_the_manifest_stays_text() -> None:
    store = RunStore("memory://escape")
    nasty = "</script><script>alert(1)</script>"
    finish(store, "duck", 1, placeholder_token=nasty, initializer=nasty, carried={nasty: nasty})
    fail(store, "x", 2, nasty)
    html = build(store, bad=[BadRow(file="m", row=1, concept_id=nasty, reason=nasty)]) and store.get("report.html")
    assert b"<script>alert" not in html
    assert rows(Page(html.decode()))[0][1] == nasty


def test_only_the_weakest_carry_pictures_and_all_are_rows() -> None:
    store = RunStore("memory://bounded")
    for i in range(6):
        finish(store, f"c{i}", i, clip_i=0.9 - i / 10)
    page = build(store, load_config(overrides=["report.embedded=2"]))
    assert page.count("card") == 2
    assert page.text.index("c5") < page.text.index("c4")
    assert "2 of 6 concepts, those with the lowest CLIP-I" in page.text
    assert [row[0] for row in rows(page)] == ["c5", "c4", "c3", "c2", "c1", "c0"]


def test_concepts_below_the_gate_come_first_and_are_flagged() -> None:
    store = RunStore("memory://below")
    finish(store, "dull", 1, clip_i=0.2, gate="passed")
    tries = tuple(Try(rung=rung, fingerprint=f"{i:032x}") for i, rung in ((2, ""), (3, "seed")))
    kept = finish(store, "poor", 2, clip_i=0.6, gate="below", tries=tries, kept=f"{3:032x}")
    store.put(kept.result.grid, png("blue"))
    page = build(store, load_config(overrides=["report.embedded=1"]))
    assert "1 below the gate" in page.text
    assert "below the gate, the best of 2 tries" in page.text
    assert [row[0] for row in rows(page)] == ["poor", "dull"]
    assert rows(page)[0][8] == "below, 2 tries"
    assert kept.result.embedding in page.values("a", "href")
    assert kept.folder.record in page.values("a", "href")


def test_tried_again_and_cost_are_told() -> None:
    store = RunStore("memory://cost")
    build_report(store, RunConfig(), RunFigures(retried=3, cost="12.50 EUR"))
    page = Page(store.get("report.html").decode())
    assert "3 tried again" in page.text
    assert "12.50 EUR cost" in page.text


def test_no_scores_no_concepts_no_seconds() -> None:
    store = RunStore("memory://bare")
    build_report(store, RunConfig(), RunFigures())
    assert "0 concepts learned" in Page(store.get("report.html").decode()).text
    finish(store, "duck", 1, scores={}, seconds=0.0)
    page = build(store)
    assert page.count("gauge") == 0
    assert "lowest CLIP-I" not in page.text


def test_a_plan_decides_what_is_current() -> None:
    store = RunStore("memory://current")
    finish(store, "duck", 1)
    new = finish(store, "duck", 2, steps=7)
    finish(store, "removed", 3)
    page = build(store, carried={new.fingerprint.encode(): b'{"sku": 2}'})
    assert [(row[0], row[6], row[9]) for row in rows(page)] == [("duck", 7, 2)]


def test_pictures_are_made_small_and_upright() -> None:
    wide = Image.new("RGB", (3000, 2000), "red")
    exif = wide.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    buffer = io.BytesIO()
    wide.save(buffer, "JPEG", exif=exif)
    picture = page.embed(buffer.getvalue(), 112, 6_000_000)
    assert (picture.width, picture.height) == (75, 112)
    assert len(picture.data_uri) < 4000
