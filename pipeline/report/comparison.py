"""Two runs side by side: the scores of the concepts that both have learned, and their sample grids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

from pipeline.config import RunConfig
from pipeline.config_file import load_config
from pipeline.ledger.differences import changed_values
from pipeline.ledger.records import load_records
from pipeline.report.columns import title_of_score
from pipeline.report.details import read_sheet
from pipeline.report.html import JINJA, Frame, to_script
from pipeline.report.intervals import Interval
from pipeline.report.run_file import RUN_FILE, read_run
from pipeline.report.sheet_layouts import SheetLayouts
from pipeline.store.redact import redact
from pipeline.store.storage import ConceptFolder, RunStore
from pipeline.times import format_utc, now

_SCRIPTS = ("compare.js",)
_COMPARED = ("clip_i", "clip_t")
"""Scores that come first."""
_REFERENCES = ("_initializer", "_photos")
"""Ends of the names of scores that do not depend on what was learned."""
_PLACES = ("manifest", "output")
_THREADS = 8


@dataclass(frozen=True, slots=True)
class Learned:
    """Facts of a learned concept that a comparison shows."""

    folder: ConceptFolder
    """Folder of its result."""
    name: str
    """Name of the concept in prompts."""
    category: str
    num_photos: int
    scores: Mapping[str, float]
    steps: int
    seconds: float
    gate: str
    finished_at: str


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two runs."""

    store: RunStore
    config: RunConfig
    settings: Mapping[str, Any]
    """The configuration without its addresses, as the run's run.json has it; empty if there is none."""
    learned: Mapping[str, Learned]
    """The newest result of each concept, by id."""
    num_failed: int

    @classmethod
    def read(cls, output: str) -> Side:
        """Read the records of a run. Raises ValueError if there are none."""
        store = RunStore(output)
        learned: dict[str, Learned] = {}
        failed = set()
        for record in load_records(store):
            if record.status == "failed":
                failed.add(record.concept_id)
                continue
            before = learned.get(record.concept_id)
            if before is None or record.finished_at >= before.finished_at:
                learned[record.concept_id] = Learned(
                    record.result,
                    record.name_in_prompts,
                    record.category,
                    len(record.images),
                    dict(record.scores),
                    record.steps,
                    record.seconds,
                    record.gate,
                    record.finished_at,
                )
        if not learned:
            raise ValueError(f"{redact(store.root)}: no learned concepts there; give the output of a run")
        config, settings = RunConfig(), {}
        if store.exists(RUN_FILE):
            tree = read_run(store).get("config", {})
            config = load_config("", [], base=tree, output=store.root)
            settings = {name: value for name, value in tree.items() if name not in _PLACES}
        return cls(store, config, settings, learned, len(failed - learned.keys()))


