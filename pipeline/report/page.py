"""The report of a run: `report.html`, one self-contained file made from the records.

Failures come first, then the concepts below the gate and those with the lowest scores. A bounded number of concepts is
shown with pictures inside the page; all are rows of a table that links to the objects beside the page.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from pipeline.config import PhotoConfig, RunConfig
from pipeline.config_file import shown_tree
from pipeline.inputs.manifest import BadRow
from pipeline.inputs.photos import fetch
from pipeline.ledger.records import ConceptRecord, latest, load_records
from pipeline.ledger.results import write_results
from pipeline.report.curves import Curve, read_curve
from pipeline.report.failures import STAGE, group_by_kind
from pipeline.report.html import JINJA, Picture, embed
from pipeline.report.overview import COLUMNS, MAX_CARRIED, Overview
from pipeline.store.redact import redact, redacted
from pipeline.store.storage import ConceptFolder, RunStore
from pipeline.times import format_duration, format_utc, now
from textual_inversion.errors import BAD_INPUT

log = logging.getLogger(__name__)

PATH = "report.html"

_ANY_FOLDER = ConceptFolder("", "")
_MAX_CAUSES = 100
_MAX_PHOTOS = 6
_PHOTO_PX = 112
_GRID_PX = 640
_THREADS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFigures:
    """Figures of a run that no record holds."""

    learned: int = 0
    """Concepts that this run learned."""
    skipped: int = 0
    """Concepts that were done before the run."""
    pending: int = 0
    """Concepts that the run did not reach before it was stopped."""
    retried: int = 0
    """Concepts that lost a call, or that were tried again because they were below the gate."""
    cost: str = ""
    """Price of the devices' time, with the currency; empty if no price is set."""
    seconds: float = 0.0
    """Wall time of the run."""
    problems: Mapping[str, str] = field(default_factory=dict)
    """Errors that are no concept's, by stage."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Further facts of the run by name, such as versions and pictures drawn."""

    @property
    def concepts_per_hour(self) -> float:
        return self.learned / self.seconds * 3600 if self.seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class _Card:
    """A concept with its pictures."""

    record: ConceptRecord
    photos: tuple[Picture, ...]
    grid: Picture
    curve: Curve | None


def build_report(
    store: RunStore,
    config: RunConfig,
    figures: RunFigures,
    carried: Mapping[bytes, bytes] | None = None,
    bad: Sequence[BadRow] = (),
) -> None:
    """Write results.parquet and report.html from the records; may be repeated at any time.

    `carried` and `bad` are those of a plan; without them, the newest record of every concept is taken.
    """
    overview = Overview(config.report.embedded)
    records = load_records(store, carried, update_cache=True) if carried is not None else latest(load_records(store))
    write_results(store, overview.adding(records), bad, absolute=config.report.paths == "absolute")
    write_page(store, config, figures, overview, bad)


def write_page(
    store: RunStore, config: RunConfig, figures: RunFigures, overview: Overview, bad: Sequence[BadRow]
) -> None:
    """Write report.html."""
    for stage, error in figures.problems.items():
        overview.failures.add(STAGE, stage, "", error)
    for row in bad:
        place = f"row {row.row} of {row.file.rpartition('/')[2]}"
        name = f"{row.concept_id or 'unnamed'} ({place})"
        overview.failures.add(BAD_INPUT, name, row.concept_id or "", row.reason)
    causes = overview.failures.causes()
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="report") as pool:
        cards = list(pool.map(lambda record: _card(store, record, config.photos), overview.worst()))
    num_missing = sum(bool(picture.note) for card in cards for picture in (*card.photos, card.grid))
    if num_missing:
        log.warning("%d pictures of learned concepts cannot be shown; the report says which and why", num_missing)
    files = {"grid": _ANY_FOLDER.grid, "embedding": _ANY_FOLDER.embedding}
    page = JINJA.get_template("report.html").render(
        config=config,
        settings=list(_flatten(redacted(shown_tree(config)))),
        figures=figures,
        made_at=format_utc(now()),
        failures=group_by_kind(causes, _MAX_CAUSES),
        num_causes=len(causes),
        num_shown_causes=min(len(causes), _MAX_CAUSES),
        num_failures=overview.num_failed + len(bad) + len(figures.problems),
        cards=cards,
        columns=[*COLUMNS, *overview.carried, *[""] * (MAX_CARRIED - len(overview.carried))],
        files={name: path.rpartition("/")[2] for name, path in files.items()},
        rows=overview.rows(),
        num_done=overview.num_done,
        num_below=overview.num_below,
        has_scores=overview.has_scores,
        medians=overview.medians(),
        scales={name: overview.scale(name) for name in ("clip_i", "clip_t")},
        format_duration=format_duration,
    )
    store.put(PATH, page.encode("utf-8", "replace"))  # a file's name need not be UTF-8


def _card(store: RunStore, record: ConceptRecord, limits: PhotoConfig) -> _Card:
    folder = record.result
    photos = tuple(_thumbnail(uri, limits) for uri in islice(record.images, _MAX_PHOTOS))
    # On damaged files, the readers of PIL and Arrow raise nearly everything.
    try:
        grid = embed(store.get(folder.grid), _GRID_PX, limits.max_pixels)
    except Exception as error:
        grid = Picture(note=redact(f"no sample grid: {error}"))
    try:
        curve = read_curve(store.get(folder.curve))
    except Exception:
        curve = None  # the card says that there is none
    return _Card(record, photos, grid, curve)


def _thumbnail(uri: str, limits: PhotoConfig) -> Picture:
    try:
        return embed(fetch(uri, limits), _PHOTO_PX, limits.max_pixels)
    except Exception as error:
        return Picture(note=redact(f"{uri}: {error}"))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield dotted names of settings and their values as text."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", " · ".join(value) if isinstance(value, list | tuple) else str(value)
