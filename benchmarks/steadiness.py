"""Measure how steady a fast recipe is from seed to seed, and how well the quality gate finds its failures.

    python -m benchmarks.steadiness --seeds 0 1 2 3 --jobs 2
    python -m benchmarks.steadiness --setups fast fast-batch-4 --seeds 0 1 --concepts 16 --truth efficientnet_own

Every setup learns the same concepts with every seed (`CANDIDATES`: the recipe `fast` with more steps, larger batches,
another start, a lower rate or no norm cap, and the default). A row failed if most of its pictures of "a photo of a S*"
are nearer to another concept's photos than to its own, by `--truth` (a score of `benchmarks/scores.py`; the gate's own
CLIP is lenient to itself, so an extractor that the gate does not use is better; of several, all must say so, and rows
on which they disagree count neither way). `best of two tries` takes, of two
seeds each, the row with the higher CLIP-I of the gate's own pictures, at the cost of both. Then every rule of
`benchmarks/gate_rules.py` is measured on all rows: the gate sees the sample grid, failures are told by other pictures.

Rows, options and output are those of `benchmarks.methods`, with `steadiness.md`. Time: about a quarter of a minute of
one core of the demo model for a fast row, half a minute for the default.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.gate_rules import has_failed, show_rules
from benchmarks.intervals import Row, by_setup, over_concepts, spread_over_seeds
from benchmarks.jobs import measure_all
from benchmarks.methods import add_options, jobs_of, report, split
from benchmarks.setups import Setup, find, settings_of
from benchmarks.timing import say, table
from pipeline.store.addresses import absolute
from pipeline.store.storage import RunStore
from textual_inversion.bias import Proportion

BASELINE = "fast"


def _fast(what: str, *pairs: str, steps: int | None = None) -> Setup:
    return Setup(what=what, recipe="fast", settings=settings_of(*pairs), steps=steps)


CANDIDATES: dict[str, Setup] = {
    BASELINE: _fast("the recipe"),
    "fast-400": _fast("twice the steps", steps=400),
    "fast-batch-4": _fast("twice the batch", "batch_size=4", steps=200),
    "fast-auto-init": _fast("from the word nearest to the photos", "init.method=auto"),
    "fast-half-rate": _fast("half the rate", "learning_rate=2.5e-3"),
    "fast-half-rate-400": _fast("half the rate, twice the steps", "learning_rate=2.5e-3", steps=400),
    "fast-no-cap": _fast("norm left alone", "norm_control=none"),
    "default": Setup(what="the project's default"),
}
TWO_TRIES = "best of two tries"


def main(arguments: list[str] | None = None) -> int:
    """Measure all rows and print the tables; return 1 if a row failed to be measured."""
    options = parse(arguments)
    setups = {name: CANDIDATES.get(name) or find(name) for name in split(options.setups)}
    jobs, scoring = jobs_of(options, setups)
    scoring = replace(scoring, gate=True)
    store = RunStore(absolute(options.output))
    jobs = [replace(job, shared=f"{job.shared}, gate") for job in jobs]
    rows, failures = measure_all(jobs, store.root, scoring, processes=options.jobs, at_once=options.at_once)
    if rows:
        baseline = BASELINE if BASELINE in setups else next(iter(setups))
        text = report(store, rows, setups, baseline=baseline)
        steady = f"{show_steadiness([*rows, *best_of_two(rows)], options.truth)}\n{show_rules(rows, options.truth)}"
        store.put("steadiness.md", steady.encode())
        say(f"\n{text}\n{steady}\n{store.uri('steadiness.md')}, table.md, plot.png, rows.parquet\n")
    return 1 if failures else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.steadiness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--setups", nargs="+", default=list(CANDIDATES), metavar="NAME")
    parser.add_argument(
        "--truth", nargs="+", default=["clip_own"], metavar="SCORE", help="scores that tell failed rows: below one half"
    )
    add_options(parser, output="output/steadiness")
    parser.set_defaults(seeds=["0", "1", "2", "3"])
    return parser.parse_args(arguments)


def best_of_two(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return, for every setup, concept and two seeds after each other, the row with the higher CLIP-I of the gate's own
    pictures; its seconds are those of both."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.get("gate"):
            groups.setdefault((row["setup"], row["concept_id"]), []).append(row)
    found = []
    for (setup, _), tries in groups.items():
        ordered = sorted(tries, key=lambda row: int(row["seed"]))
        for first, second in zip(ordered[::2], ordered[1::2], strict=False):
            best = max((first, second), key=lambda row: float(row["gate"]["clip_i"]))
            seconds = first["seconds"] + second["seconds"]
            found.append({**best, "setup": f"{setup}, {TWO_TRIES}", "seconds": seconds})
    return found


def show_steadiness(rows: Sequence[Row], truth: Sequence[str]) -> str:
    """Return a Markdown table of the setups: failed rows, CLIP-I and PSNR with their spread over seeds, and seconds."""
    lines: list[list[object]] = []
    means = {score: over_concepts(rows, score) for score in ("clip_i", "psnr_db", "seconds")}
    spreads = {score: spread_over_seeds(rows, score) for score in ("clip_i", "psnr_db")}
    for name, of_setup in by_setup(rows).items():
        judged = [each for row in of_setup if (each := has_failed(row, truth)) is not None]
        share = Proportion(count=sum(judged), n=len(judged)) if judged else None
        failed = f"{share.count} of {share.n} ({share.interval[0]:.0%} to {share.interval[1]:.0%})" if share else None
        cells = [cell for score in spreads for cell in (means[score][name], spreads[score][name])]
        seconds = means["seconds"][name]
        lines.append([name, failed, *cells, f"{seconds.mean:.0f}" if seconds else None])
    titles = ["setup", "failed (95 % interval)", "CLIP-I", "its deviation between seeds", "PSNR, dB"]
    return table([*titles, "its deviation between seeds", "s per concept"], lines)


if __name__ == "__main__":
    sys.exit(main())
