"""Trial of the ways to run a backbone's denoiser: which gives the same results, and which is fastest."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from textual_inversion.compiled import graphs_work_in_threads
from textual_inversion.conditioning import Conditioning
from textual_inversion.config import AdapterConfig, GradientPath
from textual_inversion.families.base import Backbone, stack_prompts
from textual_inversion.lora import AdapterBatch, group_adapters, made_up_adapter
from textual_inversion.prompts import encode_prompt

log = logging.getLogger(__name__)

MIN_GAIN = 1.03
"""Factor by which a mode must be faster than a simpler mode to be chosen."""

_TOLERANCE = {torch.float32: 1e-3}
_HALF_TOLERANCE = 0.1
"""Largest relative difference between two correct results in half precision; errors of a compiler are larger."""

_MIN_LAUNCH_SHARE = 0.8
"""Share of a pass's time spent launching kernels from which CUDA graphs are tried: they save that time alone."""

Mode = Literal["plain", "compiled", "graphs"]
"""Way to run the denoiser: uncompiled, by torch.compile, or by torch.compile and recorded as CUDA graphs."""


NO_ADAPTER = AdapterConfig()


@dataclass(frozen=True, slots=True)
class Pass:
    """Shape of a pass through the denoiser."""

    samples: int
    gradients: bool
    """True for a pass with a backward pass to the text."""
    adapter: AdapterConfig = NO_ADAPTER
    """Settings of the adapters of its concepts; one of cross-attention gives the denoiser further inputs."""
    gradient_path: GradientPath = "whole"
    """Part of the denoiser that gradients pass through; a U-Net runs other code for each."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Duration of one pass."""

    seconds: float
    host_seconds: float
    """Time until the host has launched all kernels; for the rest of `seconds` the device works alone."""


def compile_checked(
    backbone: Backbone,
    passes: Sequence[Pass],
    *,
    graphs: bool = False,
    backend: str = "inductor",
    or_plain: bool = False,
) -> bool:
    """Compile the denoiser, and keep it compiled if all these passes give the same results as without.

    Results are the outputs and the gradients that reach the text. Returns True if the denoiser stays compiled. With
    other results it is run uncompiled and False is returned; without `or_plain`, RuntimeError names the difference.
    """
    backbone.uncompile()
    inputs = [_inputs(backbone, each) for each in passes]
    plain = [_results(backbone, *each) for each in zip(passes, inputs, strict=True)]
    backbone.compile(backend=backend, or_plain=or_plain, graphs=graphs)
    try:
        compiled = [_results(backbone, *each) for each in zip(passes, inputs, strict=True)]
    except BaseException:
        backbone.uncompile()
        raise
    error = max(
        float((one - other).norm() / one.norm().clamp(min=torch.finfo(one.dtype).tiny))
        for before, after in zip(plain, compiled, strict=True)
        for one, other in zip(before, after, strict=True)
    )
    if error <= _TOLERANCE.get(backbone.dtype, _HALF_TOLERANCE):
        return True
    backbone.uncompile()
    message = f"torch.compile changes what the denoiser computes by {error:.2g} of its norm"
    if not or_plain:
        raise RuntimeError(f"{message}; run it without")
    log.warning("%s: not compiled, so slower", message)
    return False


def pass_results(backbone: Backbone, one: Pass) -> list[Tensor]:
    """Return what a pass on made-up inputs gives: the prediction and, in a pass with gradients, those of its square
    with respect to the text's encodings."""
    return _results(backbone, one, _inputs(backbone, one))


def time_pass(backbone: Backbone, one: Pass) -> Timing:
    """Time a pass several times, from an idle device to an idle device, and return the fastest."""
    inputs = _inputs(backbone, one)
    timings = []
    for _ in range(8):  # the first three are for graphs: warm up, record, launch
        _synchronize(backbone)
        started = time.perf_counter()
        _results(backbone, one, inputs)
        launched = time.perf_counter()
        _synchronize(backbone)
        timings.append(Timing(time.perf_counter() - started, launched - started))
    return min(timings[3:], key=lambda timing: timing.seconds)


