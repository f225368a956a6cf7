"""What is done about concepts below the gate: they are learned again with other settings, and the best try is kept.

A try is exactly what a run with those settings would learn: it has a fingerprint, a folder and a record of its own. So
it depends on no neighbour, and resuming is running again. What a concept comes to is the record under the run's own
fingerprint, which names the try that is kept and is put once more, whole, when the concept's ladder has ended. Until
then `ladder.json` lies beside it, put by the actor before the record itself.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice

from pipeline.config import RunConfig
from pipeline.config_file import load_config, recipe, to_tree
from pipeline.inputs.content_hash import content_hashes
from pipeline.inputs.manifest import ManifestRow, read_by_priority
from pipeline.ledger.digest import digest
from pipeline.ledger.gate import BELOW, PASSED, against_first, best, verdict
from pipeline.ledger.plan import ConceptTask, Plan, Selection, settings_path
from pipeline.ledger.records import ConceptRecord, Try, from_json, put_record
from pipeline.ledger.settings import current_settings
from pipeline.report.run_summary import RetryStats
from pipeline.store.addresses import read_bytes
from pipeline.store.storage import ConceptFolder, RunStore
from pipeline.times import now

log = logging.getLogger(__name__)

_BATCH = 200
"""Records held at a time."""


@dataclass(frozen=True, slots=True)
class RetryRule:
    """One entry of `gate.ladder`."""

    words: str
    config: RunConfig
    """Of the run, changed as the words say."""


LearnAll = Callable[[RunConfig, Iterator[ConceptTask], str, int], Iterator[ConceptRecord]]
"""(configuration, tasks, words for progress, how many) -> their records, as they end; fewer if the run is to stop."""


def retry_rules(config: RunConfig) -> list[RetryRule]:
    """`gate.ladder`, each entry with the configuration it makes. Raises ValueError naming one that makes none."""
    found = []
    for number, words in enumerate(config.gate.ladder, 1):
        try:
            found.append(RetryRule(words, _changed(config, words, number)))
        except (ValueError, OSError) as error:
            raise ValueError(f"gate.ladder: {words!r}: {error}") from error
    return found


def _changed(config: RunConfig, words: str, number: int) -> RunConfig:
    """The run's configuration with the parts of a rung applied in their order. `number` of the rung, from 1."""
    changed = dataclasses.replace(config, gate=dataclasses.replace(config.gate, ladder=()))
    for part in (part.strip() for part in words.split(" + ")):
        toml, overrides = "", list[str]()
        if part == "seed":
            overrides = [f"seed={(config.seed + number) % 2**63}"]
        elif factor := re.fullmatch(r"steps\*(\d+(?:\.\d+)?)", part):
            overrides = [f"inversion.steps={round(changed.inversion.steps * float(factor[1]))}"]
        elif "=" in part:
            overrides = [part]
        else:
            toml = read_bytes(recipe(part)).decode()
        changed = load_config(toml, overrides, base=to_tree(changed))
    as_before = dataclasses.replace(
        changed, seed=config.seed, inversion=config.inversion, gate=config.gate
    )  # what is left may not differ
    if as_before != config:
        raise ValueError("only `seed` and settings of `inversion` can be changed for a single concept")
    return changed


def pending(store: RunStore, plan: Plan, chosen: Selection) -> dict[str, str]:
    """Concepts whose ladder has not ended, id -> fingerprint; with `--retry below-gate`, every chosen one that is
    done, so many at most."""
    found = plan.below.items()
    if chosen.below_gate:
        folders = (ConceptFolder.from_path(path) for path, size in store.scan("concepts") if size)
        found = {one.concept_id: one.fingerprint for one in folders if one and one.fingerprint.encode() in plan.current
                 and plan.was_done(one.fingerprint)}.items()  # fmt: skip
    mine = ((name, mark) for name, mark in found if mark.encode() in plan.current and chosen.names(name))
    return dict(islice(mine, chosen.limit if chosen.below_gate and chosen.limit else None))


def retry_below_gate(
    config: RunConfig, store: RunStore, plan: Plan, chosen: Selection, learn_all: LearnAll, counts: RetryStats
) -> None:
    """Try every concept that waits below the gate again, rung by rung, and write down which try is kept.

    All concepts do a rung before any does the next. Ends early, with the rest waiting, when `learn_all` does.
    """
    waiting = pending(store, plan, chosen)
    if chosen.below_gate:  # else the actors have put it there
        for name, mark in waiting.items():
            store.put(ConceptFolder(name, mark).ladder, b"{}")
    ladder = [(rung, current_settings(rung.config)) for rung in retry_rules(config)] if waiting else []
    counts.waiting = len(waiting)
    used: list[tuple[RetryRule, str]] = []
    for rung, settings in ladder:
        _settle(config, store, plan, waiting, used, counts, is_end=False)
        wanted = _wanted(store, waiting, digest(settings), plan)
        store.put(settings_path(digest(settings)), json.dumps(settings, indent=1).encode())
        offer = _Offer(_tasks(config, digest(settings), wanted))
        for record in learn_all(rung.config, iter(offer), f"trying again ({rung.words})", len(wanted)):
            counts.tried += 1
            counts.steps += record.steps
            if record.status == "failed":
                counts.failures[record.fingerprint] = record.error
            offer.out.discard(record.fingerprint)
            wanted.pop(record.fingerprint)
        if offer.out or not offer.is_over:
            return
        counts.failures |= dict.fromkeys(wanted, "its row or photos are not what they were at its first try")
        used.append((rung, digest(settings)))
    _settle(config, store, plan, waiting, used, counts, is_end=True)


