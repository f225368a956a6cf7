from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.toy_backbone import DIMS, VOCAB_SIZE, ToyBackbone
from textual_inversion.objective import Batch, denoising, objective, per_concept

BACKBONE = ToyBackbone()


def batch(samples: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, samples, *BACKBONE.latent_shape, generator=generator)
    ids = torch.tensor([BACKBONE.assemble([5, VOCAB_SIZE + i % 2, 7]) for i in range(samples)])
    return Batch(latents=latents, noise=noise, timesteps=torch.arange(samples), weight=torch.ones(samples), ids=ids)


def rows() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {key: torch.randn(2, dim, generator=generator) for key, dim in DIMS.items()}


def test_denoising_is_the_mean_squared_error_of_each_sample() -> None:
    prediction, target = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([F.mse_loss(p, t) for p, t in zip(prediction, target, strict=True)])
    torch.testing.assert_close(denoising(prediction, target), expected)
    assert denoising(prediction.half(), target.half()).dtype == torch.float32


def test_weights_scale_each_sample() -> None:
    whole = batch(3)
    weighted = Batch(
        latents=whole.latents, noise=whole.noise, timesteps=whole.timesteps, ids=whole.ids,
        weight=torch.tensor([0.0, 1.0, 2.0]),
    )  # fmt: skip
    plain = objective(BACKBONE, whole, rows())["denoising"]
    torch.testing.assert_close(objective(BACKBONE, weighted, rows())["denoising"], plain * weighted.weight)


def test_terms_are_summed_and_samples_averaged() -> None:
    terms = {"a": torch.tensor([1.0, 3.0, 10.0, 20.0]), "b": torch.tensor([0.0, 0.0, 2.0, 2.0])}
    assert per_concept(terms, 2).tolist() == [2.0, 17.0]
    assert per_concept(terms, 1).tolist() == [9.5]


def test_only_rows_have_gradients_and_each_sample_reaches_its_own() -> None:
    leaves = {key: tensor.requires_grad_() for key, tensor in rows().items()}
    loss = objective(BACKBONE, batch(2), leaves)["denoising"]
    for grad in torch.autograd.grad(loss[0], list(leaves.values())):
        assert grad[0].abs().sum() > 0
        assert grad[1].abs().sum() == 0
