"""Rules that the KubeRay operator (1.7) checks in code, beyond its schemas; each was read in its validation.go."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tests.k8s.render import Manifest, yaml

MAX_NAME = 47
"""Longest name of a RayJob; the operator derives the names of clusters, services and pods from it."""

_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_GATED = ("networkPolicy", "tlsOptions", "historyServerOptions")
_RESOURCE_PARAMS = ("num-cpus", "num-gpus", "memory", "resources")


def operator_problems(job: Manifest) -> list[str]:
    """Return every reason for which the operator would answer `ValidationFailed` or never reconcile."""
    spec = job["spec"]
    return [
        *_name_problems(job["metadata"]["name"]),
        *_lifetime_problems(spec),
        *_submission_problems(spec),
        *_cluster_problems(spec.get("rayClusterSpec") or {}, job["metadata"].get("annotations") or {}),
    ]


def groups_of(cluster: Manifest) -> list[tuple[str, Manifest]]:
    """Return (name, group) of the head and of every worker group."""
    workers = [(group["groupName"], group) for group in cluster.get("workerGroupSpecs") or []]
    return [("head", cluster["headGroupSpec"]), *workers]


def _name_problems(name: str) -> Iterator[str]:
    if len(name) > MAX_NAME:
        yield f"name {name!r} is longer than {MAX_NAME} characters"
    if not _DNS_1035.fullmatch(name):
        yield f"name {name!r} is no DNS-1035 label"


def _lifetime_problems(spec: Manifest) -> Iterator[str]:
    ends, ttl = spec.get("shutdownAfterJobFinishes", False), spec.get("ttlSecondsAfterFinished", 0)
    if spec.get("suspend") and not ends:
        yield "suspend needs shutdownAfterJobFinishes"
    if ttl < 0:
        yield "ttlSecondsAfterFinished is negative"
    if ttl > 0 and not ends:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if "deletionStrategy" in spec and (ends or ttl):
        yield "deletionStrategy excludes shutdownAfterJobFinishes and ttlSecondsAfterFinished"
    for name in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(name, 1) <= 0:
            yield f"{name} is not positive"
    if spec.get("backoffLimit", 0) < 0:
        yield "backoffLimit is negative"


def _submission_problems(spec: Manifest) -> Iterator[str]:
    mode, selects = spec.get("submissionMode", "K8sJobMode"), bool(spec.get("clusterSelector"))
    if mode not in ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"):
        yield f"submissionMode {mode!r} is none"
    if selects == bool(spec.get("rayClusterSpec")):
        yield "exactly one of rayClusterSpec and clusterSelector must be set"
    if selects and spec.get("suspend"):
        yield "clusterSelector excludes suspend"
    if spec.get("backoffLimit", 0) and (selects or mode == "InteractiveMode"):
        yield "backoffLimit excludes clusterSelector and InteractiveMode"
    if mode == "SidecarMode":
        for name in ("submitterPodTemplate", "submitterConfig"):
            if name in spec:
                yield f"SidecarMode excludes {name}"
    policy = (spec.get("submitterPodTemplate") or {}).get("spec", {}).get("restartPolicy", "Never")
    if policy not in ("Never", "OnFailure"):
        yield f"submitterPodTemplate: a Job's pods cannot have restartPolicy {policy}"
    if not isinstance(yaml.safe_load(spec.get("runtimeEnvYAML", "{}")), dict):
        yield "runtimeEnvYAML is no mapping"


def _cluster_problems(cluster: Manifest, annotations: dict[str, str]) -> Iterator[str]:
    if not cluster:
        return
    autoscaler = cluster.get("autoscalerOptions") or {}
    v2 = cluster.get("enableInTreeAutoscaling", False) and autoscaler.get("version") == "v2"
    names = [name for name, _ in groups_of(cluster)]
    if len(set(names)) < len(names):
        yield f"two groups have one name: {names}"
    for name, group in groups_of(cluster):
        yield from (f"group {name}: {problem}" for problem in _group_problems(group))
        policy = group["template"]["spec"].get("restartPolicy", "Never")
        if v2 and policy != "Never":
            yield f"group {name}: restartPolicy must be Never or unset with autoscaler v2"
        if group.get("suspend") and cluster.get("enableInTreeAutoscaling"):
            yield f"group {name}: cannot be suspended with an autoscaler"
        for field in ("idleTimeoutSeconds", "priority"):
            if group.get(field) and not v2:
                yield f"group {name}: {field} needs autoscaler v2"
    for field in _GATED:
        if field in cluster:
            yield f"{field} needs a feature gate that is off by default"
    environment = _environment(cluster["headGroupSpec"])
    if "RAY_enable_autoscaler_v2" in environment:
        yield "head: set autoscalerOptions.version, not RAY_enable_autoscaler_v2"
    if "RAY_REDIS_ADDRESS" in environment and "gcsFaultToleranceOptions" not in cluster:
        yield "head: RAY_REDIS_ADDRESS needs gcsFaultToleranceOptions"
    if "ray.io/ft-enabled" in annotations and "gcsFaultToleranceOptions" in cluster:
        yield "ray.io/ft-enabled excludes gcsFaultToleranceOptions"
    yield from _auth_problems(cluster)


def _auth_problems(cluster: Manifest) -> Iterator[str]:
    auth = cluster.get("authOptions") or {}
    if auth.get("enableK8sTokenAuth"):
        yield "authOptions.enableK8sTokenAuth is not for RayJobs"
    if auth.get("mode") == "token":
        version = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)", str(cluster.get("rayVersion", "")))
        if not version:
            yield f"authOptions: rayVersion {cluster.get('rayVersion')!r} is no version"
        elif tuple(map(int, version.groups())) < (2, 52, 0):
            yield "authOptions: token needs Ray 2.52.0"


def _group_problems(group: Manifest) -> Iterator[str]:
    params, labels = group.get("rayStartParams") or {}, group.get("labels") or {}
    if not group["template"]["spec"].get("containers"):
        yield "no container"
    if group.get("resources") and any(params.get(name) for name in _RESOURCE_PARAMS):
        yield "resources in rayStartParams and in resources"
    if "labels" in params:
        yield "labels belong in labels, not in rayStartParams"
    for key, value in labels.items():
        if not _LABEL_KEY.fullmatch(key) or not _LABEL_VALUE.fullmatch(value):
            yield f"label {key}={value} has not the syntax of Kubernetes"
    if "groupName" in group:
        low, now, high = (group.get(f, 0) for f in ("minReplicas", "replicas", "maxReplicas"))
        if not 0 <= low <= now <= high or high == 0:
            yield f"replicas {low} <= {now} <= {high} does not hold"


def _environment(group: Manifest) -> dict[str, Any]:
    return {entry["name"]: entry.get("value") for entry in group["template"]["spec"]["containers"][0].get("env") or []}
