"""`python -m pipeline.evaluate RUN`: draw every learned concept by a protocol's prompts and score the pictures.

RUN is the output of a finished run, or a manifest, whose run is then made or completed first. CLIP-I compares pictures
with the concept's photos, CLIP-T with the prompt without its placeholder (Gal et al. 2022, section 5), DINO is CLIP-I
with other features (Ruiz et al. 2023). Scored besides is what a learned word is held against: the photos among
themselves ("image only"), the prompt without the word ("prompt only") and the initializer in the word's place.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from statistics import fmean, stdev
from typing import Any

from pipeline import run
from pipeline.bulk.evaluation import (
    PARTS,
    PLAN,
    PLAN_SCHEMA,
    SCORES,
    Totals,
    causes,
    plan_rows,
    table_path,
    write_table,
)
from pipeline.bulk.protocols import Protocol, choose
from pipeline.bulk.stage import Stage, finished_rows, put_plan, run_stage
from pipeline.config import RunConfig
from pipeline.config_file import load_config, recipe
from pipeline.exit_codes import FAILED, OK, STOPPED, USAGE
from pipeline.inputs.models import portable
from pipeline.ledger.records import latest, load_records
from pipeline.report.logs import configure_logs
from pipeline.store.errors import describe_error
from pipeline.store.redact import redact
from pipeline.store.storage import RunStore, absolute, read_bytes

_SHOWN_FAILURES = 20
_PICTURES_PER_CALL = 64


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    configure_logs()
    options = parse(arguments)
    try:
        config, code = prepare(options)
        configure_logs(config.log_format)
        return code if code == STOPPED else max(code, evaluate(config))
    except ValueError as error:
        sys.stderr.write(redact(f"error: {error}\n"))
        return USAGE
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run the same command again to continue\n")
        return STOPPED


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pipeline.evaluate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("run", metavar="RUN", help="the output of a run, or a manifest; any fsspec URI")
    parser.add_argument("--protocol", help="quick (default), paper or dreambench: see pipeline/bulk/protocols.py")
    parser.add_argument("--prompts", metavar="URI", help="prompts in place of the protocol's: text or Parquet")
    parser.add_argument("--output", metavar="URI", help="of a manifest's run (default: output/<manifest name>)")
    parser.add_argument("--model", help="of a manifest's run (default: the demo model)")
    parser.add_argument("--config", metavar="TOML", help="a job's settings, or a recipe's name (pipeline/recipes)")
    parser.add_argument("--set", metavar="A.B=C", action="append", default=[], help="one setting; may be repeated")
    return parser.parse_args(arguments)


def prepare(options: argparse.Namespace) -> tuple[RunConfig, int]:
    """The configuration to evaluate with, and the exit code of the run, if that had to be made first."""
    overrides = list(options.set)
    if options.protocol:
        overrides.append(f"evaluation.protocol={json.dumps(options.protocol)}")
    if options.prompts:
        overrides.append(f"evaluation.prompts={json.dumps(options.prompts)}")
    store = RunStore(absolute(options.run))
    if store.exists("run.json"):
        made_with = json.loads(store.get("run.json"))["config"]
        toml = read_bytes(absolute(recipe(options.config))).decode() if options.config else ""
        config = load_config(toml, overrides, base=made_with, output=store.root, model=options.model)
        config = dataclasses.replace(config, model=portable(config.model), extractor=portable(config.extractor))
    else:
        config = run.configure(
            argparse.Namespace(manifest=options.run, output=options.output, model=options.model, prompts=None,
                               config=options.config, set=overrides)
        )  # fmt: skip
    judges = dataclasses.replace(config.evaluation, dino=portable(config.evaluation.dino))
    config = dataclasses.replace(config, evaluation=judges)
    if not config.extractor:
        raise ValueError("no judge: name a CLIP or SigLIP, for example --set extractor=openai/clip-vit-base-patch32")
    choose(config)  # prompts that cannot be read are found now, not after a night of learning
    return config, OK if store.exists("run.json") else run.run(config)


def evaluate(config: RunConfig) -> int:
    """Draw and score what is not scored yet, then write the table and the summary; returns the exit code."""
    protocol = choose(config)
    store = RunStore(config.output)
    done, failures = [], dict[str, str]()
    for record in latest(load_records(store)):
        if record.status == "done":
            done.append(record)
        else:
            failures[record.concept_id] = f"not learned: {record.error}"
    if not done:
        raise ValueError(f"no learned concept at {config.output}; run python -m pipeline.run first")
    before = finished_rows(store, PARTS)
    wanted: dict[str, str] = {}
    todo = set[str]()

    def missing() -> Iterator[dict[str, Any]]:
        for row in plan_rows(config, protocol, done):
            if row["row_id"] not in before and row["row_id"] not in wanted:
                todo.add(row["row_id"])
                yield row
            wanted[row["row_id"]] = row["concept_id"]

    put_plan(store, PLAN, missing(), PLAN_SCHEMA)
    if todo:
        failures |= score_missing(config, protocol, len(todo))
    concepts = write_table(store, config, protocol, set(wanted))
    failures |= causes(store, wanted)
    conclude(config, protocol, concepts, failures, scored=len(todo), before=len(wanted) - len(todo))
    return FAILED if failures else OK


def score_missing(config: RunConfig, protocol: Protocol, num_rows: int) -> dict[str, str]:
    """Do what the plan says; returns what stopped the stage, if anything did."""
    gpus, _ = run.connect(config)
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
    except RayError as error:
        return {"evaluation": f"stopped, run again to continue: {describe_error(error)}"}
    return {}


def conclude(
    config: RunConfig,
    protocol: Protocol,
    concepts: dict[str, dict[str, Totals]],
    failures: dict[str, str],
    *,
    scored: int,
    before: int,
) -> None:
    """The last lines: mean and standard error over concepts in every setup, where the table is, every failure."""
    say = sys.stdout.write
    say(f"{config.evaluation.protocol}: {scored} rows scored, {before} done before; judges {config.extractor}")
    say(f" and {config.evaluation.dino}" if config.evaluation.dino else "")
    sampling = protocol.sampling
    say(f"; {protocol.images_per_prompt} pictures a prompt, {sampling.steps} {sampling.solver} steps\n")
    shown = [score for score in SCORES if score != "dino" or config.evaluation.dino]
    say(f"| setup | concepts | {' | '.join(shown)} |\n{'|---' * (len(shown) + 2)}|\n")
    for setup, of_concept in concepts.items():
        if of_concept:
            cells = [mean_and_error([total.score(score) for total in of_concept.values()]) for score in shown]
            say(f"| {setup} | {len(of_concept)} | {' | '.join(cells)} |\n")
    say(f"table: {RunStore(config.output).uri(table_path(config))}\n")
    for name, cause in list(failures.items())[:_SHOWN_FAILURES]:
        say(f"FAILED {name}: {cause}\n")
    if len(failures) > _SHOWN_FAILURES:
        say(f"FAILED {len(failures) - _SHOWN_FAILURES} more\n")


def mean_and_error(values: list[float]) -> str:
    """As text: mean and standard error of the concepts that have the score."""
    known = [value for value in values if value == value]
    if not known:
        return "-"
    return f"{fmean(known):.3f}" + (f" ± {stdev(known) / len(known) ** 0.5:.3f}" if len(known) > 1 else "")


if __name__ == "__main__":
    sys.exit(main())
