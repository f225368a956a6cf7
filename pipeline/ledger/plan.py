"""What is left to do: rows of the manifest against the records that exist, decided by one listing.

Everything a concept's result depends on is hashed into its fingerprint; done means that a record with the current
fingerprint exists. So resuming is running again, and a changed photo, row, setting or model means not done.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from pipeline.config import RunConfig
from pipeline.inputs.content_hash import content_hashes
from pipeline.inputs.manifest import BadRow, ManifestRow
from pipeline.ledger.digest import digest
from pipeline.store.redact import redact
from pipeline.store.storage import ConceptFolder, RunStore
from textual_inversion.concept import Concept

FORMAT_VERSION = 1
"""Raised when the same inputs would give other results or files than before; makes every concept not done."""

_BATCH_ROWS = 512
_ROW_FIELDS = tuple(each.name for each in dataclasses.fields(Concept) if each.name not in ("images", "masks"))

Identify = Callable[[Iterable[str]], Mapping[str, str | OSError | ValueError]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ConceptTask:
    """One concept that is not done. Small: it travels to an actor."""

    concept: Concept
    fingerprint: str
    carried: Mapping[str, Any] = field(default_factory=dict)
    """The manifest's other columns, as JSON values."""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """What the fingerprint is a digest of, see `fingerprint_inputs`."""

    @property
    def folder(self) -> ConceptFolder:
        return ConceptFolder(self.concept.concept_id, self.fingerprint)


def settings_of(
    config: RunConfig, *, model_hash: str, extractor_hash: str = "", captions_hash: str = "", earlier_hash: str = ""
) -> dict[str, Any]:
    """All that every concept's result in a run depends on, apart from the concept itself, as JSON values.

    Where and how fast the work is done (actors, device, output, the size of a batch of sample pictures) is left out.
    The file of knowledge preservation's captions and the earlier run that starts are fitted on count by content.
    """
    inversion = dataclasses.asdict(config.inversion)
    inversion["penalties"]["captions"] = captions_hash
    inversion["init"]["earlier_run"] = earlier_hash
    grid = dataclasses.asdict(config.grid)
    del grid["sampling"]["batch_size"]
    return {
        "format": FORMAT_VERSION,
        "inversion": inversion,
        "grid": grid,
        "seed": config.seed,
        "precision": config.precision,
        "model": model_hash,
        "extractor": extractor_hash,
    }


def settings_path(settings: str) -> str:
    """Where a run keeps what `settings` is the digest of, so that a difference can be named later."""
    return f"settings/{settings}.json"


def fingerprint(concept: Concept, identities: Sequence[str], settings: str, masks: Sequence[str] = ()) -> str:
    """32 hex digits that change with the photos' or masks' bytes or order, the concept's row, or the run's settings."""
    return digest(fingerprint_inputs(concept, identities, settings, masks))


def fingerprint_inputs(
    concept: Concept, identities: Sequence[str], settings: str, masks: Sequence[str] = ()
) -> dict[str, Any]:
    """What a fingerprint is the digest of: `concept`, the row; `images` and `masks`, hashes; `settings`, a digest.

    `identities` are the photos' content hashes in manifest order, `masks` those of their masks; addresses do not count.
    What is not given (masks, captions) does not count either, so that older fingerprints stay what they were.
    """
    row = {name: getattr(concept, name) for name in _ROW_FIELDS}  # all of them plain; `asdict` takes ten times as long
    if not row["captions"]:
        del row["captions"]
    given = {"masks": list(masks)} if masks else {}
    return {"concept": row, "images": list(identities), "settings": settings, **given}


def finished(listing: Iterable[tuple[str, int]], below: dict[str, str] | None = None) -> set[bytes]:
    """Fingerprints that have a record, from a listing of (path, bytes) under `concepts/`. Into `below` goes, concept id
    -> fingerprint, what waits below the gate to be tried again."""
    done = set()
    for path, size in listing:
        folder = ConceptFolder.from_path(path)
        if folder is not None and path == folder.record and size:
            done.add(folder.fingerprint.encode())
        elif folder is not None and path == folder.ladder and below is not None:
            below[folder.concept_id] = folder.fingerprint
    return done


