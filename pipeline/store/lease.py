"""One run at a time on an output: `lease.json`, put on the condition that nobody else has put one, and renewed.

Two runs on one output would do no harm (the same fingerprints give the same bytes, and records are written last), but
they would do all work twice. The second waits only as long as it takes to see whether the first still lives: if so, it
refuses; if not, it takes over. Clocks of two machines are never compared for that. On stores that know no conditional
writes (all but S3 and local disks), two runs started within the same second may both go on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.store.redact import redact
from pipeline.store.storage import RunStore
from pipeline.times import now

log = logging.getLogger(__name__)

PATH = "lease.json"
_RENEWALS, _LOOKS = 4, 30
"""In the time after which a lease without a sign of life ends."""


class LeaseHeld(ValueError):
    """Another run works on this output; the text says which, and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """Who has an output, as `lease.json` says."""

    run: str
    host: str
    process: int
    machine: str
    """Where process numbers mean the same; empty if not known."""
    started_at: str
    renewed_at: str

    @classmethod
    def here(cls) -> Holder:
        moment = now()
        return cls(
            run=uuid.uuid4().hex, host=socket.gethostname(), process=os.getpid(), machine=_machine(),
            started_at=moment, renewed_at=moment,
        )  # fmt: skip

    @classmethod
    def read(cls, data: bytes) -> Holder:
        """Whatever is in it; unknown where it is not a lease."""
        try:
            found = json.loads(data)
            return cls(**{field.name: found[field.name] for field in dataclasses.fields(cls)})
        except (ValueError, TypeError, KeyError):
            return cls(run="", host="unknown", process=0, machine="", started_at="unknown", renewed_at="unknown")

    def to_bytes(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), indent=1).encode()

    def is_dead(self) -> bool:
        """True if it ran on this machine and is no more; elsewhere, only time can tell."""
        if not self.machine or self.machine != _machine() or self.process <= 0:
            return False
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return self.process == os.getpid()  # the same number again: a container started anew


class Lease:
    """This process's hold on an output."""

    def __init__(self, store: RunStore, seconds: float, on_lost: Callable[[], None]) -> None:
        self._store, self._seconds, self._on_lost = store, seconds, on_lost
        self._mine, self._tag = Holder.here(), ""
        self._over = threading.Event()

    def take(self) -> None:
        """Raises LeaseHeld if another run has it and lives."""
        while not self._put():
            try:
                data, tag = self._store.get_tagged(PATH)
            except FileNotFoundError:
                continue
            holder = Holder.read(data)
            if holder.run == self._mine.run:  # it was put; only the answer was lost
                self._tag = tag
                return
            if holder.is_dead() or self._stays_silent(holder, tag):
                log.warning("taking over from a run that died: %s, process %d", holder.host, holder.process)
                self._tag = tag  # what the next put replaces, if it still is there

    def renew(self) -> bool:
        """Show a sign of life; False if another run has it."""
        self._mine = dataclasses.replace(self._mine, renewed_at=now())
        if self._put():
            return True
        try:
            data, self._tag = self._store.get_tagged(PATH)
        except FileNotFoundError:  # somebody has tidied up
            self._tag = ""
            return self._put()
        return Holder.read(data).run == self._mine.run

    def keep(self) -> None:
        """Renew it until `release`; for a thread of its own."""
        while not self._over.wait(self._seconds / _RENEWALS):
            try:
                if not self.renew():
                    log.error("another run has taken over %s: this one stops", redact(self._store.root))
                    self._on_lost()
                    return
            except Exception as error:
                log.warning("the lease on %s was not renewed: %s", redact(self._store.root), redact(str(error)))

    def release(self) -> None:
        self._over.set()
        try:
            if Holder.read(self._store.get_tagged(PATH)[0]).run == self._mine.run:
                self._store.delete(PATH)
        except OSError as error:
            log.warning("the lease on %s ends by itself in %.0f s: %s", redact(self._store.root), self._seconds, error)

    def _put(self) -> bool:
        try:
            self._tag = self._store.put_if(PATH, self._mine.to_bytes(), self._tag)
        except FileExistsError:
            self._tag = ""
            return False
        return True

    def _stays_silent(self, holder: Holder, tag: str) -> bool:
        """Watch for as long as a lease lasts. Raises LeaseHeld at the first sign of life."""
        log.warning(
            "%s is held by a run on %s (process %d, last seen %s); looking for up to %.0f s whether it lives",
            redact(self._store.root), holder.host, holder.process, holder.renewed_at, self._seconds,
        )  # fmt: skip
        until = time.monotonic() + self._seconds
        while time.monotonic() < until:
            time.sleep(self._seconds / _LOOKS)
            try:
                data, latest = self._store.get_tagged(PATH)
            except FileNotFoundError:
                return False
            if latest != tag:
                raise LeaseHeld(self._refusal(Holder.read(data)))
        return True

    def _refusal(self, holder: Holder) -> str:
        return redact(
            f"{self._store.root} is in use by another run: on {holder.host}, process {holder.process}, since "
            f"{holder.started_at}, last seen {holder.renewed_at}. Wait for it, stop it, or choose another --output; "
            f"if it dies, its lease ends by itself {self._seconds:.0f} s later."
        )


@contextlib.contextmanager
def held(store: RunStore, seconds: float) -> Iterator[None]:
    """Hold the lease on an output; `seconds` 0 takes none. Raises LeaseHeld if another run has it. Should another take
    it over meanwhile, as this one seemed dead, this process gets SIGTERM."""
    if not seconds:
        yield
        return
    lease = Lease(store, seconds, on_lost=lambda: os.kill(os.getpid(), signal.SIGTERM))
    lease.take()
    keeper = threading.Thread(target=lease.keep, name="lease", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        lease.release()
        keeper.join(timeout=seconds)


def _machine() -> str:
    """Differs wherever process numbers may mean something else: another machine, boot or container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
