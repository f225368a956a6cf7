"""`python -m pipeline.explain OUTPUT CONCEPT`: why a concept is done or not, and what there is of it.

Compares its row and photos as they are now, and the settings of the last run, with its records. Reads the manifest, the
concept's photos (on S3 only their listing) and its records; needs neither the model nor a cluster.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.config import PhotoConfig
from pipeline.config_file import parse_config
from pipeline.inputs.content_hash import content_hashes
from pipeline.inputs.manifest import BadRow, ManifestRow, concept_ids, read_manifest
from pipeline.ledger.differences import input_differences, settings_differences
from pipeline.ledger.digest import digest
from pipeline.ledger.listing import ConceptListing
from pipeline.ledger.plan import addresses_read, fingerprint_inputs, settings_path
from pipeline.ledger.records import ConceptRecord, record_or_failure
from pipeline.ledger.selection import unknown_concept
from pipeline.report.failures import UNKNOWN, remedy_of, title_of
from pipeline.report.run_file import read_run
from pipeline.report.run_status import no_run_message
from pipeline.status import run_query
from pipeline.store.storage import FAILURE, RECORD, ConceptFolder, RunStore, StoredObject
from pipeline.times import format_duration, format_rough_duration, format_utc
from textual_inversion.errors import BAD_INPUT


@dataclass(kw_only=True)
class Explanation:
    """Facts about one concept. A fact that is not known is None or empty, and `notes` say why."""

    concept_id: str
    verdict: str = ""
    """`done`, `failed`, `changed`, `learning`, `not reached`, `bad row`, `no row` or `unknown`; the last record's
    status where the present fingerprint is not known."""
    reason: str = ""
    error_kind: str = ""
    """Kind of the error of a failed concept or a bad row."""
    place: str = ""
    """File and row of the manifest."""
    row: Mapping[str, Any] = field(default_factory=dict)
    photos: list[tuple[str, str]] = field(default_factory=list)
    """Address of each photo, with its content hash or the error of reading it."""
    settings: str = ""
    """Digest of the last run's settings."""
    fingerprint: str = ""
    """The present fingerprint."""
    differences: list[str] = field(default_factory=list)
    """Changes since the last record."""
    attempts: list[ConceptRecord] = field(default_factory=list)
    """Records and failures, the newest first."""
    objects: list[tuple[str, int, float]] = field(default_factory=list)
    """URI, bytes and time of writing (seconds since 1970) of every object."""
    pictures: list[str] = field(default_factory=list)
    """URIs of the bulk pictures."""
    notes: list[str] = field(default_factory=list)


def main(arguments: list[str] | None = None, prog: str = "python -m pipeline.explain") -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", metavar="OUTPUT", help="output of a run: folder or any fsspec URI")
    parser.add_argument("concept", metavar="CONCEPT", help="concept_id")
    parser.add_argument("--manifest", metavar="URI", help="a manifest in place of the last run's")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    options = parser.parse_args(arguments)
    return run_query(
        options.output, lambda store: explain(store, options.concept, options.manifest), describe, as_json=options.json
    )


def explain(store: RunStore, concept_id: str, manifest: str | None = None) -> Explanation:
    """Find out why a concept is done or not.

    Raises ValueError if there is no run, no such concept, or the manifest that was named cannot be read.
    """
    found = Explanation(concept_id=concept_id)
    try:
        run = read_run(store)
    except FileNotFoundError:
        run = {}
        found.notes.append("there is no run.json: the settings of the last run are not known")
    row, is_row_known = _find_row(found, concept_id, manifest, run)
    is_folder = _can_be_folder(concept_id)
    listing = list(store.scan_objects(f"concepts/{concept_id}")) if is_folder else []
    if row is None and not listing:
        raise _no_such_concept(store, concept_id, manifest or run.get("config", {}).get("manifest"), run)
    found.objects = [
        (store.uri(each.path), each.num_bytes, each.written_at)
        for each in sorted(listing, key=lambda each: -each.written_at)
    ]
    found.attempts = _read_attempts(store, listing)
    if is_folder:
        found.pictures = [store.uri(path) for path, _ in store.scan(f"images/{concept_id}")]
    if row is not None:
        found.place = f"{row.file}, row {row.row}"
    inputs = _present_inputs(found, row, run) if isinstance(row, ManifestRow) else None
    if isinstance(row, BadRow):
        _set_verdict(found, "bad row", row.reason, BAD_INPUT)
    elif row is None and is_row_known:
        _set_verdict(found, "no row", "it is not in the manifest; all that it has is kept")
    elif not found.verdict:
        written = {each.path: each.written_at for each in listing if each.num_bytes}
        _set_verdict(found, *decide_verdict(found.concept_id, found.fingerprint, found.attempts, written))
    if found.verdict in ("changed", "failed", "not reached", "learning") and inputs is not None:
        assert isinstance(row, ManifestRow)
        found.differences = _differences(store, found, inputs, row)
    return found


