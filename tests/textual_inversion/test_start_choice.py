"""Initial rows chosen by the photos: the nearest word, and the regression, as an extractor of colours sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.toy_backbone import DIMS, HashedWords, ToyBackbone, plain_views
from textual_inversion.concept import Concept, LearnedEmbedding
from textual_inversion.config import InitConfig, InversionConfig
from textual_inversion.engine import Assignment, Engine
from textual_inversion.families.base import Backbone
from textual_inversion.initialise import class_vectors
from textual_inversion.latents import encode_views
from textual_inversion.learning import learn
from textual_inversion.slot_state import SlotState
from textual_inversion.start_choice import LearnedExample, StartChooser
from textual_inversion.tokens import TokenTable

BACKBONE = ToyBackbone()
CONCEPT = Concept(concept_id="c", placeholder_token="<c>", images=("x",), initializer="dog toy")


class ColourExtractor:
    """Sees a picture's mean colour, and knows three words for colours; others look grey."""

    texts_asked = 0
    pixel_features = None

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        colours = [picture.convert("RGB").resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)) for picture in pictures]
        return torch.nn.functional.normalize(torch.tensor(colours).float() + 1, dim=1)

    def texts(self, texts: Sequence[str]) -> Tensor:
        self.texts_asked += len(texts)
        known = {"red": [1, 0, 0], "tree": [0, 1, 0], "blue": [0, 0, 1]}
        colours = [known.get(text.split()[-1], [1, 1, 1]) for text in texts]
        return torch.nn.functional.normalize(torch.tensor(colours).float(), dim=1)


def test_auto_takes_the_word_nearest_to_the_photos(tiny_backbone: Backbone) -> None:
    extractor = ColourExtractor()
    choose = StartChooser(tiny_backbone, InitConfig(method="auto"), extractor)
    asked = extractor.texts_asked
    for colour, word in (("red", "red"), ("green", "tree"), ("blue", "blue")):
        start = choose(CONCEPT, [Image.new("RGB", (8, 8), colour), Image.new("RGB", (8, 8), colour)])
        assert start.concept == replace(CONCEPT, initializer=word)
        assert start.embedding is not None
        expected = tiny_backbone.token_tables["clip_l"].weight[tiny_backbone.vocabularies["clip_l"].tokenize(word)]
        assert torch.equal(start.embedding.vectors["clip_l"], expected)
        assert start.reason.startswith(f"auto: {word} (cosine ")
    assert asked == extractor.texts_asked == len(tiny_backbone.single_token_words())


def test_learning_starts_where_it_was_chosen(tiny_backbone: Backbone) -> None:
    config = InversionConfig(steps=1, learning_rate=1e-9, init=InitConfig(method="auto"))
    photos = [Image.new("RGB", (8, 8), "blue")]
    (learned,) = learn(tiny_backbone, [(CONCEPT, photos)], config, extractor=ColourExtractor())
    blue = tiny_backbone.token_tables["clip_l"].weight[tiny_backbone.vocabularies["clip_l"].tokenize("blue")]
    assert learned.metadata["initializer"] == "blue"
    assert torch.cosine_similarity(learned.vectors["clip_l"], blue) > 0.9999

    outcomes = []
    waiting = [Assignment(CONCEPT, encode_views(tiny_backbone, photos, config.augment, "c", 0))]
    engine = Engine(tiny_backbone, config, slots=1, seed=0)
    engine.run(lambda _wait: waiting.pop() if waiting else None, outcomes.append)
    assert "init.method 'auto' chooses the start by the photos" in outcomes[0].error


def test_a_resumed_concept_needs_no_start() -> None:
    """What it had learned counts, not where it would start now."""
    config = InversionConfig(steps=4, batch_size=2, init=InitConfig(method="amortised"))
    views = plain_views(torch.rand(3, 2, *BACKBONE.latent_shape))
    start = LearnedEmbedding(placeholder_token="<c>", vectors={key: torch.randn(1, dim) for key, dim in DIMS.items()})
    states: list[SlotState] = []

    def finish(assignment: Assignment) -> LearnedEmbedding:
        waiting, outcomes = [assignment], []
        engine = Engine(BACKBONE, config, slots=1, seed=0)
        keep = lambda _concept, state: states.append(state)  # noqa: E731
        engine.run(lambda _wait: waiting.pop() if waiting else None, outcomes.append, keep, 2)
        return outcomes[0].embedding

    calm = finish(Assignment(CONCEPT, views, start=start))
    resumed = finish(Assignment(CONCEPT, views, states[0]))
    assert all(torch.equal(resumed.vectors[key], calm.vectors[key]) for key in DIMS)


