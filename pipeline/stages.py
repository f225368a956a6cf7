"""The stages of a run: learn, draw, prune and report."""

from __future__ import annotations

import json
import logging
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from itertools import chain
from threading import Thread
from typing import TYPE_CHECKING, Any

from pipeline.bounds import Bound
from pipeline.config import RunConfig
from pipeline.connection import connect
from pipeline.exit_codes import OK
from pipeline.gate_retries import Retries, check_settings
from pipeline.inputs.content_hash import content_hashes
from pipeline.inputs.manifest import count_rows
from pipeline.inputs.prompt_table import Prompt
from pipeline.ledger.digest import digest
from pipeline.ledger.done import find_done
from pipeline.ledger.known_failures import read_known, write_known
from pipeline.ledger.plan import ConceptTask, Plan, settings_path
from pipeline.ledger.prune import delete_leftovers, find_leftovers
from pipeline.ledger.record_parts import PartWriter
from pipeline.ledger.records import ConceptRecord, add_to_part, load_records, put_record
from pipeline.ledger.selection import ALL_CONCEPTS, Selection
from pipeline.ledger.settings import current_settings
from pipeline.ledger.vectors import write_vectors
from pipeline.report.estimate import read_rate
from pipeline.report.logs import say
from pipeline.report.outcome import outcome_of
from pipeline.report.page import build_report
from pipeline.report.progress import Progress, ProgressNumbers
from pipeline.report.run_file import RUN_FILE
from pipeline.report.run_stats import DeviceTime, RunStats
from pipeline.report.run_summary import describe_run, figures_of
from pipeline.signals import handling_signals, stopping_on_signals
from pipeline.store.errors import ClusterLost, RunAborted, StorageLost, describe_bug, describe_error
from pipeline.store.redact import redact
from pipeline.store.storage import RunStore
from pipeline.store.trouble import describe_trouble
from pipeline.times import DeadlinePassed
from pipeline.tracking.feed import TrackerFeed
from pipeline.tracking.sender import STOPPED_WAIT_S, WAIT_S

if TYPE_CHECKING:
    from pipeline.fleet import Fleet
    from pipeline.prometheus import RunMetrics

# ray and torch are imported where they are first needed, so that --help and --dry-run answer at once.

log = logging.getLogger(__name__)


def make_plan(
    config: RunConfig, store: RunStore, selection: Selection = ALL_CONCEPTS, *, verify: bool = False
) -> tuple[Plan, dict[str, Any]]:
    """Return the plan, and the settings whose digest is in its fingerprints.

    `verify` reads every file of the concepts that are done, and compares it with its record.
    """
    settings = current_settings(config)
    check_settings(config)
    identify = partial(content_hashes, photos=config.photos)
    done = find_done(store, verify=verify)
    plan = Plan(digest(settings), done.fingerprints, identify, selection, done.awaiting_retry, done.damaged)
    return plan, settings


