"""The committed BERT text encoder before the demo's U-Net: known words, and objects learned through family `ldm`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LDMTextToImagePipeline
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from demo.bert_model import assemble
from demo.evaluate import CaptionClassifier
from demo.objects import HELD_OUT, TRAINING
from textual_inversion.concept import Concept, LearnedEmbedding
from textual_inversion.config import AugmentConfig, InversionConfig, SamplingConfig
from textual_inversion.extractors import load_extractor
from textual_inversion.families import load_backbone
from textual_inversion.families.base import Backbone
from textual_inversion.generate import ImageRequest, generate
from textual_inversion.learning import learn
from textual_inversion.metrics import clip_i
from textual_inversion.wordpiece import load_vocabularies

ROOT = Path(__file__).parents[2]
MODEL, BERT, CLIP, IMAGES = (ROOT / "demo" / name for name in ("model", "bert", "clip", "images"))
NAMES = ("cat", "horse", "owl", "lemon", "pizza", "bus", "bicycle", "castle", "guitar", "penguin", "rose", "rocket")
CONCEPTS = ("taxi", "tulip")
SAMPLING = SamplingConfig(solver="dpm++", steps=15, batch_size=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("bert") / "pipeline"
    assemble(MODEL, BERT, path)
    return path


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return load_backbone(str(folder), device="cpu", precision="float32")


def test_encoder_is_small_and_of_the_committed_unet(folder: Path) -> None:
    assert sum(path.stat().st_size for path in BERT.rglob("*") if path.is_file()) <= 2.1e6
    pipeline = LDMTextToImagePipeline.from_pretrained(folder)
    assert pipeline.bert.dtype == pipeline.unet.dtype == torch.float32
    assert pipeline.bert.config.vocab_size == len(pipeline.tokenizer)


def test_every_word_of_the_worlds_names_is_one_token(folder: Path) -> None:
    vocabulary = load_vocabularies(folder)["bert"]
    words = {word for thing in TRAINING for word in thing.name.split() if word.isalpha()}
    assert [word for word in sorted(words) if len(vocabulary.tokenize(word)) > 1] == []


def draw(backbone: Backbone, prompts: Sequence[str], *learned: LearnedEmbedding) -> list[Image.Image]:
    requests = [ImageRequest(text, seed, learned) for seed, text in enumerate(prompts)]
    return list(generate(backbone, requests, SAMPLING))


def pixels(pictures: Sequence[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(picture, dtype=np.float64) for picture in pictures])


@pytest.mark.slow
def test_known_words_are_drawn_as_with_the_models_own_text_encoder(backbone: Backbone) -> None:
    prompts = [f"a photo of a {name}" for name in NAMES]
    ours = draw(backbone, prompts)
    theirs = draw(load_backbone(str(MODEL), device="cpu", precision="float32"), prompts)
    classifier = CaptionClassifier(CLIPModel.from_pretrained(CLIP).eval(), CLIPTokenizer.from_pretrained(CLIP))
    options = [f"a photo of a {name}" for name in sorted({*NAMES, *(thing.name for thing in TRAINING[:88])})]
    named = classifier.choose(ours, [options] * len(ours))
    assert sum(options[index] == prompt for index, prompt in zip(named, prompts, strict=True)) >= 9
    apart = np.abs(pixels(ours) - pixels(theirs)).mean()
    assert apart < 0.5 * np.abs(pixels(theirs) - np.roll(pixels(theirs), 1, 0)).mean()  # same noise, same pictures


@pytest.mark.slow
def test_held_out_objects_are_learned(backbone: Backbone) -> None:
    initializers = {held.concept_id: held.initializer for held in HELD_OUT}
    work = [
        (
            Concept(
                concept_id=name, placeholder_token=f"<{name}>", images=tuple("01234"), initializer=initializers[name]
            ),
            [Image.open(IMAGES / name / f"{index}.png").convert("RGB") for index in range(5)],
        )
        for name in CONCEPTS
    ]
    config = InversionConfig(steps=100, batch_size=4, augment=replace(AugmentConfig(), flip=False))
    extractor = load_extractor(str(CLIP), "cpu")
    for (concept, photos), embedding in zip(work, learn(backbone, work, config, slots=2), strict=True):
        learned = draw(backbone, [f"a photo of a {concept.placeholder_token}"] * 6, embedding)
        started = draw(backbone, [f"a photo of a {concept.initializer}"] * 6)
        of_photos = extractor.images(photos)
        score, start = (clip_i(extractor.images(each), of_photos) for each in (learned, started))
        assert score > start + 0.2, (concept.concept_id, score, start)