def test_auto_from_a_list_of_ones_own(tiny_backbone: Backbone) -> None:
    config = InitConfig(method="auto", words=("big cat", "red", "cat on snow"))
    start = StartChooser(tiny_backbone, config, ColourExtractor())(CONCEPT, [Image.new("RGB", (8, 8), "white")])
    assert start.concept.initializer == "big cat"


@pytest.mark.parametrize("method", ["auto", "amortised"])
def test_looking_at_photos_needs_an_extractor_and_words(tiny_backbone: Backbone, method: str) -> None:
    with pytest.raises(ValueError, match=f"init.method '{method}' looks at the photos with a CLIP"):
        StartChooser(tiny_backbone, InitConfig(method=method))
    with pytest.raises(ValueError, match=r"init.words = \['cat'\]: must be 3 words or more"):
        StartChooser(tiny_backbone, InitConfig(method=method, words=("cat",)), ColourExtractor())


def test_amortised_is_the_word_where_it_is_unsure(tiny_backbone: Backbone) -> None:
    """A random model draws the same grey whatever the word, so there is nothing to be learned from its words."""
    words = ("red", "tree", "blue", "cat", "dog")
    choose = StartChooser(tiny_backbone, InitConfig(method="amortised", words=words), ColourExtractor())
    start = choose(CONCEPT, [Image.new("RGB", (8, 8), "red")])
    assert start.concept == CONCEPT
    assert start.embedding is not None
    assert torch.equal(start.embedding.vectors["clip_l"][0], class_vectors(CONCEPT, tiny_backbone)["clip_l"])
    assert start.reason.startswith("words, amortised was unsure: ")


class Numbers(HashedWords):
    """A vocabulary of numbers that are written out."""

    def tokenize(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]


class PaintBox(ToyBackbone):
    """A model whose words' vectors follow the colours that they mean."""

    def __init__(self) -> None:
        super().__init__()
        self.colours = torch.tensor([[i * 37 % 256, i * 91 % 256, i * 53 % 256] for i in range(40)])
        slope = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
        self.token_tables = {"k": TokenTable(self.features() @ slope)}
        self.vocabularies = {"k": Numbers()}

    def features(self) -> Tensor:
        return torch.nn.functional.normalize(self.colours.float() + 1, dim=1)

    def single_token_words(self) -> list[str]:
        return [str(i) for i in range(40)]

    def photo(self, word: int) -> Image.Image:
        return Image.new("RGB", (4, 4), tuple(self.colours[word].tolist()))


class PaintExtractor(ColourExtractor):
    def texts(self, texts: Sequence[str]) -> Tensor:
        return PaintBox().features()[[int(text.split()[-1]) for text in texts]]


def test_amortised_moves_the_word_towards_the_photos(monkeypatch: pytest.MonkeyPatch) -> None:
    box = PaintBox()
    drawn = lambda _backbone, words, _seed: [box.photo(int(word)) for word in words]  # noqa: E731
    monkeypatch.setattr("textual_inversion.amortise.draw_words", drawn)
    vectors = box.token_tables["k"].weight
    concept = replace(CONCEPT, initializer="3")

    def start(word: str, examples: Sequence[LearnedExample] = ()) -> Tensor:
        choose = StartChooser(box, InitConfig(method="amortised"), PaintExtractor(), examples=examples)
        chosen = choose(replace(concept, initializer=word), [box.photo(9)])
        assert (chosen.reason, chosen.concept.initializer) == ("amortised", word)
        assert chosen.embedding is not None
        return chosen.embedding.vectors["k"][0]

    assert torch.cosine_similarity(vectors[3], vectors[9], dim=0) < 0.97
    assert torch.cosine_similarity(start("3"), vectors[9], dim=0) > 0.99
    assert torch.cosine_similarity(start(""), vectors[9], dim=0) > 0.99
    elsewhere = LearnedEmbedding(placeholder_token="<old>", vectors={"k": -vectors[9:10]})
    persuaded = start("", [LearnedExample(elsewhere, [box.photo(9)])] * 20)
    assert torch.cosine_similarity(persuaded, vectors[9], dim=0) < 0.9
