"""The image's Dockerfile, without an engine: linted; its paths, versions and targets against the repository."""

from __future__ import annotations

import fnmatch
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.k8s.render import K8S, ROOT

DOCKERFILE = K8S / "image" / "Dockerfile"


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, arguments) with continued lines joined, comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(name, rest) for name, _, rest in (line.strip().partition(" ") for line in joined.splitlines()) if name]


def stages(text: str) -> dict[str, list[tuple[str, str]]]:
    """Stage -> its instructions, those of the stages it is built on first."""
    found: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    for name, rest in instructions(text):
        if name == "FROM":
            base, _, stage = rest.partition(" AS ")
            current = found[stage] = list(found.get(base, []))
        current.append((name, rest))
    return found


def image_problems(text: str) -> list[str]:
    """What is wrong with a Dockerfile of ours."""
    found = []
    bases = [rest for name, rest in instructions(text) if name == "ARG" and rest.startswith("PYTHON_IMAGE=")]
    if len(bases) != 1 or not re.search(r":3\.11\.\d+-slim-bookworm@sha256:[0-9a-f]{64}$", bases[0]):
        found.append("the base is not Python 3.11 fixed by version and digest")
    for stage in ("cpu", "cuda"):
        body = stages(text).get(stage, [])
        if ("USER", "1000:1000") not in body:
            found.append(f"{stage} runs as root")
        if any("demo" in rest for name, rest in body if name == "COPY") != (stage == "cpu"):
            found.append(f"{stage}: the demo belongs in the CPU image only")
        if not any("/etc/profile.d/" in rest for name, rest in body if name == "RUN"):
            found.append(f"{stage}: a login shell does not find the virtual environment")
        if any(re.search(r"install .*\bgcc\b", rest) for name, rest in body if name == "RUN") != (stage == "cuda"):
            found.append(f"{stage}: a C compiler, which torch.compile needs on a GPU, belongs in the CUDA image only")
    for name, rest in instructions(text):
        if name == "ADD":
            found.append("ADD fetches and unpacks unseen; use COPY")
        if name == "COPY" and "--from" not in rest:
            found += [f"{path} is not here" for path in rest.split()[:-1] if not (ROOT / path).exists()]
        if "pip install" in rest and "--constraint constraints.txt" not in rest:
            found.append("pip installs without the constraints")
        if name in ("ARG", "ENV") and re.search(r"SECRET|PASSWORD|_KEY|TOKEN", rest):
            found.append(f"{name} {rest}: a secret stays in the image")
    return found


def test_dockerfile() -> None:
    assert image_problems(DOCKERFILE.read_text()) == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("3.11.16-slim-bookworm", "3.12.1-slim-bookworm", "not Python 3.11"),
        ("@sha256:", "@sha256:x", "fixed by version and digest"),
        ("USER 1000:1000", "USER root", "runs as root"),
        ("COPY pipeline ./pipeline", "COPY pipelines ./pipeline", "pipelines is not here"),
        ("COPY demo/model ./demo/model", "", "is not here"),
        ("--constraint constraints.txt ", "", "without the constraints"),
        ("ENV PIP_NO_CACHE_DIR=1", "ENV AWS_SECRET_ACCESS_KEY=x", "a secret stays"),
        ("COPY textual_inversion", "ADD textual_inversion", "use COPY"),
        ("/etc/profile.d/", "/root/", "a login shell"),
        ("--no-install-recommends gcc libc6-dev", "--no-install-recommends libc6-dev", "cuda: a C compiler"),
        ("--no-install-recommends wget", "--no-install-recommends wget gcc", "cpu: a C compiler"),
        ("ENV NVIDIA_VISIBLE_DEVICES", "COPY demo ./demo\nENV NVIDIA_VISIBLE_DEVICES", "in the CPU image only"),
    ],
)
def test_mistakes_are_found(old: str, new: str, message: str) -> None:
    text = DOCKERFILE.read_text()
    assert old in text
    changed = text.replace(old, new)
    if message == "is not here":
        changed += "\nCOPY demo/no_model ./demo/model"
    assert any(message in problem for problem in image_problems(changed))


def test_hadolint() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if not hadolint:
        pytest.skip("no hadolint to lint the Dockerfile with")
    done = subprocess.run([hadolint, "--no-color", str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_context_holds_what_is_copied_and_little_else() -> None:
    """.dockerignore refuses everything and lets back in what the Dockerfile names."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    let_in = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        path
        for name, rest in instructions(DOCKERFILE.read_text())
        if name == "COPY" and "--from" not in rest
        for path in rest.split()[:-1]
    }
    assert copied == let_in
    assert any(fnmatch.fnmatch("pipeline/__pycache__", line) for line in lines[1:])


def test_dependencies_are_the_projects() -> None:
    """The one-liner that takes them out of pyproject.toml."""
    (command,) = re.findall(r"RUN python -c '([^']+)'", DOCKERFILE.read_text())
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


def packages_of(requirements: Iterable[str]) -> dict[str, str]:
    """Package -> version, of these requirements and of all that they require, as they are installed here."""
    found: dict[str, str] = {}
    waiting = [Requirement(line) for line in requirements]
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        distribution = importlib.metadata.distribution(name)
        is_new = name not in found
        found[name] = distribution.version
        for line in distribution.requires or []:
            needed = Requirement(line)
            extras = [{"extra": extra} for extra in wanted.extras] + ([{"extra": ""}] if is_new else [])
            if any(needed.marker is None or needed.marker.evaluate(extra) for extra in extras):
                waiting.append(needed)
    return found


def test_every_package_of_the_image_is_pinned() -> None:
    """The image's pip may choose nothing: what it installs is what the tests ran with."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pinned = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines if line)}
    assert {"triton", "nvidia-cublas", "cuda-bindings"} <= set(pinned)  # of the CUDA build, which may not be here
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    there = packages_of(wanted)
    assert {"ray", "torch", "diffusers", "s3fs", "aiobotocore", "grpcio"} <= set(there)  # those of extras, too
    free = {name: version for name, version in there.items() if pinned.get(name) != version.partition("+")[0]}
    assert free == {}


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_make_image(target: str) -> None:
    done = subprocess.run(
        ["make", "-n", "image", f"IMAGE_TARGET={target}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert f"--target {target}" in done.stdout
    (path,) = re.findall(r"--file (\S+)", done.stdout)
    assert ROOT / path == DOCKERFILE
    assert target in stages(DOCKERFILE.read_text())
