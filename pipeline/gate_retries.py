"""Concepts below the gate: they are learned again with other settings, and the best try is kept.

A try is what a run with those settings would learn: it has its own fingerprint, folder and record, so it depends on no
other concept, and the same command resumes it. The record under the run's own fingerprint names the try that is kept,
and is written once more, whole, when the concept has no tries left. Until then `ladder.json` lies beside it, which the
actor writes before the record.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

from pipeline.config import GateConfig, RunConfig
from pipeline.config_file import load_config, recipe, to_tree
from pipeline.inputs.content_hash import content_hashes
from pipeline.inputs.manifest import ManifestRow, read_by_priority
from pipeline.inputs.models import with_captions
from pipeline.ledger.digest import digest
from pipeline.ledger.gate import BELOW, PASSED, against_first, best, verdict
from pipeline.ledger.plan import ConceptTask, Plan, earlier_hash, settings_path
from pipeline.ledger.records import ConceptRecord, Try, from_json, put_record
from pipeline.ledger.selection import Selection
from pipeline.ledger.settings import captions_hash, current_settings
from pipeline.report.run_stats import RetryStats
from pipeline.store.addresses import read_bytes
from pipeline.store.storage import ConceptFolder, RunStore
from pipeline.times import now

log = logging.getLogger(__name__)

_BATCH = 200
"""Records held at a time."""


@dataclass(frozen=True, slots=True)
class RetryRule:
    """The settings of one try."""

    text: str
    """The entry of `gate.ladder`."""

    config: RunConfig
    """The run's configuration with the entry's changes."""


LearnAll = Callable[[RunConfig, Iterator[ConceptTask], str, int], Iterator[ConceptRecord]]
"""(configuration, tasks, stage name for progress, number of tasks) -> their records, as they end; fewer records if the
run is to stop."""


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


def check_rule_files(config: RunConfig) -> None:
    """Read the files and runs that the rules' settings name: a missing one is to be told before the learning. Raises
    ValueError for one that cannot be read."""
    for rule in retry_rules(config):
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
    """Return the concepts with tries left, concept id -> fingerprint.

    With `--retry below-gate` they are all selected concepts that are done, up to the selection's limit.
    """
    found: Iterable[tuple[str, str]] = plan.awaiting_retry.items()
    if selection.retries_below_gate:
        folders = [ConceptFolder.from_path(path) for path, size in store.scan("concepts") if size]
        found = {
            folder.concept_id: folder.fingerprint
            for folder in folders
            if folder is not None
            and folder.fingerprint.encode() in plan.carried
            and plan.had_record(folder.fingerprint)
        }.items()
    selected = (
        (concept_id, fingerprint)
        for concept_id, fingerprint in found
        if fingerprint.encode() in plan.carried and selection.includes(concept_id)
    )
    return dict(islice(selected, selection.limit if selection.retries_below_gate and selection.limit else None))


def retry_below_gate(
    config: RunConfig,
    store: RunStore,
    plan: Plan,
    selection: Selection,
    learn_all: LearnAll,
    stats: RetryStats,
    on_end: Callable[[ConceptRecord], None] | None = None,
) -> None:
    """Learn every concept below the gate again, rule by rule, and write down which try is kept.

    All concepts are tried by one rule before any is tried by the next. Ends early, and leaves the other concepts with
    tries left, when `learn_all` does. `on_end` is called with the last record of each concept.
    """
    waiting = concepts_to_retry(store, plan, selection)
    if selection.retries_below_gate:  # otherwise the actors have written these
        for concept_id, fingerprint in waiting.items():
            store.put(ConceptFolder(concept_id, fingerprint).ladder, b"{}")
    rules = [(rule, current_settings(rule.config)) for rule in retry_rules(config)] if waiting else []
    stats.waiting = len(waiting)
    retries = _Retries(config, store, plan, waiting, stats, on_end)
    for rule, settings in rules:
        retries.settle(is_end=False)
        store.put(settings_path(digest(settings)), json.dumps(settings, indent=1).encode())
        if not retries.learn(rule, digest(settings), learn_all):
            return
    retries.settle(is_end=True)


class _Retries:
    """The concepts with tries left, and the rules that they were tried by."""

    def __init__(
        self,
        config: RunConfig,
        store: RunStore,
        plan: Plan,
        waiting: dict[str, str],
        stats: RetryStats,
        on_end: Callable[[ConceptRecord], None] | None,
    ) -> None:
        self._config = config
        self._store = store
        self._plan = plan
        self._waiting = waiting
        """Concept id -> fingerprint."""
        self._stats = stats
        self._on_end = on_end
        self._used: list[tuple[RetryRule, str]] = []
        """Rules that all concepts were tried by, with the digests of their settings."""

    def learn(self, rule: RetryRule, settings: str, learn_all: LearnAll) -> bool:
        """Learn all concepts with a rule's settings; return whether every one was learned or failed.

        `settings` is the digest of the rule's settings.
        """
        wanted = self._untried(settings)
        offer = _Offer(_tasks(self._config, settings, wanted))
        for record in learn_all(rule.config, iter(offer), f"trying again ({rule.text})", len(wanted)):
            self._stats.tried += 1
            self._stats.steps += record.steps
            if record.status == "failed":
                self._stats.failures[record.fingerprint] = record.error
            offer.in_flight.discard(record.fingerprint)
            wanted.pop(record.fingerprint)
        if offer.in_flight or not offer.is_exhausted:
            return False
        # The plan did not offer these again.
        self._stats.failures |= dict.fromkeys(wanted, "its row or photos are not what they were at its first try")
        self._used.append((rule, settings))
        return True

    def settle(self, *, is_end: bool) -> None:
        """Write the records of the concepts that need no further try: one passes, or `is_end`, no rule is left."""
        for first in _records(self._store, list(self._waiting.items())):
            record = decide(first, self._later_tries(first), self._config.gate, is_end=is_end)
            if record is not None:
                self._write(record)

    def _write(self, record: ConceptRecord) -> None:
        put_record(self._store, record)
        self._store.delete(record.folder.ladder)
        del self._waiting[record.concept_id]
        self._stats.waiting -= 1
        self._stats.learned_before += self._plan.had_record(record.fingerprint)
        is_passed = record.gate == PASSED
        self._stats.passed += is_passed
        self._stats.better += not is_passed and bool(record.kept)
        self._stats.below += not is_passed and not record.kept
        if self._on_end is not None:
            self._on_end(record)

    def _untried(self, settings: str) -> dict[str, str]:
        """Return the tries with these settings that had no record when the run began, fingerprint -> concept id."""
        found = {}
        for record in _records(self._store, self._waiting.items()):
            fingerprint = _fingerprint_with(record, settings)
            if fingerprint != record.fingerprint and not self._plan.had_record(fingerprint):
                found[fingerprint] = record.concept_id
        return found

    def _later_tries(self, first: ConceptRecord) -> list[Try]:
        """Read the tries by the rules used so far."""
        folders = {
            rule.text: ConceptFolder(first.concept_id, _fingerprint_with(first, settings))
            for rule, settings in self._used
        }
        contents = self._store.get_many(folder.record for folder in folders.values())
        return [
            _try_of(text, folder, contents[folder.record], self._stats.failures) for text, folder in folders.items()
        ]


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


class _Offer:
    """Tasks that are handed to `learn_all` one by one, and the ones that have not ended."""

    def __init__(self, tasks: Iterator[ConceptTask]) -> None:
        self._tasks = tasks
        self.in_flight = set[str]()
        """Fingerprints of the tasks that were taken and have not ended."""
        self.is_exhausted = False
        """True once all tasks were taken. A concept may never be offered as a task, say if its photo is gone."""

    def __iter__(self) -> Iterator[ConceptTask]:
        for task in self._tasks:
            self.in_flight.add(task.fingerprint)
            yield task
        self.is_exhausted = True


def _tasks(config: RunConfig, settings: str, wanted: Mapping[str, str]) -> Iterator[ConceptTask]:
    """Yield the manifest's concepts whose fingerprint under `settings` is wanted."""
    concept_ids = set(wanted.values())
    if not concept_ids:
        return
    rows = (
        row
        for row in read_by_priority(config.manifest)
        if isinstance(row, ManifestRow) and row.concept.concept_id in concept_ids
    )
    tasks = Plan(settings, set(), partial(content_hashes, photos=config.photos)).tasks(rows)
    yield from (task for task in tasks if task.fingerprint in wanted)


