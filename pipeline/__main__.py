"""`ti COMMAND` or `python -m pipeline COMMAND`: all commands under one name.

Each is also a module: `ti run` is `python -m pipeline.run`. `ti COMMAND --help` describes a command's options.
"""

from __future__ import annotations

import argparse
import importlib
import sys

COMMANDS = {
    "run": ("run", "learn concepts from photos, draw prompts with them, write a report; again: resume"),
    "validate": ("validate", "check a job's input before paying for the job"),
    "manifest": ("manifest", "write a Parquet manifest of a folder of photos or of another table"),
    "status": ("status", "say how far a run is, how fast, and what failed"),
    "watch": ("watch", "follow a run from any machine, a line for each change"),
    "explain": ("explain", "say why one concept is done or not"),
    "compare": ("compare", "compare two runs: scores with intervals, sample grids next to each other"),
    "evaluate": ("evaluate", "draw learned concepts by a protocol and score the pictures"),
    "export": ("export", "write learned concepts as files that other tools load"),
    "train-encoder": ("train_encoder", "train a network that makes a concept's rows from its photos"),
    "draw": ("use", "draw prompts with learned concepts in them"),
    "variations": ("use", "draw a learned concept beside its photos"),
    "style": ("use", "draw in a learned style"),
    "compose": ("use", "draw two learned concepts in one picture"),
    "bias": ("use", "measure the bias of a word, and of the same word learned anew"),
    "edit": ("use", "redraw the white part of a mask"),
}
"""Name of a command -> its module in `pipeline`, and what it does. Those of `use` are subcommands of it."""

PROG = "ti"


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code; the command's module is imported only now."""
    width = max(map(len, COMMANDS)) + 2
    table = "\n".join(f"  {name:<{width}}{text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog=PROG,
        description=__doc__,
        epilog=f"commands:\n{table}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of the commands below")
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="the command's own arguments")
    options = parser.parse_args(arguments)
    name = COMMANDS[options.command][0]
    module = importlib.import_module(f"pipeline.{name}")
    if name == "use":
        return int(module.main([options.command, *options.arguments], PROG))
    return int(module.main(options.arguments, f"{PROG} {options.command}"))


if __name__ == "__main__":
    sys.exit(main())
