"""The plan of a run: the manifest's rows compared with the records that exist, which one listing shows.

All that a concept's result depends on is hashed into its fingerprint, and a concept is done when a record with its
present fingerprint exists. So the same command resumes a run, and a concept whose photos, row, settings or model have
changed is learned again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from operator import attrgetter
from typing import Any

from pipeline.config import RunConfig
from pipeline.inputs.content_hash import content_hashes
from pipeline.inputs.manifest import BadRow, ManifestRow, bad_row
from pipeline.ledger.digest import digest
from pipeline.ledger.listing import ConceptListing
from pipeline.ledger.selection import ALL_CONCEPTS, Selection
from pipeline.store.redact import foreign_text, redact
from pipeline.store.storage import ConceptFolder, RunStore
from textual_inversion.concept import Concept
from textual_inversion.errors import BadInput

FORMAT_VERSION = 1
"""Part of every fingerprint. To be raised when the same inputs would give other results or files than before; then no
concept counts as done."""

_BATCH_ROWS = 512
_ROW_FIELDS = tuple(
    each.name for each in dataclasses.fields(Concept) if each.name not in ("images", "masks", "start_from")
)
_row_values = attrgetter(*_ROW_FIELDS)

Identify = Callable[[Iterable[str]], Mapping[str, str | OSError | ValueError]]
"""Addresses -> address -> the content's hash, or the error of reading it; see `content_hashes`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConceptTask:
    """One concept that is to be learned. Small, because it is sent to an actor."""

    concept: Concept
    fingerprint: str

    carried: Mapping[str, Any] = field(default_factory=dict)
    """The manifest's other columns, as JSON values."""

    inputs: Mapping[str, Any] = field(default_factory=dict)
    """The value whose digest is the fingerprint, see `fingerprint_inputs`."""

    rung: int = 0
    """Settings that it is learned by: 0 for the run's own, n for those of the n-th entry of `gate.ladder`."""

    @property
    def folder(self) -> ConceptFolder:
        return ConceptFolder(self.concept.concept_id, self.fingerprint)


@dataclass(frozen=True, slots=True)
class DoneWork:
    """Concepts that have a record."""

    fingerprints: set[bytes]
    """Fingerprints of the concepts whose record and files are as they were written."""

    awaiting_retry: dict[str, str]
    """Fingerprint -> concept id of each concept below the gate whose retries have not ended."""

    damaged: dict[str, str] = field(default_factory=dict)
    """Fingerprint -> damage of a record or of its files."""


def settings_of(
    config: RunConfig,
    *,
    model_hash: str,
    extractor_hash: str = "",
    captions_hash: str = "",
    earlier_hash: str = "",
    encoder_hash: str = "",
    encoder_extractor_hash: str = "",
) -> dict[str, Any]:
    """Return all settings that the results of a run depend on, as JSON values.

    Settings of where and how fast the work is done (actors, device, output, the batch size of sample pictures) are left
    out. The captions of knowledge preservation, the earlier run of learned starts, the encoder of starts and its
    extractor count by content, not by address. An encoder's settings are left out where it is not used, its extractor
    where it is the run's, and the number of the initializer word's prompts where they are all, so that fingerprints of
    earlier releases stay as they were.
    """
    inversion = dataclasses.asdict(config.inversion)
    inversion["penalties"]["captions"] = captions_hash
    inversion["init"]["earlier_run"] = earlier_hash
    init = inversion["init"]
    del init["encoder"], init["extractor"]
    if config.inversion.init.method == "encoder":
        init["encoder"] = encoder_hash
        if encoder_extractor_hash:
            init["extractor"] = encoder_extractor_hash
    else:
        del init["unsure_steps"]
    grid = dataclasses.asdict(config.grid)
    del grid["sampling"]["batch_size"]
    if not config.grid.initializer_prompts:
        del grid["initializer_prompts"]
    if config.inversion.class_cue:  # earlier releases drew these concepts without the noun, and all others as now
        grid["class_cue"] = True
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
    """Return the path of the settings whose digest is `settings`; kept there so that a difference can be named
    later."""
    return f"settings/{settings}.json"


def fingerprint(concept: Concept, identities: Sequence[str], settings: str, masks: Sequence[str] = ()) -> str:
    """Return the digest of `fingerprint_inputs`, 32 hex digits."""
    return digest(fingerprint_inputs(concept, identities, settings, masks))


def addresses_read(concept: Concept) -> tuple[str, ...]:
    """Return the addresses whose contents are part of the fingerprint: photos, masks, and the embedding to start
    from."""
    return (*concept.images, *concept.masks, *filter(None, [concept.start_from]))


def fingerprint_inputs(
    concept: Concept, identities: Sequence[str], settings: str, masks: Sequence[str] = (), start: str = ""
) -> dict[str, Any]:
    """Return the value whose digest is the concept's fingerprint.

    `concept` in it is the row; `images` and `masks` are content hashes in manifest order, given as `identities` and
    `masks`; `start_from` is that of the embedding to start from, given as `start`; `settings` is the digest of
    `settings_of`. Addresses do not count. Masks, captions and a start are left out where there are none, so that
    fingerprints of earlier releases stay as they were.
    """
    row = dict(zip(_ROW_FIELDS, _row_values(concept), strict=True))  # plain values; `asdict` takes ten times as long
    if not row["captions"]:
        del row["captions"]
    given: dict[str, Any] = {"masks": list(masks)} if masks else {}
    given |= {"start_from": start} if start else {}
    return {"concept": row, "images": list(identities), "settings": settings, **given}


