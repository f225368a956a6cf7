"""`python -m pipeline.run MANIFEST`: plan, learn, draw, report. Run it again to resume.

The same command works on this machine, under a running Ray cluster and under `ray job submit`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import PurePosixPath
from typing import Any

from pipeline.checks import examine
from pipeline.config import RunConfig, load_config, recipe, to_tree
from pipeline.faults import RunAborted, describe_error
from pipeline.identity import identify
from pipeline.logs import configure_logs, say
from pipeline.manifest import BadRow, count_rows, read_manifest
from pipeline.models import extractor_hash, locate, model_hash, portable, tokenizer_of
from pipeline.plan import (
    EVERY,
    ConceptTask,
    Plan,
    Selection,
    digest,
    earlier_hash,
    finished,
    settings_of,
    settings_path,
)
from pipeline.progress import Progress, format_seconds
from pipeline.prompts import Prompt, read_prompts
from pipeline.records import load_records, now, put_record
from pipeline.redact import redact, redacted
from pipeline.report import RunFigures, build_report
from pipeline.selection import select
from pipeline.storage import RunStore, absolute, read_bytes

# ray and torch are imported where they are first needed: --help and --dry-run answer at once.

log = logging.getLogger(__name__)

OK, FAILED, USAGE, STOPPED = 0, 1, 2, 75
"""Exit codes; 75 asks to be run again."""

_SHOWN_FAILURES = 20


@dataclass
class Tally:
    """What became of the run; grows as it goes."""

    rows: int
    began: float = field(default_factory=time.monotonic)
    learned: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    """Concept id -> cause."""
    problems: dict[str, str] = field(default_factory=dict)
    """What went wrong beside single concepts: stage -> cause."""
    pictures: str = ""
    stopped: bool = False
    """By a signal."""
    stage: str = "learning"
    """What it is doing; at last `ended` or `stopped`."""
    started_at: str = field(default_factory=lambda: now("milliseconds"))


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    configure_logs()
    options = parse(arguments)
    try:
        config = configure(options)
        configure_logs(config.log_format)
        chosen = select(config.manifest, RunStore(config.output), options.only, options.retry, options.limit)
        return dry_run(config, chosen, photos=options.photos) if options.dry_run else run(config, chosen)
    except ValueError as error:
        sys.stderr.write(redact(f"error: {error}\n"))
        return USAGE
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
    parser.add_argument("--limit", metavar="N", type=int, help="learn at most N concepts, in the manifest's order")
    parser.add_argument("--retry", choices=["failed"], help="learn and draw only what failed before")
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
    return dataclasses.replace(
        config,
        inversion=dataclasses.replace(config.inversion, penalties=penalties, init=init),
        manifest=absolute(config.manifest),
        output=absolute(output),
        model=portable(config.model),
        extractor=portable(extractor),
    )


def dry_run(config: RunConfig, chosen: Selection = EVERY, *, photos: bool = False) -> int:
    """Count what is done, to do and bad; name every bad row, and what would fail or is worth a remark. `photos`: open
    them, too."""
    prompts = read_prompts(config.generation.prompts) if config.generation.prompts else []
    plan, _ = make_plan(config, RunStore(config.output), chosen)
    failing = set()
    tasks = plan.tasks(read_manifest(config.manifest))
    for finding in examine(tasks, config, prompts, tokenizer_of(config), photos=photos):
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
    return FAILED if plan.bad or failing else OK


def run(config: RunConfig, chosen: Selection = EVERY) -> int:
    """The whole run. Raises ValueError for what is wrong before anything has begun."""
    prompts = read_prompts(config.generation.prompts) if config.generation.prompts else []
    store = RunStore(config.output)
    plan, settings = make_plan(config, store, chosen)
    tally = Tally(count_rows(config.manifest))
    tasks = plan.tasks(read_manifest(config.manifest))
    store.put(settings_path(digest(settings)), json.dumps(settings, indent=1).encode())

    def note(stage: str = "learning") -> None:
        tally.stage = stage
        store.put("run.json", describe_run(config, tally, plan, settings))

    note()
    first = next(tasks, None)  # nothing to do needs no cluster
    if first is not None:
        learn(config, chain([first], tasks), tally, plan, note)
    if prompts and not tally.stopped and not tally.problems:
        note("drawing")
        draw(config, prompts, tally, plan, chosen)
    if not tally.stopped:
        note("reporting")
        report(config, tally, plan, chosen)
    note("stopped" if tally.stopped else "ended")
    return conclude(config, tally, plan, chosen)


def make_plan(config: RunConfig, store: RunStore, chosen: Selection = EVERY) -> tuple[Plan, dict[str, Any]]:
    """The plan, and the settings it was made for."""
    settings = settings_of(
        config,
        model_hash=model_hash(config.model),
        extractor_hash=extractor_hash(config.extractor),
        captions_hash=captions_hash(config.inversion.penalties.captions),
        earlier_hash=earlier_hash(config.inversion.init.earlier_run),
    )
    known = partial(identify, photos=config.photos)
    return Plan(digest(settings), finished(store.scan("concepts")), known, selection=chosen), settings


def captions_hash(path: str) -> str:
    """What is in the file of captions, nothing for those that come with the package. Raises ValueError if it cannot
    be read."""
    identity = identify([path])[path] if path else ""
    if not isinstance(identity, str):
        raise ValueError(f"inversion.penalties.captions = {path!r} cannot be read: {identity}")
    return identity


def learn(config: RunConfig, tasks: Iterator[ConceptTask], tally: Tally, plan: Plan, note: Callable[[], None]) -> None:
    """Learn every concept that is not done; each failure is recorded and the others go on."""
    gpus, cpus = connect(config)
    from pipeline.driver import drive, learner_actors, policy_of
    from pipeline.metrics import RunMetrics

    store, metrics = RunStore(config.output), RunMetrics()

    def beat() -> None:
        try:
            note()
        except OSError as error:  # the next one may get through
            log.warning("run.json was not brought up to date: %s", error)

    progress = Progress(
        "learning", lambda: plan.expected(tally.rows), beat=beat, log_format=config.log_format, observe=metrics.observe
    )
    with stopping_on_signals() as stop:
        try:
            for record in drive(tasks, learner_actors(config, gpus), policy_of(config, gpus, cpus), progress, stop):
                metrics.settled(record)
                if record.status == "done":
                    tally.learned += 1
                else:
                    tally.failures[record.concept_id] = record.error
                    put_record(store, record)
        except RunAborted as error:
            tally.problems["learning"] = f"given up: {error}"
        tally.stopped = stop.is_set()


def draw(config: RunConfig, prompts: list[Prompt], tally: Tally, plan: Plan, chosen: Selection) -> None:
    """Draw every prompt with every finished concept, as far as they were named."""
    gpus, _ = connect(config)
    from ray.exceptions import RayError

    from pipeline.generate import generate_images

    store = RunStore(config.output)
    records = load_records(store, plan.current)
    done = (record for record in records if record.status == "done" and chosen.names(record.concept_id))
    with _handling(signal.default_int_handler):
        try:
            counts = generate_images(config, done, prompts, gpus)
        except RayError as error:
            tally.problems["drawing"] = f"stopped, run again to continue: {describe_error(error)}"
            return
    tally.pictures = f"{counts.drawn} drawn, {counts.done_before} done before, {counts.failed} failed"
    if counts.failed:
        tally.problems["drawing"] = f"{counts.failed} pictures were not drawn: {'; '.join(counts.first_errors)}"


def report(config: RunConfig, tally: Tally, plan: Plan, chosen: Selection = EVERY) -> None:
    facts = {"pictures": tally.pictures} if tally.pictures else {}
    if plan.num_left:
        facts["left for another run"] = f"{plan.num_left:,} concepts ({chosen.words})"
    figures = RunFigures(
        learned=tally.learned,
        skipped=plan.num_done,
        pending=max(0, plan.num_todo - tally.learned - len(tally.failures)),
        seconds=time.monotonic() - tally.began,
        problems=tally.problems,
        facts=facts | versions(),
    )
    build_report(RunStore(config.output), config, figures, plan.current, plan.bad)


def left_out(plan: Plan, chosen: Selection) -> str:
    """What the options left undone, for a line of counts."""
    return f"{plan.num_left} left out by {chosen.words}, " if plan.num_left else ""


def conclude(config: RunConfig, tally: Tally, plan: Plan, chosen: Selection = EVERY) -> int:
    """The last lines: counts, where to look, and every failure with its cause."""
    tell = partial(say, config.log_format)
    bad = [row for row in plan.bad if chosen.names(row.concept_id)]  # of others nobody asked
    counts = (
        f"{tally.learned} learned, {plan.num_done} done before, {left_out(plan, chosen)}{len(tally.failures)} failed, "
    )
    tell(f"{counts}{len(bad)} bad rows in {format_seconds(time.monotonic() - tally.began)}\n")
    if tally.pictures:
        tell(f"pictures: {tally.pictures}\n")
    if tally.stopped:
        tell("stopped before the end; run the same command again to continue\n")
    else:
        tell(redact(f"report: {RunStore(config.output).uri('report.html')}\n"))
    failures = [f"{name}: {cause}" for name, cause in (*tally.problems.items(), *tally.failures.items())]
    failures += [f"bad row: {describe_bad(row)}" for row in bad]
    for failure in failures[:_SHOWN_FAILURES]:
        tell(f"FAILED {failure}\n")
    if len(failures) > _SHOWN_FAILURES:
        tell(f"FAILED {len(failures) - _SHOWN_FAILURES} more, all in results.parquet\n")
    return STOPPED if tally.stopped else FAILED if failures else OK


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


def describe_bad(row: BadRow) -> str:
    return f"{row.file}, row {row.row}{f' ({row.concept_id})' if row.concept_id else ''}: {row.reason}"


def describe_run(config: RunConfig, tally: Tally, plan: Plan, settings: dict[str, Any]) -> bytes:
    """`run.json`: what was run, with what, and how far it got."""
    counts = {
        "rows": tally.rows,
        "done_before": plan.num_done,
        "learned": tally.learned,
        "failed": len(tally.failures),
        "problems": tally.problems,
        "bad_rows": len(plan.bad),
        "left_out": plan.num_left,
        "looked_at": plan.num_done + plan.num_todo + plan.num_left + len(plan.bad),
    }
    description = {
        "stage": tally.stage,
        "started_at": tally.started_at,
        "written_at": now(),
        "config": redacted(to_tree(config)),
        "model_hash": settings["model"],
        "settings": digest(settings),
        "versions": versions(),
        "counts": counts,
        "seconds": round(time.monotonic() - tally.began, 1),
    }
    return json.dumps(description, indent=1).encode()


def versions() -> dict[str, str]:
    names = ("torch", "diffusers", "transformers", "ray")
    return {name: importlib.metadata.version(name) for name in names}


if __name__ == "__main__":
    sys.exit(main())
