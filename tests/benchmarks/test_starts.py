from __future__ import annotations

from itertools import islice
from statistics import fmean

import pytest

from benchmarks.starts import METHODS, read_cases, steps_to_reach
from pipeline.actor.model_loading import load_model
from pipeline.config_file import load_config
from pipeline.inputs.models import locate
from textual_inversion.extractors import ClipExtractor
from textual_inversion.initialise import initial_rows
from textual_inversion.start_choice import StartChooser


def test_when_a_loss_is_reached_is_read_off_straight_lines() -> None:
    losses = {0: 1.0, 10: 0.6, 20: 0.5}
    assert steps_to_reach(losses, 0.5) == "20.0"
    assert steps_to_reach(losses, 0.8) == "5.0"
    assert steps_to_reach(losses, 1.2) == "0"
    assert steps_to_reach(losses, 0.4) == "not in 20"


@pytest.mark.slow
def test_amortised_starts_are_nearer_than_the_word_on_the_demo_model() -> None:
    config = load_config("", ["device=cpu"])
    backbone = load_model(config)
    extractor = ClipExtractor(locate(config.extractor), "cpu")
    cases = list(islice(read_cases(backbone, "manifests/demo.parquet", config), 8))
    choose = StartChooser(backbone, METHODS["amortised"], extractor)

    def loss(amortised: bool) -> float:
        losses = []
        for case in cases:
            start = choose(case.concept, case.photos) if amortised else None
            rows = initial_rows(case.concept, backbone, noise=0.0, seed=0, start=start and start.embedding)
            losses.append(case.loss(rows))
        return fmean(losses)

    assert loss(amortised=True) < 0.97 * loss(amortised=False)
