"""The page a person reads in the morning: `report.html`, one self-contained file derived from records.

Failures first, then the concepts that most need a look. A bounded number carries its pictures inside the page; all
others are rows of a table that link to the objects next to it. Imports neither ray nor torch.
"""

from __future__ import annotations

import base64
import io
import logging
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import jinja2
import pyarrow as pa
from PIL import Image, ImageOps

from pipeline.causes import Cause, by_cause
from pipeline.config import PhotoConfig, RunConfig, to_tree
from pipeline.curves import Curve, read_curve
from pipeline.fetch import fetch
from pipeline.manifest import BadRow
from pipeline.progress import duration
from pipeline.records import ConceptRecord, latest, load_records, now
from pipeline.redact import redact, redacted
from pipeline.results import write_results
from pipeline.storage import ConceptFolder, RunStore
from textual_inversion.photos import opened

log = logging.getLogger(__name__)

PATH = "report.html"

_MAX_ROWS = 50_000
"""Rows the page's table can show (it draws some hundred at a time). All are in results.parquet."""
_COLUMNS = ("Concept", "Placeholder", "Initializer", "CLIP-I", "gain", "CLIP-T", "Steps", "Seconds")
_MAX_CARRIED = 4
_ANY = ConceptFolder("", "")
_MAX_CAUSES = 100
_MAX_PHOTOS = 6
_PHOTO_PX, _GRID_PX = 112, 640
_THREADS = 8

_JINJA = jinja2.Environment(
    loader=jinja2.PackageLoader("pipeline"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFigures:
    """What the driver knows of a run and records do not."""

    learned: int = 0
    """Concepts that this run finished."""
    skipped: int = 0
    """Done before it started."""
    pending: int = 0
    """Not reached, when the run was stopped."""
    retried: int = 0
    """Of which calls were lost, or that were tried again for being below the gate."""
    cost: str = ""
    """Device hours and their price, in words."""
    seconds: float = 0.0
    """Wall time."""
    problems: Mapping[str, str] = field(default_factory=dict)
    """What failed besides concepts: stage or part -> cause."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Anything else worth a line: devices, versions, pictures generated."""

    @property
    def concepts_per_hour(self) -> float:
        return self.learned / self.seconds * 3600 if self.seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class _Picture:
    """An image inside the page, or a note where it cannot be shown."""

    data_uri: str = ""
    width: int = 0
    height: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True)
class _Card:
    """One concept with its pictures."""

    record: ConceptRecord
    photos: tuple[_Picture, ...]
    grid: _Picture
    curve: Curve | None


def build_report(
    store: RunStore,
    config: RunConfig,
    figures: RunFigures,
    current: Mapping[bytes, bytes] | None = None,
    bad: Sequence[BadRow] = (),
) -> None:
    """Derive results.parquet and report.html from the records; may be done again at any time.

    `current` and `bad` are a plan's; without them, the newest record of every concept is taken.
    """
    records = list(load_records(store, current) if current is not None else latest(load_records(store)))
    write_results(store, records, bad)
    write_page(store, config, figures, records, bad)


def write_page(
    store: RunStore, config: RunConfig, figures: RunFigures, records: Sequence[ConceptRecord], bad: Sequence[BadRow]
) -> None:
    """Write report.html."""
    done = sorted((record for record in records if record.status == "done"), key=_weakest_first)
    failures = _failures([record for record in records if record.status == "failed"], bad, figures.problems)
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="report") as pool:
        cards = list(pool.map(lambda record: _card(store, record, config.photos), done[: config.report.embedded]))
    missing = sum(bool(picture.note) for card in cards for picture in (*card.photos, card.grid))
    if missing:
        log.warning("%d pictures of finished concepts cannot be shown; the page says which and why", missing)
    carried = list(dict.fromkeys(name for record in done[:_MAX_ROWS] for name in record.carried))[:_MAX_CARRIED]
    page = _JINJA.get_template("report.html").render(
        config=config,
        settings=list(_flatten(redacted(to_tree(config)))),
        figures=figures,
        made_at=now().replace("T", " ").replace("+00:00", " UTC"),
        failures=failures[:_MAX_CAUSES],
        num_causes=len(failures),
        num_failures=sum(failure.count for failure in failures),
        cards=cards,
        columns=[*_COLUMNS, *carried],
        files={name: path.rpartition("/")[2] for name, path in (("grid", _ANY.grid), ("embedding", _ANY.embedding))},
        rows=[_table_row(record, carried) for record in done[:_MAX_ROWS]],
        num_done=len(done),
        has_scores=any(record.scores for record in done),
        medians=_medians(done),
        scales={name: _scale(name, done) for name in ("clip_i", "clip_t")},
        duration=duration,
    )
    store.put(PATH, page.encode())


