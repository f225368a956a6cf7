"""A frozen module run by torch.compile or as CUDA graphs. `compile_trial` checks that the results stay the same.

Compilers err: torch 2.13's changes the layout of convolutions and then, on a CPU, gets the gradients of the demo model
wrong without a warning, while its outputs are right. Hence `layout_optimization` is off.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

log = logging.getLogger(__name__)

_MAX_SHAPES = 64
"""Input shapes compiled for one module. Torch's own bound is 8; beyond it, torch runs the module uncompiled without
saying so."""


_GRAPHS_SINCE = "2.13"
"""First version of torch whose CUDA graphs may be recorded and launched on any thread."""


def graphs_work_in_threads() -> bool:
    """Return whether this torch's CUDA graphs work on any thread. In earlier versions, a thread other than the first
    that uses them fails at an assertion (https://github.com/pytorch/pytorch/issues/123177)."""
    return bool(torch.__version__ >= _GRAPHS_SINCE)  # compares versions, not letters


class Compiled:
    """A module called through torch.compile. Each new input shape is compiled at its first call, for a minute or so."""

    def __init__(
        self, module: nn.Module, *, backend: str = "inductor", or_plain: bool = False, graphs: bool = False
    ) -> None:
        """Wrap a module.

        `or_plain`: where compiling fails (no C compiler, say), log it once and call the module uncompiled; without it
        the error is raised. `graphs`: on a GPU, record the kernels of each shape and launch them as one CUDA graph,
        once for each calling thread, as torch does; the graphs' memory stays allocated. No effect on a CPU.
        """
        import torch._dynamo as dynamo  # takes seconds

        dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, _MAX_SHAPES)
        self._module = module
        self._or_plain = or_plain
        self._graphs = graphs
        options: dict[str, Any] | None = None
        if backend == "inductor":
            options = {"layout_optimization": False, "triton.cudagraphs": graphs}
        # shapes are few and fixed; code for any shape would be slower
        self._call: Any = torch.compile(module, backend=backend, options=options, dynamic=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module returns, a tuple of tensors. Raises RuntimeError if it cannot be compiled."""
        from torch._dynamo.exc import TorchDynamoException

        try:
            outputs = self._call(*args, **kwargs)
        except TorchDynamoException as error:  # torch's own errors; those of the module are of other classes
            if not self._or_plain:
                raise
            reason = str(error).strip().partition("\n\n")[0]
            log.warning("not compiled, so slower: %s: %s", type(error).__name__, reason)
            self._call = self._module
            self._graphs = False
            return self._call(*args, **kwargs)
        # the next run of a graph writes into the same output tensors
        return tuple(output.clone() for output in outputs) if self._graphs else outputs