class Run:
    """One run: its configuration, plan and counts, and its stages."""

    def __init__(
        self,
        config: RunConfig,
        selection: Selection = ALL_CONCEPTS,
        until: float = math.inf,
        *,
        verify: bool = False,
    ) -> None:
        """Make the plan and store its settings. Raises ValueError for a model or a file that cannot be read.

        `verify`: see `make_plan`.
        """
        self._config = config
        self._selection = selection
        self._store = RunStore(config.output)
        self.plan, self._settings = make_plan(config, self._store, selection, verify=verify)
        self.stats = RunStats(count_rows(config.manifest), until, known_before=read_known(self._store))
        self._rate_before = read_rate(self._store)
        self._tracker = TrackerFeed(config, self._store)
        self._parts = PartWriter(self._store)
        self._retries = Retries(config, self._store, self.plan, selection, self.stats.gate_retries, self._end_retries)
        self._fleet: Fleet | None = None
        settings = json.dumps(self._settings, indent=1).encode()
        self._store.put(settings_path(digest(self._settings)), settings)

    @contextmanager
    def living_actors(self) -> Iterator[None]:
        """Let actors live on from stage to stage in the block, and dismiss them at its end."""
        try:
            yield
        finally:
            if self._fleet is not None:
                self._fleet.dismiss()

    def can_continue(self) -> bool:
        """Return whether another stage may begin."""
        return not self.stats.is_over and not self.stats.problems

    def write_state(self, stage: str) -> None:
        """Set the stage and write `run.json`."""
        self.stats.stage = stage
        description = describe_run(self._config, self.stats, self.plan, self._settings, self._rate_before)
        self._store.put(RUN_FILE, description)

    def enter(self, stage: str) -> None:
        """Set the stage and write `run.json`. Ends the run if the output cannot be written."""
        try:
            self.write_state(stage)
        except OSError as error:
            self._stop_for(stage, error)

    def learn(self, tasks: Iterator[ConceptTask]) -> None:
        """Learn every task's concept, and by the rules of `gate.ladder` those below the gate, each as soon as its
        record is there. A failure is recorded, and the other concepts are learned."""
        todo = self._all_tasks(tasks)
        first = next(todo, None)
        if first is not None and time.time() < self.stats.until:  # without work, no cluster is needed
            self._learn_all(chain([first], todo))
        if time.time() >= self.stats.until:
            for _ in tasks:  # read the rest of the manifest, because the report shows all rows
                pass
            try:
                self._retries.find()
            except OSError as error:
                self._stop_for("trying again", error)
            unlearned = self.plan.num_todo > self.stats.num_settled
            self.stats.is_late = unlearned or bool(self.stats.gate_retries.waiting)

    def _all_tasks(self, tasks: Iterator[ConceptTask]) -> Iterator[ConceptTask]:
        """Yield the tasks, and then the tries that earlier runs left, which the whole manifest must be read for."""
        yield from self._without_damaged_records(tasks)
        try:
            yield from self._retries.resumed()
        except OSError as error:
            self._stop_for("trying again", error)

    def _without_damaged_records(self, tasks: Iterator[ConceptTask]) -> Iterator[ConceptTask]:
        """Yield the tasks, after deleting the record of one whose result is damaged: an actor takes a record that it
        finds for that of a call whose answer was lost."""
        for task in tasks:
            damage = self.plan.damaged.get(task.concept.concept_id)
            if damage is not None:
                log.warning("concept %s is learned again: %s", task.concept.concept_id, damage)
                self._store.delete(task.folder.record)
            yield task

    def draw(self, prompts: Sequence[Prompt]) -> None:
        """Draw every prompt with every selected concept that is done."""
        self.enter("drawing")
        if self.stats.is_stopped:
            return
        gpus, _ = connect(self._config)
        from ray.exceptions import RayError

        from pipeline.bulk.generate import generate_images

        stats = self.stats
        records = load_records(self._store, self.plan.carried)
        learned = (
            record for record in records if record.status == "done" and self._selection.includes(record.concept_id)
        )
        fleet, actors = self._connected_fleet(gpus), self._config.actors
        seconds_before = fleet.actor_seconds()
        with handling_signals(signal.default_int_handler):
            try:
                counts = generate_images(self._config, learned, prompts, fleet, stats.until)
            except DeadlinePassed:
                stats.is_late = True
                return
            except ClusterLost as error:
                stats.problems["drawing"] = f"given up: {error}"
                stats.is_stopped = True
                return
            except RayError as error:
                stats.problems["drawing"] = f"stopped, run again to continue: {describe_error(error)}"
                stats.is_stopped = isinstance(getattr(error, "cause", None), OSError)
                return
            except OSError as error:
                self._stop_for("drawing", error)
                return
            finally:
                stats.on_gpus = bool(gpus)
                actor_s = fleet.actor_seconds() - seconds_before
                stats.device_seconds += actor_s * (actors.gpus if gpus else actors.cpus)
        stats.pictures = f"{counts.drawn} drawn, {counts.done_before} done before, {counts.failed} failed"
        if counts.failed:
            stats.problems["drawing"] = f"{counts.failed} pictures were not drawn: {'; '.join(counts.first_errors)}"

    def prune(self, bound: Bound) -> None:
        """Delete what the manifest no longer accounts for, unless the run ended early: the next one may need it.

        Nothing is deleted if that is more of the output's concepts than `bound` allows.
        """
        try:
            if not self.can_continue():
                raise ValueError("nothing was deleted, as the run did not come to its end")
            leftovers = find_leftovers(self._store, self._config.manifest, self.plan)
            leftovers.check(bound)
            delete_leftovers(self._store, leftovers)
            for line in leftovers.lines():
                say(self._config.log_format, f"deleted {line}\n")
        except (ValueError, OSError) as error:
            self.stats.problems["pruning"] = redact(str(error))

    def report(self) -> None:
        """Write the results and the report. An error is a problem of the run, which keeps its other results."""
        figures = figures_of(self._config, self.stats, self.plan, self._selection)
        try:
            build_report(self._store, self._config, figures, self.plan.carried, self.plan.bad)
            if self._config.report.vectors != "off":
                write_vectors(self._store, load_records(self._store, self.plan.carried), self._config.report.vectors)
        except OSError as error:
            self._stop_for("report", error)
        except Exception as error:
            log.exception("the report was not written")
            self.stats.problems["report"] = f"not written: {describe_bug(error)}"

    def finish(self) -> None:
        """Keep the failures that were tolerated, for the next run to know, and write the last `run.json`; then wait for
        the tracker."""
        outcome = outcome_of(self._config, self.stats, self.plan, self._selection)
        if self._selection == ALL_CONCEPTS and (outcome.is_tolerated or outcome.exit_code == OK):
            try:
                write_known(self._store, outcome.keys)
            except OSError as error:
                self._stop_for("ended", error)
        self._set_outcome()
        self.enter("stopped" if self.stats.is_stopped else "ended")
        self._set_outcome()  # anew, because run.json may not have been written
        self._tracker.close(STOPPED_WAIT_S if self.stats.is_stopped else WAIT_S)

    def _set_outcome(self) -> None:
        outcome = outcome_of(self._config, self.stats, self.plan, self._selection)
        self.stats.exit_code, self.stats.meaning = outcome.exit_code, outcome.meaning

    def _stop_for(self, stage: str, error: OSError) -> None:
        """End the run, to be continued by the same command, because its output cannot be written."""
        self.stats.problems[stage] = f"not written: {describe_trouble(error)}"
        self.stats.is_stopped = True

    def _learn_all(self, tasks: Iterator[ConceptTask]) -> None:
        """Learn the tasks' concepts and try them again; fewer if the run is stopped or given up meanwhile."""
        config, stats = self._config, self.stats
        # Imports torch while Ray's processes start: each takes seconds. The module does not import Ray.
        Thread(target=import_module, args=("pipeline.model_actor",), name="imports").start()
        gpus, _ = connect(config)
        from pipeline.driver import drive
        from pipeline.prometheus import RunMetrics
        from pipeline.step_watch import StepWatch
        from pipeline.work_queue import WorkQueue

        stats.on_gpus = bool(gpus)
        device_time = DeviceTime(stats, config.actors.gpus if gpus else config.actors.cpus)
        metrics = RunMetrics()

        def observe(numbers: ProgressNumbers) -> None:
            device_time.observe(numbers)
            stats.progress = dict(numbers)
            metrics.observe(numbers)

        fleet = self._connected_fleet(gpus)
        watch_steps = StepWatch(lambda: [worker.handle for worker in fleet.ready()])
        progress = Progress(
            "learning",
            partial(self.plan.expected_todo, stats.rows),
            beat=partial(self._beat, metrics),
            log_format=config.log_format,
            observe=observe,
            in_flight=watch_steps.in_flight,
            batch_size=config.inversion.batch_size,
            starting="loading the model" + (" and trying to compile the denoiser" if gpus else ""),
        )
        queue = WorkQueue(tasks)
        rungs = self._retries.settings
        with stopping_on_signals() as stop:
            try:
                for task, record in drive(
                    queue, fleet, rungs, progress, stop, until=stats.until, replan=self.plan.replan
                ):
                    if not task.rung:
                        metrics.settled(record)
                    if (again := self._settle(task, record)) is not None:
                        queue.add(again)
                    if stats.is_stopped:
                        break
            except RunAborted as error:
                stats.problems["learning"] = f"given up: {error}"
                stats.is_stopped |= isinstance(error, StorageLost | ClusterLost)
            finally:
                progress.close()
            stats.is_stopped |= stop.is_set()
        self._parts.flush()
        self._count_failures(metrics)

    def _settle(self, task: ConceptTask, record: ConceptRecord) -> ConceptTask | None:
        """Count the record of a task, and store it where its actor does not; return the concept's next try, if it is to
        have one. Ends the run if the output cannot be written."""
        stats, is_done = self.stats, record.status == "done"
        stats.repeated += record.repeated
        is_first = not task.rung
        try:
            if is_first:
                stats.settle(record)
                if not is_done:
                    put_record(self._store, record)
            if is_first or is_done:
                add_to_part(self._parts, record)
            if self._retries.takes(task, record):
                return self._retries.next_try(task, record)
        except OSError as error:
            self._stop_for("learning", error)
            return None
        self._tracker.add(record)
        return None

    def _end_retries(self, record: ConceptRecord) -> None:
        """Take note of the last record of a concept that was tried again."""
        add_to_part(self._parts, record)
        self._tracker.add(record)

    def _beat(self, metrics: RunMetrics) -> None:
        """Do what is due every minute of learning: export the failures, which takes longer the more there are, and
        update `run.json`."""
        self._count_failures(metrics)
        try:
            self.write_state("learning")
        except OSError as error:  # the next one may get through
            log.warning("run.json was not updated: %s", error)

    def _count_failures(self, metrics: RunMetrics) -> None:
        metrics.count_failures(outcome_of(self._config, self.stats, self.plan, self._selection))

    def _connected_fleet(self, gpus: float) -> Fleet:
        """Return the run's actors, which the first stage that needs them starts."""
        if self._fleet is None:
            from pipeline.cluster import new_fleet

            self._fleet = new_fleet(self._config, gpus)
        return self._fleet
