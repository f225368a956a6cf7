"""`python -m pipeline.run MANIFEST`: plan, learn, draw, report. Run it again to resume.

The same command works on this machine, under a running Ray cluster and under `ray job submit`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import PurePosixPath
from typing import Any

from pipeline.config import RunConfig
from pipeline.config_file import load_config, recipe
from pipeline.exit_codes import FAILED, OK, STOPPED, USAGE
from pipeline.gate_retries import pending, retry_below_gate, retry_rules
from pipeline.inputs.content_hash import content_hashes
from pipeline.inputs.manifest import count_rows, read_by_priority
from pipeline.inputs.models import load_model_tokenizer, locate, portable
from pipeline.inputs.prompt_table import Prompt, read_prompts
from pipeline.ledger.digest import digest
from pipeline.ledger.gate import BELOW
from pipeline.ledger.plan import EVERY, ConceptTask, Plan, Selection, finished, settings_path
from pipeline.ledger.preflight import examine
from pipeline.ledger.prune import delete_leftovers, find_leftovers
from pipeline.ledger.records import ConceptRecord, load_records, put_record
from pipeline.ledger.selection import RETRIES, select
from pipeline.ledger.settings import current_settings
from pipeline.report.logs import configure_logs, say
from pipeline.report.page import build_report
from pipeline.report.progress import Facts, Progress
from pipeline.report.run_summary import DeviceTime, RunStats, conclude, describe_bad, describe_run, figures_of, left_out
from pipeline.store.addresses import absolute, read_bytes
from pipeline.store.errors import RunAborted, StoreFailed, describe_error
from pipeline.store.lease import hold_lease
from pipeline.store.redact import redact
from pipeline.store.storage import RunStore
from pipeline.times import DeadlinePassed, moment_named

# ray and torch are imported where they are first needed: --help and --dry-run answer at once.

log = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    configure_logs()
    options = parse(arguments)
    try:
        config = configure(options)
        configure_logs(config.log_format)
        until = moment_named(options.finish_by)
        store = RunStore(config.output)
        chosen = select(config.manifest, store, options.only, options.retry, options.limit, config.gate)
        if options.dry_run:
            return dry_run(config, chosen, photos=options.photos, prune=options.prune)
        with hold_lease(store, config.lease_s):
            return run(config, chosen, until=until, prune=options.prune)
    except ValueError as error:
        sys.stderr.write(redact(f"error: {error}\n"))
        return USAGE
    except StoreFailed as error:
        sys.stderr.write(redact(f"error: storage failed: {error}\nnothing done is lost; run the same command again\n"))
        return STOPPED
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run the same command again to continue\n")
        return STOPPED


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pipeline.run", description=__doc__)
    parser.add_argument("manifest", nargs="?", metavar="MANIFEST", help="Parquet file, folder or glob; any fsspec URI")
    parser.add_argument("--output", metavar="URI", help="where everything is written (default: output/<manifest name>)")
    parser.add_argument("--model", help="Stable Diffusion directory or hub id (default: the demo model)")
    parser.add_argument("--prompts", metavar="URI", help="prompts to draw with every concept: text or Parquet")
    parser.add_argument("--config", metavar="TOML", help="a job's settings, or a recipe's name (pipeline/recipes)")
    parser.add_argument("--set", metavar="A.B=C", action="append", default=[], help="one setting; may be repeated")
    parser.add_argument("--only", metavar="ID,ID", help="learn and draw these concepts alone, if they are not done")
    parser.add_argument(
        "--limit", metavar="N", type=int, help="learn at most N concepts, by priority and then in order"
    )
    parser.add_argument("--retry", choices=RETRIES, help="only what failed before, was given up, or is below the gate")
    parser.add_argument("--finish-by", metavar="TIME", help="begin nothing after 06:00, 2026-11-22T06:00+01:00, or +6h")
    parser.add_argument("--prune", action="store_true", help="delete results that the manifest no longer accounts for")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done or fail, write nothing")
    parser.add_argument("--photos", action="store_true", help="with --dry-run, fetch and open every photo, too")
    return parser.parse_args(arguments)


def configure(options: argparse.Namespace) -> RunConfig:
    """TOML, then `--set`, then the named options; addresses are made absolute, so that workers agree on them."""
    toml = read_bytes(absolute(recipe(options.config))).decode() if options.config else ""
    overrides = list(options.set)
    if options.prompts:
        overrides.append(f"generation.prompts={json.dumps(options.prompts)}")
    config = load_config(toml, overrides, manifest=options.manifest, output=options.output, model=options.model)
    if not config.manifest:
        raise ValueError("no manifest: name one on the command line or as `manifest` in the configuration")
    output, extractor, default = config.output, config.extractor, RunConfig()
    if extractor == default.extractor and locate(config.model) != locate(default.model):
        extractor = ""  # the demo's judge knows the demo's pictures only: scores of others would mean nothing
    if output == default.output:
        output = f"{output}/{PurePosixPath(config.manifest.rstrip('/')).stem}"
    penalties, init = config.inversion.penalties, config.inversion.init
    if penalties.captions:
        penalties = dataclasses.replace(penalties, captions=absolute(penalties.captions))
    if init.earlier_run:
        init = dataclasses.replace(init, earlier_run=absolute(init.earlier_run))
    config = dataclasses.replace(
        config,
        inversion=dataclasses.replace(config.inversion, penalties=penalties, init=init),
        manifest=absolute(config.manifest),
        output=absolute(output),
        model=portable(config.model),
        extractor=portable(extractor),
    )
    retry_rules(config)  # a ladder that makes no sense is refused now
    return config


def dry_run(config: RunConfig, chosen: Selection = EVERY, *, photos: bool = False, prune: bool = False) -> int:
    """Count what is done, to do and bad; name every bad row, and what would fail or is worth a remark. `photos`: open
    them, too. `prune`: say what that would delete."""
    prompts = read_prompts(config.generation.prompts) if config.generation.prompts else []
    plan, _ = make_plan(config, RunStore(config.output), chosen)
    failing = set()
    tasks = plan.tasks(read_by_priority(config.manifest))
    for finding in examine(tasks, config, prompts, load_model_tokenizer(config), photos=photos):
        sys.stdout.write(f"{finding}\n")
        failing |= {finding.concept_id} if finding.fails else set()
    for row in plan.bad:
        sys.stdout.write(f"bad row: {describe_bad(row)}\n")
    if failing:
        sys.stdout.write(f"{len(failing)} of {plan.num_todo} concepts to do would fail, or pictures of them\n")
    sys.stdout.write(
        f"{plan.num_done} done, {plan.num_todo} to do, {left_out(plan, chosen)}{len(plan.bad)} bad rows, "
        f"{len(prompts)} prompts; output {redact(config.output)}\n"
    )
    again = pending(RunStore(config.output), plan, chosen)
    if again:
        sys.stdout.write(f"{len(again)} below the gate would be tried again\n")
    if prune:
        for line in find_leftovers(RunStore(config.output), config.manifest, plan).lines():
            sys.stdout.write(f"--prune would delete {line}\n")
    return FAILED if plan.bad or failing else OK


def run(config: RunConfig, chosen: Selection = EVERY, *, until: float = math.inf, prune: bool = False) -> int:
    """The whole run. `until`: when no new concept is begun any more, in seconds since 1970. `prune`: delete in the end
    what the manifest no longer accounts for. Raises ValueError for what is wrong before anything has begun."""
    prompts = read_prompts(config.generation.prompts) if config.generation.prompts else []
    store = RunStore(config.output)
    plan, settings = make_plan(config, store, chosen)
    tally = RunStats(count_rows(config.manifest), until)
    tasks = plan.tasks(read_by_priority(config.manifest))
    store.put(settings_path(digest(settings)), json.dumps(settings, indent=1).encode())

    def note(stage: str = "learning") -> None:
        tally.stage = stage
        store.put("run.json", describe_run(config, tally, plan, settings))

    note()
    first = next(tasks, None)  # nothing to do needs no cluster
    if first is not None and time.time() < until:
        learn(config, chain([first], tasks), tally, plan, note)
    if time.time() >= until:
        for _ in tasks:  # the report tells of all rows
            pass
        tally.late = plan.num_todo > tally.learned + len(tally.failures)
    if not tally.is_over and not tally.problems:
        try_again(config, tally, plan, chosen, note)
    if prompts and not tally.is_over and not tally.problems:
        note("drawing")
        draw(config, prompts, tally, plan, chosen)
    if not tally.stopped:
        note("reporting")
        if prune:
            clear_up(config, tally, plan)
        report(config, tally, plan, chosen)
    note("stopped" if tally.stopped else "ended")
    return conclude(config, tally, plan, chosen)


def make_plan(config: RunConfig, store: RunStore, chosen: Selection = EVERY) -> tuple[Plan, dict[str, Any]]:
    """The plan, and the settings it was made for."""
    settings = current_settings(config)
    known, below = partial(content_hashes, photos=config.photos), dict[str, str]()
    return Plan(digest(settings), finished(store.scan("concepts"), below), known, chosen, below), settings


def learn(
    config: RunConfig, tasks: Iterator[ConceptTask], tally: RunStats, plan: Plan, note: Callable[[], None]
) -> None:
    """Learn every concept that is not done; each failure is recorded and the others go on."""
    connect(config)
    from pipeline.prometheus import RunMetrics

    store, metrics = RunStore(config.output), RunMetrics()
    total = partial(plan.expected, tally.rows)
    for record in learn_all(config, tasks, "learning", total, tally, note, metrics.observe):
        tally.settle(record)
        metrics.settled(record)
        if record.status == "failed":
            put_record(store, record)
        elif record.gate == BELOW and config.gate.ladder:
            plan.below[record.concept_id] = record.fingerprint


def try_again(config: RunConfig, tally: RunStats, plan: Plan, chosen: Selection, note: Callable[[], None]) -> None:
    """Learn concepts below the gate again, as `gate.ladder` says."""

    def learn_these(
        changed: RunConfig, tasks: Iterator[ConceptTask], words: str, count: int
    ) -> Iterator[ConceptRecord]:
        first = next(tasks, None)  # nothing to do needs no cluster
        if first is not None and time.time() < tally.until:
            yield from learn_all(changed, chain([first], tasks), words, lambda: count, tally, note)

    retry_below_gate(config, RunStore(config.output), plan, chosen, learn_these, tally.climbed)
    tally.late |= bool(tally.climbed.waiting) and time.time() >= tally.until


def learn_all(
    config: RunConfig, tasks: Iterator[ConceptTask], words: str, total: Callable[[], int], tally: RunStats,
    note: Callable[[], None], watch: Callable[[Facts], None] | None = None,
) -> Iterator[ConceptRecord]:  # fmt: skip
    """The records of tasks, as they end; fewer if the run is stopped or given up meanwhile."""
    gpus, cpus = connect(config)
    from pipeline.cluster import learner_actors, policy_of
    from pipeline.driver import drive

    tally.on_gpus = bool(gpus)
    device_time = DeviceTime(tally, config.actors.gpus if gpus else config.actors.cpus)

    def beat() -> None:
        try:
            note()
        except OSError as error:  # the next one may get through
            log.warning("run.json was not brought up to date: %s", error)

    def observe(facts: Facts) -> None:
        device_time.observe(facts)
        if watch is not None:
            watch(facts)

    progress = Progress(words, total, beat=beat, log_format=config.log_format, observe=observe)
    policy = policy_of(config, gpus, cpus)
    with stopping_on_signals() as stop:
        try:
            for record in drive(tasks, learner_actors(config, gpus), policy, progress, stop, until=tally.until):
                tally.repeated += record.repeated
                yield record
        except RunAborted as error:
            tally.problems[words] = f"given up: {error}"
        tally.stopped = stop.is_set()


def draw(config: RunConfig, prompts: list[Prompt], tally: RunStats, plan: Plan, chosen: Selection) -> None:
    """Draw every prompt with every finished concept, as far as they were named."""
    gpus, cpus = connect(config)
    from ray.exceptions import RayError

    from pipeline.bulk.generate import generate_images

    store = RunStore(config.output)
    records = load_records(store, plan.current)
    done = (record for record in records if record.status == "done" and chosen.names(record.concept_id))
    began = time.monotonic()
    with _handling(signal.default_int_handler):
        try:
            counts = generate_images(config, done, prompts, gpus, tally.until)
        except DeadlinePassed:
            tally.late = True
            return
        except RayError as error:
            tally.problems["drawing"] = f"stopped, run again to continue: {describe_error(error)}"
            return
        finally:
            tally.on_gpus = bool(gpus)
            tally.device_seconds += (time.monotonic() - began) * (gpus or cpus)
    tally.pictures = f"{counts.drawn} drawn, {counts.done_before} done before, {counts.failed} failed"
    if counts.failed:
        tally.problems["drawing"] = f"{counts.failed} pictures were not drawn: {'; '.join(counts.first_errors)}"


def clear_up(config: RunConfig, tally: RunStats, plan: Plan) -> None:
    """Delete what is left over, unless something is still to be done: it may yet be wanted."""
    store = RunStore(config.output)
    try:
        if tally.is_over or tally.problems:
            raise ValueError("nothing was deleted, as the run did not come to its end")
        left = find_leftovers(store, config.manifest, plan)
        delete_leftovers(store, left)
        for line in left.lines():
            say(config.log_format, f"deleted {line}\n")
    except (ValueError, OSError) as error:
        tally.problems["pruning"] = redact(str(error))


def report(config: RunConfig, tally: RunStats, plan: Plan, chosen: Selection = EVERY) -> None:
    figures = figures_of(config, tally, plan, chosen)
    build_report(RunStore(config.output), config, figures, plan.current, plan.bad)


def connect(config: RunConfig) -> tuple[float, float]:
    """Join the cluster this runs in, or start one on this machine; returns its GPUs (0 if not to be used) and cores."""
    if config.output.startswith("memory:"):
        raise ValueError(f"output {config.output!r}: memory:// ends at a process's border; give a folder or a bucket")
    if config.log_format == "json":
        os.environ.setdefault("RAY_DISABLE_WORKER_LOG_PREFIX", "1")  # what workers write is passed on as it is
    import ray

    if not ray.is_initialized():
        # No address: RAY_ADDRESS (set by `ray job submit`) and a cluster running here are found without. Arguments
        # that shape a cluster must not be given when one is joined.
        local = {"include_dashboard": False} if os.environ.get("RAY_ADDRESS", "local") == "local" else {}
        ray.init(logging_level=logging.WARNING, **local)
    resources = ray.cluster_resources()
    gpus = 0.0 if config.device == "cpu" else float(resources.get("GPU", 0))
    if config.device == "cuda" and not gpus:
        gpus = config.actors.gpus or 1.0  # asked for: an autoscaler may bring one
    return gpus, float(resources.get("CPU", 1))


@contextmanager
def stopping_on_signals() -> Iterator[threading.Event]:
    """SIGTERM or Ctrl-C sets the event; a second one interrupts. To be entered after ray.init, which sets its own."""
    stop = threading.Event()

    def handle(_signal: int, _frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    with _handling(handle):
        yield stop


@contextmanager
def _handling(handler: Any) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


if __name__ == "__main__":
    sys.exit(main())
