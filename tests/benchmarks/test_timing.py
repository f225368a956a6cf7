"""What the speed benchmarks share: the order of repetitions, processes that begin together, tables."""

from __future__ import annotations

import os

import pytest

from benchmarks.timing import Rendezvous, Spread, alternate, heading, side_by_side, table


def test_repetitions_alternate_and_the_first_round_is_not_counted() -> None:
    order: list[str] = []

    def work(name: str) -> int:
        order.append(name)
        return len(order)

    results = alternate({"a": lambda: work("a"), "b": lambda: work("b")}, 2)
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert results == {"a": [3, 6], "b": [4, 5]}
    assert alternate({"a": lambda: work("a")}, 1, warm_up=False) == {"a": [7]}
    with pytest.raises(ValueError, match="repetitions = 0"):
        alternate({}, 0)


def meet(together: Rendezvous, times: int) -> int:
    for _ in range(times):
        together.wait()
    return os.getpid()


def fail_once(together: Rendezvous, number: int) -> None:
    if together.wait() == 0:
        raise ValueError(f"no {number}")
    together.wait()


def test_one_process_is_this_one() -> None:
    assert side_by_side(1, meet, 3) == [os.getpid()]


@pytest.mark.slow
def test_processes_wait_for_each_other() -> None:
    pids = side_by_side(2, meet, 3)
    assert len({*pids, os.getpid()}) == 3
    with pytest.raises(ValueError, match="no 7"):  # the other is told, and does not hang
        side_by_side(2, fail_once, 7)


def test_figures_in_a_table() -> None:
    assert str(Spread.of([1.0, 3.0, 2.0])) == "2.00 (1.00 to 3.00)"
    assert table(["a", "b"], [["x", 1234.5], [2, None], [0.01234, 45.67]]) == (
        "| a | b |\n|---|---|\n| x | 1,234 |\n| 2 | - |\n| 0.0123 | 45.7 |\n"
    )


def test_a_heading_says_what_was_run_on_what() -> None:
    text = heading("Speed", "benchmarks.inversion", ["--slots", "1"], batch_size=4)
    assert text.startswith("# Speed, 20")
    assert "- command: `python -m benchmarks.inversion --slots 1`\n" in text
    assert f"of {os.cpu_count()} cores usable" in text
    assert "torch 2" in text
    assert text.endswith("- batch size: 4\n\n")
