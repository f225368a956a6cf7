"""Load a run's frozen model and its feature extractor in the process that uses them."""

from __future__ import annotations

from functools import cached_property

import torch
from transformers.utils import logging

from pipeline.actor.other_photos import OtherPhotos
from pipeline.actor.pass_estimates import PassEstimates
from pipeline.config import RunConfig
from pipeline.inputs.models import extractor_hash, locate, model_hash
from textual_inversion.extractors import ClipExtractor
from textual_inversion.families import load_backbone
from textual_inversion.families.base import Backbone


def load_model(config: RunConfig) -> Backbone:
    """Load the backbone on the configured device, in an actor's process."""
    logging.disable_progress_bar()  # progress bars fill a job's log
    if config.device == "cpu":
        torch.set_num_threads(1)  # sums are split by thread: one thread gives the same numbers on every machine
    return load_backbone(locate(config.model), device=config.device, precision=config.precision)


class LoadedModel:
    """The model of a run, loaded once in a process, for all that learns and draws with it there."""

    def __init__(self, config: RunConfig) -> None:
        """Load the backbone. Raises ValueError if it cannot be used."""
        self._config = config
        self.digests = {"model": model_hash(config.model)}
        """Digests of what is loaded, under their names in a run's settings. They are taken before it is loaded."""
        self.backbone = load_model(config)
        self.estimates = PassEstimates(self.backbone)

    @cached_property
    def extractor(self) -> ClipExtractor | None:
        """Feature extractor that scores pictures, loaded when it is first asked for; None if the run has none."""
        self.digests["extractor"] = extractor_hash(self._config.extractor)
        if not self._config.extractor:
            return None
        return ClipExtractor(locate(self._config.extractor), self._config.device)

    @cached_property
    def other_photos(self) -> OtherPhotos | None:
        """Photos of other concepts that the gate compares sample pictures with; None if the run has no extractor."""
        return None if self.extractor is None else OtherPhotos(self._config, self.extractor)
