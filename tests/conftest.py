"""Settings and fixtures every test shares: nothing may reach the network, and Ray clusters are open to their own
machine only; tiny models are made once a session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from textual_inversion.families.base import Backbone

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny random Stable Diffusion (epsilon)."""
    from tests.tiny_models import tiny_stable_diffusion  # diffusers takes seconds to import; most tests need none

    return tiny_stable_diffusion(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_backbone(tiny_model: Path) -> Backbone:
    """The same, loaded on the CPU in float32, one torch thread."""
    import torch

    from textual_inversion.families import load_backbone

    torch.set_num_threads(1)
    return load_backbone(str(tiny_model), device="cpu", precision="float32")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray of two cores that all tests of a session share; starting one takes seconds."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
