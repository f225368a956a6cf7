"""The end of a run: which of its failures count, and the exit code."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config import RunConfig
from pipeline.exit_codes import FAILED, LATE, MEANINGS, OK, STOPPED, TOLERATED
from pipeline.ledger.known_failures import key_of
from pipeline.ledger.plan import Plan
from pipeline.ledger.selection import ALL_CONCEPTS, Selection
from pipeline.report.run_stats import RunStats


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The failures of a run, counted, and what they mean for it."""

    num_new: int
    """Bad rows and failed concepts that are not known."""

    num_known: int
    """Bad rows and failed concepts that the last whole run that did not fail had as well, see `known_failures`."""

    limit: int
    """Largest number of new ones that is tolerated."""

    exit_code: int
    keys: tuple[str, ...]
    """The keys of all of them, by which the next run knows them again."""

    is_tolerated: bool = False
    """Something failed, within the tolerance, and neither a signal nor a deadline ended the run."""

    @property
    def meaning(self) -> str:
        """The exit code's meaning, whatever `tolerance.exit_code` is."""
        return MEANINGS[TOLERATED if self.is_tolerated else self.exit_code]

    def describe(self, config: RunConfig) -> str:
        """Return a line about the tolerance; empty if none is stated or nothing failed."""
        if not config.tolerance.is_stated or not self.keys:
            return ""
        known = f", {self.num_known:,} known" if self.num_known else ""
        bound = f"tolerance.failures = {config.tolerance.failures} allows {self.limit:,}"
        if self.is_tolerated:
            return f"WARNING tolerated: {self.num_new:,} new failures{known}; {bound}"
        return f"not tolerated: {self.num_new:,} new failures{known}; {bound}"


def outcome_of(config: RunConfig, stats: RunStats, plan: Plan, selection: Selection = ALL_CONCEPTS) -> Outcome:
    """Return the outcome of a run as far as it has come.

    Only bad rows and failed concepts can be tolerated; a stage that was given up and a damaged result cannot.
    """
    bad = [row for row in plan.bad if selection.includes(row.concept_id)]
    keys = (*(stats.failure_keys.get(name, "") for name in stats.failures), *map(key_of, bad))
    num_known = sum(key in stats.known_before for key in keys)
    num_new = len(keys) - num_known
    limit = config.tolerance.limit(stats.rows - plan.num_left_out)
    has_problems = bool(stats.problems or plan.damaged_left_out)
    is_within = bool(keys) and config.tolerance.is_stated and not has_problems and num_new <= limit
    is_tolerated = is_within and not stats.is_over
    if stats.is_stopped:
        code = STOPPED
    elif stats.is_late:
        code = LATE
    elif is_tolerated:
        code = config.tolerance.exit_code
    else:
        code = FAILED if keys or has_problems else OK
    return Outcome(
        num_new=num_new, num_known=num_known, limit=limit, exit_code=code, keys=keys, is_tolerated=is_tolerated
    )
