"""Ten-step losses of the tiny model, committed: a change that should not alter numbers must not alter these.

To renew them after a change that should, run `python -m tests.golden.test_losses` and say in the commit why.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch

from tests.tiny_models import LATENT_SHAPE, tiny_stable_diffusion
from tests.toy_backbone import plain_views
from textual_inversion.concept import Concept
from textual_inversion.config import AdapterConfig, InversionConfig, PenaltyConfig, TimestepConfig
from textual_inversion.engine import Assignment, Engine, Outcome
from textual_inversion.families import load_backbone

LOSSES: dict[str, list[float]] = {
    "epsilon": [1.378411, 1.627387, 1.351656, 1.409791, 1.512095, 1.388659, 1.371521, 1.397922, 1.32478, 1.335959],
    "v_prediction": [0.96346, 1.223741, 0.865834, 1.165375, 1.332156, 1.055909, 1.231445, 1.052518, 0.971482, 1.116893],
    "adapter": [1.405784, 1.611211, 1.294283, 1.273198, 1.294257, 1.140631, 1.226843, 1.123949, 1.098677, 1.164229],
    "cross-attention": [
        1.378411,
        1.559569,
        1.273815,
        1.220269,
        1.209189,
        1.077848,
        1.118393,
        1.014865,
        0.939992,
        1.072448,
    ],
    "riemannian": [1.368919, 1.519582, 1.36152, 1.413659, 1.435544, 1.389795, 1.390533, 1.442192, 1.443134, 1.353556],
}
COORDINATES: dict[str, list[float]] = {
    "epsilon": [-0.29313, -0.15809, -0.05661, -0.0584],
    "v_prediction": [-0.14889, -0.18903, -0.0172, -0.10122],
    "adapter": [-0.32185, -0.09807, 0.1369, 0.06143],
    "cross-attention": [-0.18076, -0.15503, 0.07891, 0.04577],
    "riemannian": [-0.31042, -0.15429, 0.12346, 0.05572],
}
"""The first four of the second row."""


METHODS: dict[str, dict[str, object]] = {
    "adapter": {
        "adapter": AdapterConfig(kind="causal", rank=2, learning_rate=0.01),
        "timesteps": TimestepConfig(sampler="snr", min_snr_gamma=5.0),
        "penalties": PenaltyConfig(class_distance=0.1, start_distance=0.01),
    },
    "cross-attention": {
        "adapter": AdapterConfig(kind="causal", rank=1, targets=("fc2", "cross_attention"), learning_rate=0.01),
    },
    "riemannian": {
        "optimizer": "riemannian", "norm_control": "sphere", "direction_prior": 0.01, "per_image_tokens": True,
        "timesteps": TimestepConfig(sampler="range", low=500, high=900),
    },
}  # fmt: skip
"""Settings of the other lines, each of several methods at once; epsilon."""


def learned(name: str, directory: Path) -> Outcome:
    """One concept of two vectors, ten steps; `name` is a prediction type or one of `METHODS`."""
    model = tiny_stable_diffusion(directory / "model", "epsilon" if name in METHODS else name)
    backbone = load_backbone(str(model), device="cpu", precision="float32")
    concept = Concept(concept_id="golden", placeholder_token="<g>", images=("x",), initializer="toy", num_vectors=2)
    moments = torch.rand(4, 2, *LATENT_SHAPE, generator=torch.Generator().manual_seed(0))
    settings = {
        "steps": 10,
        "batch_size": 2,
        "learning_rate": 0.02,
        "class_cue": True,
        "norm_cap": 1.0,
        **METHODS.get(name, {}),
    }
    config = InversionConfig(**settings)
    work, outcomes = iter([Assignment(concept, plain_views(moments))]), []
    Engine(backbone, config, slots=1, seed=0).run(lambda _: next(work, None), outcomes.append)
    return outcomes[0]


def numbers(outcome: Outcome) -> tuple[list[float], list[float]]:
    """Losses of the steps, and coordinates of what was learned."""
    assert outcome.embedding is not None
    losses = [round(loss, 6) for loss in outcome.curve[:, 1].tolist()]
    return losses, [round(x, 5) for x in outcome.embedding.vectors["clip_l"][1, :4].tolist()]


@pytest.mark.parametrize("name", LOSSES)
def test_golden_losses(tmp_path: Path, name: str) -> None:
    losses, coordinates = numbers(learned(name, tmp_path))
    assert losses == pytest.approx(LOSSES[name], rel=1e-4)
    assert coordinates == pytest.approx(COORDINATES[name], abs=1e-3)


if __name__ == "__main__":
    for name in ("epsilon", "v_prediction", *METHODS):
        with tempfile.TemporaryDirectory() as folder:
            print(name, *numbers(learned(name, Path(folder))))  # noqa: T201
