"""The noise processes: how noise is added to latents, what the denoiser predicts, and how samplers undo the noise.

Each process is an object of the backbone; nothing outside this file knows which kind it is. Letters as in Ho et al.
2020: x_0 latents, eps noise, x_t noisy latents; `abar_t` is the product of alphas up to t. SNR(t) is the squared ratio
of signal to noise in x_t. Timesteps are integers from 0 (least noise) to `num_timesteps - 1`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from textual_inversion.schedule_checks import unsupported_flow

Mix = Callable[[Tensor, Tensor, int], Tensor]
"""(latents [batch, ...], noise [batch, ...], step) -> latents with the noise of that step, [batch, ...]."""


class SolverRun:
    """A run of a diffusers scheduler from noise to latents; each batch needs its own, as multistep solvers keep state.

    Steps are numbered from 0, the noisiest. Sampling starts at pure noise of standard deviation 1.
    """

    def __init__(self, scheduler: Any, timesteps: Tensor, mix: Mix) -> None:
        """Wrap a diffusers scheduler (untyped) whose timesteps are set, on the host: it would wait to read them from a
        device. `timesteps` and `mix` are those of its steps."""
        self._scheduler = scheduler
        self._mix = mix
        self.timesteps = timesteps
        """The denoiser's timestep of each step, [steps], on the host."""

    def step(self, output: Tensor, step: int, latents: Tensor) -> Tensor:
        """Take one step: denoiser output and latents [batch, ...] of this step -> latents of the next one."""
        timestep = self._scheduler.timesteps[step]
        next_latents: Tensor = self._scheduler.step(output, timestep, latents, return_dict=False)[0]
        return next_latents

    def noised(self, latents: Tensor, noise: Tensor, step: int) -> Tensor:
        """Return clean latents [batch, ...] with the noise that a sample has before this step; after the last step
        (`step` is the number of steps), return them unchanged."""
        if step == len(self.timesteps):
            return latents
        return self._mix(latents, noise, step)


