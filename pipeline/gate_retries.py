"""Concepts below the gate: they are learned again with other settings, and the best try is kept.

A try is what a run with those settings would learn: it has its own fingerprint, folder and record, so it depends on no
other concept, begins as soon as the one before it has ended, and is resumed by the same command. The record under the
run's own fingerprint names the try that is kept, and is written once more, whole, when the concept has no tries left.
Until then `ladder.json` lies beside it, which the actor writes before the record.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice

from pipeline.config import RunConfig
from pipeline.config_file import load_config, recipe, to_tree
from pipeline.inputs.content_hash import content_hashes
from pipeline.inputs.manifest import ManifestRow, read_by_priority
from pipeline.inputs.models import locate, with_captions
from pipeline.ledger.digest import digest
from pipeline.ledger.gate import BELOW, PASSED, against_first, best, verdict
from pipeline.ledger.plan import ConceptTask, Plan, earlier_hash, settings_path
from pipeline.ledger.records import ConceptRecord, Try, from_json, put_record
from pipeline.ledger.selection import Selection
from pipeline.ledger.settings import captions_hash, current_settings
from pipeline.report.run_stats import RetryStats
from pipeline.sample_config import GateConfig
from pipeline.store.addresses import read_bytes
from pipeline.store.storage import ConceptFolder, RunStore
from pipeline.times import now
from textual_inversion.families import check_gradient_path

log = logging.getLogger(__name__)

_BATCH = 200
"""Records read at a time."""


@dataclass(frozen=True, slots=True)
class RetryRule:
    """The settings of one try."""

    text: str
    """The entry of `gate.ladder`."""

    config: RunConfig
    """The run's configuration with the entry's changes."""


def retry_rules(config: RunConfig) -> list[RetryRule]:
    """Return the rules of `gate.ladder` in their order.

    Raises ValueError naming an entry that makes no configuration.
    """
    rules = []
    for number, text in enumerate(config.gate.ladder, 1):
        try:
            rules.append(RetryRule(text, _apply_rule(config, text, number)))
        except (ValueError, OSError) as error:
            raise ValueError(f"gate.ladder: {text!r}: {error}") from error
    return rules


def check_settings(config: RunConfig) -> None:
    """Check what is to be told before the learning: that the files and runs that the rules' settings name can be read,
    and that the model has the gradients that the run's settings and the rules' ask for. Raises ValueError if not."""
    check_gradient_path(locate(config.model), config.inversion.gradient_path)
    for rule in retry_rules(config):
        try:
            check_gradient_path(locate(config.model), rule.config.inversion.gradient_path)
        except ValueError as error:
            raise ValueError(f"gate.ladder: {rule.text!r}: {error}") from error
        inversion = with_captions(rule.config).inversion
        captions_hash(inversion.penalties.captions)
        earlier_hash(inversion.init.earlier_run)


def _apply_rule(config: RunConfig, text: str, number: int) -> RunConfig:
    """Apply the changes of a rule in their order; `number` counts the rules from 1."""
    changed = dataclasses.replace(config, gate=dataclasses.replace(config.gate, ladder=()))
    for change in (each.strip() for each in text.split(" + ")):
        toml = ""
        overrides: list[str] = []
        if change == "seed":
            overrides = [f"seed={(config.seed + number) % 2**63}"]
        elif factor := re.fullmatch(r"steps\*(\d+(?:\.\d+)?)", change):
            overrides = [f"inversion.steps={round(changed.inversion.steps * float(factor[1]))}"]
        elif "=" in change:
            overrides = [change]
        else:
            toml = read_bytes(recipe(change)).decode()
        changed = load_config(toml, overrides, base=to_tree(changed))
    all_else = dataclasses.replace(changed, seed=config.seed, inversion=config.inversion, gate=config.gate)
    if all_else != config:
        raise ValueError("only `seed` and settings of `inversion` can be changed for a single concept")
    return changed


def concepts_to_retry(store: RunStore, plan: Plan, selection: Selection) -> dict[str, str]:
    """Return the concepts that had a record before the run and have tries left, concept id -> fingerprint.

    With `--retry below-gate` they are all selected concepts that are done, up to the selection's limit.
    """
    found = plan.awaiting_retry
    if selection.retries_below_gate:
        folders = [ConceptFolder.from_path(path) for path, size in store.scan("concepts") if size]
        found = {folder.fingerprint: folder.concept_id for folder in folders if folder is not None}
    selected = (
        (concept_id, fingerprint)
        for fingerprint, concept_id in found.items()
        if fingerprint.encode() in plan.carried and plan.had_record(fingerprint) and selection.includes(concept_id)
    )
    return dict(islice(selected, selection.limit if selection.retries_below_gate and selection.limit else None))


@dataclass(slots=True)
class _Climb:
    """A concept with tries left."""

    task: ConceptTask
    """That of its first try."""
    first: ConceptRecord
    """The record under the run's own fingerprint, which may hold tries of an earlier run."""
    later: list[Try] = field(default_factory=list)
    """Tries by this run's rules."""
    earlier: dict[str, Try] = field(default_factory=dict)
    """Fingerprint -> try by this run's rules that had a record before the run."""


