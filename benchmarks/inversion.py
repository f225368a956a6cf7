"""Compare the engine with the common algorithm (`benchmarks/restatement.py`): speed, and with `--quality` the time that
each takes to the same scores.

    python -m benchmarks.inversion --threads 1,2
    python -m benchmarks.inversion --processes 2 --slots 4
    python -m benchmarks.inversion --quality --recipe fast --slots 8

Both have the same model and photos, and for speed also the same batch size, learning rate and number of steps. With
`--quality` each has its own settings: the common algorithm those of the project's default, the engine those of the
default or of `--recipe`, with as many concepts in flight as the last of `--slots`. Prints markdown. A figure is the
median of alternating repetitions, with the lowest and highest. Sample-steps a second are of the steps alone; the work
done once a concept has its own column; the seconds per concept are of both at the full budget of steps. With several
processes each does all of the work at the same time, and sample-steps and concepts are summed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks.contest import COMMON, Contest, Timing, read_cases
from benchmarks.inversion_quality import measure_quality
from benchmarks.timing import Rendezvous, Spread, alternate, heading, parse_numbers, say, side_by_side, table
from pipeline.config import RunConfig
from pipeline.config_file import load_config, recipe
from textual_inversion.config import InversionConfig


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    config, common = configure(options)
    facts: dict[str, object] = {"concepts": f"{options.concepts} of {options.manifest}", "processes": options.processes}
    for name, each in ((COMMON, common), ("engine", config.inversion)):
        facts[name] = f"batches of {each.batch_size}, rate {each.learning_rate:g}, {each.steps} steps"
    say(heading("Inversion: the engine against the common algorithm", "benchmarks.inversion", arguments, **facts))
    if options.quality:
        say(measure_quality(options, config, common))
        return 0
    say(f"{options.repetitions} repetitions of {options.steps} steps a concept; ")
    say(f"the budget is {config.inversion.steps} steps\n\n")
    titles = ["threads", "", "sample-steps/s", f"times the {COMMON}", "s once a concept", "s per concept at the budget"]
    say(table(titles, list(measure_speed(options, config, common))))
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.inversion", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--manifest", default="manifests/demo.parquet")
    parser.add_argument("--concepts", type=int, default=8)
    parser.add_argument("--slots", type=parse_numbers, default=[1, 2, 4, 8], metavar="N,N", help="concepts in flight")
    parser.add_argument("--threads", type=parse_numbers, default=[1], metavar="N,N", help="torch threads a process")
    parser.add_argument("--processes", type=int, default=1, help="side by side, as actors are")
    parser.add_argument("--steps", type=int, default=0, help="a concept; default 25, with --quality each its budget")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quality", action="store_true", help="scores against seconds, in place of speed")
    parser.add_argument("--every", type=int, default=100, metavar="STEPS", help="between scores, with --quality")
    parser.add_argument("--recipe", default="", help="of the engine, with --quality; a name or a TOML file")
    parser.add_argument("--learning-rate", type=float, default=0.0, help="of the common algorithm; 0: as the engine's")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="the engine's settings")
    options = parser.parse_args(arguments)
    if options.quality and options.processes != 1:
        parser.error("--quality: one process, whose seconds are not shared")
    if options.recipe and not options.quality:
        parser.error("--recipe: for speed, both learn in the same way; see --set")
    return options


def configure(options: argparse.Namespace) -> tuple[RunConfig, InversionConfig]:
    """Return the engine's settings and the common algorithm's, of which only batch size, rate and steps are used."""
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


def measure_speed(options: argparse.Namespace, config: RunConfig, common: InversionConfig) -> Iterable[list[object]]:
    """Return the rows of the table, thread count by thread count."""
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
    """Do the work of one process: return number of threads -> variant -> its timings."""
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


if __name__ == "__main__":
    sys.exit(main())
