"""Count an actor's slots, and halve them when its device runs out of memory. No torch in here.

         work beside the engine finds no memory
ENOUGH ------------------------------------------> SHRINKING
  ^ |                                                  |
  | | the engine finds no memory                       | the engine has handed over the states of its
  | v                                                  v concepts and stopped
  half the slots, or EXHAUSTED if only one was left
"""

from __future__ import annotations

import threading
from enum import Enum, auto


class BudgetState(Enum):
    """Relation of an actor's memory to its slots."""

    ENOUGH = auto()
    SHRINKING = auto()
    """Work beside the engine (encoding photos, drawing) found no memory: the engine is to stop."""
    EXHAUSTED = auto()
    """The engine found no memory for one slot."""


class SlotBudget:
    """Number of slots of an actor's engine. May be used on any thread."""

    def __init__(self, slots: int) -> None:
        self._lock = threading.Lock()
        self._slots = slots
        self._state = BudgetState.ENOUGH

    @property
    def slots(self) -> int:
        """Slots that the next engine has; the present one too, unless it is being replaced."""
        return self._slots

    @property
    def state(self) -> BudgetState:
        return self._state

    def report_shortage(self, slots_seen: int) -> bool:
        """Note that work beside the engine found no memory while the engine had `slots_seen` slots.

        Return True if the engine is to be stopped for it. An engine that has fewer slots by now goes on, because that
        may be enough; so does one with a single slot, for whose end the work waits.
        """
        with self._lock:
            if self._state is BudgetState.EXHAUSTED or self._slots != slots_seen or self._slots == 1:
                return False
            self._state = BudgetState.SHRINKING
            return True

    def halve(self) -> bool:
        """Halve the slots, once the engine has stopped or found no memory. Return False if there was only one."""
        with self._lock:
            if self._slots == 1:
                self._state = BudgetState.EXHAUSTED
                return False
            self._slots //= 2
            self._state = BudgetState.ENOUGH
            return True
