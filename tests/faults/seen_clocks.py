"""`python -m tests.faults.seen_clocks LIBRARY --offset=+2h`: learn on a node whose clock differs, print what is seen.

LIBRARY is the path of libfaketime.so.1 (Debian's package libfaketime). The driver and the head of the cluster have the
clock of this machine, the node with the learner has another; the output is a folder, or with --s3 a bucket. While the
run learns, `status` is asked once. docs/FAULTS.md quotes the output.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from datetime import datetime, timedelta
from pathlib import Path
from unittest import mock

from ray.cluster_utils import Cluster

from pipeline.ledger.records import load_records
from pipeline.report.run_file import read_run
from pipeline.report.run_status import read_status
from pipeline.store.storage import RunStore
from tests.faults.processes import kill
from tests.faults.seen_learning import Command
from tests.pipeline.runs import tiny_toml, write_manifest
from tests.pipeline.s3_server import serve_s3
from tests.tiny_models import tiny_stable_diffusion

_NUM_CONCEPTS = 24


def show(arguments: list[str], store: RunStore, address: str) -> None:
    """Run a command on a cluster, and print what it and `status` say, and the times in the records."""
    run = Command(arguments, ray_address=address)
    try:
        while run.process.poll() is None and len(_done(store)) < 8:
            time.sleep(0.2)
        status = read_status(store)
        run.say(
            f"status: stage {status.stage}, alive {status.alive}, {status.done} done, {status.learning} learning, "
            f"quiet {status.quiet_s:.0f} s, {status.recent_per_hour} an hour, {status.seconds_left} s left"
        )
        run.await_end()
    finally:
        kill(run.process.pid)
    status, description = read_status(store), read_run(store)
    run.say(
        f"status: {status.done} done, {status.other} of other runs, {status.failed} failed, last {status.last_write_at}"
    )
    times = sorted(record.finished_at for record in load_records(store))
    if not times:
        return
    run.say(f"run.json: {description['started_at']} to {description['written_at']}; records: {times[0]} to {times[-1]}")
    apart = abs(datetime.fromisoformat(times[-1]) - datetime.fromisoformat(description["written_at"]))
    assert apart > timedelta(minutes=10), "the node has the clock of this machine"
    run.say("the same command again")
    assert Command(arguments, ray_address=address).await_end() == 0


def _done(store: RunStore) -> list[str]:
    return [path for path in store.list("concepts") if path.endswith("/record.json")]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.seen_clocks", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("library", type=Path)
    parser.add_argument("--offset", default="+2h", help="by which the node is ahead, as libfaketime takes it")
    parser.add_argument("--s3", action="store_true", help="write to an S3 server, which has this machine's clock")
    options = parser.parse_args()
    other_clock = {
        "LD_PRELOAD": str(options.library.resolve(strict=True)),
        "FAKETIME": options.offset,
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "RAY_LD_PRELOAD_ON_WORKERS": "1",
    }
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as servers:
        folder = Path(name)
        output = str(folder / "out")
        if options.s3:
            server = servers.enter_context(serve_s3(folder))
            os.environ |= server.environment
            output = f"{server.make_bucket('outputs')}/out"
        settings = {"inversion": {"steps": 60, "batch_size": 2},
                    "actors": {"count": 1, "slots": 4, "checkpoint_steps": 20}}  # fmt: skip
        (folder / "job.toml").write_text(tiny_toml(tiny_stable_diffusion(folder / "model"), **settings))
        manifest = write_manifest(folder, [f"c{number:02d}" for number in range(_NUM_CONCEPTS)])
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        servers.callback(cluster.shutdown)
        with mock.patch.dict(os.environ, other_clock):  # for the processes that are started here
            cluster.add_node(num_cpus=2)
        arguments = [str(manifest), "--output", output, "--config", str(folder / "job.toml")]
        show(arguments, RunStore(output), cluster.address)
        sys.stdout.write(f"{len(_done(RunStore(output)))} of {_NUM_CONCEPTS} done\n")


if __name__ == "__main__":
    main()