def earlier_hash(output: str) -> str:
    """What an earlier run has finished; nothing for no run. Raises ValueError if it has finished nothing."""
    if not output:
        return ""
    done = finished(RunStore(output).scan("concepts"))
    if not done:
        raise ValueError(f"inversion.init.earlier_run = {output!r}: must be the output folder of a run with concepts")
    return digest(sorted(fingerprint.decode() for fingerprint in done))


@dataclass(frozen=True, slots=True)
class Selection:
    """Concepts to learn if they are not done; by default every one."""

    only: frozenset[str] | None = None
    """Ids; None for all."""
    limit: int = 0
    """At most so many, the first ones; 0 for no limit."""
    words: str = ""
    """The options that say so, for messages."""
    below_gate: bool = False
    """These are done, and are to be tried again as `gate.ladder` says."""

    def takes(self, concept_id: str, taken: int) -> bool:
        """Whether to learn this one, when `taken` are to be learned already."""
        return self.names(concept_id) and (not self.limit or taken < self.limit)

    def names(self, concept_id: str | None) -> bool:
        return self.only is None or concept_id in self.only

    def at_most(self, rows: int) -> int:
        """Concepts to learn out of so many."""
        return min([rows, *([] if self.only is None else [len(self.only)]), *([self.limit] if self.limit else [])])


EVERY = Selection()


class Plan:
    """Sorts the rows of a manifest into done, to do and bad while they stream by, and keeps the tally."""

    def __init__(
        self,
        settings: str,
        done: Collection[bytes],
        content_hashes: Identify = content_hashes,
        selection: Selection = EVERY,
        below: dict[str, str] | None = None,
    ) -> None:
        """`settings` is the digest of `settings_of`, `done` and `below` from `finished`."""
        self._settings = settings
        self._selection = selection
        self._finished = done
        self._identify = content_hashes
        self.num_done = 0
        self.num_todo = 0
        self.num_left = 0
        """Not done, and not to be learned by this command."""
        self.below: dict[str, str] = {} if below is None else below
        """Concept id -> fingerprint of what waits below the gate; may be of other photos or settings than now."""
        self.bad: list[BadRow] = []
        self.current: dict[bytes, bytes] = {}
        """Fingerprint -> carried columns as JSON, of every good row so far: which records this run's results are of."""

    def tasks(self, rows: Iterable[ManifestRow | BadRow]) -> Iterator[ConceptTask]:
        """The concepts that are not done, in manifest order; photos are looked up for some hundred rows at a time."""
        rows = iter(rows)
        while batch := list(islice(rows, _BATCH_ROWS)):
            good = [row for row in batch if isinstance(row, ManifestRow)]
            identities = self._identify({uri for row in good for uri in (*row.concept.images, *row.concept.masks)})
            for row in batch:
                task = self._sort(row, identities)
                if task is not None:
                    yield task

    def was_done(self, fingerprint: str) -> bool:
        """Whether there was a record when the run began."""
        return fingerprint.encode() in self._finished

    def expected(self, rows: int) -> int:
        """How many there will be to learn in a manifest of so many rows, as far as can be told by now."""
        return self._selection.at_most(rows - self.num_done - self.num_left - len(self.bad))

    def _sort(
        self, row: ManifestRow | BadRow, identities: Mapping[str, str | OSError | ValueError]
    ) -> ConceptTask | None:
        if isinstance(row, BadRow):
            self.bad.append(row)
            return None
        concept = row.concept
        known: list[str] = []
        for uri in (*concept.images, *concept.masks):
            identity = identities[uri]
            if not isinstance(identity, str):
                kind = "photo" if len(known) < len(concept.images) else "mask"
                reason = redact(f"{kind} {uri} cannot be read: {type(identity).__name__}: {identity}")
                self.bad.append(BadRow(file=row.file, row=row.row, concept_id=concept.concept_id, reason=reason))
                return None
            known.append(identity)
        photos, masks = known[: len(concept.images)], known[len(concept.images) :]
        inputs = fingerprint_inputs(concept, photos, self._settings, masks)
        task = ConceptTask(concept=concept, fingerprint=digest(inputs), carried=row.carried, inputs=inputs)
        key = task.fingerprint.encode()
        self.current[key] = json.dumps(dict(row.carried)).encode() if row.carried else b"{}"
        if key in self._finished:
            self.num_done += 1
            return None
        if not self._selection.takes(concept.concept_id, self.num_todo):
            self.num_left += 1
            return None
        self.num_todo += 1
        return task