@dataclass(frozen=True, slots=True)
class ScoreDifference:
    """A score over the concepts that have it in both runs."""

    score: str
    first: float
    """Mean in the first run."""
    second: float
    difference: Interval
    """Mean of the second less the first, concept by concept."""
    higher: int
    """Concepts whose score is higher in the second run."""
    lower: int

    @property
    def title(self) -> str:
        return title_of_score(self.score)

    def texts(self) -> tuple[str, str, str]:
        """Return both means and the difference as text."""
        digits = 1 if self.score in ("steps", "seconds") else 3
        return f"{self.first:.{digits}f}", f"{self.second:.{digits}f}", f"{self.difference:+.{digits}}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs, and the concepts that both have learned."""

    sides: tuple[Side, Side]
    shared: Sequence[str]
    """Ids of these concepts, in their order."""

    @classmethod
    def of(cls, first: Side, second: Side) -> Comparison:
        """Pair the concepts by id. Raises ValueError if the runs share none."""
        shared = sorted(first.learned.keys() & second.learned.keys())
        if not shared:
            raise ValueError(
                f"{redact(first.store.root)} and {redact(second.store.root)} have learned no concept of the same id"
            )
        return cls((first, second), shared)

    def scores(self) -> list[ScoreDifference]:
        """Return the difference in every score, and in steps and seconds, CLIP-I and CLIP-T first."""
        names = dict.fromkeys((*_COMPARED, *sorted(self._names()), "steps", "seconds"))
        return [found for name in names if (found := self._difference(name)) is not None]

    def settings(self) -> list[tuple[str, str, str]]:
        """Return the name of each setting that differs, and its value in both runs as text."""
        first, second = (side.settings for side in self.sides)
        return [(name, redact(one), redact(other)) for name, one, other in changed_values(first, second)]

    def lines(self) -> Iterator[str]:
        """Yield the comparison as lines of a terminal."""
        for word, side in zip(("first", "second"), self.sides, strict=True):
            failed = f", {side.num_failed:,} failed" if side.num_failed else ""
            yield f"{word:>7}  {redact(side.store.root)}: {len(side.learned):,} concepts learned{failed}"
        yield f"{'both':>7}  {len(self.shared):,} concepts"
        yield ""
        yield f"{'score':<24} {'first':>10} {'second':>10}  {'second less first':<20} {'higher':>7} {'lower':>7}"
        for each in self.scores():
            first, second, difference = each.texts()
            yield f"{each.title:<24} {first:>10} {second:>10}  {difference:<20} {each.higher:>7,} {each.lower:>7,}"
        yield ""
        yield "± is half a 95 % interval over the concepts that both have learned (Student's t)"
        for number, (name, first, second) in enumerate(self.settings()):
            yield f"{'' if number else 'settings':<9}{name}: first {first}, second {second}"

    def page(self, num_pictures: int) -> str:
        """Return the page, with the sample grids of the `num_pictures` concepts that differ most in the first score."""
        scores = self.scores()
        layouts = tuple(SheetLayouts(side.config.grid) for side in self.sides)
        by_difference = sorted(self.shared, key=lambda name: -abs(self._change(name, scores[0].score) or 0.0))
        chosen = by_difference[:num_pictures]
        sheets = []
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="compare") as pool:
            for number, of_side in enumerate(layouts):
                read = partial(self._sheet, number, of_side)
                sheets.append(dict(zip(chosen, pool.map(read, chosen), strict=True)))
        places = [redact(side.store.root) for side in self.sides]
        names = [place.rstrip("/").rpartition("/")[2] for place in places]
        data = {
            "names": names,
            "scores": [[each.score, each.title] for each in scores],
            "prompts": [
                {kind: side.config.grid.prompts_for(kind) for kind in ("object", "style")} for side in self.sides
            ],
            "layouts": [each.found for each in layouts],
            "rows": [
                {
                    "concept": name,
                    "category": self.sides[0].learned[name].category,
                    "names": [side.learned[name].name for side in self.sides],
                    "values": [_values(side.learned[name]) for side in self.sides],
                    "gates": [side.learned[name].gate for side in self.sides],
                    "sheets": [found.get(name) for found in sheets],
                }
                for name in by_difference
            ],
        }
        return JINJA.get_template("compare.html").render(
            frame=Frame.of(*_SCRIPTS),
            made_at=format_utc(now()),
            sides=self.sides,
            places=places,
            shared=self.shared,
            scores=scores,
            settings=self.settings(),
            num_pictures=min(num_pictures, len(self.shared)),
            data=to_script(data),
        )

    def _names(self) -> set[str]:
        """Return the names of the scores that both runs have and that depend on what was learned."""
        found = [{name for each in side.learned.values() for name in each.scores} for side in self.sides]
        return {name for name in found[0] & found[1] if not name.endswith(_REFERENCES)}

    def _change(self, concept_id: str, score: str) -> float | None:
        """Return the second run's value less the first's; None if either has none."""
        first, second = (_values(side.learned[concept_id]).get(score) for side in self.sides)
        return None if first is None or second is None else second - first

    def _difference(self, score: str) -> ScoreDifference | None:
        pairs = [[_values(side.learned[name]).get(score) for side in self.sides] for name in self.shared]
        known = [(first, second) for first, second in pairs if first is not None and second is not None]
        difference = Interval.of(second - first for first, second in known)
        if difference is None:
            return None
        return ScoreDifference(
            score,
            fmean(first for first, _ in known),
            fmean(second for _, second in known),
            difference,
            higher=sum(second > first for first, second in known),
            lower=sum(second < first for first, second in known),
        )

    def _sheet(self, number: int, layouts: SheetLayouts, concept_id: str) -> dict[str, Any]:
        side = self.sides[number]
        concept = side.learned[concept_id]
        try:
            content: bytes | OSError = side.store.get(concept.folder.grid)
        except OSError as error:
            content = error
        place = (concept.num_photos, concept.name, concept.category)
        return read_sheet(content, layouts, place, side.config.photos.max_pixels)


def _values(learned: Learned) -> dict[str, float]:
    return {**learned.scores, "steps": learned.steps, "seconds": learned.seconds}
