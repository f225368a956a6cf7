"""The engine against the common algorithm (`benchmarks/restatement.py`), side by side: speed, and with `--quality` the
time that each takes to the same scores.

    python -m benchmarks.inversion --threads 1,2
    python -m benchmarks.inversion --processes 2 --slots 4
    python -m benchmarks.inversion --quality --concepts 8

Same model, photos, batch size, learning rate and number of steps. Prints markdown. A figure is the median of
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
from statistics import median

import torch
from PIL import Image
from torch import Tensor

from benchmarks.restatement import CommonAlgorithm
from benchmarks.timing import Rendezvous, Spread, alternate, heading, say, side_by_side, table
from pipeline.config import RunConfig, load_config
from pipeline.manifest import BadRow, read_manifest
from pipeline.models import load_model, locate
from pipeline.samples import draw_samples, score
from pipeline.storage import absolute, read_bytes
from textual_inversion.concept import Concept, LearnedEmbedding
from textual_inversion.engine import Assignment, Engine, Outcome, SlotState
from textual_inversion.extractors import ClipExtractor
from textual_inversion.families.base import Backbone
from textual_inversion.initialise import StartChooser
from textual_inversion.latents import encode_views
from textual_inversion.metrics import mean_and_error
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

    def __init__(self, config: RunConfig, cases: list[Case], learning_rate: float) -> None:
        self.config, self.cases, self._learning_rate = config, cases, learning_rate
        self.backbone: Backbone = load_model(config)
        self.extractor = ClipExtractor(locate(config.extractor), config.device) if config.extractor else None
        self.common = CommonAlgorithm.load(
            locate(config.model), learning_rate=learning_rate, batch_size=config.inversion.batch_size
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
        batch = self.config.inversion.batch_size
        return Timing(once_s, steps_s, steps * batch * len(self.cases), len(self.cases))

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

    def looks_of_engine(self, assignment: Assignment, steps: int, every: int) -> Rows:
        """At every look up to the budget; after an early stop, what it stopped with."""
        looks: Rows = {}

        def look(_concept: Concept, state: SlotState) -> None:
            looks[state.step] = state.parameters["clip_l"]
            looks.setdefault(0, state.start["clip_l"])

        def end(outcome: Outcome) -> None:
            looks[outcome.steps] = sound(outcome).vectors["clip_l"]

        waiting = [assignment]
        engine = Engine(self.backbone, replace(self.config.inversion, steps=steps), slots=1, seed=self.config.seed)
        engine.run(lambda _wait: waiting.pop() if waiting else None, end, look, every)
        return looks

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
    config = configure(options)
    rate = options.learning_rate or config.inversion.learning_rate
    facts = {
        "concepts": f"{options.concepts} of {options.manifest}, batches of {config.inversion.batch_size}",
        "learning_rate": f"engine {config.inversion.learning_rate:g}, {COMMON} {rate:g}",
        "processes": options.processes,
    }
    say(heading("Inversion: the engine against the common algorithm", "benchmarks.inversion", arguments, **facts))
    if options.quality:
        say(quality(options, config))
        return 0
    say(f"{options.repetitions} repetitions of {options.steps} steps a concept; ")
    say(f"the budget is {config.inversion.steps} steps\n\n")
    titles = ["threads", "", "sample-steps/s", f"times the {COMMON}", "s once a concept", "s per concept at the budget"]
    say(table(titles, speed(options, config)))
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inversion", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--manifest", default="manifests/demo.parquet")
    parser.add_argument("--concepts", type=int, default=8)
    parser.add_argument("--slots", type=numbers, default=[1, 2, 4, 8], metavar="N,N", help="concepts in flight")
    parser.add_argument("--threads", type=numbers, default=[1], metavar="N,N", help="torch threads a process")
    parser.add_argument("--processes", type=int, default=1, help="side by side, as actors are")
    parser.add_argument("--steps", type=int, default=0, help="a concept; default 25, with --quality the budget")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quality", action="store_true", help="scores against seconds, in place of speed")
    parser.add_argument("--every", type=int, default=50, metavar="STEPS", help="between looks, with --quality")
    parser.add_argument("--learning-rate", type=float, default=0.0, help="of the common algorithm; 0: as the engine's")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="the engine's settings")
    options = parser.parse_args(arguments)
    if options.quality and options.processes != 1:
        parser.error("--quality: one process, whose seconds are not shared")
    return options


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def configure(options: argparse.Namespace) -> RunConfig:
    config = load_config("", ["device=cpu", *options.set])
    options.steps = options.steps or (config.inversion.steps if options.quality else 25)
    return config


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


def speed(options: argparse.Namespace, config: RunConfig) -> Iterable[list[object]]:
    """Rows of the table, thread count by thread count."""
    timings = side_by_side(options.processes, time_all, options, config)
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
    together: Rendezvous, options: argparse.Namespace, config: RunConfig
) -> dict[int, dict[str, list[Timing]]]:
    """Threads -> variant -> its timings; what one process does."""
    contest = Contest(config, read_cases(options), options.learning_rate or config.inversion.learning_rate)
    works: dict[str, Callable[[], Timing]] = {COMMON: lambda: contest.time_common(options.steps)}
    for slots in options.slots:
        works[f"engine, {slots} in flight"] = partial(contest.time_engine, options.steps, slots, 1)
        if slots > 1:
            works[f"engine, {slots} in flight, one pass"] = partial(contest.time_engine, options.steps, slots, slots)
    found = {}
    for threads in options.threads:
        torch.set_num_threads(threads)
        found[threads] = alternate(works, options.repetitions, together)
    return found


# Quality


def quality(options: argparse.Namespace, config: RunConfig) -> str:
    """Scores and seconds at every look, and when each has what the other ends with."""
    torch.set_num_threads(1)
    contest = Contest(config, read_cases(options), options.learning_rate or config.inversion.learning_rate)
    if contest.extractor is None:
        raise ValueError("extractor = '': --quality needs a judge")
    torch.set_num_threads(options.threads[0])
    once, per_step, looks = learn_both(contest, options.steps, options.every)
    steps = sorted(looks[COMMON][0])
    titles, curves = ["steps"], {}
    rows: list[list[object]] = [[step] for step in steps]
    for name, each in looks.items():
        titles += [f"s, {name}", f"CLIP-I, {name}", f"CLIP-T, {name}"]
        curves[name] = {}
        for row, step in zip(rows, steps, strict=True):
            scores = [contest.scores(case, held(rows, step)) for case, rows in zip(contest.cases, each, strict=True)]
            clip_i, error = mean_and_error(torch.tensor([score["clip_i"] for score in scores]))
            clip_t = mean_and_error(torch.tensor([score.get("clip_t", float("nan")) for score in scores]))[0]
            curves[name][step] = clip_i
            shown = f"{clip_i:.3f}" + (f" ± {error:.3f}" if error is not None else "")
            row += [once[name] + step * per_step[name], shown, f"{clip_t:.3f}"]
    text = table(titles, rows) + "\n"
    for owner, curve in curves.items():
        goal = curve[steps[-1]]
        text += f"CLIP-I {goal:.3f}, what {owner} ends with, is reached by " + ", by ".join(
            f"{name} {when(reaching(other, goal), once[name], per_step[name])}" for name, other in curves.items()
        )
        text += ".\n"
    once_a_process = contest.seconds_once_a_process
    return f"{text}\nOnce a process, not counted above: {once_a_process:.1f} s to fit the engine's starts.\n"


def learn_both(
    contest: Contest, steps: int, every: int
) -> tuple[dict[str, float], dict[str, float], dict[str, list[Rows]]]:
    """Seconds once a concept, seconds a step (means over concepts), and each concept's rows at the looks."""
    once = {COMMON: 0.0, "engine": 0.0}
    whole = dict.fromkeys(once, 0.0)
    looks: dict[str, list[Rows]] = {name: [] for name in once}
    for case in contest.cases:
        began = time.perf_counter()
        looks[COMMON].append(contest.looks_of_common(case, steps, every))
        whole[COMMON] += time.perf_counter() - began
        began = time.perf_counter()
        assignment = contest.assign(case)
        once["engine"] += time.perf_counter() - began
        began = time.perf_counter()
        looks["engine"].append(contest.looks_of_engine(assignment, steps, every))
        whole["engine"] += time.perf_counter() - began
    count = len(contest.cases)
    taken = {name: sum(max(rows) for rows in each) for name, each in looks.items()}
    return (
        {name: value / count for name, value in once.items()},
        {name: value / taken[name] for name, value in whole.items()},
        looks,
    )


def held(rows: Rows, step: int) -> Tensor:
    """The row at this step, or the last before it."""
    return rows[max(look for look in rows if look <= step)]


def reaching(curve: dict[int, float], goal: float) -> float | None:
    """After how many steps the score is first at the goal, read off straight lines between looks; None if never."""
    before = min(curve)
    for step in sorted(curve):
        if curve[step] >= goal:
            rise = curve[step] - curve[before]
            return step - (step - before) * (curve[step] - goal) / rise if rise else float(step)
        before = step
    return None


def when(steps: float | None, once: float, per_step: float) -> str:
    return "never" if steps is None else f"after {steps:.0f} steps, {once + steps * per_step:.1f} s a concept"


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
