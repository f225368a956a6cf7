"""The parts of the demo's trainings that can be checked without training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from demo.autoencoder import LATENT_CHANNELS
from demo.denoiser import NUM_TRAIN_TIMESTEPS, DenoiserTraining, new_scheduler, stratified_timesteps, velocity_loss
from demo.latent_pool import LatentPool, cumulative_probability
from demo.loop import Average, Budget, Randomness, Training, learning_rate_factor, optimise
from demo.muon import Muon, orthogonalise, parameter_groups
from textual_inversion.noise import from_scheduler_config


def test_budget_is_steps_or_minutes() -> None:
    with pytest.raises(ValueError, match="steps or minutes"):
        Budget()
    with pytest.raises(ValueError, match="steps or minutes"):
        Budget(steps=1, minutes=1)
    assert Budget(steps=10).fraction_done(5, 1e9) == 0.5
    assert Budget(minutes=1).fraction_done(10**9, 30) == 0.5


def test_learning_rate_warms_up_and_decays() -> None:
    assert learning_rate_factor(0, 0.0, warmup_steps=10) == pytest.approx(0.1)
    assert learning_rate_factor(50, 0.0, warmup_steps=10) == pytest.approx(1.0)
    assert learning_rate_factor(50, 1.0, warmup_steps=10) == pytest.approx(0.03)


def test_learning_rate_is_whole_until_its_decay_begins() -> None:
    factors = [learning_rate_factor(50, part, warmup_steps=10, decay_from=0.6) for part in (0.0, 0.6, 0.8, 1.0)]
    assert factors == pytest.approx([1.0, 1.0, 0.515, 0.03])


@pytest.mark.parametrize("decay_from", [-0.1, 1.0])
def test_decay_begins_within_the_budget(decay_from: float, tmp_path: Path) -> None:
    _, training = _tiny_training(tmp_path / "tiny.ckpt", steps=2)
    with pytest.raises(ValueError, match="decay_from"):
        replace(training, decay_from=decay_from)


def test_orthogonalise_brings_singular_values_near_one() -> None:
    for shape in ((32, 96), (96, 32), (48, 48)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        values = torch.linalg.svdvals(orthogonalise(matrix))
        assert values.max() < 1.3
        assert values.median() > 0.6


def test_velocity_loss_is_zero_at_the_schedulers_velocity() -> None:
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 6, 4, 2, 2, generator=generator)
    scheduler = new_scheduler()
    timesteps = stratified_timesteps(6, generator, torch.device("cpu"))
    velocity = scheduler.get_velocity(latents, noise, timesteps)
    process = from_scheduler_config(scheduler.config, torch.device("cpu"))
    loss = velocity_loss(velocity, process.corrupt(latents, noise, timesteps)[1])
    assert loss.shape == (6,)
    assert loss.abs().max() < 1e-10


def test_stratified_timesteps_cover_the_schedule() -> None:
    timesteps = stratified_timesteps(10, torch.Generator().manual_seed(0), torch.device("cpu"))
    quantiles = ((timesteps + 0.5) / NUM_TRAIN_TIMESTEPS) ** 2
    assert sorted((quantiles * 10).long().tolist()) == list(range(10))


def test_denoiser_learns_names_and_words_from_pictures_by_one_loss() -> None:
    torch.manual_seed(0)
    num_tokens, width = 20, 8
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, block_out_channels=(8, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1, cross_attention_dim=width, attention_head_dim=2, norm_num_groups=4,
    )  # fmt: skip
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=num_tokens, hidden_size=width, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=3, bos_token_id=0, eos_token_id=2, pad_token_id=2,
        )
    )  # fmt: skip
    pool = LatentPool(
        latents=torch.randn(2, LATENT_CHANNELS, 8, 8).half(),
        input_ids=torch.tensor([[0, 5, 2], [0, num_tokens, 2]]),  # a name, an unnamed object
        objects=torch.tensor([-1, 0]),
        features=torch.randn(1, 6),
        cumulative=cumulative_probability(["plain", "unnamed"]),
    )
    randomness = Randomness(seed=0, device=torch.device("cpu"))
    training = DenoiserTraining(unet, text_encoder, pool, torch.tensor([0, 2, 2]), randomness)
    loss, figures = training.loss(0.0)
    loss.backward()
    assert figures.keys() == {"loss", "unnamed"}
    assert figures["loss"] == loss.item()
    table = training.vocabulary.table.weight.grad
    assert table is not None
    touched = table.abs().sum(1).nonzero()[:, 0].tolist()
    assert touched == [0, 2, 5]
    assert all(each.grad is not None and each.grad.abs().max() > 0 for each in training.words.parameters())


def _tiny_training(checkpoint: Path, steps: int) -> tuple[nn.Module, Training]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 2))
    randomness = Randomness(seed=3, device=torch.device("cpu"))
    average = Average(model)

    def loss(_: float) -> tuple[torch.Tensor, dict[str, float]]:
        batch = torch.randn(8, 20, generator=randomness.torch) + float(randomness.numpy.random())
        value = model(batch).pow(2).mean()
        return value, {"loss": value.item()}

    optimizer = Muon(parameter_groups(model, matrix_lr=1e-2, vector_lr=1e-2))
    training = Training(
        name="tiny", loss=loss, optimizer=optimizer, budget=Budget(steps=steps), checkpoint=checkpoint,
        stateful={"model": model, "average": average, "randomness": randomness}, after_step=average.update,
        warmup_steps=1,
    )  # fmt: skip
    return model, training


def test_a_stopped_training_continues_bit_for_bit(tmp_path: Path) -> None:
    whole, training = _tiny_training(tmp_path / "whole.ckpt", steps=6)
    optimise(training)

    _, training = _tiny_training(tmp_path / "parts.ckpt", steps=6)
    original = training.loss

    def interrupted(fraction_done: float) -> tuple[torch.Tensor, dict[str, float]]:
        if fraction_done >= 0.5:
            raise KeyboardInterrupt
        return original(fraction_done)

    training.loss = interrupted
    training.save_every_s = -1.0  # a checkpoint after every step
    with pytest.raises(KeyboardInterrupt):
        optimise(training)
    resumed, training = _tiny_training(tmp_path / "parts.ckpt", steps=6)
    assert optimise(training) == 6
    for ours, theirs in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(ours, theirs)
