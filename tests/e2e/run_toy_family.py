"""`pipeline.run` with the toy family in the table, here and in every process that Ray starts."""

from __future__ import annotations

import sys
from pathlib import Path

import ray

from pipeline.run import main
from tests.toy_family import register

ROOT = Path(__file__).parents[2]

if __name__ == "__main__":
    register()
    if "--dry-run" not in sys.argv:
        runtime_env = {"env_vars": {"PYTHONPATH": str(ROOT)}, "worker_process_setup_hook": register}
        ray.init(address="local", num_cpus=2, include_dashboard=False, runtime_env=runtime_env)
    sys.exit(main(sys.argv[1:]))
