"""Settings of sample pictures, previews and the gate: what makes no sense is refused, in code as in a file."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pipeline.sample_config import GateConfig, GridConfig, PreviewConfig


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GridConfig(prompts=()), r"grid\.prompts = \(\): must be at least one prompt"),
        (lambda: GridConfig(style_prompts=("{} by {}",)), r"grid\.style_prompts = '{} by {}': must be a text with {}"),
        (lambda: GridConfig(images_per_prompt=0), r"grid\.images_per_prompt = 0"),
        (lambda: GridConfig(initializer_prompts=-1), r"grid\.initializer_prompts = -1: must be 1 or more"),
        (lambda: PreviewConfig(steps=-1), r"preview\.steps = -1"),
        (lambda: PreviewConfig(sampling_steps=0), r"preview\.sampling_steps = 0"),
        (lambda: GateConfig(ladder=("seed + ",)), r"gate\.ladder = 'seed \+ '"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_styles_have_prompts_of_their_own() -> None:
    config = GridConfig(prompts=("{}",), style_prompts=("in {}",))
    assert (config.prompts_for("object"), config.prompts_for("style")) == (("{}",), ("in {}",))
