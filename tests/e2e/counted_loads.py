"""Actors that note in a file each time that they load a model, and the command with them.

The workers import this module, which is why it is separate from the test.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.actor import model_loading
from pipeline.config import RunConfig
from pipeline.model_actor import ModelActor


def notes_of(output: str) -> Path:
    return Path(f"{output}-loads")


class NotingActor(ModelActor):
    """An actor that notes the models that its process loads."""

    def __init__(self, config: RunConfig, on_ready: Callable[[ModelActor], None] | None = None) -> None:
        load = model_loading.load_backbone

        def noting(*given: Any, **options: Any) -> Any:
            with notes_of(config.output).open("a") as notes:
                notes.write(f"{os.getpid()}\n")
            return load(*given, **options)

        model_loading.load_backbone = noting
        super().__init__(config, on_ready)
