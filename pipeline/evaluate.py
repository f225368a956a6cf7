"""`python -m pipeline.evaluate RUN`: draw every learned concept by a protocol's prompts and score the pictures.

RUN is the output of a finished run, or a manifest; a manifest is learned first. CLIP-I compares pictures with the
concept's photos, CLIP-T with the prompt without the concept's name (Gal et al. 2022, section 5); DINO is CLIP-I with
the features of another network (Ruiz et al. 2023), and the mirror margin is its likeness to the photos minus that to
their mirror images. PSNR and edge strength compare pixels with the nearest photo, for the reconstruction prompts of
objects. Three references are scored as well: the photos among themselves ("image only"), the prompt without the word
("prompt only") and the prompt with the initializer in the word's place.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping
from statistics import fmean, stdev

from pipeline import run
from pipeline.bulk.evaluation import (
    DINO_SCORES,
    PARTS,
    PLAN,
    PLAN_SCHEMA,
    SCORES,
    Totals,
    plan_rows,
    table_path,
    unscored,
    write_table,
)
from pipeline.bulk.protocols import Protocol, choose_protocol
from pipeline.bulk.rows import done_row_ids, plan_missing
from pipeline.bulk.stage import Stage, run_stage
from pipeline.config import RunConfig
from pipeline.config_file import load_config, recipe
from pipeline.connection import connect
from pipeline.exit_codes import FAILED, OK, STOPPED
from pipeline.inputs.manifest_files import list_folders_once
from pipeline.inputs.models import check_extractors
from pipeline.inputs.resolve import resolve_addresses
from pipeline.ledger.records import ConceptRecord, latest, load_records
from pipeline.report.command_errors import exit_code_of
from pipeline.report.logs import configure_logs
from pipeline.report.run_file import RUN_FILE, read_run
from pipeline.report.run_summary import SHOWN_FAILURES
from pipeline.store.addresses import absolute, read_bytes
from pipeline.store.errors import ClusterLost, describe_error
from pipeline.store.storage import RunStore

_PICTURES_PER_CALL = 64


def main(arguments: list[str] | None = None, prog: str = "python -m pipeline.evaluate") -> int:
    """Run the command and return its exit code."""
    configure_logs()
    options = parse(arguments, prog)
    with list_folders_once():
        return exit_code_of(lambda: _prepare_and_evaluate(options))


def _prepare_and_evaluate(options: argparse.Namespace) -> int:
    config, code = prepare(options)
    configure_logs(config.log_format)
    return code if code == STOPPED else max(code, evaluate(config))


def parse(arguments: list[str] | None, prog: str = "python -m pipeline.evaluate") -> argparse.Namespace:
    """Parse the command line; None takes the process's own arguments."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="the output of a run, or a manifest; any fsspec URI")
    parser.add_argument("--protocol", help="quick (default), paper or dreambench: see pipeline/bulk/protocols.py")
    parser.add_argument("--prompts", metavar="URI", help="prompts in place of the protocol's: text or Parquet")
    parser.add_argument(
        "--dino", metavar="MODEL", help="second feature extractor, as a DINO or DINOv2 (evaluation.dino)"
    )
    parser.add_argument("--output", metavar="URI", help="output of a manifest's run (default: output/<manifest name>)")
    parser.add_argument("--model", help="model of a manifest's run (default: the demo model)")
    parser.add_argument("--config", metavar="TOML", help="a file of settings, or a recipe's name (pipeline/recipes)")
    parser.add_argument("--set", metavar="A.B=C", action="append", default=[], help="one setting; may be repeated")
    return parser.parse_args(arguments)


def prepare(options: argparse.Namespace) -> tuple[RunConfig, int]:
    """Return the configuration to evaluate with, and the exit code of the run, which is made first for a manifest."""
    overrides = list(options.set)
    if options.protocol:
        overrides.append(f"evaluation.protocol={json.dumps(options.protocol)}")
    if options.prompts:
        overrides.append(f"evaluation.prompts={json.dumps(options.prompts)}")
    if options.dino:
        overrides.append(f"evaluation.dino={json.dumps(options.dino)}")
    store = RunStore(absolute(options.run))
    is_run = store.exists(RUN_FILE)
    if is_run:
        made_with = read_run(store).get("config", {})
        toml = read_bytes(absolute(recipe(options.config))).decode() if options.config else ""
        config = resolve_addresses(load_config(toml, overrides, base=made_with, output=store.root, model=options.model))
    else:
        given = {"manifest": options.run, "output": options.output, "model": options.model, "config": options.config}
        config = run.configure(argparse.Namespace(**(vars(run.parse([])) | given | {"set": overrides})))
    if not config.extractor:
        raise ValueError(
            "no feature extractor: name a CLIP or SigLIP, for example --set extractor=openai/clip-vit-base-patch32"
        )
    check_extractors(config)
    choose_protocol(config)  # finds prompts that cannot be read now, not after a night of learning
    return config, OK if is_run else run.run(config)


