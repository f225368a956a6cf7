"""`python -m pipeline.run PHOTOS`: plan, learn, draw, report. Run it again to resume.

PHOTOS is a folder of photos of one thing, a folder with a folder of photos for each thing, or a manifest: a Parquet,
CSV or JSON lines file with one row a concept, a folder of Parquet files, or a glob.

The same command works on this machine, under a running Ray cluster and under `ray job submit`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from pipeline.bounds import Bound, parse_bound
from pipeline.config import RunConfig
from pipeline.config_file import load_config, recipe
from pipeline.dry_run import dry_run, notes_on, stray_prompts
from pipeline.gate_retries import retry_rules
from pipeline.inputs.manifest import read_by_priority
from pipeline.inputs.manifest_files import list_folders_once
from pipeline.inputs.models import check_init_encoder, check_model, demo_note, locate
from pipeline.inputs.other_concepts import read_others
from pipeline.inputs.prompt_table import Prompt, read_prompts
from pipeline.inputs.resolve import resolve_addresses
from pipeline.inputs.text_tables import is_text_table
from pipeline.ledger.selection import ALL_CONCEPTS, RETRIES, Selection, select
from pipeline.report.command_errors import exit_code_of
from pipeline.report.logs import announce, configure_logs, say
from pipeline.report.run_summary import SHOWN_FAILURES, conclude
from pipeline.report.webhook import message_of, notify
from pipeline.stages import Run
from pipeline.store.addresses import absolute, read_bytes
from pipeline.store.lease import hold_lease
from pipeline.store.storage import RunStore
from pipeline.times import parse_deadline
from pipeline.tracking.clients import check_tracking


def main(arguments: list[str] | None = None, prog: str = "python -m pipeline.run") -> int:
    """Run the command and return its exit code."""
    configure_logs()
    return start(parse(arguments, prog))


def start(options: argparse.Namespace) -> int:
    """Run with parsed options and return the exit code; errors are printed in one line."""
    with list_folders_once():
        return exit_code_of(lambda: _start(options))


def _start(options: argparse.Namespace) -> int:
    config = configure(options)
    configure_logs(config.log_format)
    until = parse_deadline(options.finish_by)
    bound = parse_bound("--prune-at-most", options.prune_at_most)
    prune = bound if options.prune else None
    store = RunStore(config.output)
    selection = select(config.manifest, store, options.only, options.retry, options.limit, config.gate)
    if options.dry_run:
        check_tracking(config.tracking)
        return dry_run(config, selection, photos=options.photos, prune=prune, verify=options.verify)
    with hold_lease(store, config.lease_s):
        return run(config, selection, until=until, prune=prune, verify=options.verify)


def parse(
    arguments: list[str] | None,
    prog: str = "python -m pipeline.run",
    description: str | None = __doc__,
    *,
    is_dry: bool = False,
) -> argparse.Namespace:
    """Parse the command line; None takes the process's own arguments. `is_dry`: of a command that is a dry run."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("manifest", nargs="?", metavar="PHOTOS", help="folder of photos, or manifest; any fsspec URI")
    parser.add_argument("--output", metavar="URI", help="where everything is written (default: output/<its name>)")
    parser.add_argument("--model", help="model: directory, .safetensors file or hub id (default: the demo)")
    parser.add_argument("--prompts", metavar="URI", help="prompts to draw with every concept: text or Parquet")
    parser.add_argument("--config", metavar="TOML", help="a file of settings, or a recipe's name (pipeline/recipes)")
    parser.add_argument("--set", metavar="A.B=C", action="append", default=[], help="one setting; may be repeated")
    parser.add_argument("--only", metavar="ID,ID", help="learn and draw only these concepts, unless they are done")
    parser.add_argument(
        "--limit", metavar="N", type=int, help="learn at most N concepts, in the order of priority and manifest"
    )
    parser.add_argument(
        "--retry",
        choices=RETRIES,
        help="learn only concepts that failed before, that were given up after lost calls, or that are below the gate",
    )
    parser.add_argument(
        "--finish-by", metavar="TIME", help="begin no concept after this: 06:00, 2026-11-22T06:00+01:00, or +6h"
    )
    parser.add_argument(
        "--tolerate", metavar="1%", help="share or number of new bad rows and failed concepts that fail no run"
    )
    parser.add_argument("--prune", action="store_true", help="delete results that the manifest no longer accounts for")
    parser.add_argument(
        "--prune-at-most",
        metavar="10%",
        default="10%",
        help="share or number of the output's concepts that --prune may delete; beyond it, it deletes nothing "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--verify", action="store_true", help="read the files of what is done, and learn again what is damaged"
    )
    dry_run = argparse.SUPPRESS if is_dry else "say what would be done or fail; write nothing"
    parser.add_argument("--dry-run", action="store_true", default=is_dry, help=dry_run)
    photos = "fetch and open every photo, too" if is_dry else "with --dry-run, also fetch and open every photo"
    parser.add_argument("--photos", action="store_true", help=photos)
    return parser.parse_args(arguments)


