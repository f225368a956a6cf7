"""Actors that draw nothing, and die as their rows say. The module imports little, so that they start fast."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
from ray.exceptions import ActorUnavailableError


def draw_or_die(batch: pa.Table, notes: Path) -> pa.Table:
    """Return a result for every row, unless a row kills this process: each death is noted in a file of the row's.

    `always` waits with it until the results of all rows before it are there.
    """
    for name in batch["row_id"].to_pylist():
        died = notes / f"died.{name}"
        until = time.monotonic() + 120
        while name == "always" and not (notes / "rest-is-done").exists() and time.monotonic() < until:
            time.sleep(0.05)
        if name == "always" or (name.startswith("once") and not died.exists()):
            with died.open("a") as file:
                file.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
    return batch.append_column("status", pa.array(["ok"] * len(batch)))


def note_when_done(notes: Path, is_done: Callable[[], bool]) -> None:
    """Let `always` die as soon as the rest is done."""

    def watch() -> None:
        until = time.monotonic() + 120
        while not is_done() and time.monotonic() < until:
            time.sleep(0.05)
        (notes / "rest-is-done").touch()

    threading.Thread(target=watch, daemon=True).start()


class Mortal:
    """An actor that is killed by rows named `once-...` the first time that any sees them, and by `always` each time.

    At `away` the first that sees it seems to be lost, as one does whose connection breaks: it lives on.
    """

    def __init__(self, notes: str) -> None:
        self._notes = Path(notes)
        if (self._notes / "no-start").exists():
            raise ValueError("the model is not where it should be")
        (self._notes / f"start.{os.getpid()}").touch()

    async def prepare_drawing(self) -> int:
        return 1

    async def notice(self) -> None:
        await asyncio.Event().wait()

    async def draw(self, batch: pa.Table) -> pa.Table:
        been_away = self._notes / "been-away"
        if "away" in batch["row_id"].to_pylist() and not been_away.exists():
            been_away.touch()
            raise ActorUnavailableError("the connection is lost", None)
        return draw_or_die(batch, self._notes)
