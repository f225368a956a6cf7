"""An actor that learns nothing, and waits, fails or dies as the concept's name says. It starts fast, without torch.

A name is `<kind>-<number>`, or `<kind>-<kind in tries>-<number>`. The seed of the settings is taken for their rung.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import time
from pathlib import Path

from pipeline.config import RunConfig
from pipeline.ledger.plan import ConceptTask
from pipeline.ledger.records import ConceptRecord
from pipeline.report.concept_progress import ConceptProgress
from pipeline.store.errors import ActorBroken, ActorLeaving, InputChanged, RunAborted, StoreFailed
from textual_inversion.errors import BUG


class StandIn:
    """An actor that notes every call in a folder, as `<concept>.<attempt>.<pid>` with the calls that ran beside it, a
    concept on a rung above 0 as `<concept>@<rung>`; and the rungs it was prepared for in `prepared.<pid>`."""

    def __init__(self, notes: str, capacity: int = 2) -> None:
        self._notes, self._capacity = Path(notes), capacity
        self._rung = 0
        self._running: set[str] = set()
        self._store_calls = 0
        self._draining, self._leaving = asyncio.Event(), asyncio.Event()
        if (self._notes / "no-start").exists():
            raise ValueError("the model is not where it should be")

    def prepare(self, config: RunConfig) -> int:
        assert not self._running
        self._rung = config.seed
        with (self._notes / f"prepared.{os.getpid()}").open("a") as notes:
            notes.write(f"{self._rung} ")
        return self._capacity

    async def learn(self, task: ConceptTask, attempt: int) -> ConceptRecord:
        if task.rung != self._rung:
            raise RunAborted(f"prepared for rung {self._rung}, and not for {task.rung}")
        kind, _, kind_in_tries = task.concept.concept_id.rpartition("-")[0].partition("-")
        name = task.concept.concept_id + (f"@{task.rung}" if task.rung else "")
        if self._leaving.is_set():
            raise ActorLeaving("its node is taken back")
        self._running.add(name)
        note = self._notes / f"{name}.{attempt}.{os.getpid()}"
        note.write_text(" ".join(sorted(self._running)))
        try:
            await asyncio.sleep(0.05)
            note.write_text(" ".join(sorted(self._running)))
            await self._behave(kind_in_tries if task.rung else kind, name, attempt)
        finally:
            self._running.discard(name)
        status = "failed" if name.startswith("bad") else "done"
        return ConceptRecord(
            concept_id=task.concept.concept_id, fingerprint=task.fingerprint, status=status,
            placeholder_token=task.concept.placeholder_token, attempts=attempt,
            error="no such photo" if status == "failed" else "",
        )  # fmt: skip

    def progress(self) -> list[ConceptProgress]:
        return [ConceptProgress(concept_id=name, phase="learning", step=1, steps=2) for name in sorted(self._running)]

    async def drain(self, seconds: float) -> None:
        self._draining.set()
        until = time.monotonic() + seconds
        while self._running and time.monotonic() < until:
            await asyncio.sleep(0.05)
        await asyncio.sleep(min(seconds, 0.5))  # until the driver has the answers

    async def notice(self) -> None:
        """Wait for a file `leave.<pid>`, which stands for a notice of termination."""
        await self._has_appeared(f"leave.{os.getpid()}")
        self._leaving.set()

    def _is_store_away(self, name: str) -> bool:
        """Return whether storage fails a call of `nostore-<n>`: each with n = 0, else the first n for such concepts. A
        letter in `refused` stands for each failure."""
        self._store_calls += 1
        back_after = int(name.rpartition("-")[2])
        if back_after and self._store_calls > back_after:
            return False
        with (self._notes / "refused").open("a") as notes:
            notes.write("x")
        return True

    async def _behave(self, kind: str, name: str, attempt: int) -> None:
        if kind == "killer" or (kind == "unlucky" and attempt == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "broken" and attempt == 1:
            raise ActorBroken("the engine stopped")
        if kind == "buggy":
            raise ActorBroken("KeyError: 'rows'", BUG)
        if kind == "refusing":
            raise RunAborted("the model here is not the model of the plan")
        if kind == "moving" or (kind == "moved" and attempt == 1):
            raise InputChanged("photo a.png has changed since the plan")
        if kind == "offline" and attempt < 3:
            raise ConnectionError("the bucket does not answer")
        if kind == "segfault":
            ctypes.string_at(0)
        if kind == "memory":
            bytearray(2**62)
        if kind == "nostore" and self._is_store_away(name):
            raise StoreFailed("8 calls failed, the last with SlowDown")
        if kind == "bug":
            raise KeyError("a mistake in the code")
        if kind == "stuck" or (kind == "hung" and attempt == 1):
            await asyncio.sleep(3600)
        if kind == "steady":
            await asyncio.sleep(1.5)
        if kind == "long":
            await asyncio.sleep(12)
        if kind == "slow":
            await self._draining.wait()
        if kind == "held":
            await self._has_appeared(f"end.{name}")
        if kind in ("waiting", "lost") and len(list(self._notes.glob(f"{name}.*"))) == 1:
            await self._leaving.wait()
            if kind == "waiting":
                raise ActorLeaving("its node is taken back")
            await self._has_appeared(f"end.{name}")
            os.kill(os.getpid(), signal.SIGKILL)

    async def _has_appeared(self, name: str) -> None:
        while not (self._notes / name).exists():
            await asyncio.sleep(0.05)