def evaluate(config: RunConfig) -> int:
    """Draw and score the rows without scores, then write the table and the summary; return the exit code."""
    protocol = choose_protocol(config)
    store = RunStore(config.output)
    learned: list[ConceptRecord] = []
    failures: dict[str, str] = {}
    for record in latest(load_records(store)):
        if record.status == "done":
            learned.append(record)
        else:
            failures[record.concept_id] = f"not learned: {record.error}"
    if not learned:
        raise ValueError(f"no learned concept at {config.output}; run python -m pipeline.run first")
    rows = plan_missing(store, PLAN, plan_rows(config, protocol, learned), PLAN_SCHEMA, done_row_ids(store, PARTS))
    if rows.missing:
        failures |= score_missing(config, protocol, len(rows.missing))
    totals = write_table(store, config, protocol, set(rows.wanted))
    failures |= unscored(store, rows.wanted)
    conclude(config, protocol, totals, failures, num_scored=len(rows.missing), num_before=rows.num_done)
    return FAILED if failures else OK


def score_missing(config: RunConfig, protocol: Protocol, num_rows: int) -> dict[str, str]:
    """Draw and score the plan's rows; return the error that stopped the stage, under its name, or nothing."""
    gpus, _ = connect(config)
    from ray.exceptions import RayError

    from pipeline.bulk.scorer import Scorer

    pictures = protocol.images_per_prompt
    stage = Stage(
        name="evaluating",
        plan=PLAN,
        results=PARTS,
        worker=Scorer,
        rows_per_call=max(1, _PICTURES_PER_CALL // pictures),
        rows_per_part=max(1, config.generation.rows_per_part // pictures),
    )
    settings = dataclasses.replace(
        config, generation=dataclasses.replace(config.generation, sampling=protocol.sampling)
    )
    try:
        run_stage(settings, stage, num_rows, gpus)
    except (RayError, ClusterLost) as error:
        return {"evaluation": f"stopped, run again to continue: {describe_error(error)}"}
    return {}


def conclude(
    config: RunConfig,
    protocol: Protocol,
    totals: Mapping[str, Mapping[str, Totals]],
    failures: Mapping[str, str],
    *,
    num_scored: int,
    num_before: int,
) -> None:
    """Print the means over concepts in every setup with their standard errors, the table's address and the failures.

    `totals`: setup -> concept id -> its scores. `failures`: concept id or stage -> the error.
    """
    say = sys.stdout.write
    extractors = " and ".join(name for name in (config.extractor, config.evaluation.dino) if name)
    sampling = protocol.sampling
    say(f"{config.evaluation.protocol}: {num_scored} rows scored, {num_before} scored before; features of {extractors}")
    say(f"; {protocol.images_per_prompt} pictures a prompt, {sampling.steps} {sampling.solver} steps\n")
    shown = [score for score in SCORES if score not in DINO_SCORES or config.evaluation.dino]
    say(f"| setup | concepts | {' | '.join(shown)} |\n{'|---' * (len(shown) + 2)}|\n")
    for setup, of_concept in totals.items():
        if of_concept:
            cells = [mean_and_error([total.score(score) for total in of_concept.values()]) for score in shown]
            say(f"| {setup} | {len(of_concept)} | {' | '.join(cells)} |\n")
    say(f"table: {RunStore(config.output).uri(table_path(config))}\n")
    for name, error in list(failures.items())[:SHOWN_FAILURES]:
        say(f"FAILED {name}: {error}\n")
    if len(failures) > SHOWN_FAILURES:
        say(f"FAILED {len(failures) - SHOWN_FAILURES} more\n")


def mean_and_error(values: list[float]) -> str:
    """Return mean and standard error as text, over the values that are not NaN; `-` if there are none."""
    known = [value for value in values if value == value]
    if not known:
        return "-"
    return f"{fmean(known):.3f}" + (f" ± {stdev(known) / len(known) ** 0.5:.3f}" if len(known) > 1 else "")


if __name__ == "__main__":
    sys.exit(main())
