"""Render the kustomizations of `k8s/` by the real kustomize, as a cluster would get them."""

from __future__ import annotations

import shutil
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml", reason="no PyYAML to read manifests with")

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
OVERLAYS = ("cpu-demo", "encoder", "gpu", "gpu-spot")
KIND = "overlays/kind"
"""The demo's overlay with an image that has no digest."""
KUSTOMIZATIONS = (*(f"overlays/{name}" for name in OVERLAYS), KIND, "model-cache", "model-cache-s3", "monitoring")

Manifest = dict[str, Any]


def render(folder: str) -> list[Manifest]:
    """Return a kustomization's objects as a new copy that the caller may change; skip the test without kustomize."""
    objects: list[Manifest] = list(yaml.load_all(_rendered(folder), Loader=loader()))
    return objects


def only(objects: list[Manifest], kind: str, name: str = "") -> Manifest:
    """Return the only object of this kind (and name)."""
    found = [o for o in objects if o["kind"] == kind and name in ("", o["metadata"]["name"])]
    assert len(found) == 1, f"{len(found)} objects {kind} {name}"
    return found[0]


def loader() -> Any:
    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@lru_cache
def _rendered(folder: str) -> str:
    command = (
        ["kustomize", "build"]
        if shutil.which("kustomize")
        else ["kubectl", "kustomize"]
        if shutil.which("kubectl")
        else []
    )
    if not command:
        pytest.skip("neither kustomize nor kubectl is here to render manifests with")
    done = subprocess.run([*command, str(K8S / folder)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
