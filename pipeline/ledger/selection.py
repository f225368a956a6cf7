"""Which of a manifest's concepts one command learns: named ones, those that failed or came out poor, so many at most.

What is left out stays as it is; results and report show the whole manifest all the same.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence
from functools import partial

from pipeline.config import GateConfig
from pipeline.inputs.manifest import concept_ids
from pipeline.ledger.gate import BELOW, judge
from pipeline.ledger.plan import Selection
from pipeline.ledger.records import load_records
from pipeline.ledger.results import PATH as RESULTS
from pipeline.store.addresses import open_for_reading
from pipeline.store.parquet import read_table
from pipeline.store.storage import ConceptFolder, RunStore

RETRIES = ("failed", "quarantined", "below-gate")


def select(
    manifest: str, store: RunStore, only: str | None, retry: str | None, limit: int | None,
    gate: GateConfig | None = None,
) -> Selection:  # fmt: skip
    """From the command's options: `only`, ids with commas between; `retry`, one of `RETRIES`; `limit`, a number.

    Raises ValueError for an id that the manifest does not have, for none at all, and for a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit}: must be 1 or more concepts")
    words = [f"--only {only}"] if only is not None else []
    words += [f"--retry {retry}"] if retry else []
    words += [f"--limit {limit}"] if limit else []
    chosen = None
    if only is not None:
        chosen = frozenset(_named(manifest, [name.strip() for name in only.split(",") if name.strip()]))
    if retry:
        found = {"failed": failed_before, "quarantined": quarantined_before}.get(
            retry, partial(below_gate, gate=gate or GateConfig())
        )
        names = found(store)
        chosen = frozenset(names if chosen is None else chosen & names)
    return Selection(chosen, limit or 0, " ".join(words), retry == "below-gate")


def failed_before(store: RunStore) -> set[str]:
    """Ids of concepts with a stored failure, under whichever fingerprint, and of rows that the last results call bad:
    they failed before they had one. Those that are done by now are among them."""
    failed, done = set[ConceptFolder](), set[ConceptFolder]()
    for path, size in store.scan("concepts"):
        folder = ConceptFolder.from_path(path)
        if folder is not None and path == folder.failure:
            failed.add(folder)
        elif folder is not None and path == folder.record and size:
            done.add(folder)
    names = {folder.concept_id for folder in failed - done}
    if store.exists(RESULTS):
        with open_for_reading(store.uri(RESULTS)) as file:
            table = read_table(file, ["concept_id", "status"])
        names |= {row["concept_id"] for row in table.to_pylist() if row["status"] == "failed" and row["concept_id"]}
    return names


def quarantined_before(store: RunStore) -> set[str]:
    """Ids of those whose stored failure says that their calls were lost, by dying actors or by storage: bad photos are
    not among them."""
    failed = failed_before(store)
    return {
        record.concept_id for record in load_records(store)
        if record.status == "failed" and record.quarantined and record.concept_id in failed
    }  # fmt: skip


def below_gate(store: RunStore, gate: GateConfig) -> set[str]:
    """Ids of finished concepts that are below a gate, by the scores in the record of each that was finished last."""
    newest: dict[str, tuple[str, bool]] = {}
    for record in load_records(store):
        if record.status == "done":
            found = record.finished_at, judge(record, gate) == BELOW
            newest[record.concept_id] = max(newest.get(record.concept_id, found), found)
    return {name for name, (_, is_below) in newest.items() if is_below}


def unknown(name: str, known: Collection[str], place: str) -> ValueError:
    """For a concept that is not there: names the nearest that are."""
    near = nearest(name, known)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {len(known):,}"
    some = ", ".join(sorted(known)[:5])
    return ValueError(f"no concept {name!r} in {place}: {hint}" + (f", such as {some}" if not near and some else ""))


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Up to three that are like it, upper and lower case aside, the nearest first."""
    by_lower = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.6)
    return [by_lower[each] for each in close] or sorted(each for each in by_lower.values() if name in each)[:3]


def _named(manifest: str, names: Sequence[str]) -> Sequence[str]:
    if not names:
        raise ValueError("--only: name at least one concept_id, several with commas between")
    known = set(concept_ids(manifest))
    for name in names:
        if name not in known:
            raise unknown(name, known, f"manifest {manifest}")
    return names
