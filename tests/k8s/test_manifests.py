"""The manifests of `k8s/`, checked without a cluster: rendered, then against schemas, the operator's rules and ours.

And the checks themselves: every kind of mistake is planted once and must be found.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest

from pipeline.config import RunConfig
from pipeline.config_file import load_config
from tests.k8s.house_rules import nightly_problems, pod_problems, ray_problems, reference_problems
from tests.k8s.operator_rules import operator_problems
from tests.k8s.render import K8S, KIND, KUSTOMIZATIONS, OVERLAYS, ROOT, Manifest, only, render
from tests.k8s.schemas import schema_problems

RAY_VERSION = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]  # type: ignore[index]


def configuration(objects: list[Manifest]) -> RunConfig:
    return load_config(only(objects, "ConfigMap", "job")["data"]["job.toml"])


def rule_problems(objects: list[Manifest]) -> list[str]:
    """Everything but the schemas; the models' volume is made beforehand, by another kustomization."""
    job = only(objects, "RayJob")
    nights = [manifest for manifest in objects if manifest["kind"] == "CronJob"]
    return [
        *operator_problems(job),
        *(problem for cron in nights for problem in nightly_problems(cron, job)),
        *pod_problems(objects),
        *reference_problems([*objects, only(render("model-cache"), "PersistentVolumeClaim")]),
        *ray_problems(job, configuration(objects), RAY_VERSION),
    ]


@pytest.mark.parametrize("folder", KUSTOMIZATIONS)
def test_schemas(folder: str) -> None:
    assert [problem for manifest in render(folder) for problem in schema_problems(manifest)] == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_rules(overlay: str) -> None:
    assert rule_problems(render(f"overlays/{overlay}")) == []


def test_kind_runs_the_demo_with_an_image_of_its_node() -> None:
    objects = render(KIND)
    problems = rule_problems(objects)
    assert {problem.partition(": ")[2].partition(": ")[2] for problem in problems} == {
        "image textual-inversion-ray:local is not fixed by a digest"
    }
    assert len(problems) == 3  # submitter, head and worker
    assert _cluster(objects)["autoscalerOptions"]["imagePullPolicy"] == "IfNotPresent"
    assert configuration(objects) == configuration(render("overlays/cpu-demo"))


@pytest.mark.parametrize("fill", ["model-cache", "model-cache-s3"])
def test_models_are_filled_by_a_restricted_pod(fill: str) -> None:
    """From a bucket it runs as the overlay's service account."""
    objects = render(fill)
    overlay = [] if fill == "model-cache" else [only(render("overlays/gpu"), "ServiceAccount", "concepts")]
    assert pod_problems(objects) + reference_problems([*objects, *overlay]) == []
    for name in ("gpu", "gpu-spot"):
        config = configuration(render(f"overlays/{name}"))
        containers = only(objects, "Job")["spec"]["template"]["spec"]
        targets = {c["command"][-1] for c in containers["initContainers"] + containers["containers"]}
        assert {target.removeprefix("--local-dir=") for target in targets} == {config.model, config.extractor}


def test_one_cuda_image_everywhere() -> None:
    """The runs' and the one that fetches the models are edited in two files."""
    objects = [*render("overlays/gpu"), *render("model-cache")]
    assert len(set(re.findall(r"'image': '([^']+)'", str(objects)))) == 1


def test_everything_lies_in_one_namespace() -> None:
    for folder in KUSTOMIZATIONS:
        for manifest in render(folder):
            place = manifest["metadata"].get("namespace", manifest["metadata"]["name"])
            assert place == "concepts", manifest["kind"]


def test_demo_runs_what_the_image_holds() -> None:
    config = configuration(render("overlays/cpu-demo"))
    for path in (config.manifest, config.generation.prompts):
        assert (ROOT / path.removeprefix("/app/")).is_file()
    assert config.model == RunConfig().model


def test_base_is_not_complete() -> None:
    """Applied by mistake, it names no workers and an image that no registry has."""
    job = only(render("base"), "RayJob")
    assert "workerGroupSpecs" not in job["spec"]["rayClusterSpec"]
    assert any("not fixed by a digest" in problem for problem in pod_problems([job]))


