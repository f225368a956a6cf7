"""Refuse kustomizations that hold a placeholder or do not fit together, before they are applied.

    python k8s/preflight.py k8s/overlays/gpu k8s/model-cache

Each kustomization is rendered as `kubectl apply -k` renders it, so what an overlay of yours replaces is not counted.
Needs kubectl or kustomize on the path, and PyYAML, which Ray brings; no cluster is asked. Exit codes: 0 nothing is left
to fill in, 2 something is, something does not fit, or a kustomization cannot be rendered.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

Manifest = dict[str, Any]

RENDERERS = (["kubectl", "kustomize"], ["kustomize", "build"])
LABELS_OF_RUNNING_NODES = ("nvidia.com/", "feature.node.kubernetes.io/")
"""Prefixes of node labels that an agent on the node sets after it has started."""


@dataclass(frozen=True, slots=True)
class Placeholder:
    """A value that these manifests cannot know."""

    text: str
    """What stands in the files until it is filled in."""
    meaning: str
    file: str
    """Where to write the value, as in the runbook's table."""


PLACEHOLDERS = (
    Placeholder("registry.example.com", "the registry of the image", "kustomization.yaml, newName"),
    Placeholder("sha256:" + 64 * "0", "the digest of the image", "kustomization.yaml, digest"),
    Placeholder("example-bucket", "the bucket", "job.toml, or models.yaml of the fill from S3"),
    Placeholder("arn:aws:iam::000000000000:role/concepts", "the cloud role", "service_account.yaml"),
    Placeholder("example-region", "the store's region", "storage.env"),
    Placeholder("example-storage-class", "a storage class with ReadWriteMany", "volume.yaml"),
)


class NotRendered(Exception):
    """A kustomization that cannot be rendered; the message says why."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python k8s/preflight.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a kustomization, as for kubectl apply -k")
    is_refused = False
    everything: list[Manifest] = []
    for folder in parser.parse_args(arguments).folders:
        try:
            manifests = render(folder)
            problems = list(find_problems(manifests))
        except NotRendered as error:
            manifests, problems = [], [str(error)]
        is_refused |= bool(problems)
        everything += manifests
        lines = problems or [f"{len(manifests)} objects, nothing is left to fill in"]
        lines += [f"note: {note}" for note in find_notes(manifests)]
        sys.stdout.write("".join(f"{folder}: {line}\n" for line in lines))
    mismatches = list(find_mismatches(everything))
    sys.stdout.write("".join(f"{line}\n" for line in mismatches))
    return 2 if is_refused or mismatches else 0


def render(folder: str) -> list[Manifest]:
    """Return a kustomization's objects as a cluster would get them; raises NotRendered."""
    command = next((command for command in RENDERERS if shutil.which(command[0])), None)
    if command is None:
        raise NotRendered("neither kubectl nor kustomize is on the path to render it with")
    done = subprocess.run([*command, folder], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NotRendered(done.stderr.strip())
    return list(yaml.safe_load_all(done.stdout))


def find_problems(manifests: list[Manifest]) -> Iterator[str]:
    """Yield a line for every placeholder, and for a base that no overlay has completed."""
    places: dict[Placeholder, list[str]] = {each: [] for each in PLACEHOLDERS}
    for manifest in manifests:
        name = f"{manifest['kind']} {manifest['metadata']['name']}"
        if manifest["kind"] == "RayJob" and not manifest["spec"]["rayClusterSpec"].get("workerGroupSpecs"):
            yield f"{name} has no workers: apply an overlay"
        try:
            texts = list(_texts(manifest))
        except tomllib.TOMLDecodeError as error:
            yield f"{name}: a file in it is no TOML: {error}"
            continue
        for place, text in texts:
            for each in PLACEHOLDERS:
                if each.text in text:
                    places[each].append(f"{name} {place}")
    for each, found in places.items():
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            yield f"{each.text} stands for {each.meaning}: write yours in {each.file} (read by {found[0]}{more})"


def find_mismatches(manifests: list[Manifest]) -> Iterator[str]:
    """Yield a line for more actors than workers have GPUs, and for a model that a Job among these fills not."""
    jobs = [m for m in manifests if m["kind"] == "ConfigMap" and "job.toml" in m.get("data", {})]
    fills = [m for m in manifests if m["kind"] == "Job"]
    filled = {
        container["command"][-1].removeprefix("--local-dir=")
        for _, pod in _pods(fills)
        for container in pod.get("initContainers", []) + pod["containers"]
    }
    for job in jobs:
        try:
            settings = tomllib.loads(job["data"]["job.toml"])
        except tomllib.TOMLDecodeError:  # a problem of its own
            continue
        for name in ("model", "extractor"):
            if fills and settings.get(name, "").startswith("/models/") and settings[name] not in filled:
                yield f"job.toml: {name} is {settings[name]}, but the Job fills {', '.join(sorted(filled))}"
        actors = settings.get("actors", {})
        groups = [g for m in manifests if m["kind"] == "RayJob" for g in _groups(m)]
        room = max((group["maxReplicas"] * _gpus(group) for group in groups), default=0)
        if settings.get("device") == "cuda" and actors.get("count", 0) * actors.get("gpus", 1) > room:
            yield f"job.toml: actors.count is {actors['count']}, but no group of workers grows beyond {room:g} GPUs"


def _groups(ray_job: Manifest) -> list[Manifest]:
    return ray_job["spec"]["rayClusterSpec"].get("workerGroupSpecs") or []


def _gpus(group: Manifest) -> float:
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    return float(limits.get("nvidia.com/gpu", 0))


def find_notes(manifests: list[Manifest]) -> Iterator[str]:
    """Yield a line for every node label that keeps an autoscaler from starting a first node."""
    for manifest in manifests:
        for place, pod in _pods(manifest):
            for label in pod.get("nodeSelector") or {}:
                if label.startswith(LABELS_OF_RUNNING_NODES):
                    yield (
                        f"{place} asks for nodes with the label {label}, which a node has only once it runs: an "
                        "autoscaler may start none. Ask by resources, or by a label of the node group"
                    )


def _pods(value: Any, place: str = "") -> Iterator[tuple[str, Manifest]]:
    """Yield (place, specification) of every pod in an object, whatever its kind."""
    if isinstance(value, dict):
        if "containers" in value:
            yield place, value
        for key, item in value.items():
            yield from _pods(item, f"{place}.{key}".lstrip("."))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _pods(item, f"{place}[{number}]")


def _texts(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Yield (place, text) of every text in an object, those in TOML files of config maps by their keys."""
    if isinstance(value, dict):
        for key, item in value.items():
            inner = f"{place}.{key}".lstrip(".")
            yield from _texts(tomllib.loads(item) if isinstance(item, str) and key.endswith(".toml") else item, inner)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _texts(item, f"{place}[{number}]")
    elif isinstance(value, str):
        yield place, value


if __name__ == "__main__":
    sys.exit(main())
