"""Noise processes against diffusers' own schedulers, and against their definitions."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from textual_inversion.noise import Epsilon, Noise, RectifiedFlow, VPrediction, from_scheduler_config

SCHEDULER = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
DISCRETE: dict[str, Noise] = {
    "epsilon": Epsilon(SCHEDULER.alphas_cumprod, {}),
    "v_prediction": VPrediction(SCHEDULER.alphas_cumprod, {}),
}
PROCESSES = {**DISCRETE, "flow": RectifiedFlow(), "shifted flow": RectifiedFlow(shift=3.0)}


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 6, 4, 8, 8, generator=generator)
    return latents, noise, torch.tensor([0, 1, 250, 500, 998, 999])


@pytest.mark.parametrize("prediction_type", DISCRETE)
def test_equals_diffusers(prediction_type: str) -> None:
    latents, noise, t = batch()
    x_t, target = DISCRETE[prediction_type].corrupt(latents, noise, t)
    assert torch.equal(x_t, SCHEDULER.add_noise(latents, noise, t))
    expected = noise if prediction_type == "epsilon" else SCHEDULER.get_velocity(latents, noise, t)
    assert torch.equal(target, expected)
    assert torch.equal(DISCRETE[prediction_type].model_timesteps(t), t)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_perfect_prediction_gives_the_latents_back(name: str) -> None:
    latents, noise, t = batch()
    x_t, target = PROCESSES[name].corrupt(latents, noise, t)
    torch.testing.assert_close(PROCESSES[name].predicted_latents(target, x_t, t), latents, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", PROCESSES)
def test_min_snr_weighs_any_prediction_as_it_weighs_the_latents(name: str) -> None:
    """Hang et al. 2023, section 3.4: the weighted losses on the target and, by min(SNR, gamma), on x_0 are one."""
    process, gamma = PROCESSES[name], 5.0
    latents, noise, t = batch()
    x_t, target = process.corrupt(latents, noise, t)
    ones, zeros = torch.ones(6, 1), torch.zeros(6, 1)
    signal, sigma = process.corrupt(ones, zeros, t)[0].double(), process.corrupt(zeros, ones, t)[0].double()
    snr = (signal / sigma).square()[:, 0]
    off = target + torch.randn(target.shape, generator=torch.Generator().manual_seed(1))
    error = process.predicted_latents(off, x_t, t).double() - process.predicted_latents(target, x_t, t).double()
    expected = snr.clamp(max=gamma) * error.square().flatten(1).mean(1)
    loss = (off - target).double().square().flatten(1).mean(1)
    found = process.min_snr_weights(t, gamma).double() * loss
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert found.isfinite().all()


def test_min_snr_spares_noisy_timesteps() -> None:
    weights = DISCRETE["epsilon"].min_snr_weights(torch.arange(1000), 5.0)
    assert (weights == 1).nonzero().min() == 147  # by hand for this schedule: SNR falls below 5 there
    assert weights[10] == pytest.approx(0.05, abs=0.005)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("solver", ["ddim", "dpm++"])
def test_a_solver_follows_a_perfect_denoiser_to_the_latents(name: str, solver: str) -> None:
    """A denoiser that knows x_0 predicts the target of the noise it is given; any solver then ends at x_0."""
    config = {**SCHEDULER.config, "prediction_type": name} if name in DISCRETE else None
    process = from_scheduler_config(config, torch.device("cpu")) if config else PROCESSES[name]
    generator = torch.Generator().manual_seed(0)
    x_0, latents = torch.randn(2, 1, 4, 8, 8, generator=generator)
    run = process.begin(solver, 8)
    assert len(run.timesteps) == 8
    ones, zeros = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    for step in range(8):
        signal, sigma = run.noised(ones, zeros, step), run.noised(zeros, ones, step)
        eps = (latents - signal * x_0) / sigma
        target = {"epsilon": eps, "v_prediction": signal * eps - sigma * x_0}.get(name, eps - x_0)
        latents = run.step(target, step, latents)
    torch.testing.assert_close(latents, x_0, rtol=0, atol=2e-2)
    assert run.noised(x_0, latents, 8) is x_0


def test_the_schedulers_config_says_which_process_it_is() -> None:
    def made(**config: Any) -> Noise:
        return from_scheduler_config(config, torch.device("cpu"))

    assert type(made(prediction_type="epsilon")) is Epsilon
    assert type(made()) is Epsilon
    assert type(made(prediction_type="v_prediction")) is VPrediction
    flow = made(_class_name="FlowMatchEulerDiscreteScheduler", num_train_timesteps=500, shift=2.0)
    assert isinstance(flow, RectifiedFlow)
    assert flow.num_timesteps == 500
    torch.testing.assert_close(flow.model_timesteps(torch.tensor([249])), torch.tensor([500 * 2 * 0.5 / 1.5]))
    with pytest.raises(ValueError, match="prediction_type 'sample'"):
        made(prediction_type="sample")
    with pytest.raises(ValueError, match="use_dynamic_shifting = True"):
        made(_class_name="FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True)


@pytest.mark.parametrize("name", PROCESSES)
def test_an_unknown_solver_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="solver 'heun' must be 'ddim' or"):
        PROCESSES[name].begin("heun", 4)


ZERO_SNR = {
    "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
    "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": True,
}  # fmt: skip
TRAINED_BETAS = {
    "_class_name": "DDIMScheduler", "trained_betas": torch.linspace(0.02, 0.0001, 1000).square().tolist(),
    "prediction_type": "epsilon", "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False,
}  # fmt: skip


def test_a_schedule_of_zero_terminal_snr_learns_from_pure_noise() -> None:
    """Lin et al. 2024, algorithm 1: the roots of abar are shifted and scaled to end at 0 and to begin as before."""
    process = from_scheduler_config(ZERO_SNR, torch.device("cpu"))
    latents, noise, t = batch()
    x_t, target = process.corrupt(latents, noise, t)
    plain = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square()).cumprod(0).sqrt()
    signal = ((plain - plain[-1]) * plain[0] / (plain[0] - plain[-1]))[t].reshape(-1, 1, 1, 1)
    sigma = (1 - signal.square()).sqrt()
    torch.testing.assert_close(x_t, signal * latents + sigma * noise)
    torch.testing.assert_close(target, signal * noise - sigma * latents)
    assert torch.equal(x_t[-1], noise[-1])
    assert torch.equal(target[-1], -latents[-1])
    assert torch.equal(process.predicted_latents(target, x_t, t)[-1], latents[-1])
    assert process.min_snr_weights(t, 5.0)[-1] == 0


def test_trained_betas_are_the_schedule() -> None:
    process = from_scheduler_config(TRAINED_BETAS, torch.device("cpu"))
    latents, noise, t = batch()
    abar = (1 - torch.tensor(TRAINED_BETAS["trained_betas"])).cumprod(0)[t].reshape(-1, 1, 1, 1)
    assert torch.equal(process.corrupt(latents, noise, t)[0], abar.sqrt() * latents + (1 - abar).sqrt() * noise)


@pytest.mark.parametrize("config", [ZERO_SNR, TRAINED_BETAS], ids=["zero SNR", "trained betas"])
@pytest.mark.parametrize(("solver", "theirs"), [("ddim", DDIMScheduler), ("dpm++", DPMSolverMultistepScheduler)])
def test_drawing_follows_diffusers_on_unusual_schedules(config: dict[str, Any], solver: str, theirs: Any) -> None:
    run = from_scheduler_config(config, torch.device("cpu")).begin(solver, 5)
    names = inspect.signature(theirs.__init__).parameters
    scheduler = theirs(**{name: value for name, value in config.items() if name in names})
    scheduler.set_timesteps(5)
    assert torch.equal(run.timesteps, scheduler.timesteps)
    ours, output = batch()[0][:1], batch()[1][:1]
    expected = ours
    for step, timestep in enumerate(scheduler.timesteps):
        ours = run.step(output, step, ours)
        expected = scheduler.step(output, timestep, expected).prev_sample
    assert torch.equal(ours, expected)
    assert ours.isfinite().all()
