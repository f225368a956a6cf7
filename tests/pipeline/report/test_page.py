from __future__ import annotations

import base64
import hashlib
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.numpy import save

from pipeline.config import RunConfig
from pipeline.config_file import load_config
from pipeline.inputs.manifest import BadRow
from pipeline.ledger.records import ConceptRecord, StripFacts, Try, put_record
from pipeline.report import details, html
from pipeline.report.page import RunFigures, build_report
from pipeline.store.storage import RunStore
from tests.pipeline.report.report_pages import Page, part_values
from textual_inversion.grids import grid
from textual_inversion.strips import Strip

STRIP = StripFacts(steps=(0, 50, 100), cell_px=128)
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


def build(store: RunStore, config: RunConfig | None = None, **values: Any) -> Page:
    build_report(store, config or RunConfig(manifest="m.parquet", output=store.root), FIGURES, **values)
    return Page(store.get("report.html").decode())


def test_everything_about_a_concept_is_on_the_page(root: str) -> None:
    store = RunStore(root)
    record = finish(store, "duck", 1, clip_i=0.8125, carried={"sku": 4711})
    page = build(store)
    for text in ("8 cores", "concepts an hour", "0.812", "0.300"):
        assert text in page.text
    row = dict(zip([column["name"] for column in page.data["columns"]], page.data["rows"][0], strict=False))
    assert row["concept"] == "duck"
    assert (row["placeholder"], row["initializer"], row["clip_i"], row["clip_t"]) == ("<duck>", "toy", 0.8125, 0.3)
    assert (row["clip_i_gain"], row["steps"], row["seconds"], row["carried:sku"]) == (0.2125, 100, 61.0, 4711)
    assert page.data["rows"][0][-3:-1] == [record.fingerprint, record.fingerprint]
    (detail,) = page.data["details"]
    assert detail["sheet"].startswith("data:image/webp;base64,")
    assert detail["curve"]["last_step"] == 100
    assert detail["photos"] == [store.uri("photos/duck.png")]
    assert store.exists("results.parquet")
    assert not store.list("report"), "a small run has no parts"


def test_each_picture_of_a_grid_is_found() -> None:
    store = RunStore("memory://cells")
    config = RunConfig(manifest="m", output=store.root)
    record = finish(store, "duck", 1)
    labels = [prompt.replace("{}", "<duck>") for prompt in config.grid.prompts]
    sample = Image.new("RGB", (64, 64), "red")
    sheet = grid([sample], [(label, [sample] * 2) for label in labels])
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    store.put(record.folder.grid, buffer.getvalue())
    data = build(store, config).data
    layout = data["layouts"][data["details"][0]["layout"]]
    assert tuple(layout["size"]) == sheet.size
    assert len(layout["photos"]) == 1
    assert [len(row) for row in layout["rows"]] == [2] * len(labels)
    for left, top, width, height in [*layout["photos"], *layout["rows"][3]]:
        assert sheet.crop((left, top, left + width, top + height)).getcolors() == [(width * height, (255, 0, 0))]
    finish(store, "old", 2)  # the grid of an earlier release, whose layout is not known
    assert [detail["layout"] for detail in build(store, config).data["details"]] == [0, -1]


def put_strip(store: RunStore, record: ConceptRecord) -> Strip:
    """Put a strip of previews as the record says."""
    strip = Strip()
    for step in (0, 50, 100):
        strip = strip.with_picture(step, Image.new("RGB", (64, 64), (step, 0, 0)))
    store.put(record.folder.previews, strip.to_png())
    return strip


@pytest.mark.parametrize("embedded", [2, 0])
def test_the_previews_of_a_concept_are_found_on_its_strip(root: str, embedded: int) -> None:
    store = RunStore(root)
    strip = put_strip(store, finish(store, "duck", 1, previews=STRIP))
    finish(store, "plain", 2, clip_i=0.9)
    page = build(store, load_config(overrides=[f"report.embedded={embedded}"], output=root))
    parts = [part_values(store.get(path).decode()) for path in store.list("report") if "details" in path]
    found, other = page.data["details"] if embedded else parts[0]
    sheet = Image.open(io.BytesIO(strip.to_png()))
    assert other["previews"] is None
    assert tuple(found["previews"]["size"]) == sheet.size
    assert found["previews"].get("picture", "").startswith("data:image/webp" if embedded else "")
    for step, (left, top, width, height) in found["previews"]["cells"]:
        assert sheet.crop((left, top, left + width, top + height)).getcolors() == [(width * height, (step, 0, 0))]


