"""The page of an encoder's training, and the drawing of its curve."""

from __future__ import annotations

import io
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest
from PIL import Image

from pipeline.config import RunConfig
from pipeline.encoder_config import EncoderJobConfig
from pipeline.ledger.encoder_record import EncoderRecord, put_record, read_record
from pipeline.ledger.records import StoredFile
from pipeline.report.encoder_page import HEIGHT, PATH, WIDTH, draw_lines, write_encoder_page
from pipeline.store.storage import RunStore

RECORD = EncoderRecord(
    fingerprint="f",
    model_hash="m" * 32,
    extractor_hash="e" * 32,
    data="d",
    settings={"seed": 0},
    trained=1_234,
    held_out=("h0", "h1"),
    left_out={"<c>": "photo x.png: no picture"},
    ending="no better for long",
    steps=400,
    best_step=200,
    held_out_loss=0.25,
    curve=[(100, 0.5, 0.5), (200, 0.3, 0.25), (300, 0.2, inf), (400, 0.1, 0.3)],
    file=StoredFile(bytes=3, sha256="s"),
    pictures=("held_out/h0.png", "held_out/h1.png"),
)


def test_the_curve_in_svg_units() -> None:
    lines = draw_lines(RECORD.curve, RECORD.best_step)
    assert lines is not None
    assert (
        lines.loss == f"160.0,0.0 320.0,{0.2 / 0.4 * HEIGHT:.1f} {WIDTH:.1f},{HEIGHT:.1f}"
    )  # without the infinite one
    assert lines.held_out.split()[0] == "160.0,0.0"
    assert lines.best == pytest.approx((WIDTH / 2, 0.25 / 0.4 * HEIGHT))
    assert (lines.low, lines.high, lines.last_step) == (0.1, 0.5, 400)
    assert draw_lines(RECORD.curve[:1], 100) is None
    assert draw_lines([(1, 0.5, 0.5), (2, 0.5, 0.5)], 1) is not None  # a flat one


def test_the_page_names_what_was_left_out_and_shows_what_there_is(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    png = io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, "PNG")
    store.put("held_out/h0.png", png.getvalue())
    config = RunConfig(
        manifest="s3://bucket/m.parquet", encoder=EncoderJobConfig(init_from="s3://key:word@bucket/first")
    )
    write_encoder_page(store, config, RECORD)
    page = store.get(PATH).decode()
    assert "encoder of 1234 concepts, 2 held out, 1 left out" in page
    assert "&lt;c&gt;</td><td>photo x.png: no picture" in page
    assert page.count("data:image/webp;base64,") == 1
    assert "held_out/h1.png: " in page  # its picture is gone, and the page says so
    assert "<th>started from</th><td>s3://***@bucket/first</td>" in page
    assert "400: no better for long; kept is step 200, held-out loss 0.2500" in page


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    assert read_record(store) is None
    put_record(store, RECORD)
    assert read_record(store) == replace(RECORD, curve=[tuple(point) for point in RECORD.curve])
    store.put("encoder.json", b"{}")
    with pytest.raises(ValueError, match=r"encoder\.json is no record of an encoder"):
        read_record(store)
