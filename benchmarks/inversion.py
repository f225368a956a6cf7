"""The engine against the common algorithm (`benchmarks/restatement.py`), side by side: speed, and with `--quality` the
time that each takes to the same scores.

    python -m benchmarks.inversion --threads 1,2
    python -m benchmarks.inversion --processes 2 --slots 4
    python -m benchmarks.inversion --quality --recipe fast --slots 8

Same model and photos; for speed also the same batch size, learning rate and number of steps. With `--quality` each has
its own: the common algorithm those of the project's default, the engine those of the default or of `--recipe`, with as
many concepts side by side as the last of `--slots`. Prints markdown. A figure is the median of
alternating repetitions, with the lowest and highest; sample-steps a second are of the steps alone, what is done once a
concept is beside it, and the seconds per concept are of both at the full budget of steps. With several processes each
does all of it at the same time as the others: sample-steps are summed, and so are concepts.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median

import torch
from PIL import Image
from torch import Tensor

from benchmarks.restatement import CommonAlgorithm
from benchmarks.timing import Rendezvous, Spread, alternate, heading, say, side_by_side, table
from pipeline.actor.model_loading import load_model
from pipeline.actor.samples import draw_samples, score
from pipeline.config import RunConfig
from pipeline.config_file import load_config, recipe
from pipeline.inputs.manifest import BadRow, read_manifest
from pipeline.inputs.models import locate
from pipeline.store.addresses import absolute, read_bytes
from textual_inversion.concept import Concept, LearnedEmbedding
from textual_inversion.config import InversionConfig
from textual_inversion.engine import Assignment, Engine, Outcome, SlotState
from textual_inversion.extractors import ClipExtractor
from textual_inversion.families.base import Backbone
from textual_inversion.initialise import StartChooser
from textual_inversion.latents import encode_views
from textual_inversion.metrics import mean_and_standard_error
from textual_inversion.photos import open_photo

COMMON = "common algorithm"

Case = tuple[Concept, list[Image.Image]]
Rows = dict[int, Tensor]
"""Step -> [1, dim]"""


@dataclass(frozen=True, slots=True)
class Timing:
    """Of all concepts of one variant."""

    once_s: float
    """What is done once a concept, summed over concepts."""
    steps_s: float
    samples: int
    """Sample-steps in that time."""
    concepts: int

    @property
    def rate(self) -> float:
        """Sample-steps a second."""
        return self.samples / self.steps_s


class Contest:
    """The two on the same concepts."""

    def __init__(self, config: RunConfig, cases: list[Case], common: InversionConfig) -> None:
        """`common`: batch size and learning rate of the common algorithm."""
        self.config, self.cases, self._batch_size = config, cases, common.batch_size
        self.backbone: Backbone = load_model(config)
        self.extractor = ClipExtractor(locate(config.extractor), config.device) if config.extractor else None
        self.common = CommonAlgorithm.load(
            locate(config.model), learning_rate=common.learning_rate, batch_size=common.batch_size
        )
        began = time.perf_counter()
        self._choose_start = StartChooser(self.backbone, config.inversion.init, self.extractor, seed=config.seed)
        self.seconds_once_a_process = time.perf_counter() - began

    def assign(self, case: Case) -> Assignment:
        """All that the engine does for a concept before its first step, bar what it does in `run`."""
        concept, photos = case
        start = self._choose_start(concept, photos)
        views = encode_views(self.backbone, photos, self.config.inversion.augment, concept.concept_id, self.config.seed)
        return Assignment(start.concept, views, start=start.embedding)

    def time_common(self, steps: int) -> Timing:
        once_s = steps_s = 0.0
        for concept, photos in self.cases:
            once_s += seconds(lambda: self.common.begin(concept, photos))  # noqa: B023
            steps_s += seconds(lambda: self.common.learn(steps))
        return Timing(once_s, steps_s, steps * self._batch_size * len(self.cases), len(self.cases))

    def time_engine(self, steps: int, slots: int, slots_per_pass: int | None) -> Timing:
        began = time.perf_counter()
        waiting = [self.assign(case) for case in self.cases]
        once_s = time.perf_counter() - began
        inversion = replace(self.config.inversion, steps=steps)
        outcomes: list[Outcome] = []
        engine = Engine(
            self.backbone, inversion, slots=slots, seed=self.config.seed, slots_per_pass=slots_per_pass
        )  # fmt: skip
        steps_s = seconds(lambda: engine.run(lambda _wait: waiting.pop() if waiting else None, outcomes.append))
        for outcome in outcomes:
            sound(outcome)
        taken = sum(outcome.steps for outcome in outcomes)
        return Timing(once_s, steps_s, taken * inversion.batch_size, len(self.cases))

    def looks_of_common(self, case: Case, steps: int, every: int) -> Rows:
        looks: Rows = {}
        self.common.begin(*case)
        looks[0] = self.common.row()
        looks[steps] = self.common.learn(steps, looks.__setitem__, every)
        return looks

    def looks_of_engine(self, assignments: list[Assignment], slots: int, every: int) -> list[Rows]:
        """At every look, and at the end; each concept's."""
        looks: dict[str, Rows] = {assignment.concept.concept_id: {} for assignment in assignments}

        def look(concept: Concept, state: SlotState) -> None:
            looks[concept.concept_id][state.step] = state.parameters["clip_l"]
            looks[concept.concept_id].setdefault(0, state.start["clip_l"])

        def end(outcome: Outcome) -> None:
            looks[outcome.concept.concept_id][outcome.steps] = sound(outcome).vectors["clip_l"]

        waiting = list(assignments)
        engine = Engine(self.backbone, self.config.inversion, slots=slots, seed=self.config.seed)
        engine.run(lambda _wait: waiting.pop() if waiting else None, end, look, every)
        return list(looks.values())

    def scores(self, case: Case, row: Tensor) -> dict[str, float]:
        """The judge's, of the sample grid's pictures."""
        assert self.extractor is not None
        concept = replace(case[0], initializer="")  # the initializer's own pictures would take as long again
        embedding = LearnedEmbedding(placeholder_token=concept.placeholder_token, vectors={"clip_l": row})
        samples = draw_samples(self.backbone, concept, embedding, self.config.grid, self.config.seed)
        return score(self.extractor, case[1], samples)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    config, common = configure(options)
    facts: dict[str, object] = {"concepts": f"{options.concepts} of {options.manifest}", "processes": options.processes}
    for name, each in ((COMMON, common), ("engine", config.inversion)):
        facts[name] = f"batches of {each.batch_size}, rate {each.learning_rate:g}, {each.steps} steps"
    say(heading("Inversion: the engine against the common algorithm", "benchmarks.inversion", arguments, **facts))
    if options.quality:
        say(quality(options, config, common))
        return 0
    say(f"{options.repetitions} repetitions of {options.steps} steps a concept; ")
    say(f"the budget is {config.inversion.steps} steps\n\n")
    titles = ["threads", "", "sample-steps/s", f"times the {COMMON}", "s once a concept", "s per concept at the budget"]
    say(table(titles, list(speed(options, config, common))))
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inversion", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--manifest", default="manifests/demo.parquet")
    parser.add_argument("--concepts", type=int, default=8)
    parser.add_argument("--slots", type=numbers, default=[1, 2, 4, 8], metavar="N,N", help="concepts in flight")
    parser.add_argument("--threads", type=numbers, default=[1], metavar="N,N", help="torch threads a process")
    parser.add_argument("--processes", type=int, default=1, help="side by side, as actors are")
    parser.add_argument("--steps", type=int, default=0, help="a concept; default 25, with --quality each its budget")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quality", action="store_true", help="scores against seconds, in place of speed")
    parser.add_argument("--every", type=int, default=100, metavar="STEPS", help="between looks, with --quality")
    parser.add_argument("--recipe", default="", help="of the engine, with --quality; a name or a TOML file")
    parser.add_argument("--learning-rate", type=float, default=0.0, help="of the common algorithm; 0: as the engine's")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="the engine's settings")
    options = parser.parse_args(arguments)
    if options.quality and options.processes != 1:
        parser.error("--quality: one process, whose seconds are not shared")
    if options.recipe and not options.quality:
        parser.error("--recipe: for speed, both learn in the same way; see --set")
    return options


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def configure(options: argparse.Namespace) -> tuple[RunConfig, InversionConfig]:
    """The engine's settings, and those of the common algorithm, of which it knows batch size, rate and steps."""
    toml = Path(recipe(options.recipe)).read_text() if options.recipe else ""
    config = load_config(toml, ["device=cpu", *options.set])
    common = InversionConfig() if options.quality else config.inversion
    if options.quality and options.steps:
        common = replace(common, steps=options.steps)
        config = replace(config, inversion=replace(config.inversion, steps=options.steps))
    options.steps = options.steps or 25
    if options.learning_rate:
        common = replace(common, learning_rate=options.learning_rate)
    return config, common


