"""Low-rank changes of a text encoder's linear layers, another for each prompt of a batch (TextBoost)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterBatch:
    """The adapters of several concepts, and which of them each prompt uses."""

    tensors: Mapping[str, tuple[Tensor, Tensor]]
    """Layer name -> (down [concepts, rank, in], up [concepts, out, rank]) float32."""

    concept: Tensor
    """[batch] integers: which concept's adapter a prompt uses, -1 for none."""

    scale: Tensor
    """[concepts] alpha / rank of each."""

    positions: Tensor
    """[batch, length] 1 where the change is added, 0 where the layer stays as it is."""