def configure(options: argparse.Namespace) -> RunConfig:
    """Return the configuration: the TOML file, changed by `--set`, changed by the named options; addresses absolute.

    Raises ValueError for a setting, an address or a retry rule that makes no sense.
    """
    toml = read_bytes(absolute(recipe(options.config))).decode() if options.config else ""
    overrides = list(options.set)
    if options.prompts:
        overrides.append(f"generation.prompts={json.dumps(options.prompts)}")
    if options.tolerate is not None:
        overrides.append(f"tolerance.failures={json.dumps(options.tolerate)}")
    config = load_config(toml, overrides, manifest=options.manifest, output=options.output, model=options.model)
    if not config.manifest:
        raise ValueError(
            "no manifest: name a folder of photos or a table on the command line or as `manifest` in the configuration"
        )
    defaults = RunConfig()
    changes: dict[str, Any] = {}
    if config.extractor == defaults.extractor and locate(config.model) != locate(defaults.model):
        changes["extractor"] = ""  # the demo's CLIP knows the demo's pictures only: other scores would mean nothing
    if config.output == defaults.output:
        changes["output"] = f"{config.output}/{_name_of(config.manifest)}"
    config = resolve_addresses(dataclasses.replace(config, **changes))
    if demo_note(config) and config.gate == defaults.gate:  # its scores would pass what looks like nothing
        names = [each.name for each in dataclasses.fields(config.gate) if each.name.startswith("min_")]
        no_bounds: dict[str, Any] = dict.fromkeys(names)
        config = dataclasses.replace(config, gate=dataclasses.replace(config.gate, **no_bounds))
    retry_rules(config)  # refuses a bad rule now, not after a night of learning
    return config


def _name_of(manifest: str) -> str:
    """Return the last part of a manifest's address, without the ending of a table's file."""
    path = PurePosixPath(absolute(manifest))
    return path.stem if is_text_table(path.name) or path.suffix == ".parquet" else path.name


def check_negatives(config: RunConfig, prompts: Sequence[Prompt]) -> None:
    """Raise ValueError for a negative prompt whose concepts cannot be read."""
    negatives = (config.generation.negative_prompt, *(prompt.negative for prompt in prompts))
    if prompts and (config.generation.learned or any("<" in text for text in negatives)):
        from pipeline.bulk.negatives import check_negative_prompts  # here, because it needs torch

        check_negative_prompts(config, prompts)


def run(
    config: RunConfig,
    selection: Selection = ALL_CONCEPTS,
    *,
    until: float = math.inf,
    prune: Bound | None = None,
    verify: bool = False,
) -> int:
    """Learn, draw and report; return the exit code.

    `until` is the moment after which no concept is begun, in seconds since 1970. `prune` is the share or number of the
    output's concepts that may be deleted at the end, as the manifest no longer accounts for them; None deletes nothing.
    `verify` reads the files of what is done before, and learns damaged concepts again.
    Raises ValueError for what is wrong before anything has begun.
    """
    announce(config.log_format, "planning: reading the manifest, the photos' hashes and the model's files")
    check_model(config)  # here and not in every actor
    check_init_encoder(config)
    check_tracking(config.tracking)
    read_others(config.gate.others)
    prompts = read_prompts(config.generation.prompts) if config.generation.prompts else []
    check_negatives(config, prompts)
    stages = Run(config, selection, until, verify=verify)
    stats = stages.stats
    stray = stray_prompts(config, RunStore(config.output), prompts)
    for note in (*notes_on(config, prompts), *stray):
        say(config.log_format, f"note: {note}\n")
    stages.write_state("learning")
    tasks = stages.plan.tasks(read_by_priority(config.manifest))
    with stages.living_actors():
        stages.learn(tasks)
        if prompts and stages.can_continue():
            stages.draw(prompts)
            if stray:
                stats.problems["prompts"] = "; ".join(stray[:SHOWN_FAILURES])
    if not stats.is_stopped:
        stages.enter("reporting")
    if not stats.is_stopped:
        stages.report()
        if prune is not None:
            stages.prune(prune)  # last: nothing is deleted before the results are written
    stages.finish()
    code = conclude(config, stats, stages.plan, selection)
    notify(config.report.webhook, message_of(config, stats, stages.plan))
    return code


if __name__ == "__main__":
    sys.exit(main())