def test_a_strip_that_is_not_as_its_record_says_is_shown_whole_or_left_out(root: str) -> None:
    store = RunStore(root)
    put_strip(store, finish(store, "duck", 1, previews=StripFacts(steps=(0, 50), cell_px=128)))
    finish(store, "lost", 2, previews=STRIP, clip_i=0.9)
    other, lost = build(store).data["details"]
    assert other["previews"]["cells"] == []
    assert other["previews"]["picture"]
    assert len(lost["previews"]["cells"]) == 3, "the page tells which file is not found"
    assert "picture" not in lost["previews"]


def test_the_prompts_of_the_grids_are_told_for_each_category() -> None:
    config = RunConfig(output="memory://prompts")
    finish(RunStore("memory://prompts"), "duck", 1)
    prompts = build(RunStore("memory://prompts"), config).data["prompts"]
    assert prompts == {"object": list(config.grid.prompts), "style": list(config.grid.style_prompts)}


def test_the_page_needs_nothing_from_outside_and_runs_its_own_script_alone(root: str) -> None:
    store = RunStore(root)
    finish(store, "duck", 1)
    page = build(store)
    assert all(re.match(r"(results\.parquet|#list)$", link) for link in page.values("a", "href"))
    assert page.values("script", "src") == page.values("link", "href") == page.values("img", "src") == []
    assert [tag for tag, attributes in page.tags if "style" in attributes] == [], "the policy allows no such styles"
    (policy,) = [a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv")]
    hashes = {
        name: base64.b64encode(hashlib.sha256(page.code[name].encode()).digest()).decode()
        for name in ("style", "script")
    }
    assert policy == (
        f"default-src 'none'; img-src 'self' data: blob:; style-src 'sha256-{hashes['style']}'; "
        f"script-src 'self' 'sha256-{hashes['script']}'"
    )


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
    assert page.text.index("is not finite") < page.text.index("out of memory") < page.text.index("Search")
    assert page.text.count("is not finite") == 1
    assert "and 9 more" in page.text
    assert "blue mug (row 17 of m.parquet)" in page.text
    kinds = ("numbers that are not finite", "lost worker", "bad input", "unknown kind")
    assert all(kind in page.text for kind in kinds)
    assert page.values("tr", "class").count("kind") == 4
    assert "12 numbers that are not finite · lower inversion.learning_rate" in page.text
    assert page.column("status") == ["done"] + ["bad row"] + ["failed"] * 14, "they are rows, too, and come last"
    assert page.column("error")[1] == "concept_id 'blue mug' is bad"
    status = next(column for column in page.data["columns"] if column["name"] == "status")
    assert status["choices"] == [["bad row", 1], ["done", 1], ["failed", 14]]
    assert page.data["remedies"]["numerics"][0] == "numbers that are not finite"


def test_what_failed_besides_concepts_is_told() -> None:
    store = RunStore("memory://problems")
    build_report(store, RunConfig(), RunFigures(problems={"the run": "no actor starts: no GPU"}))
    page = Page(store.get("report.html").decode())
    assert "no actor starts" in page.text
    assert "0 concepts learned, 1 failed" in page.text


def test_missing_pictures_are_noted_and_nothing_else_suffers(root: str) -> None:
    store = RunStore(root)
    record = finish(store, "duck", 1)
    store.delete(record.folder.grid)
    store.put(record.folder.curve, b"no parquet")
    (detail,) = build(store).data["details"]
    assert detail["sheet"] == ""
    assert detail["note"].startswith("no sample grid")
    assert detail["curve"] is None


def test_an_unforeseen_error_of_a_picture_is_noted_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    class UnknownError(Exception):
        pass

    def fail(*_: object) -> None:
        raise UnknownError("s3://key:pw@bucket/x failed")

    for name in ("embed", "read_curve"):
        monkeypatch.setattr(details, name, fail)
    store = RunStore("memory://unforeseen")
    finish(store, "duck", 1)
    (detail,) = build(store).data["details"]
    assert detail["note"] == "no sample grid: s3://***@bucket/x failed"
    assert detail["curve"] is None


def test_large_whole_numbers_are_shown_digit_by_digit() -> None:
    store = RunStore("memory://large")
    finish(store, "duck", 1, carried={"hash": 2**64 - 1, "sku": 7})
    page = build(store)
    assert (page.column("carried:hash"), page.column("carried:sku")) == (["18446744073709551615"], [7])


def test_text_from_the_manifest_stays_text() -> None:
    store = RunStore("memory://escape")
    nasty = "</script><script>alert(1)</script><!--\u2028'\"&<img src=x onerror=alert(2)>"
    finish(store, "duck", 1, placeholder_token=nasty, initializer=nasty, carried={nasty: nasty}, images=(nasty,))
    put_pictures(store, [{"concept_id": "duck", "fingerprint": f"{1:032x}", "prompt": nasty, "path": nasty}])
    fail(store, "x", 2, nasty)
    rule = Try(rung=nasty, fingerprint=f"{4:032x}", error=nasty)
    finish(store, "poor", 3, tries=(Try(rung="", fingerprint=f"{3:032x}"), rule))
    bad = [BadRow(file="m", row=1, concept_id=nasty, reason=nasty)]
    for embedded in (200, 0):
        page = build(store, load_config(overrides=[f"report.embedded={embedded}"]), bad=bad)
        html = store.get("report.html").decode()
        scripts = [store.get(path).decode() for path in store.list("report")]
        assert len(scripts) == (0 if embedded else 2)
        for text in (html, *scripts):
            assert "<script>alert" not in text
            assert "<img" not in text
            assert "\u2028" not in text.partition('id="data">')[2]
        assert html.count("</script>") == 2, "the data, and the script"
        rows = page.data["rows"] if embedded else part_values(next(text for text in scripts if '"rows"' in text))
        place = [column["name"] for column in page.data["columns"]].index("initializer")
        assert nasty in [row[place] for row in rows]
        assert nasty in page.texts, "as a failure's cause"


def put_pictures(store: RunStore, rows: list[dict[str, Any]], part: int = 0) -> None:
    """Put metadata rows of bulk pictures, and a picture for each path that is ours."""
    for row in rows:
        row |= {"seed": row.get("seed", 1), "status": row.get("status", "ok"), "error": row.get("error")}
        if row.get("path", "").startswith("images/") and ".." not in row["path"]:
            store.put(row["path"], png("green", (64, 64)))
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    store.put(f"images/metadata/{part}.parquet", buffer.getvalue())


def test_the_bulk_pictures_of_each_concept_are_shown() -> None:
    store = RunStore("memory://bulk")
    finish(store, "duck", 1)
    kept = finish(store, "poor", 2, clip_i=0.3, kept=f"{9:032x}")
    store.put(kept.result.grid, png("blue"))
    duck = {"concept_id": "duck", "fingerprint": f"{1:032x}"}
    rows: list[dict[str, Any]] = [
        {**duck, "prompt": "a <duck> in snow", "path": "images/duck/2.png", "seed": 5},
        {**duck, "prompt": "a <duck> at sea", "path": "images/duck/1.png"},
        {**duck, "prompt": "a <duck> at sea", "status": "failed", "error": "of an earlier attempt", "path": ""},
        {**duck, "prompt": "too long", "status": "failed", "error": "77 ids", "path": ""},
        {"concept_id": "duck", "fingerprint": "earlier", "prompt": "of an earlier result", "path": "images/duck/0.png"},
        {**duck, "prompt": "packed", "path": ""},
        {**duck, "prompt": "not ours", "path": "images/../../photos/duck.png"},
        {"concept_id": "poor", "fingerprint": f"{9:032x}", "prompt": "of the kept try", "path": "images/poor/1.png"},
        {"concept_id": "gone", "fingerprint": "x", "prompt": "of no concept", "path": "images/gone/1.png"},
    ]
    put_pictures(store, rows)
    store.put("images/metadata/9.parquet", b"cut short")
    page = build(store)
    poor, found = page.data["details"]
    assert [picture[:4] for picture in found["pictures"]] == [
        ["a {} at sea", 1, "images/duck/1.png", ""],
        ["a {} in snow", 5, "images/duck/2.png", ""],
        ["not ours", 1, "", ""],
        ["packed", 1, "", ""],
        ["too long", 1, "", "77 ids"],
    ]
    assert all(picture[4].startswith("data:image/webp") for picture in found["pictures"][:2])
    assert [picture[0] for picture in poor["pictures"]] == ["of the kept try"]
    assert page.column("pictures") == [1, 4]
    assert 'data-view="pictures"' in store.get("report.html").decode()


def test_what_does_not_fit_into_the_page_is_in_parts_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.report.page.ROWS_PER_PART", 2)
    monkeypatch.setattr("pipeline.report.page.DETAILS_PER_PART", 3)
    store = RunStore("memory://bounded")
    for i in range(9):
        finish(store, f"c{i}", i, clip_i=0.9 - i / 10, carried={"row": i})
        put_pictures(
            store, [{"concept_id": f"c{i}", "fingerprint": f"{i:032x}", "prompt": "p", "path": f"images/c{i}/0.png"}], i
        )
    config = load_config(overrides=["report.embedded=2"])
    page = build(store, config)
    assert page.column("concept") == ["c8", "c7"]
    assert len(page.data["details"]) == 2
    assert page.data["numRows"] == 9
    folder = page.data["parts"]["folder"]
    names = [f"details-{number:05d}" for number in range(3)] + [f"rows-{number:05d}" for number in range(4)]
    assert sorted(store.list("report")) == [f"{folder}/{name}.js" for name in names]
    rows = [row for number in range(4) for row in part_values(store.get(f"{folder}/rows-{number:05d}.js").decode())]
    assert [row[0] for row in rows] == [f"c{i}" for i in range(6, -1, -1)]
    details = [
        each for number in range(3) for each in part_values(store.get(f"{folder}/details-{number:05d}.js").decode())
    ]
    assert [each["pictures"] for each in details] == [[["p", 1, f"images/c{i}/0.png", ""]] for i in range(6, -1, -1)]
    build(store, config)
    assert folder not in {path.rpartition("/")[0] for path in store.list("report")}, (
        "the earlier report's parts are gone"
    )
    assert len(store.list("report")) == 7
    build(store)
    assert not store.list("report")


def test_concepts_below_the_gate_come_first_and_their_tries_are_compared() -> None:
    store = RunStore("memory://below")
    finish(store, "dull", 1, clip_i=0.2, gate="passed")
    scores = [{"clip_i": 0.4, "clip_t": 0.2}, {"clip_i": 0.6, "clip_t": 0.3}]
    tries = tuple(
        Try(rung=rung, fingerprint=f"{i:032x}", scores=found)
        for i, rung, found in ((2, "", scores[0]), (3, "seed", scores[1]))
    )
    kept = finish(store, "poor", 2, clip_i=0.6, gate="below", tries=tries, kept=f"{3:032x}")
    store.put(kept.result.grid, png("blue"))
    page = build(store)
    assert "1 below the gate" in page.text
    assert page.column("concept") == ["poor", "dull"]
    assert page.column("tries") == [2, 1]
    assert page.data["rows"][0][-3:-1] == [f"{2:032x}", f"{3:032x}"], "the record's fingerprint, and the result's"
    first, second = page.data["details"][0]["tries"]
    assert [each["kept"] for each in (first, second)] == [False, True]
    assert first["sheet"] != second["sheet"]
    assert "seed 1 1 0 +0.200 +0.100" in page.text


def test_the_map_is_of_the_learned_rows(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    vectors = {"left": [0.0, 0.0], "right": [2.0, 0.0], "middle": [1.0, 0.1], "other": [1.0, 1.0, 1.0]}
    for number, (name, vector) in enumerate(vectors.items()):
        record = finish(store, name, number)
        store.put(record.folder.embedding, save({f"<{name}>": np.array([vector], np.float32)}))
    plane = build(store).data["map"]
    places = {position: (x, y) for position, x, y in plane["points"]}
    order = [["left", "middle", "other", "right"].index(name) for name in ("left", "middle", "right")]
    across = [places[position][0] for position in order]
    assert across in (sorted(across), sorted(across, reverse=True))
    assert (min(across), max(across)) == (0.0, 1.0)
    assert len(places) == 3, "a vector of another length is left out"
    assert plane["shares"][0] == pytest.approx(2 / (2 + 0.02 / 3), abs=1e-3)
    assert build(store, load_config(overrides=["report.map=0"])).data["map"] is None


def test_tried_again_and_cost_are_told() -> None:
    store = RunStore("memory://cost")
    build_report(
        store,
        RunConfig(),
        RunFigures(retried=3, cost="12.50 EUR", learned=4, device_time="0.10 core-hours", device_seconds=360),
    )
    page = Page(store.get("report.html").decode())
    for text in ("3 tried again", "12.50 EUR cost", "0.10 core-hours device time", "90.0 s device time a concept"):
        assert text in page.text


def test_a_caution_stands_at_the_top() -> None:
    store = RunStore("memory://caution")
    build_report(store, RunConfig(), RunFigures(facts={"caution": "this model draws its own world alone"}))
    page = Page(store.get("report.html").decode())
    assert page.text.index("its own world alone") < page.text.index("learned in this run")


def test_no_scores_no_concepts_no_seconds() -> None:
    store = RunStore("memory://bare")
    build_report(store, RunConfig(), RunFigures())
    assert "0 concepts learned" in Page(store.get("report.html").decode()).text
    finish(store, "duck", 1, scores={}, seconds=0.0)
    page = build(store)
    assert "CLIP-I" not in page.text
    assert "clip_i" not in [column["name"] for column in page.data["columns"]]


def test_a_plan_decides_what_is_current() -> None:
    store = RunStore("memory://current")
    finish(store, "duck", 1)
    new = finish(store, "duck", 2, steps=7)
    finish(store, "removed", 3)
    page = build(store, carried={new.fingerprint.encode(): b'{"sku": 2}'})
    assert (page.column("concept"), page.column("steps"), page.column("carried:sku")) == (["duck"], [7], [2])


def test_pictures_are_made_small_and_upright() -> None:
    wide = Image.new("RGB", (3000, 2000), "red")
    exif = wide.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    buffer = io.BytesIO()
    wide.save(buffer, "JPEG", exif=exif)
    picture = html.embed(buffer.getvalue(), 112, 6_000_000)
    assert (picture.width, picture.height) == (75, 112)
    assert len(picture.data_uri) < 4000
