"""Take `benchmarks.gpu` to a machine with a GPU, PyTorch and transformers but no network, and bring back its tables.

    python benchmarks/gpu_job.py pack gpu_job.tar.gz
    tar -xzf gpu_job.tar.gz && python gpu_job/benchmarks/gpu_job.py run tables

`pack`, here, archives the code and, as wheels, the packages that such a machine lacks, without what they depend on.
`run`, there, installs the wheels beside the code and measures in two calls, each with a bound of its own, so that
neither takes the other's minutes: the U-Net as it is, then compiled. `--parts eager` and `--parts compiled` make them
two commands, for a machine that bounds a command's time. A call that is ended leaves the rows measured so far. In the
output folder: `eager.md`, `compiled.md` and, with what the programs said besides, `eager.log` and `compiled.log`. What
`run` does not know, such as `--shape sdxl`, goes to `benchmarks.gpu`.

This file imports nothing but the standard library: it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

SOURCES = ("benchmarks", "textual_inversion", "pipeline", "demo/model/tokenizer")
"""Parts of the checkout that the benchmark reads."""

PACKAGES = ("diffusers", "pydantic", "pydantic_core", "annotated-types", "typing-inspection", "typing_extensions")
"""Packages to carry, in the versions of `constraints.txt`. The machine must have torch, transformers and accelerate."""

PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")

PARTS: Mapping[str, Sequence[str]] = {
    "eager": ("--modes", "eager"),
    "compiled": ("--modes", "compiled,graphs", "--slots", "8"),
}

_SETTINGS = {
    "PYTHONUNBUFFERED": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}


def main(arguments: list[str] | None = None) -> int:
    options, others = parser().parse_known_args(arguments)
    if options.command == "pack":
        if others:
            parser().error(f"unrecognized arguments: {' '.join(others)}")
        pack(Path(options.archive), options.python)
        return 0
    return run(Path(options.output), options, others)


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        prog="python benchmarks/gpu_job.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = whole.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="make the archive; needs git, and a package index for pip")
    packing.add_argument("archive", help="a .tar.gz to write")
    packing.add_argument("--python", default="3.12", help="of the machine with the GPU (default: %(default)s)")
    running = commands.add_parser("run", help="measure")
    running.add_argument("output", help="folder for the tables")
    running.add_argument("--parts", default=",".join(PARTS), help="some of %(default)s (default: all)")
    running.add_argument("--eager-minutes", type=float, default=4.0, help="bound (default: %(default)s)")
    running.add_argument("--compiled-minutes", type=float, default=5.5, help="bound (default: %(default)s)")
    return whole


def pack(archive: Path, python: str) -> None:
    """Write the archive. Raises CalledProcessError where git or pip fails."""
    names = subprocess.run(
        ["git", "ls-files", "-z", *SOURCES], cwd=ROOT, capture_output=True, check=True, text=True
    ).stdout.split("\0")
    with tempfile.TemporaryDirectory() as wheels, tarfile.open(archive, "w:gz") as tar:
        download(pinned((ROOT / "constraints.txt").read_text()), wheels, python)
        tar.add(wheels, "gpu_job/wheels")
        for name in filter(None, names):
            tar.add(ROOT / name, f"gpu_job/{name}")
    say(f"{archive}: {archive.stat().st_size / 1e6:.1f} MB")


def pinned(constraints: str) -> list[str]:
    """Return the packages to carry as `name==version`. Raises ValueError for one without a version."""
    versions = dict(line.split("==") for line in constraints.splitlines() if "==" in line)
    if missing := [name for name in PACKAGES if name not in versions]:
        raise ValueError(f"constraints.txt: no version of {', '.join(missing)}")
    return [f"{name}=={versions[name].strip()}" for name in PACKAGES]


def download(packages: Sequence[str], folder: str, python: str) -> None:
    """Download wheels for another machine. Raises CalledProcessError where pip finds none."""
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    target = ["--python-version", python, "--implementation", "cp", "--only-binary=:all:", *platforms]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *target, "--dest", folder, *packages]
    subprocess.run(command, check=True)


def run(output: Path, options: argparse.Namespace, others: Sequence[str]) -> int:
    """Measure the parts; return 1 if one failed or was ended at its bound."""
    parts = options.parts.split(",")
    if unknown := set(parts) - {*PARTS}:
        parser().error(f"--parts: no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    output.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **_SETTINGS, "PYTHONPATH": os.pathsep.join([str(install()), str(ROOT)])}
    codes = []
    for part in parts:
        command = [sys.executable, "-m", "benchmarks.gpu", "--short", *PARTS[part], *others]
        minutes = getattr(options, f"{part}_minutes")
        code = bounded(command, output / f"{part}.md", output / f"{part}.log", 60 * minutes, environment)
        say((output / f"{part}.md").read_text())
        say(f"{part}: " + (f"exit code {code}" if code is not None else f"ended after {minutes:g} minutes"))
        codes.append(code)
    return 0 if not any(code != 0 for code in codes) else 1


def install() -> Path:
    """Install the wheels into a folder beside them and return it. Raises CalledProcessError where pip fails."""
    folder = ROOT / "site"
    wheels = sorted(str(path) for path in (ROOT / "wheels").glob("*.whl"))
    if wheels and not folder.exists():  # a checkout has none: its environment has the packages
        quiet = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--disable-pip-version-check"]
        subprocess.run([sys.executable, "-m", "pip", "install", *quiet, "--target", str(folder), *wheels], check=True)
    return folder


def bounded(
    command: Sequence[str], out: Path, err: Path, seconds: float, environment: Mapping[str, str] | None = None
) -> int | None:
    """Run a command with its output in files, for so long at most; return its exit code, or None if it was ended.

    Its children, such as a compiler's, are ended with it.
    """
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=stdout, stderr=stderr, start_new_session=True
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def say(text: str) -> None:
    sys.stdout.write(f"{text.rstrip()}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
