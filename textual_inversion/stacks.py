"""The parameters of all slots, stacked along a first axis of slots."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from textual_inversion.objective import Trained
from textual_inversion.optim import control_norms
from textual_inversion.parameters import Layout
from textual_inversion.slot_state import SlotState
from textual_inversion.transfer import to_device


class Stacks:
    """The parameters of all slots, and the vectors to which penalties hold the rows."""

    def __init__(self, layout: Layout, num_slots: int) -> None:
        """Make the stacks of empty slots."""
        self._layout = layout
        self.groups = layout.groups(num_slots)
        """Stacked parameters by name: rows by text encoder key, and the adapter."""
        self.rows = {key: self.groups[key] for key in layout.backbone.token_tables}
        """The groups of rows alone."""
        self.learned = {name: group for name, group in self.groups.items() if layout.is_learned(name)}
        """The groups that optimizer steps change: the adapter, and rows of text encoders that learn rows."""
        self._start = {key: torch.zeros_like(group.values) for key, group in self.rows.items()}
        self._class_vector = {key: torch.zeros_like(group.values[:, :1]) for key, group in self.rows.items()}

    def write(self, slot_index: int, state: SlotState, class_vectors: Mapping[str, Tensor]) -> None:
        """Write a concept's state to a slot; `class_vectors` [dim] are the means of its initializer's vectors."""
        state.write_to(self.groups, slot_index)
        for key, vector in class_vectors.items():
            start = state.start[key]
            device = self._start[key].device
            self._class_vector[key][slot_index] = to_device(vector, device)
            self._start[key][slot_index] = 0
            self._start[key][slot_index, : len(start)] = to_device(start, device)

    def leaves(self, index: Tensor) -> dict[str, Tensor]:
        """Copy the parameters of some slots, [concepts, vectors, dim] each; gradients can be taken at the learned
        ones."""
        return {name: group.values[index].requires_grad_(name in self.learned) for name, group in self.groups.items()}

    def trained(
        self, values: Mapping[str, Tensor], index: Tensor, ids: Mapping[str, Tensor], is_placeholder_row: Tensor
    ) -> Trained:
        """Return what the objective needs to know of the parameters `values` of the slots `index`.

        `ids`: prompts [batch, length], by text encoder key. `is_placeholder_row`: [concepts, rows], as in `Trained`.
        """
        return Trained(
            rows={key: values[key] for key in self.rows},
            start={key: stack[index] for key, stack in self._start.items()},
            class_vector={key: stack[index] for key, stack in self._class_vector.items()},
            is_placeholder_row=is_placeholder_row,
            adapters=self._layout.adapters(values, ids, is_placeholder_row),
        )

    def class_directions(self, key: str) -> Tensor:
        """Return the class vectors of a text encoder at norm 1, [slots, 1, dim]; zero where there is none."""
        return control_norms(self._class_vector[key], "sphere", 1.0)

    def mean_norms(self, is_placeholder_row: Tensor) -> Tensor:
        """Return the mean norm of each slot's placeholder rows, over text encoders that learn rows, [slots]."""
        groups = [group for name, group in self.rows.items() if name in self.learned]
        norms = [(group.values.norm(dim=2) * is_placeholder_row).sum(1) for group in groups]
        return torch.stack(norms).mean(0) / is_placeholder_row.sum(1).clamp(min=1)
