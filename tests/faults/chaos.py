"""`python -m tests.faults.chaos --concepts 200 --every-s 10`: kill a random process of a run again and again.

The run is `python -m pipeline.run` on a Ray of its own, with a tiny model. While it works, SIGKILL goes to a process of
a random kind among those that live: the driver, the raylet, the GCS, a learner, another worker, or an agent of Ray. The
command is run again whenever it has ended with anything but 0, as a scheduler would. In the end every concept must be
done, once, with the bytes of a run in which nothing happened; the command must never end with 0 before that, nor stand
still for longer than the stated bound.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config_file import load_config
from pipeline.exit_codes import STOPPED
from pipeline.ledger.records import from_json
from pipeline.store.storage import RunStore
from tests.faults.night import ROOT, learned_calmly
from tests.faults.processes import kill, processes
from tests.pipeline.runs import tiny_toml, write_manifest
from tests.tiny_models import tiny_stable_diffusion

MARK = "CHAOS_RUN"
"""Variable of the environment by which the processes of a run are known: all of them inherit it."""
LEARNED = ("learned_embeds.safetensors", "curve.parquet", "grid.png")
KINDS = {
    "pipeline.run": "driver",
    "gcs_server": "GCS",
    "raylet/raylet": "raylet",
    "ray::ModelActor": "learner",
    "ray::DashboardAgent": "agent",
    "ray::RuntimeEnvAgent": "agent",
    "dashboard": "agent",
    "log_monitor": "agent",
    "monitor.py": "agent",
    "ray::": "other worker",
}
"""Part of a process's command line -> its kind; the first that fits."""


