"""docs/FAULTS.md gives the numbers of the counters as they are in the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.config import ActorConfig
from pipeline.sample_config import GateConfig
from pipeline.store import http_client, retries
from pipeline.verdict import MAX_REPLANS, Policy
from textual_inversion.slots import MAX_ROLLBACKS

_PAGE = Path(__file__).resolve().parents[2] / "docs" / "FAULTS.md"
_TABLE = _PAGE.read_text().partition("## Every retry counter")[2]
_POLICY = Policy(max_actors=1)
_NUMBERS = {
    "a call to a store": retries.MAX_CALLS,
    "a photo over HTTP": http_client.MAX_REQUESTS,
    "a concept whose call was lost": ActorConfig().max_attempts,
    "planning a concept anew": MAX_REPLANS,
    "starting an actor": _POLICY.max_start_failures,
    "an actor that dies with no concept finished": _POLICY.max_fruitless_deaths,
    "the run's own storage": _POLICY.max_store_failures,
    "a concept whose loss is not finite": MAX_ROLLBACKS,
}


@pytest.mark.parametrize("what", _NUMBERS)
def test_numbers_of_the_counters(what: str) -> None:
    (row,) = re.findall(rf"^\| {re.escape(what)}[^|]*\|[^|]*\| (\d+)", _TABLE, re.MULTILINE)
    assert int(row) == _NUMBERS[what]


def test_entries_of_the_gates_list() -> None:
    assert f"(default: {len(GateConfig().ladder)})" in _TABLE