def read_cases(options: argparse.Namespace) -> list[Case]:
    """The manifest's first objects with their photos; a bad row ends the benchmark."""
    cases = []
    for row in read_manifest(absolute(options.manifest)):
        if isinstance(row, BadRow):
            raise ValueError(f"{row.file}, row {row.row}: {row.reason}")
        if row.concept.category == "object":
            cases.append((row.concept, [open_photo(read_bytes(uri)) for uri in row.concept.images]))
    return list(islice(cases, options.concepts))


# Speed


def speed(options: argparse.Namespace, config: RunConfig, common: InversionConfig) -> Iterable[list[object]]:
    """Rows of the table, thread count by thread count."""
    timings = side_by_side(options.processes, time_all, options, config, common)
    rows: list[list[object]] = []
    for threads in options.threads:
        here = [each[threads] for each in timings]
        first = None
        for name in here[0]:
            repetitions = list(zip(*(each[name] for each in here), strict=True))
            rates = [sum(timing.rate for timing in repetition) for repetition in repetitions]
            first = first or median(rates)
            once = median(t.once_s / t.concepts for repetition in repetitions for t in repetition)
            work = config.inversion.steps * config.inversion.batch_size
            whole = once / options.processes + work / median(rates)
            rows.append([threads, name, Spread.of(rates), median(rates) / first, once, whole])
    return rows


