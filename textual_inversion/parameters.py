"""The trained parameters of one concept.

A concept has placeholder rows in every text encoder, auxiliary rows (of a photo or of an augmentation) that are dropped
at the end, and an adapter of the text encoder if the configuration has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from textual_inversion.adapter_config import CROSS_ATTENTION, AdapterShape
from textual_inversion.concept import Concept, LearnedAdapter, LearnedEmbedding
from textual_inversion.config import InversionConfig
from textual_inversion.errors import BadInput
from textual_inversion.families.base import Backbone
from textual_inversion.initialise import augmentation_rows, initial_rows, learning_encoders
from textual_inversion.latents import EncodedViews
from textual_inversion.lora import AdapterBatch, acting_positions, initial_adapter, last_part
from textual_inversion.model_checks import NO_UP_PATH
from textual_inversion.optim import ParameterGroup, control_norms
from textual_inversion.paired_augment import augmentation_tokens
from textual_inversion.prompts import class_noun
from textual_inversion.rng import generator_for

ADAPTER = "adapter"
"""Name of the adapter among the parameters; rows are named by their text encoder's key."""

MAX_PHOTOS = 32
"""Most photos of a concept that can have a row each."""

_PIECE = 1024
"""Length of the pieces that an adapter is cut into. A gradient's squares are summed piece by piece: how one long sum is
cut among threads would depend on the number of slots."""


