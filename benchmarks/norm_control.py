"""Compare forms of norm control: each learns the same concepts, and every extractor scores the pictures.

    python -m benchmarks.norm_control --seeds 0 1 2 --jobs 2
    python -m benchmarks.norm_control --concepts 8 --learning-rates 0.005 0.02 --settings clamp none sphere clamp:2

A setting is a norm control and its `norm_cap`; where no cap is given, it is the control's default (4 under `clamp`, 1
under `sphere`). The first setting with the first rate is the baseline of the paired differences. Rows, tables and plot
are those of `benchmarks.methods`, and so are the other options; the row norms in the last table, over the vocabulary's
mean norm (which is printed), show which settings end at their cap. Time: that of `benchmarks.methods`, about half a
minute of one core for each setting, seed and concept.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import product

from benchmarks.methods import add_options, configure, measure_setups, report
from benchmarks.setups import Setup, settings_of
from benchmarks.timing import say
from pipeline.actor.model_loading import load_model
from pipeline.store.addresses import absolute
from pipeline.store.storage import RunStore

SETTINGS = ("clamp", "none", "clamp:1", "clamp:2", "clamp:8", "sphere")


def main(arguments: list[str] | None = None) -> int:
    """Learn with every setting in turn, and print the tables; return 1 if a row failed."""
    options = parse(arguments)
    setups = make_setups(options.settings, options.learning_rates)
    rows, failures = measure_setups(options, setups)
    if rows:
        tables = load_model(configure(options)).token_tables
        norms = ", ".join(f"{table.mean_norm:.3f}" for table in tables.values())
        say(f"\n{report(RunStore(absolute(options.output)), rows, setups, baseline=next(iter(setups)))}")
        say(f"\nThe vocabulary's mean norm: {norms}.\n")
    return 1 if failures else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.norm_control",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--settings", nargs="+", default=SETTINGS, metavar="CONTROL[:CAP]")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[5e-3])
    add_options(parser, output="output/norm_control")
    return parser.parse_args(arguments)


def make_setups(settings: Sequence[str], rates: Sequence[float]) -> dict[str, Setup]:
    """Return name -> setup of every setting with every rate; a rate is part of the name where there are several."""
    found = {}
    for setting, rate in product(settings, rates):
        control, _, cap = setting.partition(":")
        name = setting.replace(":", "-") + (f"-at-{rate:g}" if len(rates) > 1 else "")
        pairs = settings_of(f"norm_control={control}", f"norm_cap={float(cap or 0)}", f"learning_rate={rate}")
        found[name] = Setup(what=f"norm control {setting}, rate {rate:g}", settings=pairs)
    return found


if __name__ == "__main__":
    sys.exit(main())
