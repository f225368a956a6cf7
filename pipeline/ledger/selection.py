"""Selection of the concepts that one command learns: named ones, earlier failures, poor results, a limited number.

Concepts that are not selected stay as they are; the results and the report hold the whole manifest.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from pipeline.inputs.manifest import concept_ids
from pipeline.ledger.gate import BELOW, gate_verdict
from pipeline.ledger.records import load_records
from pipeline.ledger.results import PATH as RESULTS
from pipeline.sample_config import GateConfig
from pipeline.store.addresses import open_for_reading
from pipeline.store.parquet import read_table
from pipeline.store.storage import ConceptFolder, RunStore

RETRIES = ("failed", "quarantined", "below-gate")
"""Values of `--retry`."""


@dataclass(frozen=True, slots=True)
class Selection:
    """The concepts that a command may learn; by default all that are not done."""

    only: frozenset[str] | None = None
    """Ids of the concepts; None for all."""

    limit: int = 0
    """Largest number of concepts to learn, the first ones of the manifest; 0 for no limit."""

    options: str = ""
    """The command's options that made this selection, for messages."""

    retries_below_gate: bool = False
    """True if the selected concepts are done and are to be learned again by `gate.ladder`."""

    def accepts(self, concept_id: str, num_accepted: int) -> bool:
        """Return whether to learn a concept when `num_accepted` were accepted before it."""
        return self.includes(concept_id) and (not self.limit or num_accepted < self.limit)

    def includes(self, concept_id: str | None) -> bool:
        """Return whether a concept, or a row without a concept id, is selected, the limit aside."""
        return self.only is None or concept_id in self.only

    def max_concepts(self, num_rows: int) -> int:
        """Return the largest number of concepts that may be learned out of `num_rows`."""
        bounds = [num_rows]
        if self.only is not None:
            bounds.append(len(self.only))
        if self.limit:
            bounds.append(self.limit)
        return min(bounds)


ALL_CONCEPTS = Selection()


def select(
    manifest: str,
    store: RunStore,
    only: str | None,
    retry: str | None,
    limit: int | None,
    gate: GateConfig | None = None,
) -> Selection:
    """Make a selection from the command's options.

    `only` is a list of concept ids with commas between, `retry` one of `RETRIES`, `limit` a number of concepts.
    Raises ValueError for an id that the manifest does not have, for an empty list, and for a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit}: must be 1 or more concepts")
    options = [f"--only {only}"] if only is not None else []
    options += [f"--retry {retry}"] if retry else []
    options += [f"--limit {limit}"] if limit else []
    chosen = None
    if only is not None:
        chosen = frozenset(_check_ids(manifest, [name.strip() for name in only.split(",") if name.strip()]))
    if retry:
        finders: dict[str, Callable[[RunStore], set[str]]] = {
            "failed": failed_before,
            "quarantined": quarantined_before,
            "below-gate": partial(below_gate, gate=gate or GateConfig()),
        }
        found = finders[retry](store)
        chosen = frozenset(found if chosen is None else chosen & found)
    return Selection(chosen, limit or 0, " ".join(options), retry == "below-gate")


def failed_before(store: RunStore) -> set[str]:
    """Return the ids of concepts that failed before, whether or not they are done by now.

    A concept failed before if it has a stored failure and no record under the same fingerprint, or if its row failed in
    the last results.parquet: a bad row fails before it has a fingerprint.
    """
    failed: set[ConceptFolder] = set()
    done: set[ConceptFolder] = set()
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
    """Return the ids of concepts whose stored failure says that their calls were lost, to dying actors or to storage.

    Concepts that failed for their own input, a damaged photo for example, are not among them.
    """
    failed = failed_before(store)
    return {
        record.concept_id
        for record in load_records(store)
        if record.status == "failed" and record.quarantined and record.concept_id in failed
    }


def below_gate(store: RunStore, gate: GateConfig) -> set[str]:
    """Return the ids of concepts whose newest record has scores below the gate."""
    newest: dict[str, tuple[str, bool]] = {}
    for record in load_records(store):
        if record.status == "done":
            found = record.finished_at, gate_verdict(record, gate) == BELOW
            newest[record.concept_id] = max(newest.get(record.concept_id, found), found)
    return {name for name, (_, is_below) in newest.items() if is_below}


def unknown_concept(concept_id: str, known: Collection[str], place: str) -> ValueError:
    """Return the error for a concept id that `place` does not have; it names the nearest of the `known` ids."""
    near = nearest(concept_id, known)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {len(known):,}"
    examples = ", ".join(sorted(known)[:5])
    more = f", such as {examples}" if not near and examples else ""
    return ValueError(f"no concept {concept_id!r} in {place}: {hint}{more}")


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Return up to three similar names, the most similar first; upper and lower case count as equal."""
    by_lower = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.6)
    return [by_lower[each] for each in close] or sorted(each for each in by_lower.values() if name in each)[:3]


def _check_ids(manifest: str, ids: Sequence[str]) -> Sequence[str]:
    """Return `ids`. Raises ValueError if there are none or the manifest lacks one."""
    if not ids:
        raise ValueError("--only: name at least one concept_id, several with commas between")
    known = set(concept_ids(manifest))
    for each in ids:
        if each not in known:
            raise unknown_concept(each, known, f"manifest {manifest}")
    return ids