def test_spot_comes_first_and_on_demand_can_do_it_alone() -> None:
    groups = only(render("overlays/gpu-spot"), "RayJob")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    on_demand, spot = groups
    assert spot["priority"] > on_demand.get("priority", 0)
    assert spot["labels"] != on_demand["labels"]
    assert {g["template"]["spec"]["nodeSelector"]["karpenter.sh/capacity-type"] for g in groups} == {
        "spot",
        "on-demand",
    }
    assert on_demand["maxReplicas"] >= configuration(render("overlays/gpu-spot")).actors.count


def test_nightly_copies_a_suspended_template() -> None:
    objects = render("overlays/gpu")
    job = only(objects, "RayJob")
    assert nightly_problems(only(objects, "CronJob"), job) == []
    assert only(objects, "ConfigMap", "nightly")["data"]["start_run.py"]
    job["metadata"]["name"] += "-20261121"
    assert operator_problems(job) == []


def test_runbook_names_what_exists() -> None:
    """Paths of this repository in the runbook."""
    text = (K8S / "README.md").read_text()
    paths = set(re.findall(r"\b(?:k8s|benchmarks|pipeline|manifests)/[\w./-]*[\w/]", text))
    assert paths
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def _first_container(cron: Manifest) -> Manifest:
    container: Manifest = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    return container


Change = Callable[[list[Manifest]], Any]


def _spec(objects: list[Manifest]) -> Manifest:
    spec: Manifest = only(objects, "RayJob")["spec"]
    return spec


def _cluster(objects: list[Manifest]) -> Manifest:
    cluster: Manifest = _spec(objects)["rayClusterSpec"]
    return cluster


def _head(objects: list[Manifest]) -> Manifest:
    head: Manifest = _cluster(objects)["headGroupSpec"]
    return head


def _worker(objects: list[Manifest]) -> Manifest:
    worker: Manifest = _cluster(objects)["workerGroupSpecs"][0]
    return worker


def _pod(group: Manifest) -> Manifest:
    pod: Manifest = group["template"]["spec"]
    return pod


def _ray(group: Manifest) -> Manifest:
    container: Manifest = _pod(group)["containers"][0]
    return container


def _drop(place: Manifest, key: str) -> None:
    del place[key]


def _job_toml(objects: list[Manifest], old: str, new: str) -> None:
    data = only(objects, "ConfigMap", "job")["data"]
    assert old in data["job.toml"]
    data["job.toml"] = data["job.toml"].replace(old, new)


