"""Which schedulers' configs describe a noise process that can be learned with."""

from __future__ import annotations

import re
from typing import Any

import diffusers
import pytest
import torch

from textual_inversion.noise import from_scheduler_config
from textual_inversion.schedule_checks import _CLASSES, discrete_problem

STABLE_DIFFUSION = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
ZERO_SNR = {
    "_class_name": "DDIMScheduler",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


@pytest.mark.parametrize("name", _CLASSES)
def test_the_default_config_of_each_known_scheduler_makes_a_noise_process(name: str) -> None:
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    config = dict(getattr(diffusers, name)().config) | {"_class_name": name}
    assert discrete_problem(config) == ""
    assert from_scheduler_config(config, torch.device("cpu")).num_timesteps == config["num_train_timesteps"]


@pytest.mark.parametrize(
    "changes",
    [{}, ZERO_SNR, {"trained_betas": [0.001] * 1000}, {"trained_betas": [0.1, 0.2], "num_train_timesteps": 2}],
)
def test_schedules_that_people_have_are_accepted(changes: dict[str, Any]) -> None:
    assert discrete_problem(STABLE_DIFFUSION | changes) == ""


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"prediction_type": "sample"}, "prediction_type 'sample'"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "rectified flow"),
        ({"use_flow_sigmas": True}, "rectified flow"),
        ({"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler scales what the U-Net reads"),
        ({"_class_name": "ScoreSdeVeScheduler"}, "class 'ScoreSdeVeScheduler', which is not supported; DDIM"),
        ({"_class_name": None}, "class None"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr with prediction_type 'epsilon'"),
        ({"trained_betas": [0.1] * 7}, "7 trained_betas for 1000 timesteps"),
        ({"trained_betas": "[0.1]"}, "must be a list"),
        ({"trained_betas": [0.1] * 999 + [2]}, "from 0 to 1"),
        ({"num_train_timesteps": "many"}, "num_train_timesteps 'many'"),
        ({"num_train_timesteps": 10**9}, "num_train_timesteps 1000000000 .* from 1 to 100,000"),
        ({"beta_schedule": "cosine"}, "beta_schedule 'cosine'.*'squaredcos_cap_v2'"),
        ({"beta_start": "0.1"}, "beta_start '0.1'"),
        ({"timestep_spacing": "even"}, "timestep_spacing 'even'"),
    ],
)
def test_what_makes_no_noise_process_is_refused_by_its_setting(changes: dict[str, Any], problem: str) -> None:
    assert re.search(problem, discrete_problem(STABLE_DIFFUSION | changes))
