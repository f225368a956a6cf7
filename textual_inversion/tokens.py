"""The token table: a text encoder's id -> vector lookup whose vocabulary is never resized.

Ids below the vocabulary size read the frozen table; ids from it up read rows handed in by the caller. Only the rows
can have gradients, switching concepts moves no weights, and a batch may mix any concepts.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TokenTable(nn.Module):
    """Stands in for a text encoder's `nn.Embedding`.

    The rows in use are set for the duration of one forward pass and belong to the calling thread, so a grid can be
    drawn on one thread while the engine learns on another.
    """

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        """`weight`: the frozen vocabulary, [vocab_size, dim]."""
        super().__init__()
        self.register_buffer("weight", weight.detach())
        self._in_use = threading.local()

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    @property
    def dim(self) -> int:
        return self.weight.shape[1]

    # Of the whole vocabulary, which takes a CPU up to half a second: worked out once, and only if somebody asks.

    @cached_property
    def mean_norm(self) -> float:
        """Mean L2 norm of the vocabulary's vectors: where norm control holds the learned rows."""
        return float(self.weight.float().norm(dim=1).mean())

    @cached_property
    def mean(self) -> Tensor:
        """[dim] float32 CPU: the mean of the vocabulary's vectors."""
        return self.weight.float().mean(0).cpu()

    @cached_property
    def deviation(self) -> Tensor:
        """[dim] float32 CPU: the vocabulary's standard deviation, coordinate by coordinate."""
        return self.weight.float().std(0).cpu()

    @contextmanager
    def reading(self, rows: Tensor | None) -> Iterator[None]:
        """Within the block, on this thread, id `vocab_size + i` reads `rows[i]`; rows are [num_rows, dim]."""
        self._in_use.rows = rows
        try:
            yield
        finally:
            self._in_use.rows = None

    def forward(self, ids: Tensor) -> Tensor:
        """[batch, length] ids -> [batch, length, dim] vectors, in the table's dtype."""
        known = F.embedding(ids.clamp(max=self.vocab_size - 1), self.weight)
        rows = getattr(self._in_use, "rows", None)
        if rows is None:
            if ids.numel() and int(ids.max()) >= self.vocab_size:
                raise ValueError(f"token id {int(ids.max())} is not in the vocabulary and no rows are in use")
            return known
        learned = F.embedding((ids - self.vocab_size).clamp(min=0), rows.to(self.weight.dtype))
        return torch.where((ids >= self.vocab_size)[..., None], learned, known)
