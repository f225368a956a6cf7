"""Frozen denoisers run by torch.compile, and a look whether they still do the same.

Compilers err: torch 2.13's changes the layout of convolutions and then, on a CPU, gets the gradients of the demo model
wrong without a word, while its outputs are right. Hence `layout_optimization` off, and `compile_checked`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from textual_inversion.families.base import Conditioning

if TYPE_CHECKING:
    from textual_inversion.families.base import Backbone

log = logging.getLogger(__name__)

_TOLERANCE = {torch.float32: 1e-3}
_HALF_TOLERANCE = 0.1
"""Of two ways to round half precision, relative; what is wrong is off by more."""


class Compiled:
    """Calls a module through torch.compile: each new shape is compiled when it first comes, for a minute or so."""

    def __init__(self, module: nn.Module, *, backend: str = "inductor", or_plain: bool = False) -> None:
        """`or_plain`: where compiling fails (no C compiler, say), say so once and call the module as it is from then
        on; else the error is raised."""
        self._module, self._or_plain = module, or_plain
        options: dict[str, Any] | None = {"layout_optimization": False} if backend == "inductor" else None
        # shapes are few and fixed; code for any shape would be slower
        self._call: Any = torch.compile(module, backend=backend, options=options, dynamic=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the module. Raises RuntimeError if it cannot be compiled."""
        from torch._dynamo.exc import TorchDynamoException  # takes seconds to import

        try:
            return self._call(*args, **kwargs)
        except TorchDynamoException as error:  # torch's own; what the module raises is none
            if not self._or_plain:
                raise
            reason = str(error).strip().partition("\n\n")[0]
            log.warning("not compiled, so slower: %s: %s", type(error).__name__, reason)
        self._call = self._module
        return self._call(*args, **kwargs)


def compile_checked(
    backbone: Backbone, batch_size: int, *, gradients: bool, backend: str = "inductor", or_plain: bool = False
) -> bool:
    """Run the denoiser compiled from now on, if for so many samples it then gives what it gives as it is: outputs, and
    with `gradients` also those that reach the text. True if it does.

    Otherwise it stays as it is; without `or_plain` that is an error: RuntimeError, naming the difference.
    """
    plain = _results(backbone, batch_size, gradients)
    backbone.compile(backend=backend, or_plain=or_plain)
    compiled = _results(backbone, batch_size, gradients)
    error = max(float((one - other).norm() / one.norm()) for one, other in zip(plain, compiled, strict=True))
    if error <= _TOLERANCE.get(backbone.dtype, _HALF_TOLERANCE):
        return True
    backbone.uncompile()
    message = f"torch.compile changes what the denoiser computes by {error:.2g} of its norm"
    if not or_plain:
        raise RuntimeError(f"{message}; run it without")
    log.warning("%s: not compiled, so slower", message)
    return False


def _results(backbone: Backbone, batch_size: int, gradients: bool) -> list[Tensor]:
    """The prediction for made-up samples, and the gradient of its square with respect to the text's states."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch_size, *backbone.latent_shape, generator=generator).to(backbone.device)
    timesteps = torch.linspace(0, len(backbone.alphas_cumprod) - 1, batch_size).long().to(backbone.device)
    with torch.no_grad():
        empty = torch.tensor([backbone.assemble([])] * batch_size, device=backbone.device)
        states = backbone.encode_prompts(empty, {}).hidden
        if not gradients:
            return [backbone.predict(latents, timesteps, Conditioning(hidden=states))]
    states = states.detach().requires_grad_()
    prediction = backbone.predict(latents, timesteps, Conditioning(hidden=states))
    return [prediction.detach(), *torch.autograd.grad(prediction.square().mean(), states)]
