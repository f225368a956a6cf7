"""Compare methods on the demo world: every setup learns the same concepts, and every extractor scores the pictures.

    python -m benchmarks.methods --jobs 2                                         # all setups, all held-out objects
    python -m benchmarks.methods --setups textual-inversion textboost-v2 --seeds 0 1 2 --baseline textual-inversion
    python -m benchmarks.methods --setups high-lr low-lr --concepts 16 --steps 300 --output output/rates
    python -m benchmarks.methods --setups dvar dvar-budget textual-inversion keep-best --output output/stopping
    python -m benchmarks.methods --extractors moco=demo/moco --recipes fast ti-paper

Setups are those of `benchmarks/setups.py` and the recipes. As soon as a concept is done in a setup and seed, its row
and its pictures are in `rows/` of the output; at the end come all rows (`rows.parquet`: every score, its value for
every picture), the tables (`table.md`) and the distortion-editability plot (`plot.png`). Run it again to continue:
stored rows are not measured again. Scores are those of `benchmarks/scores.py`. All setups draw from the same noise.
Differences to the baseline are taken concept by concept, with 95 % intervals over concepts (`benchmarks/intervals.py`);
with fewer than 16 concepts the intervals say little. Where a setup and the same without its stop rule are both present,
a table of each concept's steps and scores with and without it follows (`stopping.md`).

On the demo model a row takes about half a minute of one core: 500 steps of 4 samples and 44 pictures. `--steps` makes
rows cheaper, and so do `--samples` and `--prompts benchmarks/few_prompts.txt`, the prompts of the sample grid. `--busy`
learns from the photos put on a busy background, which a method may learn along with the thing; scores stay those
against the photos as they are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice

from benchmarks.comparison import BASELINE, rows_parquet, show_scores, stopping
from benchmarks.concepts import HELD_OUT_OBJECTS, read_objects
from benchmarks.intervals import Row
from benchmarks.jobs import Job, Scoring, make_jobs, measure_all
from benchmarks.masking import busy_concept
from benchmarks.plot import plot
from benchmarks.scores import has_outside_models
from benchmarks.setups import SETUPS, Setup, find
from benchmarks.timing import say
from pipeline.config import RunConfig
from pipeline.config_file import load_config
from pipeline.store.addresses import absolute
from pipeline.store.storage import RunStore
from textual_inversion.concept import Concept


def main(arguments: list[str] | None = None) -> int:
    """Measure the missing rows, then write tables and plot; return 1 if a row failed."""
    options = parse(arguments)
    names = split(options.setups)
    setups = {name: find(name) for name in names}
    rows, failures = measure_setups(options, setups)
    if rows:
        store = RunStore(absolute(options.output))
        text = report(store, rows, setups, baseline=options.baseline)
        if more := stopping(rows, {name: setup.full_budget for name, setup in setups.items()}):
            store.put("stopping.md", more.encode())
        say(f"\n{text}\n{more}\n{store.uri('table.md')}, plot.png, rows.parquet{', stopping.md' if more else ''}\n")
    return 1 if failures else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.methods", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--setups", "--recipes", nargs="+", default=list(SETUPS), metavar="NAME", help="default: all of setups.py"
    )
    parser.add_argument("--baseline", default=BASELINE, metavar="NAME", help="setup that the others are compared with")
    add_options(parser, output="output/methods")
    return parser.parse_args(arguments)


def add_options(parser: argparse.ArgumentParser, *, output: str) -> None:
    """Add the options of every command that measures setups with the engine."""
    add_inputs(parser, output=output)
    parser.add_argument("--steps", type=int, default=500, help="of 4 samples; others get as many samples in all")
    parser.add_argument("--at-once", type=int, default=4, help="concepts that a process learns at the same time")
    parser.add_argument(
        "--busy", action="store_true", help="learn from the photos on a busy background, without masks (masking.py)"
    )


def add_inputs(parser: argparse.ArgumentParser, *, output: str) -> None:
    """Add the options that say what is learned, drawn and scored, and where."""
    parser.add_argument("--manifest", default=HELD_OUT_OBJECTS, help="default: the demo world's held-out objects")
    parser.add_argument("--concepts", type=int, default=0, metavar="N", help="the first N objects; default: all")
    parser.add_argument("--seeds", nargs="+", default=["0"], metavar="N", help="of learning and drawing")
    parser.add_argument("--samples", type=int, default=4, help="pictures per prompt")
    parser.add_argument("--prompts", default="", metavar="URI", help="in place of the demo's")
    parser.add_argument(
        "--extractors", nargs="+", default=[], metavar="NAME=PATH", help="further feature extractors to score with"
    )
    parser.add_argument(
        "--no-outside", action="store_true", help="leave out EfficientNet and ST-LPIPS even if they are installed"
    )
    parser.add_argument("--jobs", "--processes", type=int, default=1, help="processes, a torch thread each")
    parser.add_argument("--output", default=output)
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="for every setup")


def split(values: Sequence[str]) -> list[str]:
    """Return the words of an option that takes them with spaces or commas between."""
    return list(dict.fromkeys(word for value in values for word in value.split(",") if word))


def configure(options: argparse.Namespace) -> RunConfig:
    """Return the configuration of all setups, but for their settings of learning."""
    base = load_config("", ["device=cpu", *options.set, f"evaluation.images_per_prompt={options.samples}"])
    return replace(base, evaluation=replace(base.evaluation, prompts=options.prompts))


def scoring_of(options: argparse.Namespace, concepts: Sequence[Concept]) -> Scoring:
    """Return the scoring against these concepts. Raises ValueError for an extractor without a name."""
    pairs = [value.partition("=") for value in options.extractors]
    if bad := [name for name, equals, path in pairs if not (name and equals and path)]:
        raise ValueError(f"--extractors {bad[0]}: give NAME=PATH")
    return Scoring(
        concepts=tuple(concepts),
        extractors=tuple((name, path) for name, _, path in pairs),
        outside=has_outside_models() and not options.no_outside,
    )


def jobs_of(options: argparse.Namespace, setups: Mapping[str, Setup]) -> tuple[list[Job], Scoring]:
    """Return the jobs, and how they are scored: against all concepts of the manifest, also those not measured, and
    against their own photos if they are learned on a busy background."""
    concepts = list(read_objects(options.manifest))
    scoring = scoring_of(options, concepts)
    learned = list(islice(concepts, options.concepts or None))
    if options.busy:
        store = RunStore(absolute(f"{options.output}/busy"))
        learned = [replace(busy_concept(concept, store), masks=()) for concept in learned]
    jobs = make_jobs(
        setups,
        learned,
        configure(options),
        steps=options.steps,
        seeds=[int(seed) for seed in split(options.seeds)],
        overrides=options.set,
        scoring=scoring,
    )
    return list(jobs), scoring


def measure_setups(options: argparse.Namespace, setups: Mapping[str, Setup]) -> tuple[list[Row], dict[str, str]]:
    """Measure the missing rows of the setups; return all rows, and path -> error of those that failed."""
    jobs, scoring = jobs_of(options, setups)
    output = RunStore(absolute(options.output)).root
    rows, failures = measure_all(jobs, output, scoring, processes=options.jobs, at_once=options.at_once)
    return list(rows), failures


def report(store: RunStore, rows: Sequence[Row], setups: Mapping[str, Setup], *, baseline: str) -> str:
    """Store the rows, the tables and the plot; return the tables."""
    text = show_scores(rows, baseline, {name: setup.what for name, setup in setups.items()})
    store.put("rows.parquet", rows_parquet(rows))
    store.put("table.md", text.encode())
    store.put("plot.png", plot(rows))
    return text


if __name__ == "__main__":
    sys.exit(main())