def _failures(failed: Iterable[ConceptRecord], bad: Iterable[BadRow], problems: Mapping[str, str]) -> list[Cause]:
    """What failed, grouped by cause."""
    single = [(name, "", cause) for name, cause in problems.items()]
    rows = [(f"{row.concept_id or 'unnamed'} (row {row.row} of {row.file.rpartition('/')[2]})", row.concept_id or "",
             row.reason) for row in bad]  # fmt: skip
    return by_cause(chain(single, rows, ((r.concept_id, r.concept_id, r.error) for r in failed)))


def _weakest_first(record: ConceptRecord) -> tuple[float, str]:
    return record.scores.get("clip_i", math.inf), record.concept_id


def _medians(done: Sequence[ConceptRecord]) -> dict[str, float]:
    """Medians over all finished concepts, by name; only those there is a value for."""
    names = dict.fromkeys(name for record in done for name in record.scores)
    values: dict[str, list[float]] = {
        name: [record.scores[name] for record in done if name in record.scores] for name in names
    }
    values["seconds"] = [record.seconds for record in done if record.seconds > 0]
    return {name: statistics.median(numbers) for name, numbers in values.items() if numbers}


def _table_row(record: ConceptRecord, carried: Sequence[str]) -> list[object]:
    """Values in the order of the columns, then the concept's folder."""
    scores = record.scores
    gain = (
        scores["clip_i"] - scores["clip_i_initializer"] if {"clip_i", "clip_i_initializer"} <= scores.keys() else None
    )
    numbers = [
        value if value is None else round(value, 3) for value in (scores.get("clip_i"), gain, scores.get("clip_t"))
    ]
    own = [record.concept_id, record.placeholder_token, record.initializer, *numbers, record.steps]
    return [*own, round(record.seconds, 1), *(record.carried.get(name) for name in carried), record.result.root]


def _scale(name: str, done: Sequence[ConceptRecord]) -> tuple[float, float]:
    """Where a score's axis begins and ends: around all values of the score and what it is compared with."""
    values = [value for record in done for key, value in record.scores.items() if key.startswith(name)]
    low, high = min(values, default=0.0), max(values, default=1.0)
    pad = 0.06 * (high - low) or 0.05
    return low - pad, high + pad


def _card(store: RunStore, record: ConceptRecord, limits: PhotoConfig) -> _Card:
    folder = record.result
    photos = tuple(_thumbnail(uri, limits) for uri in islice(record.images, _MAX_PHOTOS))
    try:
        grid = _embed(store.get(folder.grid), _GRID_PX, limits.max_pixels)
    except (OSError, ValueError) as error:
        grid = _Picture(note=f"no sample grid: {error}")
    try:
        curve = read_curve(store.get(folder.curve))
    except (OSError, ValueError, pa.ArrowException):
        curve = None  # the card says so
    return _Card(record, photos, grid, curve)


def _thumbnail(uri: str, limits: PhotoConfig) -> _Picture:
    try:
        return _embed(fetch(uri, limits), _PHOTO_PX, limits.max_pixels)
    except Exception as error:  # on damaged files PIL's readers raise nearly everything
        return _Picture(note=redact(f"{uri}: {error}"))


def _embed(data: bytes, side_px: int, max_pixels: int) -> _Picture:
    """A picture as a data URI, its longer side at most `side_px`; small drawings stay lossless."""
    with opened(data, "picture", max_pixels) as found:
        found.draft("RGB", (side_px, side_px))  # JPEG: decode at a fraction of the size
        picture: Image.Image = ImageOps.exif_transpose(found).convert("RGBA")
    paper = Image.new("RGB", picture.size, "white")
    paper.paste(picture, mask=picture.getchannel("A"))
    paper.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    paper.save(buffer, "WEBP", quality=82, method=4)
    text = base64.b64encode(buffer.getvalue()).decode()
    return _Picture(f"data:image/webp;base64,{text}", *paper.size)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted setting names and their values, as `--set` takes them."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", " · ".join(value) if isinstance(value, list | tuple) else str(value)