MISTAKES: list[tuple[str, Change]] = [
    # What the operator refuses.
    ("longer than 47", lambda o: only(o, "RayJob")["metadata"].update(name="c" * 48)),
    ("DNS-1035", lambda o: only(o, "RayJob")["metadata"].update(name="2026-concepts")),
    ("suspend needs", lambda o: _spec(o).update(shutdownAfterJobFinishes=False, ttlSecondsAfterFinished=0)),
    ("ttlSecondsAfterFinished needs", lambda o: _spec(o).update(shutdownAfterJobFinishes=False, suspend=False)),
    ("deletionStrategy excludes", lambda o: _spec(o).update(deletionStrategy={"deletionRules": []})),
    ("activeDeadlineSeconds is not", lambda o: _spec(o).update(activeDeadlineSeconds=0)),
    ("backoffLimit is negative", lambda o: _spec(o).update(backoffLimit=-1)),
    ("exactly one of", lambda o: _spec(o).update(clusterSelector={"ray.io/cluster": "x"})),
    ("excludes clusterSelector", lambda o: _spec(o).update(submissionMode="InteractiveMode")),
    ("SidecarMode excludes submitter", lambda o: _spec(o).update(submissionMode="SidecarMode")),
    ("restartPolicy Always", lambda o: _spec(o)["submitterPodTemplate"]["spec"].update(restartPolicy="Always")),
    ("runtimeEnvYAML is no mapping", lambda o: _spec(o).update(runtimeEnvYAML="- a")),
    ("two groups have one name", lambda o: _worker(o).update(groupName="gpu-spot")),
    ("must be Never or unset", lambda o: _pod(_worker(o)).update(restartPolicy="Always")),
    ("cannot be suspended", lambda o: _worker(o).update(suspend=True)),
    ("needs autoscaler v2", lambda o: _cluster(o)["autoscalerOptions"].update(version="v1")),
    ("not RAY_enable_autoscaler_v2", lambda o: _ray(_head(o))["env"].append({"name": "RAY_enable_autoscaler_v2"})),
    ("RAY_REDIS_ADDRESS needs", lambda o: _ray(_head(o))["env"].append({"name": "RAY_REDIS_ADDRESS", "value": "r"})),
    ("in rayStartParams and in resources", lambda o: _head(o).update(resources={"CPU": "0"})),
    ("labels belong in", lambda o: _worker(o)["rayStartParams"].update(labels="a=b")),
    ("has not the syntax", lambda o: _worker(o)["labels"].update({"ray.io/market-type": "on demand"})),
    ("does not hold", lambda o: _worker(o).update(maxReplicas=0)),
    ("needs a feature gate", lambda o: _cluster(o).update(networkPolicy={"mode": "DenyAll"})),
    ("token needs Ray 2.52.0", lambda o: _cluster(o).update(rayVersion="2.51.9")),
    ("not for RayJobs", lambda o: _cluster(o)["authOptions"].update(enableK8sTokenAuth=True)),
    # What we refuse.
    ("rayVersion is not", lambda o: _cluster(o).update(rayVersion="2.59.0")),
    ("no token authentication", lambda o: _drop(_cluster(o), "authOptions")),
    ("shell syntax", lambda o: _spec(o).update(entrypoint="python -m pipeline.run; true")),
    ("num-cpus is not 0", lambda o: _drop(_head(o)["rayStartParams"], "num-cpus")),
    ("not fixed by a digest", lambda o: _ray(_worker(o)).update(image="registry.example.com/x:latest")),
    ("may run as root", lambda o: _drop(_pod(_worker(o))["securityContext"], "runAsNonRoot")),
    ("no seccomp profile", lambda o: _drop(_pod(_head(o))["securityContext"], "seccompProfile")),
    ("keeps capabilities", lambda o: _drop(_ray(_head(o))["securityContext"], "capabilities")),
    ("may gain privileges", lambda o: _drop(_first_container(only(o, "CronJob")), "securityContext")),
    ("can be written", lambda o: _ray(_head(o))["securityContext"].update(readOnlyRootFilesystem=False)),
    ("requests differ", lambda o: _ray(_worker(o))["resources"]["requests"].update(cpu="1")),
    ("no limits on cpu", lambda o: _drop(_ray(_worker(o))["resources"]["limits"], "memory")),
    ("in plain text", lambda o: _ray(_head(o))["env"].append({"name": "AWS_SECRET_ACCESS_KEY", "value": "x"})),
    ("is not declared", lambda o: _ray(_head(o))["volumeMounts"].append({"name": "x", "mountPath": "/x"})),
    ("is not mounted", lambda o: _pod(_head(o))["volumes"].append({"name": "x", "emptyDir": {}})),
    ("ConfigMap jobs is nowhere", lambda o: _pod(_head(o))["volumes"][0]["configMap"].update(name="jobs")),
    ("ServiceAccount nobody is nowhere", lambda o: _pod(_worker(o)).update(serviceAccountName="nobody")),
    ("the models can be written", lambda o: _drop(_ray(_worker(o))["volumeMounts"][2], "readOnly")),
    ("HF_HUB_OFFLINE is not 1", lambda o: _ray(_worker(o))["env"].pop(1)),
    ("holds the object store", lambda o: _worker(o)["rayStartParams"].update({"object-store-memory": "3000000000"})),
    ("does not tolerate", lambda o: _drop(_pod(_worker(o)), "tolerations")),
    ("only once it runs", lambda o: _pod(_worker(o))["nodeSelector"].update({"nvidia.com/gpu.present": "true"})),
    ("RAY_JOB_STOP_WAIT_TIME_S", lambda o: _drop(_spec(o), "runtimeEnvYAML")),
    ("RAY_JOB_STOP_WAIT_TIME_S", lambda o: _job_toml(o, "drain_s = 20.0", "drain_s = 55.0")),
    ("terminationGracePeriodSeconds", lambda o: _pod(_worker(o)).update(terminationGracePeriodSeconds=90)),
    ("terminationGracePeriodSeconds", lambda o: _drop(_pod(_head(o)), "terminationGracePeriodSeconds")),
    ("does not fit", lambda o: _job_toml(o, "count = 8", "count = 9")),
    ("not K8sJobMode", lambda o: _spec(o).update(submissionMode="HTTPMode")),
    ("backoffLimit is not set", lambda o: _drop(_spec(o), "backoffLimit")),
    ("ttlSecondsAfterFinished is not set", lambda o: _drop(_spec(o), "ttlSecondsAfterFinished")),
    ("preRunningDeadlineSeconds is not set", lambda o: _drop(_spec(o), "preRunningDeadlineSeconds")),
    ("no autoscaler v2", lambda o: _drop(_cluster(o), "enableInTreeAutoscaling")),
    ("not given back", lambda o: _cluster(o)["autoscalerOptions"].update(idleTimeoutSeconds=3600)),
    ("keeps nodes", lambda o: _worker(o).update(minReplicas=1, replicas=1)),
    ("no port named metrics", lambda o: _drop(_ray(_worker(o)), "ports")),
    ("two nights may overlap", lambda o: only(o, "CronJob")["spec"].update(concurrencyPolicy="Allow")),
    ("no timeZone", lambda o: only(o, "CronJob")["spec"].update(timeZone="Europe/Berlin")),
    ("none of this night", lambda o: _drop(only(o, "CronJob")["spec"], "startingDeadlineSeconds")),
    ("TEMPLATE is not", lambda o: _first_container(only(o, "CronJob"))["env"][0].update(value="concept")),
    ("not suspended", lambda o: _drop(_spec(o), "suspend")),
    ("no podFailurePolicy", lambda o: _drop(only(o, "CronJob")["spec"]["jobTemplate"]["spec"], "podFailurePolicy")),
    ("device auto", lambda o: _job_toml(o, 'device = "cuda"', 'device = "auto"')),
]


