"""The report of a run: `report.html`, made from the records.

The page is one self-contained file for a run of up to `report.embedded` concepts. Of a larger run it holds those that
come first, and the rest is in parts beside it (`parts.py`), which the page loads when it needs them. Failures come
first, then the concepts below the gate and those with the lowest scores.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.config import RunConfig
from pipeline.config_file import shown_tree
from pipeline.inputs.manifest import BadRow
from pipeline.ledger.records import latest, load_records
from pipeline.ledger.results import write_results
from pipeline.report.bulk_pictures import read_pictures
from pipeline.report.columns import Column
from pipeline.report.details import Details
from pipeline.report.embedding_map import EmbeddingMap, read_map
from pipeline.report.failures import KindGroup, group_by_kind
from pipeline.report.html import JINJA, Frame, to_script
from pipeline.report.overview import Overview
from pipeline.report.parts import DETAILS_PER_PART, ROWS_PER_PART, PartWriter
from pipeline.report.spool import Spool
from pipeline.store.redact import redacted
from pipeline.store.storage import ConceptFolder, RunStore
from pipeline.times import format_duration, format_utc, now

log = logging.getLogger(__name__)

PATH = "report.html"

_SCRIPTS = ("rows.js", "concept.js", "map.js", "report.js")
_ANY_FOLDER = ConceptFolder("", "")
_MAX_CAUSES = 100


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
    device_time: str = ""
    """Time for which actors held devices, with its unit; empty if there is none."""
    device_seconds: float = 0.0
    """Time for which actors held devices, in seconds, summed over the devices."""
    seconds: float = 0.0
    """Wall time of the run."""
    problems: Mapping[str, str] = field(default_factory=dict)
    """Errors that are no concept's, by stage."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Further facts of the run by name, such as versions and pictures drawn."""

    @property
    def concepts_per_hour(self) -> float:
        return self.learned / self.seconds * 3600 if self.seconds > 0 else 0.0


def build_report(
    store: RunStore,
    config: RunConfig,
    figures: RunFigures,
    carried: Mapping[bytes, bytes] | None = None,
    bad: Sequence[BadRow] = (),
) -> None:
    """Write results.parquet, report.html and its parts from the records; may be repeated at any time.

    `carried` and `bad` are those of a plan; without them, the newest record of every concept is taken.
    """
    with Spool() as spool:
        overview = Overview(spool)
        records = (
            load_records(store, carried, update_cache=True) if carried is not None else latest(load_records(store))
        )
        write_results(store, overview.adding(records), bad, absolute=config.report.paths == "absolute")
        overview.add_bad_rows(bad)
        for stage, error in figures.problems.items():
            overview.add_problem(stage, error)
        spool.add_pictures(read_pictures(store))
        _Report(store, config, figures, overview, spool).write()