def _set_verdict(found: Explanation, verdict: str, reason: str, error_kind: str = "") -> None:
    found.verdict = verdict
    found.reason = reason
    found.error_kind = error_kind


def decide_verdict(
    concept_id: str, fingerprint: str, attempts: Sequence[ConceptRecord], written: Mapping[str, float]
) -> tuple[str, str, str]:
    """Return the verdict on a concept with a good row, the reason, and the kind of its error if it failed.

    `fingerprint` is the present one, empty if it is not known; `attempts` are the records, the newest first; `written`
    gives the time of writing of the concept's objects, by path, in seconds since 1970.
    """
    last = attempts[0] if attempts else None
    if not fingerprint:
        return (last.status, "as its last record says", _kind_of(last)) if last else ("unknown", "", "")
    folder = ConceptFolder(concept_id, fingerprint)
    present = next((record for record in attempts if record.fingerprint == fingerprint), None)
    saved = written.get(folder.checkpoint, 0.0)
    if present is not None and present.status == "done":
        if folder.ladder in written:
            return "done", "it is below the gate; the next run tries it again with other settings", ""
        return "done", "a record has the present fingerprint; no run learns it again", ""
    if present is not None and folder.record in written:  # a damaged record
        return "failed", present.error, _kind_of(present)
    if saved > written.get(folder.failure, 0.0):
        age = format_rough_duration(max(0.0, time.time() - saved))
        return "learning", f"its checkpoint is {age} old; a run continues from it", ""
    if present is not None:
        return "failed", f"{present.error}; the next run tries it again", _kind_of(present)
    if last is None:
        return "not reached", "nothing has come of it yet; the next run learns it", ""
    before = f"its last attempt failed ({last.error}); since then, " if last.status == "failed" else ""
    return "changed", f"{before}its row, photos or settings have changed; the next run learns it", ""


def _kind_of(record: ConceptRecord) -> str:
    return (record.error_kind or UNKNOWN) if record.status == "failed" else ""


def _find_row(
    found: Explanation, concept_id: str, manifest: str | None, run: Mapping[str, Any]
) -> tuple[ManifestRow | BadRow | None, bool]:
    """Return the concept's first row, or None, and whether the manifest could be read; if not, a note says why."""
    uri = manifest or run.get("config", {}).get("manifest")
    if not uri:
        found.notes.append("no manifest is known; name one with --manifest")
        return None, False
    try:
        for row in read_manifest(uri):
            if concept_id == (row.concept.concept_id if isinstance(row, ManifestRow) else row.concept_id):
                return row, True
    except (ValueError, OSError) as error:
        if manifest:
            raise
        found.notes.append(f"{error}; only the records are known: name another manifest with --manifest")
        return None, False
    return None, True


def _no_such_concept(store: RunStore, concept_id: str, manifest: str | None, run: Mapping[str, Any]) -> ValueError:
    """Return the error for a concept that is neither in the manifest nor in the output."""
    folders = (ConceptFolder.from_path(path) for path, _ in store.scan("concepts"))
    known = {folder.concept_id for folder in folders if folder is not None}
    if not known and not run:
        return ValueError(no_run_message(store))
    try:
        known |= set(concept_ids(manifest)) if manifest else set()
    except ValueError:
        manifest = None
    return unknown_concept(concept_id, known, f"{store.root} or manifest {manifest}" if manifest else store.root)


def _can_be_folder(concept_id: str) -> bool:
    """Return whether a concept id can name a folder; that of a bad row may not."""
    return bool(concept_id) and "/" not in concept_id and not concept_id.startswith(".")


def _read_attempts(store: RunStore, objects: Sequence[StoredObject]) -> list[ConceptRecord]:
    """Read the records and failures of all fingerprints, the newest first.

    A failure older than a record beside it is never found: the actor that writes the record deletes the failure.
    """
    ends = [each.path for each in objects if each.path.endswith((f"/{RECORD}", f"/{FAILURE}"))]
    listing = ConceptListing(objects)
    records = [record_or_failure(path, content, listing) for path, content in store.get_many(ends).items()]
    return sorted(records, key=lambda record: record.finished_at, reverse=True)


