"""What the demo's rectified-flow model knows and learns, where its folder exists.

`python -m demo.train --stages flow` makes the folder, `demo/flow`; the environment variable DEMO_FLOW names another.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from textual_inversion.concept import Concept
from textual_inversion.config import InversionConfig, SamplingConfig
from textual_inversion.extractors import ClipExtractor
from textual_inversion.families import load_backbone
from textual_inversion.generate import ImageRequest, generate
from textual_inversion.learning import learn_outcomes

ROOT = Path(__file__).parents[2]
FLOW = Path(os.environ.get("DEMO_FLOW", ROOT / "demo/flow"))
SAMPLING = SamplingConfig(steps=20, batch_size=8)
NAMES = ("cat", "lion", "penguin", "horse", "car", "bus", "rocket", "guitar", "rose", "lemon", "castle", "bicycle")
HELD_OUT = {"tiger": "cat", "taxi": "car", "tomato": "apple"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FLOW.exists(), reason=f"{FLOW} is made by `python -m demo.train --stages flow`"),
]


@pytest.fixture(scope="module")
def backbone() -> Any:
    torch.set_num_threads(1)
    return load_backbone(str(FLOW), device="cpu", precision="float32")


@pytest.fixture(scope="module")
def clip() -> ClipExtractor:
    return ClipExtractor(str(ROOT / "demo/clip"), "cpu")


def test_pictures_of_known_names_are_named_rightly(backbone: Any, clip: ClipExtractor) -> None:
    prompts = [f"a photo of a {name}" for name in NAMES]
    pictures = generate(backbone, [ImageRequest(prompt, seed) for prompt in prompts for seed in (0, 1)], SAMPLING)
    named = (clip.images(pictures) @ clip.texts(prompts).T).argmax(1)
    answers = torch.arange(len(NAMES)).repeat_interleave(2)
    assert (named == answers).float().mean() >= 0.7


@pytest.mark.timeout(3600)
def test_held_out_objects_are_learned(backbone: Any, clip: ClipExtractor) -> None:
    cases = []
    for name, initializer in HELD_OUT.items():
        concept = Concept(
            concept_id=name, placeholder_token=f"<{name}>", images=tuple("01234"), initializer=initializer
        )
        photos = [Image.open(ROOT / f"demo/images/{name}/{i}.png").convert("RGB") for i in range(5)]
        cases.append((concept, photos))
    config = InversionConfig(steps=200)
    config = replace(config, augment=replace(config.augment, flip=False))
    outcomes = learn_outcomes(backbone, cases, config, slots=len(cases), seed=0, extractor=clip)
    photos = torch.stack([clip.images(photos).mean(0) for _, photos in cases])
    for index, ((concept, _), outcome) in enumerate(zip(cases, outcomes, strict=True)):
        prompt = f"a photo of a {concept.placeholder_token}"
        requests = [ImageRequest(prompt, seed, (outcome.embedding,)) for seed in range(4)]
        likeness = clip.images(generate(backbone, requests, SAMPLING)).mean(0) @ photos.T
        assert likeness.argmax() == index, (concept.concept_id, likeness)
