"""`python -m pipeline.explain OUTPUT CONCEPT`: why a concept is done or not, and what there is of it.

Its row and photos as they are now and the settings of the last run are held against the records it has. Reads the
manifest, those photos (or only their listing, on S3) and the concept's own records; needs neither the model nor a
cluster.
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
from pipeline.ledger.plan import fingerprint_inputs, settings_path
from pipeline.ledger.records import ConceptRecord, from_json
from pipeline.ledger.selection import unknown_concept
from pipeline.report.run_status import no_run, read_run
from pipeline.status import answer
from pipeline.store.storage import ConceptFolder, RunStore
from pipeline.times import format_duration, format_rough_duration, format_utc


@dataclass(kw_only=True)
class Explanation:
    """What is known of one concept. What could not be told is None or empty, and `notes` say why."""

    concept_id: str
    verdict: str = ""
    """`done`, `failed`, `changed`, `learning`, `not reached`, `bad row`, `no row`, or `unknown`; the last record's
    status where the present fingerprint cannot be told."""
    reason: str = ""
    place: str = ""
    """File and row of the manifest."""
    row: Mapping[str, Any] = field(default_factory=dict)
    photos: list[tuple[str, str]] = field(default_factory=list)
    """Address, and content hash or what is wrong."""
    settings: str = ""
    """Digest of the last run's."""
    fingerprint: str = ""
    """The present one."""
    differences: list[str] = field(default_factory=list)
    """From the last record."""
    attempts: list[ConceptRecord] = field(default_factory=list)
    """Newest first."""
    objects: list[tuple[str, int, float]] = field(default_factory=list)
    """URI, bytes, time of writing in seconds since 1970."""
    pictures: list[str] = field(default_factory=list)
    """URIs of the bulk stage's."""
    notes: list[str] = field(default_factory=list)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.explain", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("output", metavar="OUTPUT", help="output of a run: folder or any fsspec URI")
    parser.add_argument("concept", metavar="CONCEPT", help="concept_id")
    parser.add_argument("--manifest", metavar="URI", help="another than the last run's")
    parser.add_argument("--json", action="store_true", help="everything as one JSON object")
    options = parser.parse_args(arguments)
    return answer(
        options.output, lambda store: explain(store, options.concept, options.manifest), describe, as_json=options.json
    )


def explain(store: RunStore, concept_id: str, manifest: str | None = None) -> Explanation:
    """Raises ValueError if there is no run, no such concept, or the manifest that was named cannot be read."""
    found = Explanation(concept_id=concept_id)
    try:
        run = read_run(store)
    except FileNotFoundError:
        run = {}
        found.notes.append("there is no run.json: the settings of the last run are not known")
    row = _find_row(found, concept_id, manifest, run)
    listing = [] if _is_no_id(concept_id) else list(store.scan_with_times(f"concepts/{concept_id}"))
    if row is None and not listing:
        _refuse(store, concept_id, manifest or run.get("config", {}).get("manifest"), run)
    found.objects = [(store.uri(path), size, at) for path, size, at in sorted(listing, key=lambda each: -each[2])]
    found.attempts = _records(store, [path for path, _, _ in listing])
    if not _is_no_id(concept_id):
        found.pictures = [store.uri(path) for path, _ in store.scan(f"images/{concept_id}")]
    now: dict[str, Any] | None = None
    if isinstance(row, ManifestRow):
        now = _inputs(found, row, run)
    _judge(found, row, now, {path for path, size, _ in listing if size})
    if found.verdict in ("changed", "failed", "not reached", "learning") and now is not None:
        found.differences = _differences(store, found, now, row)
    return found


def _find_row(
    found: Explanation, concept_id: str, manifest: str | None, run: Mapping[str, Any]
) -> ManifestRow | BadRow | None:
    """The first row of this concept; None where there is none, or, with a note, where it cannot be told."""
    uri = manifest or run.get("config", {}).get("manifest")
    if not uri:
        found.notes.append("no manifest is known; name one with --manifest")
        return None
    try:
        for row in read_manifest(uri):
            if concept_id == (row.concept.concept_id if isinstance(row, ManifestRow) else row.concept_id):
                return row
    except (ValueError, OSError) as error:
        if manifest:
            raise
        found.notes.append(f"{error}; told from the records alone: name another manifest with --manifest")
        found.verdict = "unknown"
    return None


def _refuse(store: RunStore, concept_id: str, manifest: str | None, run: Mapping[str, Any]) -> None:
    """Raises ValueError for a concept that is neither in the manifest nor in the output."""
    known = {folder.concept_id for path, _ in store.scan("concepts") if (folder := ConceptFolder.from_path(path))}
    if not known and not run:
        raise ValueError(no_run(store))
    try:
        known |= set(concept_ids(manifest)) if manifest else set()
    except ValueError:
        manifest = None
    raise unknown_concept(concept_id, known, f"{store.root} or manifest {manifest}" if manifest else store.root)


def _is_no_id(concept_id: str) -> bool:
    """Whether it cannot name a folder, as one of a bad row."""
    return "/" in concept_id or concept_id.startswith(".") or not concept_id


def _records(store: RunStore, paths: Sequence[str]) -> list[ConceptRecord]:
    """Of every fingerprint, newest first; an older failure beside a record is left out by the publisher itself."""
    ends = [path for path in paths if path.endswith(("/record.json", "/failure.json"))]
    records = []
    for path, content in store.get_many(ends).items():
        folder = ConceptFolder.from_path(path)
        assert folder is not None
        try:
            if isinstance(content, OSError):
                raise content
            records.append(from_json(content))
        except (OSError, ValueError) as error:
            records.append(ConceptRecord(
                concept_id=folder.concept_id, fingerprint=folder.fingerprint, status="failed", placeholder_token="",
                error=f"{path} cannot be read ({error}); delete it and run again",
            ))  # fmt: skip
    return sorted(records, key=lambda record: record.finished_at, reverse=True)


