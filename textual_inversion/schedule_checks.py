"""Checks of the config of a scheduler, of a U-Net or of a rectified flow, without diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PREDICTIONS = ("epsilon", "v_prediction")
_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
_SPACINGS = ("leading", "linspace", "trailing")
_CLASSES = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
"""Schedulers that differ in how they draw, but whose settings describe one noise process (Ho et al. 2020)."""
_SHIFTS_BY_SIZE = "use_dynamic_shifting"
_FLOW_VARIANTS = (
    _SHIFTS_BY_SIZE,
    "invert_sigmas",
    "shift_terminal",
    "stochastic_sampling",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
)
"""Settings of FlowMatchEulerDiscreteScheduler that change the noise levels or the steps."""
_NUM_TIMESTEPS = 1000
"""Number of timesteps where a config is silent."""
_MAX_TIMESTEPS = 100_000
"""Largest number of timesteps; models have 1,000, and each takes memory and time."""


def discrete_problem(scheduler: Mapping[str, Any]) -> str:
    """Return why no noise process can be made from the config of a U-Net's scheduler, with a remedy; empty if one
    can."""
    name, prediction = scheduler.get("_class_name"), scheduler.get("prediction_type", "epsilon")
    if str(name).startswith(("EDM", "KarrasEDM")):
        return f"its scheduler {name} scales what the U-Net reads in a way that is not supported"
    if str(name).startswith("FlowMatch") or scheduler.get("use_flow_sigmas"):
        return (
            f"its scheduler {name} is one of rectified flow, for which these U-Nets are not trained; put the scheduler "
            "that the model was trained with into its folder"
        )
    if name not in _CLASSES:
        return f"the scheduler's config names the class {name!r}, which is not supported; {', '.join(_CLASSES)} are"
    if prediction not in _PREDICTIONS:
        return f"prediction_type {prediction!r} in the scheduler's config: 'epsilon' and 'v_prediction' are supported"
    if scheduler.get("rescale_betas_zero_snr") and prediction == "epsilon":
        return (
            "rescale_betas_zero_snr with prediction_type 'epsilon' in the scheduler's config: from pure noise, the "
            "noise tells nothing about the picture; the model predicts v, or its schedule is not rescaled"
        )
    return _betas_problem(scheduler) or _spacing_problem(scheduler)


def unsupported_flow(scheduler: Mapping[str, Any], *, shifts_by_size: bool = False) -> str:
    """Return what is not supported in the config of a rectified flow's scheduler; empty if nothing is.

    `shifts_by_size`: True if the family knows how the shift depends on the pictures' size.
    """
    if problem := timesteps_problem(scheduler):
        return problem
    variants = [name for name in _FLOW_VARIANTS if not (shifts_by_size and name == _SHIFTS_BY_SIZE)]
    return next(
        (f"{name} = {scheduler[name]!r} in the scheduler's config is not supported"
         for name in variants if scheduler.get(name)),
        "",
    )  # fmt: skip


def timesteps_problem(scheduler: Mapping[str, Any]) -> str:
    """Return why a scheduler's number of timesteps is none; empty if it is one."""
    num_timesteps = scheduler.get("num_train_timesteps", _NUM_TIMESTEPS)
    if not isinstance(num_timesteps, int) or not 1 <= num_timesteps <= _MAX_TIMESTEPS:
        return (
            f"num_train_timesteps {num_timesteps!r} in the scheduler's config is no number of timesteps from 1 to "
            f"{_MAX_TIMESTEPS:,}"
        )
    return ""


def _betas_problem(scheduler: Mapping[str, Any]) -> str:
    if problem := timesteps_problem(scheduler):
        return problem
    num_timesteps = scheduler.get("num_train_timesteps", _NUM_TIMESTEPS)
    betas = scheduler.get("trained_betas")
    if betas is not None:
        if not isinstance(betas, list) or not all(isinstance(beta, float | int) and 0 <= beta <= 1 for beta in betas):
            return "trained_betas in the scheduler's config must be a list of numbers from 0 to 1"
        if len(betas) != num_timesteps:
            return f"the scheduler's config has {len(betas)} trained_betas for {num_timesteps} timesteps"
        return ""
    if scheduler.get("beta_schedule", "linear") not in _BETA_SCHEDULES:
        return (
            f"beta_schedule {scheduler['beta_schedule']!r} in the scheduler's config: "
            f"{', '.join(map(repr, _BETA_SCHEDULES))} are supported"
        )
    for name in ("beta_start", "beta_end"):
        value = scheduler.get(name, 0.01)
        if not isinstance(value, float | int) or not 0 < value < 1:
            return f"{name} {value!r} in the scheduler's config must be between 0 and 1"
    return ""


def _spacing_problem(scheduler: Mapping[str, Any]) -> str:
    spacing = scheduler.get("timestep_spacing", "leading")
    if spacing not in _SPACINGS:
        return f"timestep_spacing {spacing!r} in the scheduler's config: {', '.join(map(repr, _SPACINGS))} are known"
    return ""
