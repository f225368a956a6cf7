"""The denoiser's inputs from the text, as one value that families make and everybody else only moves around."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Conditioning:
    """The denoiser's inputs from a batch of prompts. Only a family's own module reads the parts."""

    hidden: Tensor
    """Encoder states, [batch, length, dim] in the denoiser's dtype. A family with several text encoders concatenates
    their states, along either axis."""
    pooled: Tensor | None = None
    """One vector for each whole prompt, [batch, pooled_dim]; None for families without."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """Further inputs that go with each prompt (time ids, attention masks), name -> [batch, ...]."""

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.hidden)

    def __getitem__(self, prompts: slice | Tensor) -> Conditioning:
        """Select prompts by a slice or by a tensor of indices [n] on the same device."""
        return self._map(lambda tensor: tensor[prompts])

    def to(self, device: torch.device) -> Conditioning:
        """Move every part to a device; parts that are there already are not copied."""
        return self._map(lambda tensor: tensor.to(device))

    def detach(self) -> Conditioning:
        """Cut every part off the graph that made it, without a copy."""
        return self._map(lambda tensor: tensor.detach())

    def where(self, chosen: Tensor, other: Conditioning) -> Conditioning:
        """Take each prompt from this value where `chosen` [batch] (bool) is true and from `other` elsewhere."""

        def pick(ours: Tensor, theirs: Tensor) -> Tensor:
            return torch.where(chosen.view(-1, *[1] * (ours.ndim - 1)), ours, theirs)

        return self._unflatten([pick(*pair) for pair in zip(self.tensors(), other.tensors(), strict=True)])

    def repeat(self, size: int) -> Conditioning:
        """Return a batch of `size` copies of the only prompt."""
        return self._map(lambda tensor: tensor.expand(size, *tensor.shape[1:]).contiguous())

    def cosine_distance(self, other: Conditioning) -> Tensor:
        """Return how far two encodings of the same prompts are apart, [batch] float32.

        The mean over positions, padding included, of 1 - cos of the states (TextBoost v1), and with pooled vectors
        1 - cos of these added. Extras come from settings and not from the text: they are not compared.
        """
        distance = 1 - F.cosine_similarity(self.hidden.float(), other.hidden.float(), dim=-1).mean(1)
        if self.pooled is None or other.pooled is None:
            return distance
        return distance + 1 - F.cosine_similarity(self.pooled.float(), other.pooled.float(), dim=-1)

    def encodings(self) -> list[Tensor]:
        """Return the parts through which gradients reach the text: states, and pooled vectors if there are any."""
        return [self.hidden] if self.pooled is None else [self.hidden, self.pooled]

    def tensors(self) -> list[Tensor]:
        """Return every part, [batch, ...] each, in an order that is fixed for a family."""
        return [*self.encodings(), *(self.extras[name] for name in sorted(self.extras))]

    def _unflatten(self, tensors: Sequence[Tensor]) -> Conditioning:
        """Return a value with these parts in place of its own; the inverse of `tensors`."""
        parts = iter(tensors)
        hidden = next(parts)
        pooled = None if self.pooled is None else next(parts)
        return Conditioning(hidden=hidden, pooled=pooled, extras={name: next(parts) for name in sorted(self.extras)})

    def _map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        return self._unflatten([change(tensor) for tensor in self.tensors()])


def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
    """Concatenate one family's conditionings along the batch."""
    tensors = zip(*(part.tensors() for part in parts), strict=True)
    return parts[0]._unflatten([torch.cat(each) for each in tensors])
