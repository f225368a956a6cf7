"""Estimates of the memory of one model's passes, each made once: those of most further settings are the same passes."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from textual_inversion.config import InversionConfig, SamplingConfig
from textual_inversion.families.base import Backbone, MemorySaving
from textual_inversion.memory_estimate import PassMemory, drawing_memory, learning_memory, pass_settings
from textual_inversion.training_data import ImageFeatures


class PassEstimates:
    """The passes of one model that were estimated so far; a new one takes seconds."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._known: dict[Hashable, PassMemory] = {}

    def learning(
        self, saving: MemorySaving, config: InversionConfig, slots: int, image_features: ImageFeatures | None
    ) -> PassMemory:
        """Return `learning_memory`; `saving` are the ways in which the backbone runs now."""
        settings = pass_settings(config)
        return self._once(
            (saving, settings, slots, image_features),
            lambda: learning_memory(self.backbone, settings, slots, image_features),
        )

    def drawing(self, saving: MemorySaving, sampling: SamplingConfig) -> PassMemory:
        """Return `drawing_memory`; `saving` as in `learning`."""
        return self._once((saving, sampling), lambda: drawing_memory(self.backbone, sampling))

    def _once(self, key: Hashable, estimate: Callable[[], PassMemory]) -> PassMemory:
        if key not in self._known:
            self._known[key] = estimate()
        return self._known[key]