def _inputs(found: Explanation, row: ManifestRow, run: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the fingerprint would be of, if the last run were started again; None, with a reason, if it would not be."""
    concept = row.concept
    try:
        limits = parse_config(run.get("config", {})).photos
    except ValueError:  # of another release
        limits = PhotoConfig()
    identities = content_hashes({*concept.images, *concept.masks}, limits)
    known = {uri: value if isinstance(value, str) else f"cannot be read: {value}" for uri, value in identities.items()}
    found.photos = [(uri, known[uri]) for uri in concept.images]
    wrong = [uri for uri in (*concept.images, *concept.masks) if not isinstance(identities[uri], str)]
    if wrong:
        found.verdict, found.reason = "bad row", f"{wrong[0]} {known[wrong[0]]}"
        return None
    found.settings = run.get("settings", "")
    photos, masks = [known[uri] for uri in concept.images], [known[uri] for uri in concept.masks]
    inputs = fingerprint_inputs(concept, photos, found.settings, masks)
    found.row = inputs["concept"]
    if found.settings:
        found.fingerprint = digest(inputs)
    else:
        found.notes.append("the last run did not keep its settings: what has changed in them cannot be told")
    return inputs


def _judge(
    found: Explanation, row: ManifestRow | BadRow | None, now: Mapping[str, Any] | None, paths: set[str]
) -> None:
    last = found.attempts[0] if found.attempts else None
    if row is not None:
        found.place = f"{row.file}, row {row.row}"
    if isinstance(row, BadRow):
        found.verdict, found.reason = "bad row", row.reason
    elif row is None and found.verdict != "unknown":
        found.verdict, found.reason = "no row", "it is not in the manifest; what it has is kept"
    elif now is not None and found.fingerprint:
        folder = ConceptFolder(found.concept_id, found.fingerprint)
        present = next((record for record in found.attempts if record.fingerprint == found.fingerprint), None)
        written = {uri.rpartition("/")[2]: at for uri, _, at in found.objects if folder.root in uri}
        saved, failed = written.get("checkpoint.safetensors", 0.0), written.get("failure.json", 0.0)
        if present is not None and present.status == "done":
            found.verdict, found.reason = "done", "a record has the present fingerprint; no run learns it again"
            if folder.ladder in paths:
                found.reason = "it is below the gate; the next run tries it again with other settings"
        elif folder.record in paths and present is not None:  # a damaged one
            found.verdict, found.reason = "failed", present.error
        elif saved > failed:
            found.verdict = "learning"
            found.reason = (
                f"its checkpoint is {format_rough_duration(max(0.0, time.time() - saved))} old; a run goes on from it"
            )
        elif present is not None:
            found.verdict, found.reason = "failed", f"{present.error}; the next run tries it again"
        elif last is not None:
            found.verdict = "changed"
            story = f"its last attempt failed ({last.error}), and what" if last.status == "failed" else "what"
            found.reason = f"{story} it is made of is not what it was; the next run learns it"
        else:
            found.verdict, found.reason = "not reached", "nothing has come of it yet; the next run learns it"
    elif not found.verdict or found.verdict == "unknown":
        found.verdict = last.status if last else "unknown"
        found.reason = "as its last record says" if last else ""


def _differences(
    store: RunStore, found: Explanation, now: Mapping[str, Any], row: ManifestRow | BadRow | None
) -> list[str]:
    """From the last record under another fingerprint, a finished one if there is any."""
    others = [record for record in found.attempts if record.fingerprint != found.fingerprint]
    last = next((record for record in others if record.status == "done"), others[0] if others else None)
    if last is None or not isinstance(row, ManifestRow):
        return []
    if not last.inputs:
        return ["not known: the last record is of a release that did not keep what its fingerprint was of"]
    found_differences = input_differences(last.inputs, now, last.images, row.concept.images)
    before = last.inputs["settings"]
    if before == now["settings"]:
        return found_differences
    contents = store.get_many([settings_path(before), settings_path(now["settings"])])
    trees = [json.loads(content) for content in contents.values() if isinstance(content, bytes)]
    if len(trees) < 2:
        return [*found_differences, "settings: which is not known, settings/ does not hold both any more"]
    return found_differences + [f"settings: {line}" for line in settings_differences(*trees)]


def describe(found: Explanation) -> Iterator[str]:
    """Lines for a person."""
    yield f"{found.concept_id}: {found.verdict.upper()}. {found.reason}".rstrip(". ")
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
        yield from _attempt(record, record.fingerprint == found.fingerprint)
    if found.objects:
        yield "\nobjects"
        yield from (f"  {size:>12,} bytes  {uri}" for uri, size, _ in found.objects)
    if found.pictures:
        yield f"\n{len(found.pictures):,} pictures, such as\n  {found.pictures[0]}"


def _attempt(record: ConceptRecord, is_present: bool) -> Iterator[str]:
    when = format_utc(record.finished_at) or "at an unknown time"
    which = "the present fingerprint" if is_present else f"fingerprint {record.fingerprint}"
    tries = f", {record.attempts} calls" if record.attempts > 1 else ""
    work = f", {record.steps:,} steps in {format_duration(record.seconds)}" if record.steps else ""
    yield f"  {when}  {record.status} under {which}{work}{tries}"
    if record.error:
        yield f"    {record.error}"
    if record.start:
        yield f"    started from {record.start}"
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
