"""Run the engine and the common algorithm (`benchmarks/restatement.py`) on the same concepts, with their times."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice

from PIL import Image
from torch import Tensor

from benchmarks.concepts import read_objects, read_photos
from benchmarks.restatement import CommonAlgorithm
from pipeline.actor.model_loading import load_model
from pipeline.actor.samples import draw_samples, score
from pipeline.config import RunConfig
from pipeline.inputs.models import locate
from textual_inversion.concept import Concept, LearnedEmbedding
from textual_inversion.config import InversionConfig
from textual_inversion.engine import Assignment, Engine, Outcome, SlotState
from textual_inversion.extractors import ClipExtractor
from textual_inversion.families.base import Backbone
from textual_inversion.latents import encode_views
from textual_inversion.start_choice import StartChooser

COMMON = "common algorithm"

Case = tuple[Concept, list[Image.Image]]
Rows = dict[int, Tensor]
"""Learned row [1, dim] by step."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Time of all concepts of one variant."""

    once_s: float
    """Seconds of the work done once a concept, summed over concepts."""
    steps_s: float
    """Seconds of all steps."""
    samples: int
    """Sample-steps in `steps_s`."""
    concepts: int

    @property
    def rate(self) -> float:
        """Sample-steps a second."""
        return self.samples / self.steps_s


class Contest:
    """The engine and the common algorithm, on the same concepts."""

    def __init__(self, config: RunConfig, cases: list[Case], common: InversionConfig) -> None:
        """Load all models. `common` has the batch size and learning rate of the common algorithm."""
        self.config = config
        self.cases = cases
        self._batch_size = common.batch_size
        self.backbone: Backbone = load_model(config)
        self.extractor = ClipExtractor(locate(config.extractor), config.device) if config.extractor else None
        self.common = CommonAlgorithm.load(
            locate(config.model), learning_rate=common.learning_rate, batch_size=common.batch_size
        )
        began = time.perf_counter()
        self._choose_start = StartChooser(self.backbone, config.inversion.init, self.extractor, seed=config.seed)
        self.seconds_once_a_process = time.perf_counter() - began

    def assign(self, case: Case) -> Assignment:
        """Do the work for a concept that precedes `Engine.run`: choose its start and encode its photos."""
        concept, photos = case
        start = self._choose_start(concept, photos)
        views = encode_views(self.backbone, photos, self.config.inversion.augment, concept.concept_id, self.config.seed)
        return Assignment(start.concept, views, start=start.embedding)

    def time_common(self, steps: int) -> Timing:
        once_s = steps_s = 0.0
        for concept, photos in self.cases:
            once_s += seconds(lambda: self.common.begin(concept, photos))  # noqa: B023
            steps_s += seconds(lambda: self.common.learn(steps))
        return Timing(once_s, steps_s, steps * self._batch_size * len(self.cases), len(self.cases))

    def time_engine(self, steps: int, slots: int, slots_per_pass: int | None) -> Timing:
        began = time.perf_counter()
        waiting = [self.assign(case) for case in self.cases]
        once_s = time.perf_counter() - began
        inversion = replace(self.config.inversion, steps=steps)
        outcomes: list[Outcome] = []
        engine = Engine(self.backbone, inversion, slots=slots, seed=self.config.seed, slots_per_pass=slots_per_pass)
        steps_s = seconds(lambda: engine.run(lambda _wait: waiting.pop() if waiting else None, outcomes.append))
        for outcome in outcomes:
            learned_embedding(outcome)
        taken = sum(outcome.steps for outcome in outcomes)
        return Timing(once_s, steps_s, taken * inversion.batch_size, len(self.cases))

    def rows_of_common(self, case: Case, steps: int, every: int) -> Rows:
        """Learn a concept; return its rows at the start, every `every` steps, and at the end."""
        rows: Rows = {}
        self.common.begin(*case)
        rows[0] = self.common.row()
        rows[steps] = self.common.learn(steps, rows.__setitem__, every)
        return rows

    def rows_of_engine(self, assignments: list[Assignment], slots: int, every: int) -> list[Rows]:
        """Learn the concepts; return each one's rows at the start, every `every` steps, and at the end."""
        rows: dict[str, Rows] = {assignment.concept.concept_id: {} for assignment in assignments}

        def keep(concept: Concept, state: SlotState) -> None:
            rows[concept.concept_id][state.step] = state.parameters["clip_l"]
            rows[concept.concept_id].setdefault(0, state.start["clip_l"])

        def end(outcome: Outcome) -> None:
            rows[outcome.concept.concept_id][outcome.steps] = learned_embedding(outcome).vectors["clip_l"]

        waiting = list(assignments)
        engine = Engine(self.backbone, self.config.inversion, slots=slots, seed=self.config.seed)
        engine.run(lambda _wait: waiting.pop() if waiting else None, end, keep, every)
        return list(rows.values())

    def scores(self, case: Case, row: Tensor) -> dict[str, float]:
        """Return the scores of sample pictures drawn with a row."""
        assert self.extractor is not None
        concept = replace(case[0], initializer="")  # the initializer's own pictures would take as long again
        embedding = LearnedEmbedding(placeholder_token=concept.placeholder_token, vectors={"clip_l": row})
        samples = draw_samples(self.backbone, concept, embedding, self.config.grid, self.config.seed)
        return score(self.extractor, case[1], samples)


def read_cases(options: argparse.Namespace) -> list[Case]:
    """Read the manifest's first objects and their photos. Raises ValueError for a bad row."""
    concepts = islice(read_objects(options.manifest), options.concepts)
    return [(concept, read_photos(concept)) for concept in concepts]


def learned_embedding(outcome: Outcome) -> LearnedEmbedding:
    """Return what a concept learned. Raises ValueError if it failed."""
    if outcome.embedding is None:
        raise ValueError(f"concept {outcome.concept.concept_id!r}: {outcome.error}")
    return outcome.embedding


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