class Noise(Protocol):
    """A noise process: the forward direction, the denoiser's target, and samplers for the way back."""

    num_timesteps: int
    """Number of training timesteps."""

    def corrupt(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Add noise to latents: [batch, ...] each, timesteps [batch] -> (x_t, target of the denoiser)."""
        ...

    def predicted_latents(self, prediction: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """Return the x_0 that a prediction at x_t stands for, [batch, ...] each."""
        ...

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Return min-SNR loss weights [batch] (Hang et al. 2023, section 3.4).

        The weight of the loss on x_0 is min(SNR, gamma), converted to the loss on this process's target.
        """
        ...

    def snr_probabilities(self) -> Tensor:
        """Return TextBoost's distribution of timesteps (Park et al. 2024, v1), [num_timesteps] float64 on the CPU.

        p(t) is proportional to max_s log SNR(s) - log SNR(t). Raises ValueError if a discrete schedule has a timestep
        without noise or without signal.
        """
        ...

    def model_timesteps(self, timesteps: Tensor) -> Tensor:
        """Convert training timesteps [batch] to what `Backbone.predict` takes, [batch]."""
        ...

    def begin(self, solver: str, steps: int) -> SolverRun:
        """Begin a sampling run. Raises ValueError if the solver is not known."""
        ...


class _DiscreteTime(ABC):
    """Ho et al. 2020, Eq. 4: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, SNR(t) = abar_t / (1 - abar_t)."""

    def __init__(self, alphas_cumprod: Tensor, scheduler_config: Mapping[str, Any]) -> None:
        """Hold `alphas_cumprod`, [num_timesteps] float32 on the backbone's device, and the diffusers scheduler settings
        that sampling runs are made from."""
        self._abar = alphas_cumprod
        self._scheduler_config = dict(scheduler_config)
        self.num_timesteps = len(alphas_cumprod)

    def corrupt(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """See `Noise.corrupt`."""
        signal, sigma = self._levels(timesteps, latents)
        return signal * latents + sigma * noise, self._target(latents, noise, signal, sigma)

    def predicted_latents(self, prediction: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """See `Noise.predicted_latents`."""
        signal, sigma = self._levels(timesteps, x_t)
        return self._predicted(prediction, x_t, signal, sigma)

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """See `Noise.min_snr_weights`."""
        abar = self._abar[timesteps]
        snr = abar / (1 - abar)
        return snr.clamp(max=gamma) / self._loss_ratio(snr)

    def snr_probabilities(self) -> Tensor:
        """See `Noise.snr_probabilities`."""
        abar = self._abar.cpu().double()
        if not ((abar > 0) & (abar < 1)).all():
            raise ValueError(
                "timesteps.sampler 'snr' needs noise and signal at every timestep; this model's schedule has one "
                "without (zero terminal SNR?): use 'range'"
            )
        return _by_log_snr(abar.log() - (1 - abar).log())

    def model_timesteps(self, timesteps: Tensor) -> Tensor:
        """Return the timesteps unchanged."""
        return timesteps

    def begin(self, solver: str, steps: int) -> SolverRun:
        """Begin a run of `ddim` (with eta 0) or `dpm++` (DPM-Solver++(2M)) on the checkpoint's own schedule.

        Samples are never clipped to [-1, 1], whatever the schedule's settings say: latents are not bounded by 1. Raises
        ValueError for another solver.
        """
        from diffusers import DDIMScheduler, DPMSolverMultistepScheduler  # takes seconds

        config = {**self._scheduler_config, "clip_sample": False}
        if solver == "ddim":
            scheduler = DDIMScheduler.from_config(config)
        elif solver == "dpm++":
            scheduler = DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++", solver_order=2)
        else:
            raise _unknown_solver(solver)
        scheduler.set_timesteps(steps)

        def mix(latents: Tensor, noise: Tensor, step: int) -> Tensor:
            noisy: Tensor = scheduler.add_noise(latents, noise, scheduler.timesteps[step].expand(len(latents)))
            return noisy

        return SolverRun(scheduler, scheduler.timesteps, mix)

    @abstractmethod
    def _target(self, latents: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor: ...

    @abstractmethod
    def _predicted(self, prediction: Tensor, x_t: Tensor, signal: Tensor, sigma: Tensor) -> Tensor: ...

    @abstractmethod
    def _loss_ratio(self, snr: Tensor) -> Tensor:
        """Return the loss on the target in units of the loss on x_0, [batch]."""

    def _levels(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return sqrt(abar_t) and sqrt(1 - abar_t), shaped to multiply `like` [batch, ...]."""
        abar = _column(self._abar[timesteps], like)
        return abar.sqrt(), (1 - abar).sqrt()


class Epsilon(_DiscreteTime):
    """The denoiser predicts the noise: target eps, x_0 = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t)
    (Ho et al. 2020, Eq. 15)."""

    def _target(self, latents: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        del latents, signal, sigma
        return noise

    def _predicted(self, prediction: Tensor, x_t: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        return (x_t - sigma * prediction) / signal

    def _loss_ratio(self, snr: Tensor) -> Tensor:
        return snr


class VPrediction(_DiscreteTime):
    """The denoiser predicts the velocity (Salimans & Ho 2022, appendix D): target
    v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0, so x_0 = sqrt(abar_t) x_t - sqrt(1 - abar_t) v."""

    def _target(self, latents: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        return signal * noise - sigma * latents

    def _predicted(self, prediction: Tensor, x_t: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        return signal * x_t - sigma * prediction

    def _loss_ratio(self, snr: Tensor) -> Tensor:
        return snr + 1


class RectifiedFlow:
    """Straight paths from latents to noise (Liu et al. 2023; Esser et al. 2024, section 2): x_t = (1 - sigma_t) x_0 +
    sigma_t eps, target eps - x_0, SNR(t) = ((1 - sigma_t) / sigma_t)^2.

    Noise levels are those of diffusers' FlowMatchEulerDiscreteScheduler: with u = (t + 1) / num_timesteps,
    sigma_t = shift u / (1 + (shift - 1) u) (Esser et al. 2024, Eq. 23). The last timestep is pure noise, sigma 1.
    """

    def __init__(
        self,
        num_timesteps: int = 1000,
        shift: float = 1.0,
        *,
        even_steps: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        """Make the noise levels.

        `even_steps`: True if Euler's n steps begin at u = 1, 1 - 1/n, ..., 1/n, as FluxPipeline has it, and not at the
        levels that the scheduler chooses itself.
        """
        self.num_timesteps = num_timesteps
        self._shift = shift
        self._even_steps = even_steps
        u = torch.linspace(1, num_timesteps, num_timesteps) / num_timesteps
        self._sigma = (shift * u / (1 + (shift - 1) * u)).to(device)

    def corrupt(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """See `Noise.corrupt`."""
        sigma = _column(self._sigma[timesteps], latents)
        return (1 - sigma) * latents + sigma * noise, noise - latents

    def predicted_latents(self, prediction: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """Return x_0 = x_t - sigma_t (eps - x_0), [batch, ...]."""
        return x_t - _column(self._sigma[timesteps], x_t) * prediction

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """See `Noise.min_snr_weights`. The loss on x_0 is sigma^2 times the loss on the target, so the weight is
        min((1 - sigma)^2, gamma sigma^2), which is finite at every noise level."""
        sigma = self._sigma[timesteps]
        return torch.minimum((1 - sigma).square(), gamma * sigma.square())

    def snr_probabilities(self) -> Tensor:
        """See `Noise.snr_probabilities`. The last timestep has no signal, hence no log SNR, and is never drawn."""
        sigma = self._sigma[:-1].cpu().double()
        return torch.cat([_by_log_snr(2 * ((1 - sigma).log() - sigma.log())), sigma.new_zeros(1)])

    def model_timesteps(self, timesteps: Tensor) -> Tensor:
        """Return num_timesteps * sigma_t, [batch] float32: the scale that SD3 and FLUX were trained to read."""
        return self._sigma[timesteps] * self.num_timesteps

    def begin(self, solver: str, steps: int) -> SolverRun:
        """Begin a run of Euler's method (`ddim`, whose deterministic step it is on straight paths) or of
        DPM-Solver++(2M) (`dpm++`). Raises ValueError for another solver."""
        from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler  # takes seconds

        if solver == "ddim":
            scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=self.num_timesteps, shift=self._shift)
            even = [1 - step / steps for step in range(steps)] if self._even_steps else None
            scheduler.set_timesteps(steps, sigmas=even)
        elif solver == "dpm++":
            scheduler = DPMSolverMultistepScheduler(
                num_train_timesteps=self.num_timesteps,
                algorithm_type="dpmsolver++",
                solver_order=2,
                prediction_type="flow_prediction",
                use_flow_sigmas=True,
                flow_shift=self._shift,
            )
            scheduler.set_timesteps(steps)
        else:
            raise _unknown_solver(solver)

        def mix(latents: Tensor, noise: Tensor, step: int) -> Tensor:
            sigma: Tensor = scheduler.sigmas[step]
            return (1 - sigma) * latents + sigma * noise

        # DPMSolverMultistepScheduler truncates its timesteps to integers; the denoiser gets the exact noise level
        return SolverRun(scheduler, scheduler.sigmas[:-1] * self.num_timesteps, mix)


def from_scheduler_config(config: Mapping[str, Any], device: torch.device) -> Noise:
    """Make the noise process that a diffusers `scheduler_config.json` describes.

    Raises ValueError, naming the setting, for a prediction type or a schedule that is not implemented.
    """
    # a live scheduler's config lists the settings that nobody gave, and `from_config` would drop those
    config = {name: value for name, value in config.items() if name != "_use_default_values"}
    if config.get("_class_name") == "FlowMatchEulerDiscreteScheduler":
        if problem := unsupported_flow(config):
            raise ValueError(problem)
        return RectifiedFlow(config.get("num_train_timesteps", 1000), config.get("shift", 1.0), device=device)
    if str(config.get("_class_name")).startswith("FlowMatch") or config.get("use_flow_sigmas"):
        raise ValueError(
            f"the scheduler {config.get('_class_name')} is not supported; of rectified flow, "
            "FlowMatchEulerDiscreteScheduler is"
        )
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in _DISCRETE:
        raise ValueError(
            f"prediction_type {prediction_type!r} in the scheduler's config: 'epsilon' and 'v_prediction' are supported"
        )
    from diffusers import DDPMScheduler  # takes seconds

    return _DISCRETE[prediction_type](DDPMScheduler.from_config(config).alphas_cumprod.to(device), config)


_DISCRETE: Mapping[str, type[_DiscreteTime]] = {"epsilon": Epsilon, "v_prediction": VPrediction}


def _column(values: Tensor, like: Tensor) -> Tensor:
    """Shape values [batch] to multiply `like` [batch, ...]."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _by_log_snr(log_snr: Tensor) -> Tensor:
    """Return probabilities proportional to max_s log SNR(s) - log SNR(t), [timesteps] float64."""
    weight = log_snr.max() - log_snr
    return weight / weight.sum()


def _unknown_solver(solver: str) -> ValueError:
    return ValueError(f"solver {solver!r} must be 'ddim' or 'dpm++'")
