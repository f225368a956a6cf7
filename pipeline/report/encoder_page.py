"""The report of an encoder's training: `report.html`, made from its record."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from pipeline.config import RunConfig
from pipeline.ledger.encoder_record import ENCODER, EncoderRecord
from pipeline.report.html import JINJA, Picture, embed
from pipeline.store.redact import redact
from pipeline.store.storage import RunStore
from pipeline.times import format_utc

log = logging.getLogger(__name__)

PATH = "report.html"
WIDTH, HEIGHT = 640, 220
"""Size of the learning curve, in SVG units."""

_PICTURE_PX = 640
_MAX_LEFT_OUT = 200


@dataclass(frozen=True, slots=True)
class Lines:
    """The learning curve as SVG point lists, and the ends of its scales."""

    loss: str
    """Training loss."""
    held_out: str
    """Loss on the held-out concepts."""
    best: tuple[float, float]
    """Place of the encoder that was kept."""
    low: float
    high: float
    last_step: int


def draw_lines(curve: Sequence[tuple[int, float, float]], best_step: int) -> Lines | None:
    """Return the drawing of a curve of (step, loss, held-out loss); None for fewer than two points that are finite."""
    points = [point for point in curve if all(isfinite(value) for value in point)]
    if len(points) < 2:
        return None
    low = min(min(loss, held_out) for _, loss, held_out in points)
    high = max(max(loss, held_out) for _, loss, held_out in points)
    last = points[-1][0]

    def place(step: int, value: float) -> tuple[float, float]:
        return step / last * WIDTH, (high - value) / ((high - low) or 1.0) * HEIGHT

    def line(values: Sequence[tuple[int, float]]) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(step, value) for step, value in values))

    best = next((held_out for step, _, held_out in points if step == best_step), points[-1][2])
    return Lines(
        loss=line([(step, loss) for step, loss, _ in points]),
        held_out=line([(step, held_out) for step, _, held_out in points]),
        best=place(best_step, best),
        low=low,
        high=high,
        last_step=last,
    )


def write_encoder_page(store: RunStore, config: RunConfig, record: EncoderRecord) -> None:
    """Write the page: how training went, what was left out, and what the encoder makes of concepts it never saw."""
    page = JINJA.get_template("encoder.html").render(
        record=record,
        left_out=list(record.left_out.items())[:_MAX_LEFT_OUT],
        title=f"encoder of {record.trained} concepts",
        source=" + ".join(filter(None, [config.manifest, config.encoder.from_run])),
        output=redact(store.uri(ENCODER)),
        model=config.model,
        extractor=config.extractor,
        start=redact(config.encoder.init_from),
        finished_at=format_utc(record.finished_at),
        lines=draw_lines(record.curve, record.best_step),
        width=WIDTH,
        height=HEIGHT,
        pictures=[
            (path.rpartition("/")[2].removesuffix(".png"), _picture(store, config, path)) for path in record.pictures
        ],
    )
    store.put(PATH, page.encode())


def _picture(store: RunStore, config: RunConfig, path: str) -> Picture:
    try:
        return embed(store.get(path), _PICTURE_PX, config.photos.max_pixels)
    except (OSError, ValueError) as error:
        log.warning("%s cannot be shown: %s", store.uri(path), error)
        return Picture(note=redact(f"{path}: {error}"))
