"""Measure the scores over time of the engine and of the common algorithm: the seconds each takes to the same scores."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.contest import COMMON, Contest, Rows, read_cases, seconds
from benchmarks.timing import table
from pipeline.config import RunConfig
from textual_inversion.config import InversionConfig
from textual_inversion.metrics import mean_and_standard_error


@dataclass(frozen=True, slots=True)
class Curve:
    """Scores of one variant by step."""

    batch_size: int
    once_s: float
    """Seconds of the work done once a concept."""
    step_s: float
    """Seconds of one step of one concept: the time of all steps by their number."""
    scores: dict[int, list[dict[str, float]]]
    """Scores of each concept, by step."""

    def seconds(self, step: float) -> float:
        """Return the seconds of a concept up to this step."""
        return self.once_s + step * self.step_s

    def each(self, score: str, step: int) -> Tensor:
        return torch.tensor([scores.get(score, float("nan")) for scores in self.scores[step]])

    @property
    def end(self) -> int:
        return max(self.scores)


def measure_quality(options: argparse.Namespace, config: RunConfig, common: InversionConfig) -> str:
    """Return a table of scores and seconds at every evaluated step, a comparison of the two at the end, and the step at
    which each has the score that the other ends with."""
    torch.set_num_threads(1)
    contest = Contest(config, read_cases(options), common)
    if contest.extractor is None:
        raise ValueError("extractor = '': --quality needs a CLIP")
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
    text += compare_ends(curves[COMMON], curves["engine"])
    for owner, curve in curves.items():
        goal = float(curve.each("clip_i", curve.end).mean())
        text += f"CLIP-I {goal:.3f}, what the {owner} ends with, is reached by " + ", by ".join(
            f"the {name} {describe_step(steps_to_reach(other, goal), other)}" for name, other in curves.items()
        )
        text += ".\n"
    once_a_process = contest.seconds_once_a_process
    return f"{text}\nOnce a process, not counted above: {once_a_process:.1f} s to fit the engine's starts.\n"


def compare_ends(common: Curve, engine: Curve) -> str:
    """Return a sentence with the differences of scores, concept by concept, and the seconds."""
    text = "At the end of its budget, concept by concept, the engine has "
    for name, title in (("clip_i", "CLIP-I"), ("clip_t", "CLIP-T")):
        more, error = mean_and_standard_error(engine.each(name, engine.end) - common.each(name, common.end))
        text += f"{more:+.3f}" + (f" ± {error:.3f}" if error is not None else "") + f" {title}, "
    ours = engine.seconds(engine.end)
    theirs = common.seconds(common.end)
    return (
        f"{text}in {ours:.1f} s a concept against {theirs:.1f} s: {theirs / ours:.1f} times as many concepts an hour.\n"
    )


def learn_both(contest: Contest, common: InversionConfig, slots: int, every: int) -> dict[str, Curve]:
    """Learn all concepts by both: by the common algorithm one after the other, by the engine several at once."""
    rows = []
    whole = once = 0.0
    for concept, photos in contest.cases:
        once += seconds(partial(contest.common.begin, concept, photos))
        began = time.perf_counter()
        rows.append(contest.rows_of_common((concept, photos), common.steps, every))
        whole += time.perf_counter() - began
    theirs = once, whole - once, rows  # `begin` was called twice, once of it within `whole`
    began = time.perf_counter()
    assignments = [contest.assign(case) for case in contest.cases]
    once = time.perf_counter() - began
    began = time.perf_counter()
    rows = contest.rows_of_engine(assignments, slots, every)
    ours = once, time.perf_counter() - began, rows
    return {
        COMMON: score_rows(contest, common.batch_size, *theirs),
        "engine": score_rows(contest, contest.config.inversion.batch_size, *ours),
    }


def score_rows(contest: Contest, batch_size: int, once_s: float, steps_s: float, rows: list[Rows]) -> Curve:
    """Score each concept's rows at every step at which any concept has rows."""
    steps = sorted({step for each in rows for step in each})
    scores = {
        step: [contest.scores(case, last_row(each, step)) for case, each in zip(contest.cases, rows, strict=True)]
        for step in steps
    }
    return Curve(batch_size, once_s / len(rows), steps_s / sum(max(each) for each in rows), scores)


def last_row(rows: Rows, step: int) -> Tensor:
    """Return the row at this step, or the last one before it."""
    return rows[max(at for at in rows if at <= step)]


def steps_to_reach(curve: Curve, goal: float) -> float | None:
    """Return the steps after which CLIP-I first reaches the goal, interpolated between evaluated steps, or None."""
    means = {step: float(curve.each("clip_i", step).mean()) for step in curve.scores}
    before = min(means)
    for step in sorted(means):
        if means[step] >= goal:
            rise = means[step] - means[before]
            return step - (step - before) * (means[step] - goal) / rise if rise else float(step)
        before = step
    return None


def describe_step(step: float | None, curve: Curve) -> str:
    if step is None:
        return "never"
    return f"after {step * curve.batch_size:.0f} sample-steps, {curve.seconds(step):.1f} s a concept"
