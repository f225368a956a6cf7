"""Example embeddings and adapters with made-up values, and requests for pictures that use them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tests.tiny_models import DIM
from textual_inversion.concept import LearnedAdapter, LearnedEmbedding
from textual_inversion.families.base import Backbone
from textual_inversion.generate import ImageRequest
from textual_inversion.lora import TARGETS, initial_adapter


def an_embedding(seed: int, word: str = "<c>", num_vectors: int = 1, dim: int = DIM) -> LearnedEmbedding:
    rows = torch.randn(num_vectors, dim, generator=torch.Generator().manual_seed(seed)) * 0.3
    return LearnedEmbedding(placeholder_token=word, vectors={"clip_l": rows})


def an_adapter(
    backbone: Backbone, seed: int, kind: Any = "lora", rank: int = 2, targets: tuple[str, ...] = TARGETS
) -> LearnedAdapter:
    generator = torch.Generator().manual_seed(seed)
    start = initial_adapter(backbone.adapter_layers, targets, rank, generator)
    tensors = {name: (down, 0.2 * torch.randn(up.shape, generator=generator)) for name, (down, up) in start.items()}
    return LearnedAdapter(kind=kind, scale=1.5, tensors=tensors)


def adapted_requests(backbone: Backbone) -> list[ImageRequest]:
    """Adapted and plain ones: both kinds, several ranks and targets, cross-attention among them, and two adapted
    concepts in one prompt."""
    embeddings = [
        replace(an_embedding(1), adapter=an_adapter(backbone, 1)),
        replace(an_embedding(2, num_vectors=2), adapter=an_adapter(backbone, 2, "causal", 1, ("fc2",))),
        replace(an_embedding(3, "<d>"), adapter=an_adapter(backbone, 3, rank=5)),
        replace(an_embedding(4, "<d>"), adapter=an_adapter(backbone, 4, "causal")),
    ]
    one, causal, of_rank_5, causal_of_rank_2 = embeddings
    targets = ("fc2", "cross_attention")
    plus_plus = replace(an_embedding(5), adapter=an_adapter(backbone, 5, "causal", 1, targets))
    of_rank_3 = replace(an_embedding(6, "<d>"), adapter=an_adapter(backbone, 6, "causal", 3, targets))
    return [
        ImageRequest("a photo of a <c>", 0, (one,)),
        ImageRequest("a photo of a <c>", 0, (replace(one, adapter=None),)),
        ImageRequest("a <c> on the moon", 2, (causal,)),
        ImageRequest("a <d> and a <c>", 3, (one, of_rank_5)),
        ImageRequest("a <d> and a <c>", 3, (causal_of_rank_2, causal)),
        ImageRequest("a <d> and a <c>", 3, (one, causal_of_rank_2)),
        ImageRequest("a photo of a cat", 4),
        ImageRequest("a photo of a <d>", 5, (of_rank_5,)),
        ImageRequest("a <c> on the moon", 6, (plus_plus,)),
        ImageRequest("a <d> and a <c>", 7, (plus_plus, of_rank_3)),
    ]
