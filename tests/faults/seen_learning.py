"""`python -m tests.faults.seen_learning FAULT`: inflict a fault on an output while concepts are learned, and print what
a person sees and when.

The run is `python -m pipeline.run` on a Ray of its own, with a tiny model. The fault is inflicted when two concepts are
done. It is mended `--away-s` later, or, with 0, after the command has ended; then the same command is run again. Full
and read-only disks are file systems in memory, which need root to mount. docs/FAULTS.md quotes the output.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.store.storage import RunStore
from tests.faults.night import ROOT
from tests.faults.processes import kill
from tests.faults.seen import file_system
from tests.pipeline.runs import tiny_toml, write_manifest
from tests.pipeline.s3_server import serve_s3
from tests.tiny_models import tiny_stable_diffusion

NUM_CONCEPTS = 40
_LONGEST_S = 1500.0


@dataclass(frozen=True)
class Fault:
    """An output, and how its fault is inflicted and mended."""

    output: str
    inflict: Callable[[], object]
    mend: Callable[[], object]

    def num_done(self) -> int:
        return sum(path.endswith("/record.json") for path in RunStore(self.output).list("concepts"))


@dataclass
class Command:
    """A running command, whose lines are printed with the time since `began`."""

    arguments: list[str]
    ray_address: str = "local"
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        environment = os.environ | {"RAY_ADDRESS": self.ray_address, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.run", *self.arguments], cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace",
        )  # fmt: skip
        self._reader = threading.Thread(target=self._print_lines, daemon=True)
        self._reader.start()

    def await_end(self) -> int:
        """Wait for the command's end, and return its exit code."""
        code = self.process.wait(_LONGEST_S)
        self._reader.join(10)
        self.say(f"exit code {code}")
        return code

    def say(self, text: str) -> None:
        sys.stdout.write(f"{time.monotonic() - self.began:7.1f} s  {text}\n")
        sys.stdout.flush()

    def _print_lines(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.say(f"| {line.rstrip()[:400]}")


@contextlib.contextmanager
def full_disk(folder: Path) -> Iterator[Fault]:
    with file_system(folder / "disk", "16m") as disk:
        filling = disk / "filling"

        def fill() -> None:
            with contextlib.suppress(OSError), filling.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

        yield Fault(str(disk / "out"), fill, filling.unlink)


@contextlib.contextmanager
def read_only_disk(folder: Path) -> Iterator[Fault]:
    with file_system(folder / "disk", "16m") as disk:

        def mount(how: str) -> None:
            # fails as long as a file is open for writing, which takes milliseconds
            while subprocess.run(
                ["mount", "-o", f"remount,{how}", str(disk)], check=False, stderr=subprocess.DEVNULL
            ).returncode:
                time.sleep(0.05)

        yield Fault(str(disk / "out"), lambda: mount("ro"), lambda: mount("rw"))


@contextlib.contextmanager
def absent_store(folder: Path) -> Iterator[Fault]:
    """A server of S3 that is stopped, and started again with its objects."""
    with ExitStack() as servers:
        server = servers.enter_context(serve_s3(folder))
        os.environ |= server.environment
        bucket = server.make_bucket("outputs")
        yield Fault(f"{bucket}/out", servers.close, lambda: servers.enter_context(serve_s3(folder, server.ports)))


FAULTS: dict[str, Callable[[Path], AbstractContextManager[Fault]]] = {
    "full": full_disk,
    "read-only": read_only_disk,
    "away": absent_store,
}


def show(fault: Fault, arguments: list[str], away_s: float) -> None:
    """Run a command, inflict the fault and mend it, and print what happens."""
    run = Command(arguments)
    try:
        while fault.num_done() < 2:
            assert run.process.poll() is None, "it ended before anything was done to it"
            time.sleep(0.2)
        run.say("two concepts are done; from here on, times are those since the fault")
        run.began = time.monotonic()
        fault.inflict()
        if away_s:
            time.sleep(away_s)
            fault.mend()
            run.say("MENDED")
            before = fault.num_done()
            while run.process.poll() is None and fault.num_done() == before:
                time.sleep(0.2)
            run.say(f"after {before} concepts, the next one is done")
        if run.await_end() == 0:
            return
    finally:
        kill(run.process.pid)
    if not away_s:
        fault.mend()
    again = Command(arguments)
    again.say("MENDED, and the same command again")
    assert again.await_end() == 0


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.seen_learning", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("fault", choices=FAULTS)
    parser.add_argument("--away-s", type=float, default=180.0, help="0: until the run ends (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = {"inversion": {"steps": 60, "batch_size": 2},
                    "actors": {"count": 1, "slots": 4, "checkpoint_steps": 20}}  # fmt: skip
        (folder / "job.toml").write_text(tiny_toml(tiny_stable_diffusion(folder / "model"), **settings))
        manifest = write_manifest(folder, [f"c{number:02d}" for number in range(NUM_CONCEPTS)])
        with FAULTS[options.fault](folder) as fault:
            show(fault, [str(manifest), "--output", fault.output, "--config", str(folder / "job.toml")], options.away_s)
            sys.stdout.write(f"{fault.num_done()} of {NUM_CONCEPTS} done\n")


if __name__ == "__main__":
    main()
