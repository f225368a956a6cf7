"""Rules for this project's manifests: restricted pods, fixed images, no secrets, times that agree with the
pipeline's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from k8s.preflight import find_notes
from pipeline.config import RunConfig
from tests.k8s.operator_rules import groups_of
from tests.k8s.render import Manifest, yaml

_BY_DIGEST = re.compile(r"\S+@sha256:[0-9a-f]{64}")
_SECRET = re.compile(r"(ACCESS_KEY|SECRET|PASSWORD|TOKEN)(?!IZERS)", re.IGNORECASE)
_UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
_DRIVER_SLACK_S = 5
"""Seconds that the driver waits for its actors in addition to `actors.drain_s`."""

_TEMPLATES = {
    "Job": ("spec.template",),
    "CronJob": ("spec.jobTemplate.spec.template",),
    "RayJob": ("spec.submitterPodTemplate", "spec.rayClusterSpec.headGroupSpec.template"),
}


def pods_of(manifest: Manifest) -> Iterator[tuple[str, Manifest]]:
    """Yield (place, pod specification) of every pod that the object makes."""
    for path in _TEMPLATES.get(manifest["kind"], ()):
        yield path, _at(manifest, f"{path}.spec")
    if manifest["kind"] == "RayJob":
        for name, group in groups_of(manifest["spec"]["rayClusterSpec"])[1:]:
            yield f"group {name}", group["template"]["spec"]


def pod_problems(manifests: Iterable[Manifest]) -> list[str]:
    found = []
    for manifest in manifests:
        for place, pod in pods_of(manifest):
            problems = [*_restriction_problems(pod), *_container_problems(pod), *_volume_problems(pod)]
            found += [f"{manifest['kind']} {place}: {problem}" for problem in problems]
    return found


def reference_problems(manifests: Iterable[Manifest]) -> list[str]:
    """Return the config maps, volumes and accounts that pods name and no manifest defines."""
    known = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests}
    wanted = {reference for manifest in manifests for _, pod in pods_of(manifest) for reference in _references(pod)}
    return [f"{kind} {name} is nowhere" for kind, name in sorted(wanted - known)]


def ray_problems(job: Manifest, config: RunConfig, ray_version: str) -> list[str]:
    """Check the RayJob against the pipeline's configuration in its config map and against the project's version of
    Ray."""
    cluster = job["spec"]["rayClusterSpec"]
    return [
        *_run_problems(job["spec"]),
        *_time_problems(job, config),
        *_capacity_problems(cluster, config),
        *_ray_group_problems(cluster),
        *([] if cluster["rayVersion"] == ray_version else [f"rayVersion is not {ray_version}"]),
        *([] if (cluster.get("authOptions") or {}).get("mode") == "token" else ["no token authentication"]),
        *([] if not set("'\"|;&$<>`") & set(job["spec"]["entrypoint"]) else ["entrypoint has shell syntax"]),
    ]


def nightly_problems(cron: Manifest, job: Manifest) -> list[str]:
    """Check the CronJob that copies the RayJob every night."""
    spec = cron["spec"]
    environment = _environment(_at(cron, "spec.jobTemplate.spec.template.spec.containers")[0])
    checks = {
        "two nights may overlap: concurrencyPolicy is not Forbid": spec.get("concurrencyPolicy") == "Forbid",
        "no timeZone, or another than its script's": spec.get("timeZone") == environment.get("TIME_ZONE") is not None,
        "startingDeadlineSeconds is none of this night": 0 < spec.get("startingDeadlineSeconds", 0) < 24 * 3600,
        "TEMPLATE is not the RayJob": environment.get("TEMPLATE") == job["metadata"]["name"],
        "the template would run by itself: it is not suspended": job["spec"].get("suspend") is True,
        "no podFailurePolicy: a run that failed would be started again": "podFailurePolicy"
        in _at(cron, "spec.jobTemplate.spec"),
    }
    return [problem for problem, holds in checks.items() if not holds]


def _run_problems(spec: Manifest) -> Iterator[str]:
    """Check that a run ends, gives its nodes back, and resumes by itself after the loss of its head."""
    cluster = spec["rayClusterSpec"]
    autoscaler = cluster.get("autoscalerOptions") or {}
    if spec.get("submissionMode", "K8sJobMode") != "K8sJobMode":
        yield "submissionMode is not K8sJobMode"
    for name in ("activeDeadlineSeconds", "preRunningDeadlineSeconds", "ttlSecondsAfterFinished", "backoffLimit"):
        if not spec.get(name):
            yield f"{name} is not set"
    if not cluster.get("enableInTreeAutoscaling") or autoscaler.get("version") != "v2":
        yield "no autoscaler v2: workers that are at 0 stay there"
    if not 0 < autoscaler.get("idleTimeoutSeconds", 0) <= 600:
        yield "idle nodes are not given back within ten minutes"
    for name, group in groups_of(cluster):
        if group.get("minReplicas"):
            yield f"group {name}: keeps nodes that do nothing"
        if "metrics" not in {port["name"] for port in group["template"]["spec"]["containers"][0].get("ports", [])}:
            yield f"group {name}: no port named metrics to scrape"


def _time_problems(job: Manifest, config: RunConfig) -> Iterator[str]:
    drain_s = config.actors.drain_s + _DRIVER_SLACK_S
    runtime = yaml.safe_load(job["spec"].get("runtimeEnvYAML", "{}"))
    environment = runtime.get("env_vars", {}) if isinstance(runtime, dict) else {}
    if float(environment.get("RAY_JOB_STOP_WAIT_TIME_S", 3)) <= drain_s:
        yield f"RAY_JOB_STOP_WAIT_TIME_S is not above the {drain_s:g} s the pipeline drains for"
    for name, group in groups_of(job["spec"]["rayClusterSpec"]):
        pod = group["template"]["spec"]
        grace_s = pod.get("terminationGracePeriodSeconds", 30)
        ray_s = float(_environment(pod["containers"][0]).get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", 30))
        if grace_s <= max(drain_s, ray_s):
            yield f"group {name}: terminationGracePeriodSeconds is not above both drains ({drain_s:g} s, {ray_s:g} s)"


def _capacity_problems(cluster: Manifest, config: RunConfig) -> Iterator[str]:
    if cluster["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
        yield "the head takes work: num-cpus is not 0"
    resource, share = ("nvidia.com/gpu", config.actors.gpus) if config.device == "cuda" else ("cpu", config.actors.cpus)
    room = 0.0
    for _, group in groups_of(cluster)[1:]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        room = max(room, group["maxReplicas"] * float(limits.get(resource, 0)))
    if not 1 <= config.actors.count <= room / share:
        yield f"actors.count {config.actors.count} does not fit into a group with {room:g} {resource}"
    if config.device == "auto":
        yield "device auto takes what a cluster of no workers has: no GPU"


def _ray_group_problems(cluster: Manifest) -> Iterator[str]:
    for name, group in groups_of(cluster):
        pod = group["template"]["spec"]
        container = pod["containers"][0]
        if _environment(container).get("HF_HUB_OFFLINE") != "1":
            yield f"group {name}: HF_HUB_OFFLINE is not 1"
        mounts = {mount["mountPath"]: mount for mount in container.get("volumeMounts", [])}
        if "/models" in mounts and not mounts["/models"].get("readOnly"):
            yield f"group {name}: the models can be written"
        volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
        shm = volumes.get(mounts.get("/dev/shm", {}).get("name"), {}).get("emptyDir", {})
        store = int(group["rayStartParams"].get("object-store-memory", 0))
        if shm.get("medium") != "Memory" or not 0 < store < _bytes(shm.get("sizeLimit", "0")):
            yield f"group {name}: /dev/shm is no memory that holds the object store"
        if "nvidia.com/gpu" in container["resources"]["limits"]:
            if "nvidia.com/gpu" not in {toleration.get("key") for toleration in pod.get("tolerations", [])}:
                yield f"group {name}: does not tolerate GPU nodes"
            yield from (f"group {name}: {note}" for note in find_notes([{"spec": pod}]))


def _restriction_problems(pod: Manifest) -> Iterator[str]:
    """Check a pod against the `restricted` pod security standard and for a read-only file system."""
    security = pod.get("securityContext") or {}
    if not security.get("runAsNonRoot") or not security.get("runAsUser"):
        yield "may run as root"
    if (security.get("seccompProfile") or {}).get("type") != "RuntimeDefault":
        yield "no seccomp profile"
    for container in _containers(pod):
        own = container.get("securityContext") or {}
        if own.get("allowPrivilegeEscalation") is not False:
            yield f"{container['name']}: may gain privileges"
        if "ALL" not in (own.get("capabilities") or {}).get("drop", []):
            yield f"{container['name']}: keeps capabilities"
        if not own.get("readOnlyRootFilesystem"):
            yield f"{container['name']}: its file system can be written"
    if pod.get("hostNetwork") or any("hostPath" in volume for volume in pod.get("volumes", [])):
        yield "uses the host"


def _container_problems(pod: Manifest) -> Iterator[str]:
    for container in _containers(pod):
        name, resources = container["name"], container.get("resources") or {}
        if not _BY_DIGEST.fullmatch(container["image"]):
            yield f"{name}: image {container['image']} is not fixed by a digest"
        if not {"cpu", "memory"} <= set(resources.get("limits", {})):
            yield f"{name}: no limits on cpu and memory"
        if resources.get("requests") != resources.get("limits"):
            yield f"{name}: requests differ from limits"
        for key, value in _environment(container).items():
            if value and _SECRET.search(key):
                yield f"{name}: {key} is a secret in plain text"


def _volume_problems(pod: Manifest) -> Iterator[str]:
    there = {volume["name"] for volume in pod.get("volumes", [])}
    used = {mount["name"] for container in _containers(pod) for mount in container.get("volumeMounts", [])}
    for name in sorted(used ^ there):
        yield f"volume {name} is {'not declared' if name in used else 'not mounted'}"


def _references(pod: Manifest) -> Iterator[tuple[str, str]]:
    if "serviceAccountName" in pod:
        yield "ServiceAccount", pod["serviceAccountName"]
    for volume in pod.get("volumes", []):
        if "configMap" in volume:
            yield "ConfigMap", volume["configMap"]["name"]
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]
    for container in _containers(pod):
        for source in container.get("envFrom", []):
            if not source["configMapRef"].get("optional"):
                yield "ConfigMap", source["configMapRef"]["name"]


def _containers(pod: Manifest) -> list[Manifest]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def _environment(container: Manifest) -> dict[str, Any]:
    return {entry["name"]: entry.get("value") for entry in container.get("env", [])}


def _bytes(quantity: str) -> float:
    unit = quantity[-2:]
    return float(quantity[:-2]) * _UNITS[unit] if unit in _UNITS else float(quantity)


def _at(manifest: Manifest, path: str) -> Any:
    for name in path.split("."):
        manifest = manifest[name]
    return manifest