def earlier_hash(output: str) -> str:
    """Return the digest of an earlier run's fingerprints with a record; empty for an empty `output`.

    Raises ValueError if no concept of that run has a record.
    """
    if not output:
        return ""
    done = ConceptListing.of(RunStore(output)).records
    if not done:
        raise ValueError(f"inversion.init.earlier_run = {output!r}: must be the output folder of a run with concepts")
    return digest(sorted(fingerprint.decode() for fingerprint in done))


class Plan:
    """Sorts the manifest's rows into done, to do, left out and bad while they are read, and counts them."""

    def __init__(
        self,
        settings: str,
        done: Collection[bytes],
        content_hashes: Identify = content_hashes,
        selection: Selection = ALL_CONCEPTS,
        awaiting_retry: Mapping[str, str] | None = None,
        damaged: Mapping[str, str] | None = None,
    ) -> None:
        """Start with no rows.

        settings: digest of `settings_of`.
        done, awaiting_retry, damaged: the fields of `done.find_done`.
        """
        self._settings = settings
        self._selection = selection
        self._done_before = done
        self._damaged_before = damaged or {}
        self._identify = content_hashes
        self.num_done = 0
        self.num_todo = 0
        self.num_left_out = 0
        """Rows that are not done and that the selection does not take."""
        self.awaiting_retry: Mapping[str, str] = awaiting_retry or {}
        """Fingerprint -> concept id of each concept below the gate whose retries have not ended; the fingerprint may be
        that of earlier photos or settings."""
        self.bad: list[BadRow] = []
        self.damaged: dict[str, str] = {}
        """Concept id -> damage of its present result, of every good row so far. It does not count as done."""
        self.damaged_left_out: set[str] = set()
        """Ids among `damaged` that the selection does not take."""
        self.carried: dict[bytes, bytes] = {}
        """Fingerprint -> carried columns as JSON text, of every good row so far. The keys are the present
        fingerprints: a record under another one is not a result of this manifest and these settings."""

    def tasks(self, rows: Iterable[ManifestRow | BadRow]) -> Iterator[ConceptTask]:
        """Yield the concepts to learn in manifest order; photos are hashed for some hundred rows at a time."""
        rows = iter(rows)
        while batch := list(islice(rows, _BATCH_ROWS)):
            good = [row for row in batch if isinstance(row, ManifestRow)]
            identities = self._identify({uri for row in good for uri in addresses_read(row.concept)})
            for row in batch:
                task = self._sort(row, identities)
                if task is not None:
                    yield task

    def replan(self, task: ConceptTask) -> ConceptTask:
        """Return the task of a concept whose photos or masks have changed since it was planned, from their bytes as
        they are now; its fingerprint takes the place of the former one. Raises BadInput if one cannot be read."""
        concept = task.concept
        anew = self._task(concept, task.carried, self._identify(addresses_read(concept)))
        former = task.fingerprint.encode()
        in_order = [(anew.fingerprint.encode() if key == former else key, row) for key, row in self.carried.items()]
        self.carried.clear()
        self.carried.update(in_order)
        return anew

    def had_record(self, fingerprint: str) -> bool:
        """Return whether a record with this fingerprint existed before the run."""
        return fingerprint.encode() in self._done_before

    def expected_todo(self, num_rows: int) -> int:
        """Estimate how many of `num_rows` rows are to be learned, from the rows read so far."""
        return self._selection.max_concepts(num_rows - self.num_done - self.num_left_out - len(self.bad))

    def _sort(
        self, row: ManifestRow | BadRow, identities: Mapping[str, str | OSError | ValueError]
    ) -> ConceptTask | None:
        """Count a row; return its task if it is to be learned."""
        if isinstance(row, BadRow):
            self.bad.append(row)
            return None
        concept = row.concept
        try:
            task = self._task(concept, row.carried, identities)
        except BadInput as error:
            self.bad.append(bad_row(row, str(error)))
            return None
        key = task.fingerprint.encode()
        self.carried[key] = row.carried_json
        if key in self._done_before:
            self.num_done += 1
            return None
        if task.fingerprint in self._damaged_before:
            self.damaged[concept.concept_id] = self._damaged_before[task.fingerprint]
        if not self._selection.accepts(concept.concept_id, self.num_todo):
            self.num_left_out += 1
            self.damaged_left_out |= {concept.concept_id} & self.damaged.keys()
            return None
        self.num_todo += 1
        return task

    def _task(
        self, concept: Concept, carried: Mapping[str, Any], identities: Mapping[str, str | OSError | ValueError]
    ) -> ConceptTask:
        """Return a concept's task. Raises BadInput naming the first photo, mask or embedding without a content hash."""
        hashes: list[str] = []
        for uri in addresses_read(concept):
            identity = identities[uri]
            if not isinstance(identity, str):
                kind = "photo" if uri in concept.images else "mask" if uri in concept.masks else "start_from"
                reason = f"{type(identity).__name__}: {foreign_text(str(identity))}"
                raise BadInput(f"{kind} {redact(uri)} cannot be read: {reason}")
            hashes.append(identity)
        num_photos, num_masks = len(concept.images), len(concept.masks)
        photos, masks = hashes[:num_photos], hashes[num_photos : num_photos + num_masks]
        start = hashes[-1] if concept.start_from else ""
        inputs = fingerprint_inputs(concept, photos, self._settings, masks, start)
        return ConceptTask(concept=concept, fingerprint=digest(inputs), carried=carried, inputs=inputs)