def compile_fastest(
    backbone: Backbone,
    passes: Sequence[Pass],
    *,
    backend: str = "inductor",
    measure: Callable[[Backbone, Pass], Timing] = time_pass,
) -> Mode:
    """Choose the mode in which the first of these passes is fastest, set the denoiser to it, and return it.

    `graphs` is tried only where launching kernels takes most of the time, and where this torch lets other threads use
    what this one records (`graphs_work_in_threads`). A mode that fails or gives other results is not chosen
    (`compile_checked`). `measure` times a pass.
    """
    backbone.uncompile()
    plain = measure(backbone, passes[0])
    if not compile_checked(backbone, passes, backend=backend, or_plain=True):
        return "plain"
    compiled = measure(backbone, passes[0])
    if graphs_work_in_threads() and compiled.host_seconds >= _MIN_LAUNCH_SHARE * compiled.seconds:
        try:
            if compile_checked(backbone, passes, graphs=True, backend=backend, or_plain=True):
                graphs = measure(backbone, passes[0])
                if graphs.seconds * MIN_GAIN <= min(plain.seconds, compiled.seconds):
                    return _log_choice("graphs", plain, graphs)
        except RuntimeError as error:  # no memory for graphs, or kernels that cannot be recorded
            log.warning("no CUDA graphs: %s: %s", type(error).__name__, error)
    if compiled.seconds * MIN_GAIN <= plain.seconds:
        backbone.compile(backend=backend, or_plain=True)  # torch keeps the compiled code
        return _log_choice("compiled", plain, compiled)
    backbone.uncompile()
    return _log_choice("plain", plain, compiled)


def _log_choice(mode: Mode, plain: Timing, other: Timing) -> Mode:
    log.info("denoiser %s: a pass takes %.3g s plain, %.3g s otherwise", mode, plain.seconds, other.seconds)
    return mode


def _synchronize(backbone: Backbone) -> None:
    if backbone.device.type == "cuda":
        torch.cuda.synchronize(backbone.device)


_Inputs = tuple[Tensor, Tensor, Conditioning]
"""Latents, timesteps, conditioning of a pass."""


@torch.no_grad()
def _inputs(backbone: Backbone, one: Pass) -> _Inputs:
    """Make up a pass's inputs: random latents, all noise levels, and the empty prompt, changed by an adapter that acts
    at every position if the pass has adapters."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(one.samples, *backbone.latent_shape, generator=generator).to(backbone.device)
    timesteps = torch.linspace(0, backbone.noise.num_timesteps - 1, one.samples).long().to(backbone.device)
    ids = stack_prompts([encode_prompt("", {}, backbone.vocabularies)])
    ids = {key: each.to(backbone.device) for key, each in ids.items()}
    conditioning = backbone.encode_prompts(ids, {}, *_made_up_adapters(backbone, one.adapter, ids))
    conditioning = replace(conditioning.repeat(one.samples), gradient_path=one.gradient_path)
    return latents, backbone.noise.model_timesteps(timesteps), conditioning


def _made_up_adapters(
    backbone: Backbone, config: AdapterConfig, ids: Mapping[str, Tensor]
) -> list[Sequence[AdapterBatch]]:
    """Return the adapters argument of `encode_prompts` for one prompt, as a list of one; empty without an adapter."""
    if config.kind == "none":
        return []
    adapter = made_up_adapter(backbone.adapter_layers, config, torch.Generator().manual_seed(0))
    everywhere = {key: torch.ones(each.shape[1], dtype=torch.bool) for key, each in ids.items()}
    return [group_adapters([[(adapter, everywhere)]], backbone.device)]


def _results(backbone: Backbone, one: Pass, inputs: _Inputs) -> list[Tensor]:
    """Return the prediction and, in a pass with gradients, those of its square with respect to the text's encodings."""
    latents, timesteps, conditioning = inputs
    if not one.gradients:
        with torch.no_grad():
            return [backbone.predict(latents, timesteps, conditioning)]
    conditioning = conditioning.detach()
    encodings = [encoding.requires_grad_() for encoding in conditioning.encodings()]
    prediction = backbone.predict(latents, timesteps, conditioning)
    gradients = torch.autograd.grad(prediction.square().mean(), encodings, allow_unused=True, materialize_grads=True)
    return [prediction.detach(), *gradients]
