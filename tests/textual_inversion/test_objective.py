from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.toy_backbone import ALPHAS_CUMPROD, DIMS, VOCAB_SIZE, VOCABULARY, ToyBackbone, toy_ids
from textual_inversion.config import PenaltyConfig
from textual_inversion.objective import (
    Batch,
    Trained,
    class_distance,
    concatenate_batches,
    cosine_distance,
    denoising,
    objective,
    per_concept,
    row_distance,
    start_distance,
)

BACKBONE = ToyBackbone()
NONE = PenaltyConfig()
CONCEPTS, ROWS, SAMPLES = 2, 3, 2


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batch(samples: int = CONCEPTS * SAMPLES) -> Batch:
    latents, noise = random(2, samples, *BACKBONE.latent_shape)
    ids = [VOCABULARY.assemble([5, VOCAB_SIZE + ROWS * (i // SAMPLES), 7]) for i in range(samples)]
    return Batch(latents=latents, noise=noise, timesteps=20 * torch.arange(samples), ids=toy_ids(ids))


def trained() -> Trained:
    """Two concepts, of one row and of two."""
    return Trained(
        rows={key: random(CONCEPTS, ROWS, dim, seed=1) for key, dim in DIMS.items()},
        start={key: random(CONCEPTS, ROWS, dim, seed=2) for key, dim in DIMS.items()},
        class_vector={key: random(CONCEPTS, 1, dim, seed=3) for key, dim in DIMS.items()},
        is_placeholder_row=torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]),
    )


def test_denoising_is_the_mean_squared_error_of_each_sample() -> None:
    prediction, target = random(2, 3, 4, 8, 8)
    expected = torch.stack([F.mse_loss(p, t) for p, t in zip(prediction, target, strict=True)])
    torch.testing.assert_close(denoising(prediction, target), expected)
    assert denoising(prediction.half(), target.half()).dtype == torch.float32


def test_a_mask_leaves_the_mean_of_what_it_shows() -> None:
    prediction, target = random(2, 4, 3, 8, 8)
    mask = torch.zeros(4, 1, 8, 8)
    mask[0] = 1
    mask[1, :, 2:5, 3:4] = 1
    mask[2] = torch.rand(1, 8, 8)
    squares = (prediction - target).square()
    expected = [
        squares[0].mean(),
        squares[1, :, 2:5, 3:4].mean(),
        (squares[2] * mask[2]).sum() / (3 * mask[2].sum()),
        torch.tensor(0.0),
    ]
    torch.testing.assert_close(denoising(prediction, target, mask), torch.stack(expected))


def test_masked_losses_reach_the_prompts_rows_from_the_masked_part_alone() -> None:
    masks = torch.zeros(CONCEPTS * SAMPLES, 1, *BACKBONE.latent_shape[1:])
    masks[:, :, 0, 0] = 1
    one = batch()
    x_t, target = BACKBONE.noise.corrupt(one.latents, one.noise, one.timesteps)
    rows = {key: tensor.flatten(0, 1) for key, tensor in trained().rows.items()}
    prediction = BACKBONE.predict(x_t, one.timesteps, BACKBONE.encode_prompts(one.ids, rows))
    expected = (prediction - target)[:, :, 0, 0].square().mean(1)
    torch.testing.assert_close(objective(BACKBONE, replace(one, mask=masks), trained(), NONE)["denoising"], expected)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weighs_each_sample(prediction_type: str) -> None:
    backbone = ToyBackbone(prediction_type)
    plain = objective(backbone, batch(), trained(), NONE)["denoising"]
    weighted = objective(backbone, batch(), trained(), NONE, min_snr_gamma=5.0)["denoising"]
    weights = backbone.noise.min_snr_weights(batch().timesteps, 5.0)
    assert weights.min() < 0.9
    torch.testing.assert_close(weighted, weights * plain)


def test_class_distance_is_ldms_for_one_row_and_not_fooled_by_opposites() -> None:
    """LDM's `embedding_to_coarse_loss` is the mean of (V - c)(V - c)^T, k x k."""
    c, d = random(1, 1, 8), random(8, seed=1)
    one = c + d
    assert class_distance({"a": one}, {"a": c}, torch.ones(1, 1)) == pytest.approx(float(d @ d), rel=1e-5)

    opposite = torch.stack([c[0, 0] + d, c[0, 0] - d])[None]
    ldms = ((opposite - c)[0] @ (opposite - c)[0].T).mean()
    assert ldms == pytest.approx(0, abs=1e-5)
    assert class_distance({"a": opposite}, {"a": c}, torch.ones(1, 2)) == pytest.approx(float(d @ d), rel=1e-5)


def test_distances_are_means_over_a_concepts_own_rows_and_sums_over_text_encoders() -> None:
    t = trained()
    squared, norm = [], []
    for concept, own in enumerate((1, 2)):
        from_class = [(t.rows[key] - t.class_vector[key])[concept, :own] for key in DIMS]
        from_start = [(t.rows[key] - t.start[key])[concept, :own] for key in DIMS]
        squared.append(sum(part.square().sum(-1).mean() for part in from_class))
        norm.append(sum(part.norm(dim=-1).mean() for part in from_start))
    torch.testing.assert_close(class_distance(t.rows, t.class_vector, t.is_placeholder_row), torch.stack(squared))
    torch.testing.assert_close(start_distance(t.rows, t.start, t.is_placeholder_row), torch.stack(norm))


def test_row_distance_is_class_distances_and_zero_without_learned_rows() -> None:
    rows = {key: random(2, 3, dim, seed=1).requires_grad_() for key, dim in DIMS.items()}
    learned = {key: random(2, 3, dim, seed=2) for key, dim in DIMS.items()}
    found = row_distance(rows, learned, torch.tensor([1.0, 0.0]))
    expected = class_distance(rows, learned, torch.ones(2, 3)).detach()
    assert found.tolist() == pytest.approx([float(expected[0]), 0.0])
    found.sum().backward()
    for tensor in rows.values():
        assert tensor.grad[0].all()
        assert not tensor.grad[1].any()
    only = row_distance(rows, {"long": learned["long"]}, torch.ones(2))
    assert (only < row_distance(rows, learned, torch.ones(2))).all(), (
        "a text encoder that learns no rows does not count"
    )


def test_start_distance_has_no_gradient_at_the_start() -> None:
    rows = random(1, 2, 8).requires_grad_()
    start_distance({"a": rows}, {"a": rows.detach().clone()}, torch.ones(1, 2)).sum().backward()
    assert torch.equal(rows.grad, torch.zeros_like(rows))


def test_penalties_are_weighted_and_the_same_for_each_of_a_concepts_samples() -> None:
    t = trained()
    penalties = PenaltyConfig(class_distance=0.5, start_distance=1e-5)
    terms = objective(BACKBONE, batch(), t, penalties)
    expected = 0.5 * class_distance(t.rows, t.class_vector, t.is_placeholder_row)
    assert terms["class_distance"].tolist() == pytest.approx(expected.repeat_interleave(SAMPLES).tolist())
    expected = 1e-5 * start_distance(t.rows, t.start, t.is_placeholder_row)
    assert terms["start_distance"].tolist() == pytest.approx(expected.repeat_interleave(SAMPLES).tolist())
    assert list(objective(BACKBONE, batch(), t, NONE)) == ["denoising"]


def features(pixels: Tensor) -> Tensor:
    """Stands in for CLIP."""
    return pixels.flatten(1) @ random(pixels[0].numel(), 6, seed=8)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_clip_term_compares_the_decoded_prediction_with_the_photo(prediction_type: str) -> None:
    backbone = ToyBackbone(prediction_type)
    t = trained()
    whole = replace(batch(), features=random(CONCEPTS * SAMPLES, 6, seed=9))
    leaves = {key: tensor.requires_grad_() for key, tensor in t.rows.items()}
    terms = objective(backbone, whole, replace(t, rows=leaves), PenaltyConfig(clip=0.3), image_features=features)

    abar = ALPHAS_CUMPROD[whole.timesteps].view(-1, 1, 1, 1)
    x_t = abar.sqrt() * whole.latents + (1 - abar).sqrt() * whole.noise
    rows = {key: tensor.flatten(0, 1) for key, tensor in leaves.items()}
    said = backbone.predict(x_t, whole.timesteps, backbone.encode_prompts(whole.ids, rows))
    if prediction_type == "epsilon":
        x_0 = (x_t - (1 - abar).sqrt() * said) / abar.sqrt()
    else:
        x_0 = abar.sqrt() * x_t - (1 - abar).sqrt() * said
    ours = F.normalize(features(backbone.decode(x_0)), dim=1)
    expected = 0.3 * (1 - (ours * F.normalize(whole.features, dim=1)).sum(1))
    torch.testing.assert_close(terms["clip"], expected, rtol=1e-4, atol=1e-5)
    (grad,) = torch.autograd.grad(terms["clip"].sum(), leaves["long"])
    assert grad[:, 0].abs().sum() > 0


def test_cosine_distance() -> None:
    a = random(3, 5)
    torch.testing.assert_close(cosine_distance(a, 2 * a), torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(cosine_distance(a, -a), 2 * torch.ones(3))


def test_terms_are_summed_and_samples_averaged() -> None:
    terms = {"a": torch.tensor([1.0, 3.0, 10.0, 20.0]), "b": torch.tensor([0.0, 0.0, 2.0, 2.0])}
    assert per_concept(terms, 2).tolist() == [2.0, 17.0]
    assert per_concept(terms, 1).tolist() == [9.5]


def test_only_rows_have_gradients_and_each_sample_reaches_its_own() -> None:
    t = trained()
    leaves = {key: tensor.requires_grad_() for key, tensor in t.rows.items()}
    loss = objective(BACKBONE, batch(), replace(t, rows=leaves), NONE)["denoising"]
    for grad in torch.autograd.grad(loss[0], list(leaves.values())):
        assert grad[0, 0].abs().sum() > 0
        assert grad[0, 1:].abs().sum() == 0
        assert grad[1].abs().sum() == 0


def test_joined_samples_read_their_own_concepts_rows() -> None:
    ids = toy_ids([[1, VOCAB_SIZE, VOCAB_SIZE + 2, 0]])
    sizes = dict.fromkeys(DIMS, VOCAB_SIZE)
    one = Batch(latents=random(1, 2, 4, 4), noise=random(1, 2, 4, 4), timesteps=torch.tensor([3]), ids=ids)
    masked = replace(one, mask=torch.zeros(1, 1, 4, 4))
    both = concatenate_batches([one, masked], sizes, ROWS)
    assert both.ids["long"].tolist() == both.ids["short"].tolist()
    assert both.ids["long"].tolist() == [[1, VOCAB_SIZE, VOCAB_SIZE + 2, 0], [1, VOCAB_SIZE + 3, VOCAB_SIZE + 5, 0]]
    assert both.latents.shape == (2, 2, 4, 4)
    assert both.mask is not None
    assert both.mask.mean((1, 2, 3)).tolist() == [1, 0]  # without a mask everything counts
    assert concatenate_batches([one, one], sizes, ROWS).mask is None