def time_all(
    together: Rendezvous, options: argparse.Namespace, config: RunConfig, common: InversionConfig
) -> dict[int, dict[str, list[Timing]]]:
    """Threads -> variant -> its timings; what one process does."""
    contest = Contest(config, read_cases(options), common)
    works: dict[str, Callable[[], Timing]] = {COMMON: lambda: contest.time_common(options.steps)}
    for slots in options.slots:
        works[f"engine, {slots} in flight"] = partial(contest.time_engine, options.steps, slots, slots)
        if slots > 1:
            name = f"engine, {slots} in flight, passes of their own"
            works[name] = partial(contest.time_engine, options.steps, slots, 1)
    found = {}
    for threads in options.threads:
        torch.set_num_threads(threads)
        found[threads] = alternate(works, options.repetitions, together)
    return found


# Quality


@dataclass(frozen=True, slots=True)
class Curve:
    """How the scores of one variant rise."""

    batch_size: int
    once_s: float
    """What is done once a concept."""
    step_s: float
    """A step of one concept: all steps' time by their number."""
    scores: dict[int, list[dict[str, float]]]
    """Step -> each concept's."""

    def seconds(self, step: float) -> float:
        """Of a concept up to this step."""
        return self.once_s + step * self.step_s

    def each(self, score: str, step: int) -> Tensor:
        return torch.tensor([scores.get(score, float("nan")) for scores in self.scores[step]])

    @property
    def end(self) -> int:
        return max(self.scores)


