"""Settings of what a run says at its end: the report, and the failures that do not fail it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from pipeline.bounds import largest_number, parse_bound
from pipeline.exit_codes import TOLERATED
from textual_inversion.config_checks import require

VectorType = Literal["float16", "float32"]


def hidden_webhook(webhook: str) -> str:
    """Return a webhook without its secret part: its scheme and host, or the name of its environment variable."""
    if not webhook or webhook.startswith("$"):
        return webhook
    scheme, separator, rest = webhook.partition("://")
    return f"{scheme}://{rest.partition('/')[0].rpartition('@')[2]}/***" if separator else "***"


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """Settings of the report, the page that a person reads."""

    embedded: int = 200
    """Concepts that are inside the page, with their pictures. Those of a larger run are in parts beside it, which show
    the run's own pictures."""

    map: int = 2000
    """Largest number of concepts whose learned rows are read for the map of a run; 0 leaves the map out."""

    hour_price: float = 0.0
    """Price of one GPU for an hour, or of one core where there are no GPUs, to compute the run's cost; 0 leaves the
    cost out."""

    currency: str = ""
    """Currency written after the cost."""

    webhook: str = ""
    """Address (http or https) to which a run posts one JSON object when it ends, with its counts, exit code and output,
    and with a `text` as Slack takes it; `$NAME` is the address in the environment variable NAME. Its path is secret: no
    log, record or page shows it. Empty posts nothing."""

    tracked: int = 100
    """Largest number of concepts, those that end first, whose curve and sample grid `tracking` logs. Each costs two
    reads of the output; the numbers of all concepts cost none."""

    paths: Literal["relative", "absolute"] = "relative"
    """Form of the addresses of embeddings and grids in `results.parquet`: relative to the output, which may then be
    copied or moved, or absolute. The photos' addresses are always absolute."""

    vectors: Literal["off", VectorType] = "off"
    """Type of number in `vectors.parquet`, a table of the learned rows of all concepts for vector databases; `off`
    writes no such table."""

    def __post_init__(self) -> None:
        require(self.embedded >= 0, "report.embedded", self.embedded, "0 or more")
        require(self.tracked >= 0, "report.tracked", self.tracked, "0 or more")
        require(self.map >= 0, "report.map", self.map, "0 or more")
        require(self.hour_price >= 0, "report.hour_price", self.hour_price, "0 or more")
        is_address = self.webhook.startswith(("http://", "https://")) and bool(urlsplit(self.webhook).hostname)
        is_webhook = not self.webhook or is_address or (self.webhook[0] == "$" and self.webhook[1:].isidentifier())
        rule = "an address that begins with http:// or https://, or $NAME for an environment variable"
        require(is_webhook, "report.webhook", hidden_webhook(self.webhook), rule)


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