class _Offer:
    """Tasks on their way to be learned: which are out, and whether there are more. Those that cannot be offered, as a
    photo is gone, must not keep the others waiting."""

    def __init__(self, tasks: Iterator[ConceptTask]) -> None:
        self._tasks = tasks
        self.out = set[str]()
        """Fingerprints of those taken that have not ended."""
        self.is_over = False

    def __iter__(self) -> Iterator[ConceptTask]:
        for task in self._tasks:
            self.out.add(task.fingerprint)
            yield task
        self.is_over = True


def _tasks(config: RunConfig, settings: str, wanted: Mapping[str, str]) -> Iterator[ConceptTask]:
    """Those of the manifest's concepts whose fingerprint under these settings is wanted."""
    names = set(wanted.values())
    if not names:
        return
    rows = (
        row for row in read_by_priority(config.manifest)
        if isinstance(row, ManifestRow) and row.concept.concept_id in names
    )  # fmt: skip
    tasks = Plan(settings, set(), partial(content_hashes, photos=config.photos)).tasks(rows)
    yield from (task for task in tasks if task.fingerprint in wanted)


def _wanted(store: RunStore, waiting: Mapping[str, str], settings: str, plan: Plan) -> dict[str, str]:
    """Fingerprint -> concept id, of the tries with these settings that had no record when the run began."""
    found = {}
    for record in _records(store, waiting.items()):
        mark = _fingerprint(record, settings)
        if mark != record.fingerprint and not plan.was_done(mark):
            found[mark] = record.concept_id
    return found


def _fingerprint(record: ConceptRecord, settings: str) -> str:
    """What this concept's would be under other settings: of the same photos and row."""
    return digest({**record.inputs, "settings": settings}) if record.inputs else record.fingerprint


def _settle(
    config: RunConfig, store: RunStore, plan: Plan, waiting: dict[str, str], used: list[tuple[RetryRule, str]],
    counts: RetryStats, *, is_end: bool,
) -> None:  # fmt: skip
    """End the ladder of every concept with a try that passes, at the end of all: choose, put the record, forget."""
    for first in _records(store, list(waiting.items())):
        folders = {words.words: ConceptFolder(first.concept_id, _fingerprint(first, mark)) for words, mark in used}
        later = store.get_many(folder.record for folder in folders.values())
        own = tuple(each for each in first.tries if not each.error) or (_as_try(first, ""),)
        known = {each.fingerprint for each in own}
        new = [
            _tried(words, folder, later[folder.record], counts)
            for words, folder in folders.items()
            if folder.fingerprint not in known
        ]
        tries = (*own, *new)
        kept = best(tries, config.gate)
        judged = verdict(against_first(kept, tries), config.gate)
        if judged == BELOW and not is_end:
            continue
        put_record(store, _keeping(first, tries, kept, judged))
        store.delete(first.folder.ladder)
        del waiting[first.concept_id]
        counts.waiting -= 1
        counts.learned_before += plan.was_done(first.fingerprint)
        counts.passed += judged == PASSED
        counts.better += judged != PASSED and kept is not tries[0]
        counts.below += judged != PASSED and kept is tries[0]


def _records(store: RunStore, folders: Iterable[tuple[str, str]]) -> Iterator[ConceptRecord]:
    """The records of (concept id, fingerprint) pairs; one that cannot be read is left for the report to tell."""
    pairs = iter(list(folders))
    while batch := list(islice(pairs, _BATCH)):
        for path, content in store.get_many(ConceptFolder(*pair).record for pair in batch).items():
            try:
                if isinstance(content, OSError):
                    raise content
                yield from_json(content)
            except (OSError, ValueError) as error:
                log.warning("%s cannot be read, its ladder is left out: %s", path, error)


def _as_try(record: ConceptRecord, words: str) -> Try:
    names = {each.name for each in dataclasses.fields(Try)} - {"rung", "fingerprint"}
    return Try(rung=words, fingerprint=record.fingerprint, **{name: getattr(record, name) for name in names})


def _tried(words: str, folder: ConceptFolder, content: bytes | OSError, counts: RetryStats) -> Try:
    """What came of a rung: its record, or why there is none."""
    try:
        if isinstance(content, OSError):
            raise content
        return _as_try(from_json(content), words)
    except (OSError, ValueError) as error:
        cause = counts.failures.get(folder.fingerprint) or f"{folder.record} cannot be read: {error}"
        return Try(rung=words, fingerprint=folder.fingerprint, error=cause)


def _keeping(first: ConceptRecord, tries: tuple[Try, ...], kept: Try, judged: str) -> ConceptRecord:
    """The concept's record once its ladder has ended: of the try that is kept."""
    shown = {each.name: getattr(kept, each.name) for each in dataclasses.fields(Try)}
    del shown["rung"], shown["fingerprint"]
    return dataclasses.replace(
        first,
        **shown,
        gate=judged,
        tries=tries,
        kept="" if kept.fingerprint == first.fingerprint else kept.fingerprint,
        finished_at=now("milliseconds"),
    )