def _fingerprint_with(record: ConceptRecord, settings: str) -> str:
    """Return the fingerprint of the record's photos and row under other settings."""
    return digest({**record.inputs, "settings": settings}) if record.inputs else record.fingerprint


def _records(store: RunStore, folders: Iterable[tuple[str, str]]) -> Iterator[ConceptRecord]:
    """Yield the records of (concept id, fingerprint) pairs; one that cannot be read is logged and left to the
    report."""
    pairs = iter(list(folders))
    while batch := list(islice(pairs, _BATCH)):
        for path, content in store.get_many(ConceptFolder(*pair).record for pair in batch).items():
            try:
                if isinstance(content, OSError):
                    raise content
                yield from_json(content)
            except (OSError, ValueError) as error:
                log.warning("%s cannot be read, and its concept is not tried again: %s", path, error)


def _as_try(record: ConceptRecord, *, rung: str) -> Try:
    names = {each.name for each in dataclasses.fields(Try)} - {"rung", "fingerprint"}
    return Try(rung=rung, fingerprint=record.fingerprint, **{name: getattr(record, name) for name in names})


def _try_of(rung: str, folder: ConceptFolder, content: bytes | OSError, failures: Mapping[str, str]) -> Try:
    """Return the try of a record, or a failed try with its error; `failures` are errors by fingerprint."""
    try:
        if isinstance(content, OSError):
            raise content
        return _as_try(from_json(content), rung=rung)
    except (OSError, ValueError) as error:
        reason = failures.get(folder.fingerprint) or f"{folder.record} cannot be read: {error}"
        return Try(rung=rung, fingerprint=folder.fingerprint, error=reason)
