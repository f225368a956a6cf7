"""The denoiser's inputs from the text, as one value that families make and everybody else only moves around."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from textual_inversion.config import GradientPath

FRAMING = "framing"
"""Name of the extra in which a family keeps what each picture shows of its photo, [batch, 4] float32
(`Framing.numbers`), if its denoiser reads that."""

GUIDANCE = "guidance"
"""Name of the extra in which a family keeps the guidance scale of each picture, [batch] float32, if its denoiser reads
that; 1 as encoded, for learning."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerChanges:
    """Changes that give each cross-attention layer of the denoiser text states of its own (TextBoost++).

    The states of layer l are H_l = H + the sum over i of weights[:, i, l, :, None] * directions[:, i, l, None, :]: a
    change of low rank, kept as its two factors. Both tensors are in the denoiser's dtype.
    """

    weights: Tensor
    """[batch, rank, layers, length]; 0 at positions that are not changed."""
    directions: Tensor
    """[batch, rank, layers, dim]; all 0 for a prompt without changes."""

    def states(self, hidden: Tensor, layer: int) -> Tensor:
        """Return the states [batch, length, dim] of one layer, given those that all layers share.

        Positions of weight 0 keep their values. Terms are added one by one, so further terms of weight 0, which other
        prompts of the batch may need, change nothing.
        """
        for weights, directions in zip(self.weights.unbind(1), self.directions.unbind(1), strict=True):
            hidden = torch.addcmul(hidden, weights[:, layer, :, None], directions[:, layer, None, :])
        return hidden

    def to(self, dtype: torch.dtype) -> LayerChanges:
        """Return the same changes in another precision."""
        return LayerChanges(weights=self.weights.to(dtype), directions=self.directions.to(dtype))

    def of_rank(self, rank: int) -> LayerChanges:
        """Return the same changes with further terms of weight 0, `rank` terms in all."""
        more = rank - self.weights.shape[1]
        if not more:
            return self
        weights, directions = (
            torch.cat([tensor, tensor.new_zeros(len(tensor), more, *tensor.shape[2:])], dim=1)
            for tensor in (self.weights, self.directions)
        )
        return LayerChanges(weights=weights, directions=directions)


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
    changes: LayerChanges | None = None
    """Changes of `hidden` for each cross-attention layer; None where all layers take `hidden` as it is."""
    gradient_path: GradientPath = "whole"
    """Part of the denoiser that gradients pass through to the other parts; changes no output. Only a U-Net reads it."""

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

    def framed(self, framing: Tensor | None) -> Conditioning:
        """Return the value with this framing of each picture, [batch, 4], in place of its own; unchanged for None, and
        where the family's denoiser reads no framing."""
        if framing is None or FRAMING not in self.extras:
            return self
        return replace(self, extras={**self.extras, FRAMING: framing})

    def guided(self, scale: float) -> Conditioning:
        """Return the value with this guidance scale for every picture; unchanged where the family's denoiser reads
        none."""
        if GUIDANCE not in self.extras:
            return self
        return replace(self, extras={**self.extras, GUIDANCE: torch.full_like(self.extras[GUIDANCE], scale)})

    def zeroed(self) -> Conditioning:
        """Return the value with zeros in place of what the text encoders made; the extras stay."""
        encodings = [torch.zeros_like(tensor) for tensor in self.encodings()]
        return self._unflatten([*encodings, *self.tensors()[len(encodings) :]])

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
        """Return the parts through which gradients reach the text: states, and the pooled vectors and the changes of
        layers if there are any."""
        pooled = [] if self.pooled is None else [self.pooled]
        return [self.hidden, *pooled, *([self.changes.weights, self.changes.directions] if self.changes else [])]

    def tensors(self) -> list[Tensor]:
        """Return every part, [batch, ...] each, in an order that is fixed for a family."""
        return [*self.encodings(), *(self.extras[name] for name in sorted(self.extras))]

    def _unflatten(self, tensors: Sequence[Tensor]) -> Conditioning:
        """Return a value with these parts in place of its own; the inverse of `tensors`."""
        parts = iter(tensors)
        hidden = next(parts)
        pooled = None if self.pooled is None else next(parts)
        changes = LayerChanges(weights=next(parts), directions=next(parts)) if self.changes else None
        extras = {name: next(parts) for name in sorted(self.extras)}
        return replace(self, hidden=hidden, pooled=pooled, extras=extras, changes=changes)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        return self._unflatten([change(tensor) for tensor in self.tensors()])


def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
    """Concatenate one family's conditionings along the batch. Prompts without changes of layers, and with changes of
    lower rank, get terms of weight 0."""
    parts = _alike(parts)
    tensors = zip(*(part.tensors() for part in parts), strict=True)
    return parts[0]._unflatten([torch.cat(each) for each in tensors])


def _alike(parts: Sequence[Conditioning]) -> Sequence[Conditioning]:
    """Return the same conditionings with changes of one rank, or as they are if none has any."""
    found = [part.changes for part in parts if part.changes]
    if not found:
        return parts
    rank = max(each.weights.shape[1] for each in found)

    def changes(part: Conditioning) -> LayerChanges:
        if part.changes:
            return part.changes.of_rank(rank)
        none = (tensor.new_zeros(len(part), 0, *tensor.shape[2:]) for tensor in (found[0].weights, found[0].directions))
        return LayerChanges(weights=next(none), directions=next(none)).of_rank(rank)

    return [replace(part, changes=changes(part)) for part in parts]