class Retries:
    """The concepts below the gate, each of which is tried by one rule after the other, whatever the others do."""

    def __init__(
        self,
        config: RunConfig,
        store: RunStore,
        plan: Plan,
        selection: Selection,
        stats: RetryStats,
        on_end: Callable[[ConceptRecord], None],
    ) -> None:
        """Begin with no concept. `on_end` is called with the last record of each, when it is stored.

        Raises ValueError naming a rule that makes no configuration.
        """
        self._config = config
        self._store = store
        self._plan = plan
        self._selection = selection
        self._stats = stats
        self._on_end = on_end
        self._rules = retry_rules(config)
        self._found: dict[str, str] | None = None
        self._climbs: dict[str, _Climb] = {}
        """Concept id -> concept that has begun to be tried again."""

    @property
    def settings(self) -> list[RunConfig]:
        """The configuration of each rung (`ConceptTask.rung`)."""
        return [self._config, *(rule.config for rule in self._rules)]

    @cached_property
    def _digests(self) -> list[str]:
        """Digests of the rules' settings, which are stored with them."""
        digests = []
        for rule in self._rules:
            settings = current_settings(rule.config)
            digests.append(digest(settings))
            self._store.put(settings_path(digests[-1]), json.dumps(settings, indent=1).encode())
        return digests

    def find(self) -> dict[str, str]:
        """Find the concepts that earlier runs left with tries, or that are asked for, and count them; return concept id
        -> fingerprint. The plan must have read the whole manifest."""
        if self._found is None:
            self._found = concepts_to_retry(self._store, self._plan, self._selection)
            self._stats.waiting += len(self._found)
        return self._found

    def resumed(self) -> Iterator[ConceptTask]:
        """Yield the next try of each concept that `find` finds, which is called when the first is asked for."""
        found = self.find()
        if self._selection.retries_below_gate:  # otherwise the actors have written these
            for concept_id, fingerprint in found.items():
                self._store.put(ConceptFolder(concept_id, fingerprint).ladder, b"{}")
        tasks = self._present_tasks(found)
        while batch := {task.folder.record: task for task in islice(tasks, _BATCH)}:
            climbs = []
            for path, content in self._store.get_many(batch).items():
                try:
                    if isinstance(content, OSError):
                        raise content
                    climbs.append(_Climb(batch[path], from_json(content)))
                except (OSError, ValueError) as error:
                    log.warning("%s cannot be read, and its concept is not tried again: %s", path, error)
            self._begin(climbs)
            for climb in climbs:
                if (again := self._next_try(climb, 0)) is not None:
                    yield again

    def _present_tasks(self, found: Mapping[str, str]) -> Iterator[ConceptTask]:
        """Yield the tasks of the found concepts whose row and photos are what they were."""
        if not found:
            return
        rows = (
            row
            for row in read_by_priority(self._config.manifest)
            if isinstance(row, ManifestRow) and row.concept.concept_id in found
        )
        identify = partial(content_hashes, photos=self._config.photos)
        for task in Plan(digest(current_settings(self._config)), (), identify).tasks(rows):
            if found[task.concept.concept_id] == task.fingerprint:
                yield task

    def takes(self, task: ConceptTask, record: ConceptRecord) -> bool:
        """Return whether the record of a task is one for `next_try`."""
        return bool(task.rung) or (record.gate == BELOW and bool(self._rules))

    def next_try(self, task: ConceptTask, record: ConceptRecord) -> ConceptTask | None:
        """Take the record of a try, the first one of a concept below the gate or a later one, and return the next.

        None is returned, and the concept's last record is stored, if it passes or no rule is left. Raises OSError for a
        record that cannot be stored.
        """
        if task.rung:
            climb = self._climbs[task.concept.concept_id]
            climb.later.append(_as_try(record, rung=self._rules[task.rung - 1].text))
            self._stats.tried += 1
            self._stats.steps += record.steps
        else:
            climb = _Climb(task, record)
            self._begin([climb])
            self._stats.waiting += 1
        return self._next_try(climb, task.rung)

    def _next_try(self, climb: _Climb, rung: int) -> ConceptTask | None:
        """Return the first try above a rung that has no record yet, if one is needed."""
        for task in self._tries_above(climb, rung):
            if self._has_ended(climb, is_end=False):
                return None
            if task.fingerprint in (climb.first.fingerprint, *(each.fingerprint for each in climb.later)):
                continue
            if task.fingerprint not in climb.earlier:
                return task
            climb.later.append(climb.earlier[task.fingerprint])
        self._has_ended(climb, is_end=True)
        return None

    def _tries_above(self, climb: _Climb, rung: int) -> Iterator[ConceptTask]:
        """Yield the tasks of a concept's tries by all rules above a rung."""
        for above, settings in enumerate(self._digests[rung:], rung + 1):
            inputs = {**climb.task.inputs, "settings": settings}
            yield dataclasses.replace(climb.task, fingerprint=digest(inputs), inputs=inputs, rung=above)

    def _has_ended(self, climb: _Climb, *, is_end: bool) -> bool:
        """Return whether a concept needs no further try, and store its last record then."""
        record = decide(climb.first, climb.later, self._config.gate, is_end=is_end)
        if record is None:
            return False
        put_record(self._store, record)
        self._store.delete(record.folder.ladder)
        del self._climbs[record.concept_id]
        self._stats.waiting -= 1
        self._stats.learned_before += self._plan.had_record(record.fingerprint)
        is_passed = record.gate == PASSED
        self._stats.passed += is_passed
        self._stats.better += not is_passed and bool(record.kept)
        self._stats.below += not is_passed and not record.kept
        self._on_end(record)
        return True

    def _begin(self, climbs: Sequence[_Climb]) -> None:
        """Begin with concepts, and read the records that earlier runs left of their tries, all at once."""
        self._climbs |= {climb.first.concept_id: climb for climb in climbs}
        had_record = [
            (climb, task)
            for climb in climbs
            for task in self._tries_above(climb, 0)
            if self._plan.had_record(task.fingerprint)
        ]
        contents = self._store.get_many(task.folder.record for _, task in had_record)
        for climb, task in had_record:
            found = _try_of(contents[task.folder.record], task, rung=self._rules[task.rung - 1].text)
            climb.earlier.setdefault(task.fingerprint, found)


