"""The passes of a step: which concepts share one, the samples drawn for it, and the losses on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from textual_inversion.config import PenaltyConfig
from textual_inversion.objective import Batch, concatenate_batches, objective, per_concept
from textual_inversion.parameters import Layout
from textual_inversion.rng import generator_for
from textual_inversion.slots import Slot
from textual_inversion.stacks import Stacks
from textual_inversion.timesteps import timestep_sampler
from textual_inversion.training_data import ImageFeatures
from textual_inversion.transfer import to_device


class Passes:
    """Passes of equal size, whose members are concepts in slots; every draw is seeded by (seed, concept id, step)."""

    def __init__(
        self,
        layout: Layout,
        stacks: Stacks,
        *,
        num_slots: int,
        size: int,
        seed: int,
        image_features: ImageFeatures | None,
    ) -> None:
        """Make passes of `size` members over the `num_slots` slots of the stacks."""
        self._layout = layout
        self._stacks = stacks
        self._num_slots = num_slots
        self._size = size
        self._seed = seed
        self._image_features = image_features
        self._backbone = backbone = layout.backbone
        self._config = layout.config
        self._draw_timesteps = timestep_sampler(layout.config.timesteps, backbone.noise)
        self._vocab_sizes = {key: vocabulary.size for key, vocabulary in backbone.vocabularies.items()}
        # slot indices and numbers of active rows are the same at nearly every step
        self._on_device = lru_cache(maxsize=256)(lambda numbers: to_device(torch.tensor(numbers), backbone.device))

    def cut(self, learning: list[Slot]) -> list[list[Slot]]:
        """Cut the concepts into passes; the last is padded with copies of its first."""
        size = self._size
        passes = [learning[first : first + size] for first in range(0, len(learning), size)]
        return [members + members[:1] * (size - len(members)) for members in passes]

    def draw(self, members: Sequence[Slot]) -> Batch:
        """Draw the samples of a pass: latents, noise, timesteps and prompts."""
        drawn = {slot: self.draw_of(slot, "step", slot.step) for slot in dict.fromkeys(members)}
        return concatenate_batches([drawn[slot] for slot in members], self._vocab_sizes, self._layout.max_rows)

    def draw_of(self, slot: Slot, purpose: str, step: int) -> Batch:
        """Draw one concept's samples for a purpose at a step."""
        generator = generator_for(self._seed, slot.concept.concept_id, purpose, step)
        shape = self._backbone.latent_shape
        return slot.data.draw(generator, self._config.batch_size, step, shape, self._draw_timesteps)

    def loss(
        self, members: Sequence[Slot], values: Mapping[str, Tensor], batch: Batch, penalties: PenaltyConfig
    ) -> Tensor:
        """Return the loss of each member [concepts] at these parameters, on a batch of their samples."""
        is_placeholder_row = self.is_placeholder_row(members)
        terms = objective(
            self._backbone,
            batch,
            self._stacks.trained(values, self.index(members), batch.ids, is_placeholder_row),
            penalties,
            gradient_path=self._config.gradient_path,
            min_snr_gamma=self._config.timesteps.min_snr_gamma,
            image_features=self._image_features,
        )
        return per_concept(terms, len(members))

    def by_slot(self, learning: list[Slot], values: Tensor) -> Tensor:
        """Spread values [concepts and padding, ...] of all passes over the slots [slots, ...]; idle slots are zero."""
        spread = values.new_zeros(self._num_slots, *values.shape[1:])
        spread[self.index(learning)] = values[: len(learning)]
        return spread

    def index(self, slots: Sequence[Slot]) -> Tensor:
        """Return the slots' indices in the stacks, [slots]; on the device, as indexing by a host tensor waits."""
        index: Tensor = self._on_device(tuple(slot.index for slot in slots))
        return index

    def is_placeholder_row(self, slots: Sequence[Slot | None]) -> Tensor:
        """Return 1 for rows of each concept's placeholder that its next prompts use, else 0; [slots, rows] float32."""
        active = self._on_device(tuple(slot.data.active_vectors(slot.step) if slot else 0 for slot in slots))
        return (torch.arange(self._layout.max_rows, device=active.device) < active[:, None]).float()