@dataclass
class Chaos:
    """A run of the command, again and again, and what was done to it."""

    command: list[str]
    output: Path
    every_s: float
    stall_s: float
    random: random.Random
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    kills: list[tuple[float, str]] = field(default_factory=list)
    """Time since the beginning, s, and kind of each process killed."""
    codes: Counter[int] = field(default_factory=Counter)
    """Exit codes of the command; -9 where the driver was killed."""
    left: Counter[str] = field(default_factory=Counter)
    """Processes that lived five seconds after the command had ended, by kind."""

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        self.said = self.output.parent / "said.txt"

    def until_done(self, num_concepts: int, seconds: float) -> None:
        """Run the command until it ends with 0. Raises AssertionError if it lies, stands still, or takes too long."""
        while True:
            code = self._run_once(seconds)
            self.codes[code] += 1
            time.sleep(5.0)
            for pid, kind in self._living():
                self.left[kind] += 1
                kill(pid)
            done = len(self.records())
            say(f"{self._clock():6.0f} s  ended with {code}, {done} of {num_concepts} done, {len(self.kills)} killed")
            if code == 0:
                assert done == num_concepts, f"it ended with 0, and {done} of {num_concepts} are done"
                return
            assert code in (STOPPED, -9), f"it ended with {code}"

    def records(self) -> list[Path]:
        return sorted(self.output.glob("concepts/*/*/record.json"))

    def _run_once(self, seconds: float) -> int:
        """Start the command, kill a process every `every_s` from its first record on, and return its exit code."""
        environment = os.environ | {"RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1", MARK: self.mark}
        with self.said.open("ab") as said:
            run = subprocess.Popen(self.command, cwd=ROOT, env=environment, stdout=said, stderr=said)
        seen = len(self.records())
        moved_at = time.monotonic()
        next_kill = float("inf")
        while run.poll() is None:
            time.sleep(0.2)
            now = time.monotonic()
            if len(self.records()) != seen:
                seen, moved_at = len(self.records()), now
                if next_kill == float("inf"):
                    next_kill = now + self.random.uniform(0, self.every_s)
            if now >= next_kill:
                self._kill_one()
                next_kill = now + self.every_s
            if now - moved_at > self.stall_s or self._clock() > seconds:
                for pid, _ in self._living():
                    kill(pid)
                raise AssertionError(f"no concept ended for {now - moved_at:.0f} s, {self._clock():.0f} s in all")
        return run.returncode

    def _kill_one(self) -> None:
        by_kind: dict[str, list[int]] = {}
        for pid, kind in self._living():
            by_kind.setdefault(kind, []).append(pid)
        if by_kind:
            kind = self.random.choice(sorted(by_kind))
            kill(self.random.choice(by_kind[kind]))
            self.kills.append((self._clock(), kind))

    def _living(self) -> list[tuple[int, str]]:
        """Return the processes of the run, with their kinds."""
        marked = {pid for pid, environment in processes("environ") if f"{MARK}={self.mark}" in environment}
        found = []
        for pid in marked:
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
                if line:  # none of a process that has ended
                    found.append((pid, next((kind for part, kind in KINDS.items() if part in line), "other worker")))
        return found

    def _clock(self) -> float:
        return time.monotonic() - self.began


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def compare(output: Path, calm: RunStore, names: list[str]) -> None:
    """Raise AssertionError unless every concept is done, once, with the bytes of a calm run."""
    paths = sorted(output.glob("concepts/*/*/record.json"))
    found = [from_json(path.read_bytes()) for path in paths]
    assert sorted(record.concept_id for record in found) == names, "a concept is missing, or is there twice"
    assert {record.status for record in found} == {"done"}
    for path in paths:
        relative = path.parent.relative_to(output)
        for name in LEARNED:
            assert (path.parent / name).read_bytes() == calm.get(f"{relative}/{name}"), (relative, name)
    assert not list(output.glob("**/checkpoint.safetensors")), "a checkpoint was left"
    assert not (output / "lease.json").exists()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--concepts", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=8, help="steps of each concept (default: %(default)s)")
    parser.add_argument("--every-s", type=float, default=10.0, help="time between kills, s (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3600.0, help="time in all, s (default: %(default)s)")
    parser.add_argument("--stall-s", type=float, default=600.0, help="longest time without a concept's end, s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names = [f"c{number:03d}" for number in range(options.concepts)]
        manifest = write_manifest(folder, names)
        model = tiny_stable_diffusion(folder / "model")
        settings = {"inversion": {"steps": options.steps, "batch_size": 2},
                    "actors": {"count": 1, "slots": 4, "checkpoint_steps": 4, "max_attempts": 20}}  # fmt: skip
        (folder / "job.toml").write_text(tiny_toml(model, **settings))
        toml = (folder / "job.toml").read_text()
        began = time.monotonic()
        calm = learned_calmly(load_config(toml, manifest=str(manifest), output=str(folder / "calm"), device="cpu"))
        say(f"calm: {options.concepts} concepts learned in one process in {time.monotonic() - began:.0f} s")
        command = [sys.executable, "-m", "pipeline.run", str(manifest), "--output", str(folder / "out"),
                   "--config", str(folder / "job.toml")]  # fmt: skip
        chaos = Chaos(command, folder / "out", options.every_s, options.stall_s, random.Random(options.seed))
        try:
            chaos.until_done(options.concepts, options.seconds)
            compare(chaos.output, calm, names)
        finally:
            seconds = time.monotonic() - chaos.began
            for at, kind in chaos.kills:
                say(f"{at:6.0f} s  SIGKILL to {kind}")
            say(f"{len(chaos.kills)} killed in {seconds:.0f} s: {dict(Counter(kind for _, kind in chaos.kills))}")
            say(f"exit codes {dict(chaos.codes)}; alive 5 s after the command's end: {dict(chaos.left)}")
            said = (
                (folder / "said.txt").read_text(errors="replace").splitlines() if (folder / "said.txt").exists() else []
            )
            say(
                "\n".join(line for line in said if line.startswith(("ERROR", "  PROBLEM", "error:"))) or "no error told"
            )
        say(f"{options.concepts} done, each once, with the bytes of the calm run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
