"""The works that `benchmarks.gpu` times: a concept's photos encoded, concepts learned, sample pictures drawn."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import numpy as np
import torch
from PIL import Image

from benchmarks.accelerator import Figures, timed
from benchmarks.restatement import CommonAlgorithm
from pipeline.actor.samples import initializer_requests, sample_requests
from pipeline.sample_config import GridConfig
from textual_inversion.concept import Concept, LearnedEmbedding
from textual_inversion.config import InversionConfig
from textual_inversion.engine import Assignment, Engine, Outcome
from textual_inversion.families.base import Backbone
from textual_inversion.generate import ImageRequest, generate
from textual_inversion.latents import EncodedViews, encode_views

PHOTOS = 5


def time_common(common: CommonAlgorithm, side_px: int, steps: int, batch_size: int, device: str) -> Figures:
    """Measure the common algorithm on photos of this side."""
    common.begin(a_concept(0), photos(side_px))
    return timed(lambda: common.learn(steps), steps * batch_size, device)


def time_engine(backbone: Backbone, config: InversionConfig, slots: int, device: str) -> Figures:
    """Measure the engine with all slots full for all steps."""
    views = encode(backbone)
    waiting = [Assignment(a_concept(number), views) for number in range(slots)]
    engine = Engine(backbone, config, slots=slots, seed=0)

    def end(outcome: Outcome) -> None:
        if outcome.embedding is None:
            raise ValueError(f"concept {outcome.concept.concept_id!r}: {outcome.error}")

    def run() -> None:
        engine.run(lambda _wait: waiting.pop() if waiting else None, end)

    return timed(run, config.steps * config.batch_size * slots, device)


def a_concept(number: int) -> Concept:
    return Concept(concept_id=f"c{number}", placeholder_token=f"<c{number}>", images=("x",), initializer="cat")


def photos(side: int) -> list[Image.Image]:
    """Return photos of random noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (PHOTOS, side, side, 3), dtype=np.uint8)
    return [Image.fromarray(each) for each in pixels]


def encode(backbone: Backbone) -> EncodedViews:
    """Encode a concept's photos."""
    return encode_views(backbone, photos(backbone.resolution), InversionConfig().augment, "any", 0)


def seconds_once(backbone: Backbone, device: str) -> float:
    """Return the median seconds to encode a concept's photos."""
    return median(PHOTOS / timed(lambda: encode(backbone), PHOTOS, device).rate for _ in range(3))


def seconds_of_grid(backbone: Backbone, repetitions: int) -> float:
    """Return the median seconds to draw a concept's sample grid by the default settings."""
    rows = {key: torch.zeros(1, table.dim) for key, table in backbone.token_tables.items()}
    embedding = LearnedEmbedding(placeholder_token="<c0>", vectors=rows)
    requests = sample_requests(a_concept(0), embedding, GridConfig(), 0, initial=False)
    return _seconds_to_draw(backbone, requests, repetitions)


def seconds_of_initializer(backbone: Backbone, repetitions: int) -> float:
    """Return the median seconds to draw the pictures of an initializer word that a concept's scores are compared with,
    which an actor draws once for all concepts that start from the word."""
    return _seconds_to_draw(backbone, initializer_requests(a_concept(0), GridConfig(), 0), repetitions)


def _seconds_to_draw(backbone: Backbone, requests: Sequence[ImageRequest], repetitions: int) -> float:
    seconds = []
    for _ in range(repetitions + 1):  # the first is not counted
        began = time.perf_counter()
        generate(backbone, requests, GridConfig().sampling)  # returns pictures: the device is idle then
        seconds.append(time.perf_counter() - began)
    return median(seconds[1:])
