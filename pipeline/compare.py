"""`python -m pipeline.compare FIRST SECOND`: two runs side by side, concept by concept.

Prints the mean of each score in both outputs, the mean difference over the concepts that both have learned with its
95 % interval, and the settings that differ. Writes a page with the sample grids next to each other. The runs may differ
in anything, such as their recipe or their steps; only the ids of their concepts must be the same.
"""

from __future__ import annotations

import argparse
import sys

from pipeline.exit_codes import OK
from pipeline.report.command_errors import exit_code_of
from pipeline.report.comparison import Comparison, Side
from pipeline.store.addresses import absolute
from pipeline.store.redact import redact
from pipeline.store.storage import RunStore

_PROG = "python -m pipeline.compare"


def main(arguments: list[str] | None = None, prog: str = _PROG) -> int:
    """Run the command and return its exit code."""
    options = parse(arguments, prog)
    return exit_code_of(lambda: compare(options))


def parse(arguments: list[str] | None, prog: str = _PROG) -> argparse.Namespace:
    """Parse the command line; None takes the process's own arguments."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("first", metavar="FIRST", help="output of a run: folder or any fsspec URI")
    parser.add_argument("second", metavar="SECOND", help="output of another run, whose scores are compared with these")
    parser.add_argument(
        "--output", metavar="FILE", default="compare.html", help="the page: path or URI (default: %(default)s)"
    )
    parser.add_argument(
        "--pictures",
        metavar="N",
        type=int,
        default=100,
        help="concepts with sample grids on the page, those that differ most (default: %(default)s)",
    )
    return parser.parse_args(arguments)


def compare(options: argparse.Namespace) -> int:
    """Compare two outputs: print the table and write the page. Raises ValueError if they share no concept."""
    if options.pictures < 0:
        raise ValueError(f"--pictures {options.pictures}: give 0 or more")
    comparison = Comparison.of(Side.read(options.first), Side.read(options.second))
    folder, _, name = absolute(options.output).rpartition("/")
    store = RunStore(folder)
    store.put(name, comparison.page(options.pictures).encode("utf-8", "replace"))
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in comparison.lines()))
    sys.stdout.write(f"\npage: {redact(store.uri(name))}\n")
    return OK


if __name__ == "__main__":
    sys.exit(main())