class AdapterLayout:
    """Layout of one concept's low-rank tensors in a block [pieces, 1024], which the optimizer steps as one parameter.

    The last piece is padded with zeros, which have no gradient and stay zero.
    """

    def __init__(self, backbone: Backbone, config: AdapterShape) -> None:
        """Compute the layout. Raises ValueError if the model has none of the layers, or none of cross-attention where
        that is wanted."""
        first = initial_adapter(backbone.adapter_layers, config.targets, config.rank, torch.Generator())
        if CROSS_ATTENTION in config.targets and not any(last_part(name) == CROSS_ATTENTION for name in first):
            raise ValueError(
                f"adapter.targets = {config.targets!r}: this model's denoiser has no cross-attention layers that take "
                f"text states; leave {CROSS_ATTENTION!r} out (TextBoost v2), or use a model with a U-Net, such as "
                "Stable Diffusion 1.x or 2.x"
            )
        if not first:
            raise ValueError(f"adapter.targets = {config.targets!r}: this model's text encoder has no such layers")
        self.kind: Literal["lora", "causal"] = "causal" if config.kind == "causal" else "lora"
        self.scale = config.alpha / config.rank
        self._shapes = {name: (down.shape, up.shape) for name, (down, up) in first.items()}
        self._sizes = [shape.numel() for shapes in self._shapes.values() for shape in shapes]
        self.pieces = -(-sum(self._sizes) // _PIECE)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of one concept's block."""
        return self.pieces, _PIECE

    def flatten(self, tensors: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
        """Return the block of an adapter: layer name -> (down [rank, in], up [out, rank]) -> [pieces, 1024].

        Raises BadInput if the layers or their shapes are not those of the layout.
        """
        if {name: (down.shape, up.shape) for name, (down, up) in tensors.items()} != self._shapes:
            raise BadInput("the adapter to start from does not fit the model or the adapter settings")
        flat = torch.cat([tensor.flatten() for name in self._shapes for tensor in tensors[name]])
        return F.pad(flat, (0, self.pieces * _PIECE - len(flat))).view(self.shape)

    def unflatten(self, blocks: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the adapters of several concepts: [concepts, pieces, 1024] -> layer name -> (down, up).

        The shapes are down [concepts, rank, in] and up [concepts, out, rank].
        """
        flat = blocks.flatten(1)
        tensors = iter(torch.split(flat, [*self._sizes, flat.shape[1] - sum(self._sizes)], dim=1))
        return {
            name: (next(tensors).reshape(-1, *down), next(tensors).reshape(-1, *up))
            for name, (down, up) in self._shapes.items()
        }

    def batch(self, blocks: Tensor, concept: Tensor, positions: Mapping[str, Tensor]) -> AdapterBatch:
        """Make the adapters of a batch of prompts from blocks [concepts, pieces, 1024].

        `concept` and `positions` are those of `AdapterBatch`.
        """
        scale = blocks.new_full((len(blocks),), self.scale)
        return AdapterBatch(tensors=self.unflatten(blocks), concept=concept, scale=scale, positions=positions)

    def learned(self, block: Tensor) -> LearnedAdapter:
        """Copy one concept's block [pieces, 1024] into a `LearnedAdapter`."""
        tensors = {name: (down[0].clone(), up[0].clone()) for name, (down, up) in self.unflatten(block[None]).items()}
        return LearnedAdapter(kind=self.kind, scale=self.scale, tensors=tensors)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Names, shapes and initial values of any concept's parameters, under one configuration on one model."""

    backbone: Backbone
    config: InversionConfig
    max_vectors: int
    """Most rows that a concept's placeholder may stand for."""
    adapter: AdapterLayout | None
    learning: tuple[str, ...]
    """Keys of the text encoders in which rows are learned."""

    @classmethod
    def from_config(cls, backbone: Backbone, config: InversionConfig, max_vectors: int) -> Layout:
        """Make the layout. Raises ValueError if the configured adapter, text encoders or gradients do not go with the
        model."""
        if config.gradient_path == "up_path" and not backbone.has_up_path:
            raise ValueError(NO_UP_PATH)
        return cls(
            backbone=backbone,
            config=config,
            max_vectors=max_vectors,
            adapter=None if config.adapter.kind == "none" else AdapterLayout(backbone, config.adapter),
            learning=learning_encoders(backbone, config.text_encoders),
        )

    @property
    def max_rows(self) -> int:
        """Rows of one slot in a text encoder's stack."""
        return self.max_vectors + self.num_auxiliary(MAX_PHOTOS)

    def is_learned(self, name: str) -> bool:
        """Return whether steps change a parameter: not the rows of a text encoder that learns none."""
        return name in self.learning or name == ADAPTER

    def num_auxiliary(self, num_photos: int) -> int:
        """Return how many rows of a concept are dropped at the end; they follow its placeholder's rows."""
        if self.config.per_image_tokens:
            return num_photos
        return len(augmentation_tokens(self.config.augment))

    def groups(self, slots: int) -> dict[str, ParameterGroup]:
        """Make the empty stacks of all slots, by parameter name."""
        config = self.config
        backbone = self.backbone
        device = self.backbone.device
        groups = {
            key: ParameterGroup.zeros(
                (slots, self.max_rows, table.dim),
                device,
                learning_rate=config.learning_rate,
                weight_decay=config.weight_decay,
                norm_control=config.norm_control,
                norm=config.norm_limit * table.mean_norm,
            )
            for key, table in backbone.token_tables.items()
        }
        if self.adapter is not None:
            shape = (slots, *self.adapter.shape)
            groups[ADAPTER] = ParameterGroup.zeros(
                shape,
                device,
                learning_rate=config.adapter.learning_rate,
                weight_decay=config.adapter.weight_decay,
            )
        return groups

    def shapes(self, concept: Concept, num_photos: int) -> dict[str, tuple[int, int]]:
        """Return the shape [vectors, dim] of each parameter of one concept, by name.

        Raises BadInput if the concept is too large for a slot.
        """
        if concept.num_vectors > self.max_vectors:
            raise BadInput(f"num_vectors {concept.num_vectors} is more than the {self.max_vectors} a slot can hold")
        if self.config.per_image_tokens and num_photos > MAX_PHOTOS:
            raise BadInput(f"{num_photos} photos are more than the {MAX_PHOTOS} that can have a token of their own")
        rows = concept.num_vectors + self.num_auxiliary(num_photos)
        shapes = {key: (rows, table.dim) for key, table in self.backbone.token_tables.items()}
        return shapes if self.adapter is None else {**shapes, ADAPTER: self.adapter.shape}

    def initial_parameters(
        self, concept: Concept, num_photos: int, *, seed: int, start: LearnedEmbedding | None
    ) -> dict[str, Tensor]:
        """Return the parameters before the first step: name -> [vectors, dim] float32 on the CPU.

        The concept, the seed and `start` alone decide them. With `start`, its rows and adapter are the initial ones.
        Raises BadInput if `start` does not fit the model or the concept.
        """
        noise = self.config.init.noise
        placeholder = initial_rows(concept, self.backbone, noise=noise, seed=seed, start=start, learning=self.learning)
        auxiliary = self._auxiliary_rows(concept, num_photos, seed)
        parameters = {
            key: torch.cat([rows, auxiliary[key]]) if auxiliary else rows for key, rows in placeholder.items()
        }
        if self.config.optimizer == "riemannian":  # its steps start from the sphere
            for key, rows in parameters.items():
                if not self.is_learned(key):
                    continue
                norm = self.config.norm_limit * self.backbone.token_tables[key].mean_norm
                parameters[key] = control_norms(rows, "sphere", norm)
        if self.adapter is not None:
            adapter = self.config.adapter
            generator = generator_for(seed, concept.concept_id, "adapter")
            first = initial_adapter(self.backbone.adapter_layers, adapter.targets, adapter.rank, generator)
            parameters[ADAPTER] = self.adapter.flatten(start.adapter.tensors if start and start.adapter else first)
        elif start and start.adapter:
            raise BadInput(
                f"embedding {start.placeholder_token!r} comes with an adapter, which its rows need; set adapter.kind "
                f"to {start.adapter.kind!r} to start from both"
            )
        return parameters

    def _auxiliary_rows(self, concept: Concept, num_photos: int, seed: int) -> dict[str, Tensor]:
        """Return the initial auxiliary rows, by text encoder key; none if the configuration needs none.

        Augmentation rows start at their words. A photo's row is drawn from the vocabulary's distribution, coordinate by
        coordinate (the code of Gal et al. 2022 draws uniformly in [0, 1), far outside it); it is the vocabulary's mean
        in a text encoder that learns no rows.
        """
        if self.config.augment.paired:
            return augmentation_rows(self.backbone, augmentation_tokens(self.config.augment))
        if not self.config.per_image_tokens:
            return {}
        generator = generator_for(seed, concept.concept_id, "per-image")
        rows = {}
        for key, table in sorted(self.backbone.token_tables.items()):
            amount = table.deviation if key in self.learning else 0
            rows[key] = table.mean + amount * torch.randn(num_photos, table.dim, generator=generator)
        return rows

    def adapters(
        self, values: Mapping[str, Tensor], ids: Mapping[str, Tensor], is_placeholder_row: Tensor
    ) -> list[AdapterBatch]:
        """Return the adapters of a batch of prompts, as `Backbone.encode_prompts` takes them; empty without adapters.

        `values`: the parameters, [concepts, vectors, dim] each. `ids`: text encoder key -> the prompts [batch, length],
        an equal number of each concept, in concept order. `is_placeholder_row`: [concepts, rows], 1 for rows of the
        placeholder.
        """
        if self.adapter is None:
            return []
        is_concept_row = is_placeholder_row.flatten() > 0
        positions = {}
        for key, prompts in ids.items():
            vocabulary = self.backbone.vocabularies[key]
            row = (prompts - vocabulary.size).clamp(min=0)
            is_concept = (prompts >= vocabulary.size) & is_concept_row[row % len(is_concept_row)]
            positions[key] = acting_positions(self.adapter.kind, prompts, is_concept, vocabulary.end_of_text)
        num_concepts = len(is_placeholder_row)
        num_prompts = len(next(iter(ids.values())))
        concepts = torch.arange(num_concepts, device=is_placeholder_row.device)
        concept = concepts.repeat_interleave(num_prompts // num_concepts)
        return [self.adapter.batch(values[ADAPTER], concept, positions)]

    def embedding(
        self, concept: Concept, parameters: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> LearnedEmbedding:
        """Make a concept's learned embedding of its parameters; auxiliary rows are dropped."""
        return LearnedEmbedding(
            placeholder_token=concept.placeholder_token,
            vectors={key: parameters[key][: concept.num_vectors].clone() for key in self.backbone.token_tables},
            class_noun=class_noun(concept, class_cue=self.config.class_cue),
            adapter=None if self.adapter is None else self.adapter.learned(parameters[ADAPTER]),
            metadata=metadata,
        )


def num_photos(views: EncodedViews) -> int:
    """Return one more than the highest photo number: a photo whose views were all left out has a number, too."""
    return max(views.photo_indices, default=-1) + 1
