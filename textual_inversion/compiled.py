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
"""Compiled for one module. Torch's own bound is 8, and beyond it a module runs as it is, without a word."""


class Compiled:
    """Calls a module through torch.compile: each new shape is compiled when it first comes, for a minute or so."""

    def __init__(
        self, module: nn.Module, *, backend: str = "inductor", or_plain: bool = False, graphs: bool = False
    ) -> None:
        """`or_plain`: where compiling fails (no C compiler, say), say so once and call the module as it is from then
        on; else the error is raised. `graphs`: on a GPU, record the kernels of each shape and launch them as one CUDA
        graph, once for each thread that calls, as torch does; their memory stays taken. On a CPU it does nothing."""
        import torch._dynamo as dynamo  # takes seconds

        dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, _MAX_SHAPES)
        self._module, self._or_plain, self._graphs = module, or_plain, graphs
        options: dict[str, Any] | None = None
        if backend == "inductor":
            options = {"layout_optimization": False, "triton.cudagraphs": graphs}
        # shapes are few and fixed; code for any shape would be slower
        self._call: Any = torch.compile(module, backend=backend, options=options, dynamic=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the module, a tuple of tensors. Raises RuntimeError if it cannot be compiled."""
        from torch._dynamo.exc import TorchDynamoException

        try:
            outputs = self._call(*args, **kwargs)
        except TorchDynamoException as error:  # torch's own; what the module raises is none
            if not self._or_plain:
                raise
            reason = str(error).strip().partition("\n\n")[0]
            log.warning("not compiled, so slower: %s: %s", type(error).__name__, reason)
            self._call, self._graphs = self._module, False
            return self._call(*args, **kwargs)
        # a graph's next run writes over what its last one gave
        return tuple(output.clone() for output in outputs) if self._graphs else outputs
