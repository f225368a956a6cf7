"""Check objects against the schema of their kind and refuse unknown fields, as `kubectl apply --validate=strict`
does."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from tests.k8s.render import Manifest, loader, yaml

_PREFIX = {"RayJob": "rayjobs", "RayCluster": "rayclusters"}

_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_DURATION = {"type": "string", "pattern": r"^\d+(s|m|h)$"}


def _closed(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


_METADATA = _closed(("name",), name={"type": "string"}, namespace={"type": "string"}, labels=_TEXTS)
_RELABELING = _closed(
    ("action",),
    action={"enum": ["replace", "keep", "drop"]},
    sourceLabels={"type": "array", "items": {"type": "string"}},
    targetLabel={"type": "string"},
    regex={"type": "string"},
)
_ENDPOINT = _closed(
    ("port",), port={"type": "string"}, interval=_DURATION, relabelings={"type": "array", "items": _RELABELING}
)
_RULE = _closed(
    ("alert", "expr", "labels", "annotations"),
    alert={"type": "string"},
    expr={"type": "string"},
    labels=_TEXTS,
    annotations=_TEXTS,
    **{"for": _DURATION},
)
_MONITORING = {
    # The Prometheus operator's kinds, as far as they are used here: its own schemas are in no package registry.
    "PodMonitor": _closed(
        ("selector", "podMetricsEndpoints"),
        jobLabel={"type": "string"},
        selector=_closed(matchLabels=_TEXTS),
        podMetricsEndpoints={"type": "array", "minItems": 1, "items": _ENDPOINT},
    ),
    "PrometheusRule": _closed(
        ("groups",),
        groups={
            "type": "array",
            "items": _closed(("name", "rules"), name={"type": "string"}, rules={"type": "array", "items": _RULE}),
        },
    ),
}


def schema_problems(manifest: Manifest) -> list[str]:
    """Return the object's violations of its schema; skip the test where the schema's source is missing."""
    group = manifest["apiVersion"].partition("/")[0]
    checks: dict[str, Callable[[Manifest], list[str]]] = {
        "ray.io": _ray_problems,
        "monitoring.coreos.com": _monitoring_problems,
    }
    return checks.get(group, _core_problems)(manifest)


def _core_problems(manifest: Manifest) -> list[str]:
    validate = pytest.importorskip("kubernetes_validate", reason="no kubernetes-validate for the core kinds")
    try:
        validate.validate(manifest, validate.latest_version(), strict=True)
    except validate.ValidationError as error:
        return [f"{manifest['kind']} {'.'.join(map(str, error.absolute_path))}: {error.message}"]
    return []


def _ray_problems(manifest: Manifest) -> list[str]:
    return _errors(manifest, _ray_schema(manifest["kind"], manifest["apiVersion"].partition("/")[2]))


def _monitoring_problems(manifest: Manifest) -> list[str]:
    schema = _closed(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": "monitoring.coreos.com/v1"},
        kind={"type": "string"},
        metadata=_METADATA,
        spec=_MONITORING[manifest["kind"]],
    )
    return _errors(manifest, schema)


def _errors(manifest: Manifest, schema: dict[str, Any]) -> list[str]:
    jsonschema = pytest.importorskip("jsonschema", reason="no jsonschema to check against")
    found = jsonschema.Draft7Validator(schema).iter_errors(manifest)
    return [f"{manifest['kind']} {'.'.join(map(str, e.absolute_path))}: {e.message}" for e in found]


@lru_cache
def _ray_schema(kind: str, version: str) -> dict[str, Any]:
    """Return the custom resource definition's schema, from the folder that KUBERAY_CRDS names."""
    folder = os.environ.get("KUBERAY_CRDS", "")
    if not folder:
        pytest.skip("KUBERAY_CRDS names no folder with KubeRay's custom resource definitions")
    definition = yaml.load((Path(folder) / f"ray.io_{_PREFIX[kind]}.yaml").read_text(), Loader=loader())
    (schema,) = [v["schema"]["openAPIV3Schema"] for v in definition["spec"]["versions"] if v["name"] == version]
    schema["properties"]["metadata"] = {"type": "object"}
    closed: dict[str, Any] = _strict(schema)
    return closed


def _strict(schema: Any) -> Any:
    """Convert a structural schema to a JSON schema that refuses unknown fields."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: part if key in ("default", "enum") else _strict(part) for key, part in schema.items()}
    out.pop("format", None)
    if out.get("x-kubernetes-int-or-string"):
        out.pop("type", None)
        out["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if out.pop("nullable", False) and "type" in out:
        out["type"] = [out["type"], "null"]
    is_open = "additionalProperties" in out or out.get("x-kubernetes-preserve-unknown-fields")
    if out.get("type") == "object" and "properties" in out and not is_open:
        out["additionalProperties"] = False
    return out
