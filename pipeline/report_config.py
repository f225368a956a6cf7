"""Settings of what a run says at its end: the report, and the failures that do not fail it."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.bounds import largest_number, parse_bound
from pipeline.exit_codes import TOLERATED
from textual_inversion.config_checks import require


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """Settings of the report, the page that a person reads."""

    embedded: int = 200
    """Concepts whose pictures are inside the page; all others are table rows that link to the objects."""

    hour_price: float = 0.0
    """Price of one GPU for an hour, or of one core where there are no GPUs, to compute the run's cost; 0 leaves the
    cost out."""

    currency: str = ""
    """Currency written after the cost."""

    def __post_init__(self) -> None:
        require(self.embedded >= 0, "report.embedded", self.embedded, "0 or more")
        require(self.hour_price >= 0, "report.hour_price", self.hour_price, "0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class ToleranceConfig:
    """Failures that do not fail the run."""

    failures: int | str = ""
    """Largest number of new bad rows and failed concepts, as a share of the manifest's rows ("1%", rounded down) or as
    a count. A failure is not new if the last whole run that did not fail had it: the same row or fingerprint with the
    same error. Empty states no tolerance: every failure fails the run."""

    exit_code: int = TOLERATED
    """Exit code of a run whose failures are tolerated; 0 where a scheduler repeats every other code, as a RayJob
    does."""

    def __post_init__(self) -> None:
        if self.is_stated:
            parse_bound("tolerance.failures", self.failures)
        require(0 <= self.exit_code <= 255, "tolerance.exit_code", self.exit_code, "0 to 255")

    @property
    def is_stated(self) -> bool:
        """True unless `failures` is empty."""
        return self.failures != ""

    def limit(self, num_rows: int) -> int:
        """Return the largest number of new failures that is tolerated among `num_rows` rows."""
        if not self.is_stated:
            return 0
        return largest_number(parse_bound("tolerance.failures", self.failures), num_rows)
