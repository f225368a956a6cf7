"""Alert rules and dashboard: PromQL that parses, over metrics that exist; endpoints that the pods have."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from pipeline.prometheus import exported_names
from tests.k8s.render import K8S, Manifest, only, render, yaml

OTHERS = {
    # KubeRay's operator (docs: reference for its metrics) and kube-state-metrics.
    "kuberay_job_deployment_status",
    "kube_cronjob_status_last_successful_time",
}


def alerts() -> list[Manifest]:
    groups = yaml.safe_load((K8S / "monitoring" / "rules.yaml").read_text())["spec"]["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    board: dict[str, Any] = json.loads((K8S / "monitoring" / "dashboard.json").read_text())
    return board


def queries() -> dict[str, str]:
    """Where it is -> PromQL of every alert and panel, as Prometheus gets it."""
    found = {alert["alert"]: alert["expr"] for alert in alerts()}
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"].replace("$__rate_interval", "1m").replace("$cluster", "concepts-x")
            found[f"{panel['title']}, {target['refId']}"] = expression
    return found


def metrics_in(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:ray|autoscaler|kuberay|kube)_\w+", expression)) - {"ray_io_cluster"}


def exported() -> set[str]:
    """Our own; Ray's, as its dashboards ask for them and its autoscaler registers them; other exporters'."""
    import ray
    from ray.autoscaler._private.prom_metrics import AutoscalerPrometheusMetrics

    folder = Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    asked = "".join(path.read_text() for path in folder.glob("*_panels.py"))
    rays = {metric.name for metric in AutoscalerPrometheusMetrics(session_name="s").registry.collect()}
    return OTHERS | exported_names() | set(re.findall(r"\bray_\w+", asked)) | rays


def test_expressions_parse() -> None:
    promql = pytest.importorskip("promql_parser", reason="no promql-parser to read the queries with")
    for expression in queries().values():
        promql.parse(expression)
    with pytest.raises(ValueError, match="unexpected"):
        promql.parse('sum by (x) (ray_tasks{State="RUNNING"')


def test_metrics_are_exported() -> None:
    known = exported()
    for place, expression in queries().items():
        used = metrics_in(expression)
        assert used, place
        assert used <= known, place
    for mistake in ("ray_tasks_of_tomorrow", "ray_concepts_done", "ray_concepts_left_total", "ray_concepts_seconds"):
        assert mistake not in known


def test_grafana_finds_the_dashboard() -> None:
    board = only(render("monitoring"), "ConfigMap")
    assert board["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(board["data"]["dashboard.json"]) == dashboard()


def test_dashboard_shows_all_that_we_export() -> None:
    shown = {name for expression in queries().values() for name in metrics_in(expression)}
    assert exported_names() <= shown


def test_dashboard_is_one_that_grafana_draws() -> None:
    board = dashboard()
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert set(re.findall(r"\$\{?([a-z]+)", json.dumps(board))) == set(variables)
    assert metrics_in(variables["cluster"]["query"]["query"]) <= exported_names()
    for panel in panels:
        assert panel["type"] == "row" or panel["targets"], panel["title"]
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        for target in panel.get("targets", []):
            assert 'ray_io_cluster="$cluster"' in target["expr"], panel["title"]
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        apart = [one[a] + one[size] <= other[a] or other[a] + other[size] <= one[a] for a, size in ("xw", "yh")]
        assert any(apart), (one, other)


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
