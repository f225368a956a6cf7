"""Let one run at a time work on an output: `lease.json`, put on the condition that none is present, and renewed.

Two runs on one output would do no harm (the same fingerprints give the same bytes, and records are written last), but
they would do all work twice. The second run waits until it knows whether the first is alive: it refuses if so, and
takes over if not. It waits for the term that the lease states, whatever its own settings are. Clocks of two machines
are never compared. On stores without conditional writes (all but S3 and local disks), two runs started within the same
second may both go on.
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
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from pipeline.config import MAX_LEASE_S
from pipeline.store.redact import redact
from pipeline.store.storage import RunStore
from pipeline.times import now

log = logging.getLogger(__name__)

PATH = "lease.json"

_RENEWALS_PER_TERM = 4
"""Renewals in a lease's term, the time after which a lease without renewal ends."""

_PARTIAL_FILE_S = 600.0
"""Age from which a temporary file was left by a killed process: writing one takes seconds."""

_CHECKS_PER_TERM = 30
"""Checks of another run's lease while waiting for it to be renewed or to end."""


class LeaseHeld(ValueError):
    """Raised when another run works on this output; the text says which, and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """Run that works on an output: the content of `lease.json`."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="ignore")

    run: str
    host: str
    process: int
    machine: str
    """Host, boot and container within which process ids are unique; "" if not known."""
    started_at: str
    renewed_at: str
    term_s: float = 0.0
    """Time without renewal after which another run may take over; 0 in leases of earlier releases."""

    @classmethod
    def for_this_process(cls, term_s: float = 0.0) -> Holder:
        moment = now()
        return cls(
            run=uuid.uuid4().hex,
            host=socket.gethostname(),
            process=os.getpid(),
            machine=_machine(),
            started_at=moment,
            renewed_at=moment,
            term_s=term_s,
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Holder:
        """Parse a lease; the holder of anything that is not a lease is unknown."""
        try:
            return _HOLDER.validate_json(data, strict=True)
        except ValidationError:
            return cls(run="", host="unknown", process=0, machine="", started_at="unknown", renewed_at="unknown")

    def to_bytes(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), indent=1).encode()

    def is_dead(self) -> bool:
        """Return True if the holder ran on this machine and its process is gone; False on other machines, where only
        waiting can tell."""
        if not self.machine or self.machine != _machine() or self.process <= 0:
            return False
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return self.process == os.getpid()  # this process got the dead one's id: a container was started again


_HOLDER = TypeAdapter(Holder)


class Lease:
    """Lease of this process on an output, for terms of `term_s` seconds."""

    def __init__(self, store: RunStore, term_s: float, on_lost: Callable[[], None]) -> None:
        self._store = store
        self._term_s = term_s
        self._on_lost = on_lost
        self._mine = Holder.for_this_process(term_s)
        self._etag = ""
        """Entity tag of the lease that the next put replaces; "" for none."""
        self._is_released = threading.Event()

    def acquire(self) -> None:
        """Take the lease, waiting for another run's lease to end. Raises LeaseHeld if that run is alive."""
        while not self._put():
            try:
                data, etag = self._store.get_with_etag(PATH)
            except FileNotFoundError:
                continue
            holder = Holder.from_bytes(data)
            if holder.run == self._mine.run:  # the put succeeded; only its answer was lost
                self._etag = etag
                return
            if holder.is_dead() or self._stays_unrenewed(holder, etag):
                log.warning("taking over from a run that died: %s, process %d", holder.host, holder.process)
                self._etag = etag

    def renew(self) -> bool:
        """Put the lease with the current time; return False if another run has it."""
        self._mine = dataclasses.replace(self._mine, renewed_at=now())
        if self._put():
            return True
        try:
            data, self._etag = self._store.get_with_etag(PATH)
        except FileNotFoundError:  # a person or a tool deleted the lease
            self._etag = ""
            return self._put()
        return Holder.from_bytes(data).run == self._mine.run

    def renew_until_released(self) -> None:
        """Renew the lease until `release`, or call `on_lost` once another run has it; for a thread of its own."""
        while not self._is_released.wait(self._term_s / _RENEWALS_PER_TERM):
            try:
                if not self.renew():
                    log.error("another run has taken over %s: this one stops", redact(self._store.root))
                    self._on_lost()
                    return
            except Exception as error:
                log.warning("the lease on %s was not renewed: %s", redact(self._store.root), redact(str(error)))

    def release(self) -> None:
        """Stop the renewal and delete the lease if it is still this run's."""
        self._is_released.set()
        try:
            if Holder.from_bytes(self._store.get_with_etag(PATH)[0]).run == self._mine.run:
                self._store.delete(PATH)
        except OSError as error:
            log.warning("the lease on %s ends by itself in %.0f s: %s", redact(self._store.root), self._term_s, error)

    def _put(self) -> bool:
        try:
            self._etag = self._store.put_if_match(PATH, self._mine.to_bytes(), self._etag)
        except FileExistsError:
            self._etag = ""
            return False
        return True

    def _stays_unrenewed(self, holder: Holder, etag: str) -> bool:
        """Watch another run's lease for its whole term; return False if it is deleted meanwhile. Raises LeaseHeld at
        its first renewal."""
        term_s = self._term_of(holder)
        log.warning(
            "%s is held by a run on %s (process %d, last seen %s); waiting up to %.0f s to see whether it is alive",
            redact(self._store.root),
            holder.host,
            holder.process,
            holder.renewed_at,
            term_s,
        )
        until = time.monotonic() + term_s
        while time.monotonic() < until:
            time.sleep(term_s / _CHECKS_PER_TERM)
            try:
                data, latest = self._store.get_with_etag(PATH)
            except FileNotFoundError:
                return False
            if latest != etag:
                raise LeaseHeld(self._refusal(Holder.from_bytes(data)))
        return True

    def _term_of(self, holder: Holder) -> float:
        """Return the term that a lease states, or this run's own where it states none that a setting may have."""
        return holder.term_s if 0 < holder.term_s <= MAX_LEASE_S else self._term_s

    def _refusal(self, holder: Holder) -> str:
        return redact(
            f"{self._store.root} is in use by another run: on {holder.host}, process {holder.process}, since "
            f"{holder.started_at}, last seen {holder.renewed_at}. Wait for it, stop it, or choose another --output; "
            f"if it dies, its lease ends by itself {self._term_of(holder):.0f} s later."
        )


@contextlib.contextmanager
def hold_lease(store: RunStore, term_s: float) -> Iterator[None]:
    """Hold the lease on an output; a `term_s` of 0 takes none. Raises LeaseHeld if another run has it.

    Temporary files that a killed run left there are deleted once the lease is held.
    This process gets SIGTERM if another run takes the lease over because this one seemed dead.
    """
    if not term_s:
        yield
        return
    lease = Lease(store, term_s, on_lost=lambda: os.kill(os.getpid(), signal.SIGTERM))
    lease.acquire()
    renewer = threading.Thread(target=lease.renew_until_released, name="lease", daemon=True)
    renewer.start()
    try:
        store.delete_partial_files(_PARTIAL_FILE_S)
        yield
    finally:
        lease.release()
        renewer.join(timeout=term_s)


def _machine() -> str:
    """Return a name of the machine, its boot and the container: process ids are unique within the three."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
