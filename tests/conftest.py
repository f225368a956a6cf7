"""Settings and fixtures that all tests share. Tests cannot reach the network, Ray clusters are open to their own
machine only, and tiny models are made once a session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from tests.pipeline.s3_server import S3Server
    from textual_inversion.families.base import Backbone

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two groups of tests share two cores, and tiny models gain nothing
os.environ.setdefault("RAY_worker_niceness", "0")  # by default 15, which starves Ray's workers on a busy machine

# How fast examples are made and run says how busy the machine is, and nothing of the code.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny random Stable Diffusion (epsilon) and return its directory."""
    from tests.tiny_models import tiny_stable_diffusion  # diffusers takes seconds to import; most tests need none

    return tiny_stable_diffusion(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_backbone(tiny_model: Path) -> Backbone:
    """Load the tiny model on the CPU in float32, with one torch thread."""
    import torch

    from textual_inversion.families import load_backbone

    torch.set_num_threads(1)
    return load_backbone(str(tiny_model), device="cpu", precision="float32")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Start a Ray of two cores that all tests of a session share, because starting one takes seconds."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Run an S3 server that this process, and every process it starts, uses by default. All tests share one, because
    fsspec keeps its stores, which keep the address of their first server."""
    from tests.pipeline.s3_server import serve_s3

    with serve_s3(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def bucket(s3_server: S3Server, tmp_path: Path) -> str:
    """Return the URI of a new, empty bucket. It takes seven of the server's volumes until the session ends."""
    return s3_server.make_bucket(tmp_path.name.replace("_", "-").lower())