def decide(first: ConceptRecord, later: Sequence[Try], gate: GateConfig, *, is_end: bool) -> ConceptRecord | None:
    """Return the concept's final record with its best try, or None if it is to be tried by the next rule.

    `first` is the record under the run's own fingerprint, which may hold tries of an earlier run; `later` are the tries
    by this run's rules; `is_end` says that no rule is left.
    """
    known = tuple(each for each in first.tries if not each.error) or (_as_try(first, rung=""),)
    fingerprints = {each.fingerprint for each in known}
    tries = (*known, *(each for each in later if each.fingerprint not in fingerprints))
    kept = best(tries, gate)
    gate_verdict = verdict(against_first(kept, tries), gate)
    if gate_verdict == BELOW and not is_end:
        return None
    shown = {each.name: getattr(kept, each.name) for each in dataclasses.fields(Try)}
    del shown["rung"], shown["fingerprint"]
    return dataclasses.replace(
        first,
        **shown,
        gate=gate_verdict,
        tries=tries,
        kept="" if kept.fingerprint == first.fingerprint else kept.fingerprint,
        finished_at=now("milliseconds"),
    )


def _try_of(content: bytes | OSError, task: ConceptTask, *, rung: str) -> Try:
    """Return the try of a stored record, or a failed try with the reason why it cannot be read."""
    try:
        if isinstance(content, OSError):
            raise content
        return _as_try(from_json(content), rung=rung)
    except (OSError, ValueError) as error:
        return Try(rung=rung, fingerprint=task.fingerprint, error=f"{task.folder.record} cannot be read: {error}")


def _as_try(record: ConceptRecord, *, rung: str) -> Try:
    names = {each.name for each in dataclasses.fields(Try)} - {"rung", "fingerprint"}
    return Try(rung=rung, fingerprint=record.fingerprint, **{name: getattr(record, name) for name in names})