class _Report:
    """The report of a run whose records have all been taken in."""

    def __init__(
        self, store: RunStore, config: RunConfig, figures: RunFigures, overview: Overview, spool: Spool
    ) -> None:
        self._store = store
        self._config = config
        self._figures = figures
        self._overview = overview
        self._spool = spool
        self._num_rows = spool.finish()
        self._num_inside = min(self._num_rows, config.report.embedded)
        self._made_at = now("milliseconds")
        self._details = Details(store, config, spool)
        self._parts = PartWriter.of(store, self._made_at)
        self._columns = self._used_columns()

    def write(self) -> None:
        """Write the parts, then the page; delete the parts of earlier reports."""
        inside = self._details.embedded(self._num_inside)  # it also finds the grids' layout, which the parts name
        if self._details.num_missing:
            log.warning(
                "%d pictures of learned concepts cannot be shown; the report says which and why",
                self._details.num_missing,
            )
        rows = list(self._rows(0, self._num_inside))
        if self._num_inside < self._num_rows:
            self._parts.put_all("rows", self._rows(self._num_inside, self._num_rows), ROWS_PER_PART)
            details = self._details.linked(self._num_inside, self._num_rows)
            self._parts.put_all("details", details, DETAILS_PER_PART)
        causes = self._overview.failures.causes()
        groups = group_by_kind(causes, _MAX_CAUSES)
        page = self._page(self._data(rows, inside, groups), groups, len(causes))
        self._store.put(PATH, page.encode("utf-8", "replace"))  # a file's name need not be UTF-8
        self._parts.delete_others()

    def _page(self, data: Mapping[str, Any], groups: Sequence[KindGroup], num_causes: int) -> str:
        overview = self._overview
        return JINJA.get_template("report.html").render(
            frame=Frame.of(*_SCRIPTS),
            config=self._config,
            settings=list(flatten(redacted(shown_tree(self._config)))),
            figures=self._figures,
            made_at=format_utc(self._made_at),
            failures=groups,
            num_causes=num_causes,
            num_shown_causes=min(num_causes, _MAX_CAUSES),
            num_failures=overview.num_failed + len(self._figures.problems),
            num_done=overview.num_done,
            num_below=overview.num_below,
            num_rows=self._num_rows,
            num_inside=self._num_inside,
            num_columns_left_out=overview.columns.num_left_out,
            has_scores=overview.has_scores,
            has_pictures=any(column.name == "pictures" for column in self._columns),
            has_map=data["map"] is not None,
            medians=overview.medians(),
            retry_gains=overview.retry_gains.rules(),
            encoder_starts=overview.encoder_starts,
            data=to_script(data),
            format_duration=format_duration,
        )

    def _data(
        self, rows: list[list[Any]], details: list[dict[str, Any]], groups: Sequence[KindGroup]
    ) -> dict[str, Any]:
        """Return what the page's script reads."""
        plane = self._map()
        return {
            "columns": [column.describe() for column in self._columns],
            "numRows": self._num_rows,
            "rows": rows,
            "details": details,
            "parts": {"folder": self._parts.folder, "rows": ROWS_PER_PART, "details": DETAILS_PER_PART},
            "layouts": self._details.layouts.found,
            "prompts": {
                "object": self._config.grid.prompts_for("object"),
                "style": self._config.grid.prompts_for("style"),
            },
            "files": {
                name: getattr(_ANY_FOLDER, name).rpartition("/")[2]
                for name in ("embedding", "grid", "curve", "previews", "record", "failure", "log")
            },
            "scales": {name: self._overview.scale(name) for name in ("clip_i", "clip_t")},
            "remedies": {group.kind: [group.title, group.remedy] for group in groups},
            "map": asdict(plane) if plane else None,
        }

    def _rows(self, start: int, stop: int) -> Iterator[list[Any]]:
        """Yield the rows at these positions: the values of the columns, then the fingerprints of record and result,
        and the number of the grid's layout."""
        names = [column.name for column in self._columns]
        for row, num_pictures in self._spool.rows(start, stop):
            values = {**row["values"], "pictures": num_pictures or None}
            layout = None
            if "folder" in row:
                layout = self._details.layouts.expected(row["num_photos"], row["name"], row["category"])
            yield [*map(values.get, names), row.get("folder"), row.get("result"), layout]

    def _used_columns(self) -> list[Column]:
        if self._spool.has_pictures():
            self._overview.columns.add({"pictures": 0})
        return self._overview.columns.in_order()

    def _map(self) -> EmbeddingMap | None:
        """Return the map of at most `report.map` concepts, chosen by their results' fingerprints: by chance, but the
        same ones in every report, up to the share that is new."""
        chosen = self._spool.first_by_fingerprint(self._overview.num_done, self._config.report.map)
        folders = {position: ConceptFolder(row["values"]["concept"], row["result"]) for position, row in chosen}
        return read_map(self._store, folders) if folders else None


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield dotted names of settings and their values as text."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", " · ".join(value) if isinstance(value, list | tuple) else str(value)