@pytest.mark.parametrize(("message", "change"), MISTAKES, ids=[message for message, _ in MISTAKES])
def test_rules_find(message: str, change: Change) -> None:
    objects = deepcopy(render("overlays/gpu-spot"))
    change(objects)
    assert any(message in problem for problem in rule_problems(objects))


SCHEMA_MISTAKES: list[tuple[str, str, Change]] = [
    ("RayJob", "'maxReplica' was unexpected", lambda o: _worker(o).update(maxReplica=3)),
    ("RayJob", "is not of type 'integer'", lambda o: _worker(o).update(maxReplicas="8")),
    ("RayJob", "is not one of ['disabled', 'token']", lambda o: _cluster(o)["authOptions"].update(mode="on")),
    ("RayJob", "'name' is a required", lambda o: _worker(o)["template"].update(spec={"containers": [{"image": "x"}]})),
    ("CronJob", "'timezone' was unexpected", lambda o: only(o, "CronJob")["spec"].update(timezone="UTC")),
    ("NetworkPolicy", "'policyType' was unexpected", lambda o: only(o, "NetworkPolicy")["spec"].update(policyType=[])),
]


@pytest.mark.parametrize(("kind", "message", "change"), SCHEMA_MISTAKES, ids=[m for _, m, _ in SCHEMA_MISTAKES])
def test_schemas_find(kind: str, message: str, change: Change) -> None:
    objects = render("overlays/gpu-spot")
    change(objects)
    found = schema_problems(only(objects, kind))
    assert any(message in problem for problem in found), found
