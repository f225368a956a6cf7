"""Read `run.json`, the description of a run that `run_summary.describe_run` writes; a person may have changed it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import AfterValidator, Field, FiniteFloat, TypeAdapter, ValidationError

from pipeline.store.storage import RunStore

RUN_FILE = "run.json"


def _checked_time(text: str) -> str:
    """Return a time as it is. Raises ValueError if it is none in ISO 8601 with a zone, of years that clocks have."""
    time = datetime.datetime.fromisoformat(text)
    if time.tzinfo is None or time.year < 1970:
        raise ValueError("it is no time since 1970 with a zone")
    return text


_Time = Annotated[str, AfterValidator(_checked_time)]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Counts:
    rows: int | None = None
    done_before: int = 0
    learned: int = 0
    failed: int = 0
    bad_rows: int = 0
    left_out: int = 0
    looked_at: int = 0
    problems: Mapping[str, str] = field(default_factory=dict)
    gate: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Addresses:
    manifest: str = ""
    output: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rate:
    concepts: Annotated[int, Field(gt=0)]
    seconds: Annotated[FiniteFloat, Field(gt=0)]
    device_seconds: Annotated[FiniteFloat, Field(ge=0)]
    of: str
    settings: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """Entries of `run.json` that other modules read; it holds more, and earlier releases wrote less."""

    stage: str | None = None
    exit_code: int | None = None
    meaning: str = ""
    started_at: _Time | None = None
    written_at: _Time | None = None
    config: _Addresses = field(default_factory=_Addresses)
    settings: str = ""
    counts: _Counts = field(default_factory=_Counts)
    progress: Mapping[str, FiniteFloat] = field(default_factory=dict)
    rate: _Rate | None = None
    seconds: FiniteFloat = 0.0


_RUN = TypeAdapter(_Run)


def read_run(store: RunStore) -> dict[str, Any]:
    """Read `run.json`. Raises FileNotFoundError if it is missing, and ValueError, naming it and what is wrong, if it
    does not describe a run."""
    content = store.get(RUN_FILE)
    try:
        _RUN.validate_json(content, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        reason = f"{place}: {first['msg']}" if place else first["msg"]
        raise ValueError(
            f"{store.uri(RUN_FILE)} does not describe a run ({reason}); delete it, the next run writes another"
        ) from error
    return dict(json.loads(content))
