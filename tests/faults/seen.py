"""`python -m tests.faults.seen`: inflict faults of an output on commands, and print what a person sees and how long it
takes. docs/FAULTS.md quotes it. It mounts file systems of a few kilobytes, which needs root; it starts no Ray."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from pipeline import run, status
from pipeline.report.command_errors import exit_code_of
from pipeline.store.lease import PATH, Holder, hold_lease
from pipeline.store.storage import RunStore
from tests.pipeline.runs import tiny_toml, write_manifest
from tests.tiny_models import tiny_stable_diffusion

TERM_S = 60.0
NOBODY = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
          "AWS_DEFAULT_REGION": "us-east-1"}  # fmt: skip
"""Environment of a client of a store that does not answer."""
_HOLDING = f"""
import sys, time
from pipeline.store.lease import hold_lease
from pipeline.store.storage import RunStore
with hold_lease(RunStore(sys.argv[1]), {TERM_S}):
    time.sleep({TERM_S})
"""
"""Program of another driver that holds the lease of the output in its argument."""


def show(fault: str, command: Callable[[], int]) -> None:
    """Call a command and print its exit code, its time and the last line that it wrote on stderr."""
    errors = io.StringIO()
    began = time.monotonic()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = command()
    lines = errors.getvalue().strip().splitlines() or ["(nothing)"]
    sys.stdout.write(f"{fault}: exit code {code} after {time.monotonic() - began:.1f} s\n    {lines[-1]}\n")
    sys.stdout.flush()


@contextlib.contextmanager
def file_system(folder: Path, size: str) -> Iterator[Path]:
    """Mount a file system in memory of this size."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def take_lease(store: RunStore) -> int:
    """Take the lease on an output and give it back, as a run does at its beginning and end."""

    def take() -> int:
        with hold_lease(store, TERM_S):
            return 0

    return exit_code_of(take)


def with_lease(folder: Path, **changes: object) -> RunStore:
    """Return an output that holds a lease of another run."""
    store = RunStore(str(folder))
    holder = dataclasses.replace(Holder.for_this_process(TERM_S), run="another", **changes)  # type: ignore[arg-type]
    store.put(PATH, holder.to_bytes())
    return store


def show_leases(folder: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    elsewhere = {"machine": "another machine", "host": "node-7"}
    show("a stale lease of a dead process here", partial(take_lease, with_lease(folder / "1", process=ended.pid)))
    show("a stale lease of another machine", partial(take_lease, with_lease(folder / "2", **elsewhere)))
    ahead = "2099-01-01T00:00:00+00:00"
    years_ahead = with_lease(folder / "3", **elsewhere, started_at=ahead, renewed_at=ahead)
    show("the same, its clock years ahead", partial(take_lease, years_ahead))
    store = RunStore(str(folder / "4"))
    first = subprocess.Popen([sys.executable, "-c", _HOLDING, store.root])
    while not store.exists(PATH):
        time.sleep(0.1)
    show("two drivers, and the first is alive", partial(take_lease, store))
    first.kill()


def main() -> None:
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = tiny_stable_diffusion(folder / "model")
        (folder / "job.toml").write_text(tiny_toml(model))
        options = [str(write_manifest(folder, ["a"])), "--config", str(folder / "job.toml"), "--output"]
        with file_system(folder / "read-only", "4m") as mounted:
            subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
            show("a read-only output", partial(run.main, [*options, str(mounted / "out")]))
        with file_system(folder / "full", "64k") as mounted:
            with contextlib.suppress(OSError):
                (mounted / "filling").write_bytes(bytes(100_000))
            show("an output on a full disk", partial(run.main, [*options, str(mounted / "out")]))
        show_leases(folder)
        os.environ |= NOBODY
        show("a store that does not answer", partial(status.main, ["s3://bucket/out"]))


if __name__ == "__main__":
    main()