def quality(options: argparse.Namespace, config: RunConfig, common: InversionConfig) -> str:
    """Scores and seconds at every look, how the two compare at the end, and when each has what the other ends with."""
    torch.set_num_threads(1)
    contest = Contest(config, read_cases(options), common)
    if contest.extractor is None:
        raise ValueError("extractor = '': --quality needs a judge")
    torch.set_num_threads(options.threads[0])
    curves = learn_both(contest, common, options.slots[-1], options.every)
    rows: list[list[object]] = []
    for name, curve in curves.items():
        for step in curve.scores:
            clip_i, error = mean_and_standard_error(curve.each("clip_i", step))
            clip_t = mean_and_standard_error(curve.each("clip_t", step))[0]
            shown = f"{clip_i:.3f}" + (f" ± {error:.3f}" if error is not None else "")
            rows.append([name, step, step * curve.batch_size, curve.seconds(step), shown, f"{clip_t:.3f}"])
    text = table(["", "steps", "sample-steps", "s a concept", "CLIP-I", "CLIP-T"], rows) + "\n"
    text += at_the_end(curves[COMMON], curves["engine"])
    for owner, curve in curves.items():
        goal = float(curve.each("clip_i", curve.end).mean())
        text += f"CLIP-I {goal:.3f}, what the {owner} ends with, is reached by " + ", by ".join(
            f"the {name} {when(reaching(other, goal), other)}" for name, other in curves.items()
        )
        text += ".\n"
    once_a_process = contest.seconds_once_a_process
    return f"{text}\nOnce a process, not counted above: {once_a_process:.1f} s to fit the engine's starts.\n"


def at_the_end(common: Curve, engine: Curve) -> str:
    """In words: scores concept by concept, and seconds."""
    text = "At the end of its budget, concept by concept, the engine has "
    for name, title in (("clip_i", "CLIP-I"), ("clip_t", "CLIP-T")):
        more, error = mean_and_standard_error(engine.each(name, engine.end) - common.each(name, common.end))
        text += f"{more:+.3f}" + (f" ± {error:.3f}" if error is not None else "") + f" {title}, "
    ours, theirs = engine.seconds(engine.end), common.seconds(common.end)
    return (
        f"{text}in {ours:.1f} s a concept against {theirs:.1f} s: {theirs / ours:.1f} times as many concepts an hour.\n"
    )


def learn_both(contest: Contest, common: InversionConfig, slots: int, every: int) -> dict[str, Curve]:
    """The common algorithm one concept after the other, the engine side by side."""
    looks, whole, once = [], 0.0, 0.0
    for concept, photos in contest.cases:
        once += seconds(partial(contest.common.begin, concept, photos))
        began = time.perf_counter()
        looks.append(contest.looks_of_common((concept, photos), common.steps, every))
        whole += time.perf_counter() - began
    theirs = once, whole - once, looks  # beginning is in the whole, too
    began = time.perf_counter()
    assignments = [contest.assign(case) for case in contest.cases]
    once = time.perf_counter() - began
    began = time.perf_counter()
    looks = contest.looks_of_engine(assignments, slots, every)
    ours = once, time.perf_counter() - began, looks
    return {
        COMMON: drawn(contest, common.batch_size, *theirs),
        "engine": drawn(contest, contest.config.inversion.batch_size, *ours),
    }


def drawn(contest: Contest, batch_size: int, once_s: float, steps_s: float, looks: list[Rows]) -> Curve:
    """The looks with their scores."""
    steps = sorted({step for rows in looks for step in rows})
    scores = {
        step: [contest.scores(case, held(rows, step)) for case, rows in zip(contest.cases, looks, strict=True)]
        for step in steps
    }
    return Curve(batch_size, once_s / len(looks), steps_s / sum(max(rows) for rows in looks), scores)


def held(rows: Rows, step: int) -> Tensor:
    """The row at this step, or the last before it."""
    return rows[max(look for look in rows if look <= step)]


def reaching(curve: Curve, goal: float) -> float | None:
    """After how many steps the score is first at the goal, read off straight lines between looks; None if never."""
    means = {step: float(curve.each("clip_i", step).mean()) for step in curve.scores}
    before = min(means)
    for step in sorted(means):
        if means[step] >= goal:
            rise = means[step] - means[before]
            return step - (step - before) * (means[step] - goal) / rise if rise else float(step)
        before = step
    return None


def when(step: float | None, curve: Curve) -> str:
    if step is None:
        return "never"
    return f"after {step * curve.batch_size:.0f} sample-steps, {curve.seconds(step):.1f} s a concept"


def sound(outcome: Outcome) -> LearnedEmbedding:
    """What was learned. Raises ValueError if it was not."""
    if outcome.embedding is None:
        raise ValueError(f"concept {outcome.concept.concept_id!r}: {outcome.error}")
    return outcome.embedding


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
