"""Load a run's frozen model in the process that uses it."""

from __future__ import annotations

import torch
from transformers.utils import logging

from pipeline.config import RunConfig
from pipeline.inputs.models import locate
from textual_inversion.families import load_backbone
from textual_inversion.families.base import Backbone


def load_model(config: RunConfig) -> Backbone:
    """Load the backbone on the configured device, in an actor's process."""
    logging.disable_progress_bar()  # progress bars fill a job's log
    if config.device == "cpu":
        torch.set_num_threads(1)  # sums are split by thread: one thread gives the same numbers on every machine
    return load_backbone(locate(config.model), device=config.device, precision=config.precision)
