"""The states of an actor's slots, and what leads from one to another."""

from __future__ import annotations

from pipeline.actor.slot_budget import BudgetState, SlotBudget


def test_an_engine_without_memory_is_followed_by_one_with_half_the_slots() -> None:
    budget = SlotBudget(5)
    assert [(budget.halve(), budget.slots, budget.state) for _ in range(2)] == [
        (True, 2, BudgetState.ENOUGH), (True, 1, BudgetState.ENOUGH)
    ]  # fmt: skip
    assert not budget.halve()
    assert (budget.slots, budget.state) == (1, BudgetState.EXHAUSTED)


def test_work_beside_the_engine_stops_it_and_then_there_are_fewer_slots() -> None:
    budget = SlotBudget(4)
    assert budget.report_shortage(4)
    assert (budget.slots, budget.state) == (4, BudgetState.SHRINKING)
    assert budget.report_shortage(4), "also of a second caller: the engine may not have been there at the first"
    assert budget.halve()
    assert (budget.slots, budget.state) == (2, BudgetState.ENOUGH)


def test_who_has_seen_more_slots_than_there_are_tries_again_first() -> None:
    budget = SlotBudget(4)
    budget.halve()
    assert not budget.report_shortage(4)
    assert (budget.slots, budget.state) == (2, BudgetState.ENOUGH)


def test_the_last_slot_is_not_given_up_for_work_beside_it() -> None:
    budget = SlotBudget(1)
    assert not budget.report_shortage(1)
    assert budget.state is BudgetState.ENOUGH
    budget.halve()
    assert not budget.report_shortage(1)
    assert budget.state is BudgetState.EXHAUSTED
