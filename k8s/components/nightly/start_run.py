"""Start the night's run: copy the template RayJob under a name with the date, and wait until it has ended.

The script uses the standard library only, and talks to the API server as the pod's service account. Started again, it
finds its RayJob and waits for it. Exit codes: 0 the run succeeded, 3 it failed or another one is still going, 1 any
other error, worth a retry.
"""

from __future__ import annotations

import datetime
import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

OK = 0
FAILED = 3
ENDED = ("Complete", "Failed", "ValidationFailed")
"""Final values of status.jobDeploymentStatus."""

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class RayJobs:
    """Client for the RayJobs of one namespace."""

    def __init__(self, server: str, namespace: str, account: Path = ACCOUNT) -> None:
        self._url = f"{server}/apis/ray.io/v1/namespaces/{namespace}/rayjobs"
        self._account = account
        authority = account / "ca.crt"
        self._tls = ssl.create_default_context(cafile=str(authority)) if server.startswith("https") else None

    def get(self, name: str) -> dict[str, Any]:
        return self._ask(f"/{name}")

    def list(self) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = self._ask("")["items"]
        return items

    def create(self, body: Mapping[str, Any]) -> bool:
        """Create a RayJob; return False if one of that name exists."""
        try:
            self._ask("", body)
        except urllib.error.HTTPError as error:
            if error.code == 409:
                return False
            raise
        return True

    def _ask(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        token = (self._account / "token").read_text().strip()  # Kubernetes renews the token while the pod lives
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, headers)
        with urllib.request.urlopen(request, timeout=30, context=self._tls) as response:
            answer: dict[str, Any] = json.load(response)
        return answer


def make_ray_job(template: Mapping[str, Any], name: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the RayJob to create: the template's specification, not suspended, owned by the Job that starts it."""
    labels = dict(template["metadata"].get("labels", {}))
    if queue := environment.get("QUEUE"):
        labels["kueue.x-k8s.io/queue-name"] = queue
    owner = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "name": environment["OWNER_NAME"],
        "uid": environment["OWNER_UID"],
    }
    return {
        "apiVersion": template["apiVersion"],
        "kind": template["kind"],
        "metadata": {"name": name, "labels": labels, "ownerReferences": [owner]},
        "spec": dict(template["spec"]) | {"suspend": False},
    }


def state_of(job: Mapping[str, Any]) -> str:
    return str(job.get("status", {}).get("jobDeploymentStatus") or "New")


def run(
    jobs: RayJobs,
    environment: Mapping[str, str],
    today: datetime.date,
    wait: Callable[[], None],
    say: Callable[[str], Any],
) -> int:
    """Start today's run unless it exists, and wait until it ends; return the exit code."""
    template = environment["TEMPLATE"]
    name = f"{template}-{today:%Y%m%d}"
    others = {job["metadata"]["name"]: state_of(job) for job in jobs.list()}
    others = {other: state for other, state in others.items() if other not in (template, name) and state not in ENDED}
    if others:
        say(f"not started: {', '.join(f'{other} is {state}' for other, state in others.items())}\n")
        return FAILED
    created = jobs.create(make_ray_job(jobs.get(template), name, environment))
    say(f"{name} {'created' if created else 'is there already'}\n")
    before = ""
    while True:
        job = jobs.get(name)
        state = state_of(job)
        if state != before:
            say(f"{name}: {state}\n")
            before = state
        if state in ENDED:
            break
        wait()
    status = job["status"]
    succeeded = status.get("jobStatus") == "SUCCEEDED"
    if not succeeded:
        say(f"{name}: {status.get('reason', '')} {status.get('message', '')}\n")
    return OK if succeeded else FAILED


def main() -> int:
    server = f"https://{os.environ['KUBERNETES_SERVICE_HOST']}:{os.environ['KUBERNETES_SERVICE_PORT']}"
    today = datetime.datetime.now(ZoneInfo(os.environ["TIME_ZONE"])).date()
    jobs = RayJobs(server, os.environ["NAMESPACE"])
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    return run(jobs, os.environ, today, lambda: time.sleep(30), sys.stdout.write)


if __name__ == "__main__":
    sys.exit(main())
