"""Alert rules: PromQL that parses, over metrics that exist; endpoints that the pods have."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.k8s.render import Manifest, only, render

OTHERS = {
    # KubeRay's operator (docs: reference for its metrics) and kube-state-metrics.
    "kuberay_job_deployment_status",
    "kube_cronjob_status_last_successful_time",
}


def alerts() -> list[Manifest]:
    groups = only(render("monitoring"), "PrometheusRule")["spec"]["groups"]
    return [rule for group in groups for rule in group["rules"]]


def metrics_in(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:ray|autoscaler|kuberay|kube)_\w+", expression)) - {"ray_io_cluster"}


def test_expressions_parse() -> None:
    promql = pytest.importorskip("promql_parser", reason="no promql-parser to read the rules with")
    for alert in alerts():
        promql.parse(alert["expr"])
    with pytest.raises(ValueError, match="unexpected"):
        promql.parse('sum by (x) (ray_tasks{State="RUNNING"')


def test_metrics_are_exported() -> None:
    """Ray's own, as its dashboards ask for them and its autoscaler registers them."""
    import ray
    from ray.autoscaler._private.prom_metrics import AutoscalerPrometheusMetrics

    folder = Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    asked = "".join(path.read_text() for path in folder.glob("*_panels.py"))
    known = OTHERS | set(re.findall(r"\bray_\w+", asked))
    known |= {metric.name for metric in AutoscalerPrometheusMetrics(session_name="s").registry.collect()}
    assert "ray_tasks_of_tomorrow" not in known
    for alert in alerts():
        used = metrics_in(alert["expr"])
        assert used, alert["alert"]
        assert used <= known, alert["alert"]


def test_alerts_are_about_our_namespace() -> None:
    for alert in alerts():
        for selector in re.findall(r"\w+_\w+(\{[^}]*\})?", alert["expr"]):
            assert not selector or 'namespace="concepts"' in selector, alert["alert"]
        assert 'namespace="concepts"' in alert["expr"]


def test_long_run_is_told_before_it_is_stopped() -> None:
    (long,) = [alert for alert in alerts() if alert["alert"] == "ConceptsRunLong"]
    deadline_s = only(render("overlays/gpu"), "RayJob")["spec"]["activeDeadlineSeconds"]
    assert int(long["for"].removesuffix("h")) * 3600 < deadline_s
    assert f"after {deadline_s // 3600}" in long["annotations"]["summary"]


def test_scraped_ports_are_the_pods() -> None:
    cluster = only(render("overlays/gpu"), "RayJob")["spec"]["rayClusterSpec"]
    groups = {"head": cluster["headGroupSpec"], "worker": cluster["workerGroupSpecs"][0]}
    monitors = [manifest["spec"] for manifest in render("monitoring") if manifest["kind"] == "PodMonitor"]
    assert len(monitors) == 2
    policy = only(render("monitoring"), "NetworkPolicy")["spec"]["ingress"][0]["ports"]
    for monitor in monitors:
        group = groups[monitor["selector"]["matchLabels"]["ray.io/node-type"]]
        ports = {p["name"]: p["containerPort"] for p in group["template"]["spec"]["containers"][0]["ports"]}
        for endpoint in monitor["podMetricsEndpoints"]:
            assert ports[endpoint["port"]] in {rule["port"] for rule in policy}