def _present_inputs(found: Explanation, row: ManifestRow, run: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the inputs of the fingerprint that the last run would make if it were started again.

    Returns None and sets the verdict if a photo, a mask or the embedding to start from cannot be read.
    """
    concept = row.concept
    try:
        limits = parse_config(run.get("config", {})).photos
    except ValueError:  # another release wrote it
        limits = PhotoConfig()
    identities = content_hashes(set(addresses_read(concept)), limits)
    known = {uri: value if isinstance(value, str) else f"cannot be read: {value}" for uri, value in identities.items()}
    found.photos = [(uri, known[uri]) for uri in concept.images]
    unreadable = [uri for uri in addresses_read(concept) if not isinstance(identities[uri], str)]
    if unreadable:
        _set_verdict(found, "bad row", f"{unreadable[0]} {known[unreadable[0]]}", BAD_INPUT)
        return None
    found.settings = run.get("settings", "")
    photos = [known[uri] for uri in concept.images]
    masks = [known[uri] for uri in concept.masks]
    inputs = fingerprint_inputs(concept, photos, found.settings, masks, known.get(concept.start_from, ""))
    found.row = inputs["concept"]
    if found.settings:
        found.fingerprint = digest(inputs)
    else:
        found.notes.append("the last run did not keep its settings, so changes of settings cannot be shown")
    return inputs


def _differences(store: RunStore, found: Explanation, inputs: Mapping[str, Any], row: ManifestRow) -> list[str]:
    """Describe what has changed since the last record under another fingerprint, a done one if there is any."""
    others = [record for record in found.attempts if record.fingerprint != found.fingerprint]
    last = next((record for record in others if record.status == "done"), others[0] if others else None)
    if last is None:
        return []
    if not last.inputs:
        return ["not known: an earlier release wrote the last record, and did not keep what its fingerprint is made of"]
    differences = input_differences(last.inputs, inputs, last.images, row.concept.images)
    before = last.inputs["settings"]
    if before == inputs["settings"]:
        return differences
    contents = store.get_many([settings_path(before), settings_path(inputs["settings"])])
    trees = [json.loads(content) for content in contents.values() if isinstance(content, bytes)]
    if len(trees) < 2:
        return [*differences, "settings: which is not known, settings/ does not hold both any more"]
    return differences + [f"settings: {line}" for line in settings_differences(*trees)]


def describe(found: Explanation) -> Iterator[str]:
    """Yield lines for a person."""
    yield f"{found.concept_id}: {found.verdict.upper()}. {found.reason}".rstrip(". ")
    if found.error_kind:
        yield f"  {title_of(found.error_kind)}: {remedy_of(found.error_kind)}"
    yield from (f"  note: {note}" for note in found.notes)
    if found.differences:
        yield "\nchanged since the last record"
        yield from (f"  {line}" for line in found.differences)
    yield "\ninputs"
    if found.place:
        yield f"  row          {found.place}"
    for name, value in found.row.items():
        if name != "concept_id" and value not in ("", ()):
            yield f"    {name:<18} {value}"
    for number, (uri, identity) in enumerate(found.photos, 1):
        yield f"  photo {number:<6} {identity}  {uri}"
    if found.settings:
        yield f"  settings     {found.settings}  settings/{found.settings}.json"
    if found.fingerprint:
        yield f"  fingerprint  {found.fingerprint}"
    yield "\nattempts" if found.attempts else "\nno attempts"
    for record in found.attempts:
        yield from _describe_attempt(record, record.fingerprint == found.fingerprint)
    if found.objects:
        yield "\nobjects"
        yield from (f"  {size:>12,} bytes  {uri}" for uri, size, _ in found.objects)
    if found.pictures:
        yield f"\n{len(found.pictures):,} pictures, such as\n  {found.pictures[0]}"


def _describe_attempt(record: ConceptRecord, is_present: bool) -> Iterator[str]:
    when = format_utc(record.finished_at) or "at an unknown time"
    which = "the present fingerprint" if is_present else f"fingerprint {record.fingerprint}"
    calls = f", {record.attempts} calls" if record.attempts > 1 else ""
    work = f", {record.steps:,} steps in {format_duration(record.seconds)}" if record.steps else ""
    kind = f" ({title_of(_kind_of(record))})" if record.status == "failed" else ""
    yield f"  {when}  {record.status}{kind} under {which}{work}{calls}"
    if record.error:
        yield f"    {record.error}"
    if record.start:
        is_mean = record.start == "words" and not record.initializer
        yield f"    started from {'the mean of all words' if is_mean else record.start}"
    if record.sampling:
        drawn = record.sampling
        yield f"    sample pictures drawn in {drawn.steps} {drawn.solver} steps with guidance {drawn.guidance_scale:g}"
    if record.scores:
        yield f"    {', '.join(f'{name} {value:.3f}' for name, value in record.scores.items())}"
    if record.gate:
        yield f"    {record.gate} the gate"
    for each in record.tries:
        kept = ", kept" if each.fingerprint == record.result.fingerprint else ""
        scores = ", ".join(f"{name} {value:.3f}" for name, value in each.scores.items())
        yield f"      tried {f'with {each.rung}' if each.rung else 'as configured'}: {each.error or scores}{kept}"


if __name__ == "__main__":
    sys.exit(main())
