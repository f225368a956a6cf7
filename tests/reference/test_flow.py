"""Rectified flow against diffusers' own scheduler: noise levels, noisy latents, and pictures of a guided run."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from textual_inversion.noise import RectifiedFlow

SHIFTS = (1.0, 3.0)


@pytest.mark.parametrize("shift", SHIFTS)
def test_training_equals_diffusers(shift: float) -> None:
    """As diffusers' training scripts for SD3 and FLUX have it: the model is told sigma * 1000."""
    scheduler, flow = FlowMatchEulerDiscreteScheduler(shift=shift), RectifiedFlow(shift=shift)
    latents, noise = torch.randn(2, 1000, 2, 2, generator=torch.Generator().manual_seed(0))
    t = torch.arange(1000)
    theirs = scheduler.timesteps.flip(0)
    torch.testing.assert_close(flow.model_timesteps(t), theirs, rtol=1e-6, atol=0)
    x_t, target = flow.corrupt(latents, noise, t)
    torch.testing.assert_close(x_t, scheduler.scale_noise(latents, theirs, noise))
    assert torch.equal(target, noise - latents)


@pytest.mark.parametrize("shift", SHIFTS)
def test_a_run_equals_diffusers(shift: float) -> None:
    scheduler, run = FlowMatchEulerDiscreteScheduler(shift=shift), RectifiedFlow(shift=shift).begin("ddim", 7)
    scheduler.set_timesteps(7)
    torch.testing.assert_close(run.timesteps, scheduler.timesteps)
    clean, noise = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    ours = theirs = noise
    for step, timestep in enumerate(scheduler.timesteps):
        torch.testing.assert_close(
            run.noised(clean, noise, step), scheduler.scale_noise(clean, timestep.expand(3), noise)
        )
    scheduler.set_timesteps(7)
    for step, timestep in enumerate(scheduler.timesteps):
        ours = run.step((ours * timestep / 1000).sin(), step, ours)
        theirs = scheduler.step((theirs * timestep / 1000).sin(), timestep, theirs).prev_sample
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("kind", "shift"), [("exponential", math.exp(0.8)), ("linear", 0.8)])
def test_even_steps_equal_diffusers_with_a_dynamic_shift(kind: str, shift: float) -> None:
    """As FluxPipeline calls the scheduler, with mu = 0.8."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 7, 7), mu=0.8)
    run = RectifiedFlow(shift=shift, even_steps=True).begin("ddim", 7)
    torch.testing.assert_close(run.timesteps, scheduler.timesteps)
    torch.testing.assert_close(RectifiedFlow(even_steps=True).begin("ddim", 4).timesteps,
                               torch.tensor([1000.0, 750, 500, 250]))  # fmt: skip
