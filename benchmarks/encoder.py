"""Compare starts from an encoder's rows with starts from the initializer's vectors, by the samples learned from since.

    python -m benchmarks.encoder --concepts 24 --jobs 2               # five numbers of samples, four photos
    python -m benchmarks.encoder --photos 1 --budgets 0 50 2000 --output output/encoder-one
    python -m benchmarks.encoder --encoder output/night/encoder.safetensors

Rows, scores and tables are those of `benchmarks.methods`, which says how they are measured; run it again to continue.
Learning takes steps of one sample, and 2,000 samples are the project's default, 500 steps of 4. The words without a
step are the pictures of the initializer itself. Differences are to the default from the words.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.methods import add_options, measure_setups, report
from benchmarks.setups import Setup, settings_of
from benchmarks.timing import say
from pipeline.store.addresses import absolute
from pipeline.store.storage import RunStore
from textual_inversion.config import InversionConfig

BUDGETS = (0, 50, 200, 800, 2000)
"""Samples of a concept's photos that learning takes."""
DEMO_ENCODER = "demo/encoder/encoder.safetensors"
_BATCH_SIZE = 1


def setups_of(budgets: Sequence[int], num_photos: int, encoder: str) -> dict[str, Setup]:
    """Return the setups by name: for each number of samples one from the words and one from the encoder."""
    default = InversionConfig()
    found = {}
    for samples in budgets:
        is_default = samples == default.steps * default.batch_size
        batch_size = default.batch_size if is_default else _BATCH_SIZE
        size = settings_of(f"batch_size={batch_size}")
        steps = samples // batch_size
        found[f"words-{samples}"] = Setup(
            what=f"from the initializer's vectors, {samples} samples",
            settings=size,
            num_photos=num_photos,
            drawn="learned" if samples else "initializer",
            steps=max(steps, 1),
        )
        found[f"encoder-{samples}"] = Setup(
            what=f"from the encoder's rows, {samples} samples",
            settings=(*size, *settings_of("init.method=encoder", f"init.encoder={encoder}")),
            num_photos=num_photos,
            steps=steps,
        )
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.encoder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budgets", nargs="+", type=int, default=list(BUDGETS), metavar="N", help="samples")
    parser.add_argument("--photos", type=int, default=4, metavar="N", help="photos of a concept, the first N")
    parser.add_argument("--encoder", default=DEMO_ENCODER, metavar="URI")
    parser.add_argument("--starts", nargs="+", choices=("words", "encoder"), default=["words", "encoder"])
    add_options(parser, output="output/encoder")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure the missing rows, then write tables and plot; return 1 if a row failed."""
    options = parse(arguments)
    budgets = sorted({*options.budgets})
    setups = setups_of(budgets, options.photos, absolute(options.encoder))
    setups = {name: setup for name, setup in setups.items() if name.partition("-")[0] in options.starts}
    rows, failures = measure_setups(options, setups)
    if rows:
        store = RunStore(absolute(options.output))
        baseline = f"words-{budgets[-1]}" if "words" in options.starts else next(iter(setups))
        say(f"\n{report(store, rows, setups, baseline=baseline)}\n{store.uri('table.md')}, plot.png, rows.parquet\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
