"""The settings of an encoder and of its training: their bounds, and the learning rate over the steps."""

from __future__ import annotations

from typing import Any

import pytest

from textual_inversion.encoder_config import EncoderConfig, EncoderTrainingConfig


@pytest.mark.parametrize(
    "wrong", [{"hidden": 0}, {"max_offset": 0.0}, {"latent_side": -1}, {"denoiser_side": -1}, {"num_vectors": 0}]
)
def test_sizes_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"encoder\.network\.{next(iter(wrong))}"):
        EncoderConfig(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"class_noun_share": 1.5}, {"averaging": 1.0}, {"learning_rate": 0}, {"row_weight": -1.0}],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"encoder\.training\.{next(iter(wrong))}"):
        EncoderTrainingConfig(**wrong)


def test_rates_rise_stay_and_fall() -> None:
    config = EncoderTrainingConfig(steps=100, warmup_steps=9, decay_share=0.2)
    factors = [config.rate_factor(step) for step in range(101)]
    assert factors[0] == 0.1
    assert factors[9:81] == [1.0] * 72
    assert factors[90] == 0.5
    assert factors[100] == 0.0
