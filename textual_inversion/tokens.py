"""Token table: the id -> vector lookup of a text encoder, whose vocabulary is never resized.

Ids below the vocabulary size read the frozen table; ids from that size up read rows that the caller passes in. Only the
rows can have gradients, switching concepts moves no weights, and a batch may mix any concepts.
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
    """Lookup that replaces a text encoder's `nn.Embedding`.

    The rows in use are set for one forward pass and belong to the calling thread, so a grid can be drawn on one thread
    while the engine learns on another.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, *, learns_rows: bool = True) -> None:
        """Hold the frozen vocabulary `weight`, [vocab_size, dim].

        `learns_rows`: False if the rows beside this table keep their initial values while a concept is learned, unless
        `text_encoders` of the configuration names it.
        """
        super().__init__()
        self.learns_rows = learns_rows
        self.register_buffer("weight", weight.detach())
        self._in_use = threading.local()

    @property
    def vocab_size(self) -> int:
        """Number of vectors in the vocabulary."""
        return self.weight.shape[0]

    @property
    def dim(self) -> int:
        """Width of a vector."""
        return self.weight.shape[1]

    # Statistics of the whole vocabulary take a CPU up to half a second: computed once, when first read.

    @cached_property
    def mean_norm(self) -> float:
        """Mean L2 norm of the vocabulary's vectors, to which norm control holds the learned rows."""
        return float(self.weight.float().norm(dim=1).mean())

    @cached_property
    def mean(self) -> Tensor:
        """Mean of the vocabulary's vectors, [dim] float32 on the CPU."""
        return self.weight.float().mean(0).cpu()

    @cached_property
    def deviation(self) -> Tensor:
        """Standard deviation of the vocabulary's vectors by coordinate, [dim] float32 on the CPU."""
        return self.weight.float().std(0).cpu()

    @contextmanager
    def reading(self, rows: Tensor | None) -> Iterator[None]:
        """Let id `vocab_size + i` read `rows[i]` ([num_rows, dim]) within the block, on this thread."""
        self._in_use.rows = rows
        try:
            yield
        finally:
            self._in_use.rows = None

    def forward(self, ids: Tensor) -> Tensor:
        """Look ids [batch, length] up: vectors [batch, length, dim], in the table's dtype.

        Raises ValueError for an id beyond the vocabulary if no rows are in use.
        """
        known = F.embedding(ids.clamp(max=self.vocab_size - 1), self.weight)
        rows = getattr(self._in_use, "rows", None)
        if rows is None:
            if ids.numel() and int(ids.max()) >= self.vocab_size:
                raise ValueError(f"token id {int(ids.max())} is not in the vocabulary and no rows are in use")
            return known
        learned = F.embedding((ids - self.vocab_size).clamp(min=0), rows.to(self.weight.dtype))
        return torch.where((ids >= self.vocab_size)[..., None], learned, known)
