from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.toy_backbone import DIMS, VOCAB_SIZE, VOCABULARY, HashedWords, ToyBackbone, plain_views
from textual_inversion.concept import Concept, LearnedEmbedding
from textual_inversion.config import InitConfig, InversionConfig
from textual_inversion.engine import Assignment, Engine
from textual_inversion.families.base import Backbone, to_tensors
from textual_inversion.initialise import Example, StartChooser, class_vectors, encoder_output, initial_rows
from textual_inversion.latents import encode_views
from textual_inversion.learn import learn
from textual_inversion.prompts import encode_prompt
from textual_inversion.slot_state import SlotState
from textual_inversion.tokens import TokenTable

BACKBONE = ToyBackbone()
WEIGHT = BACKBONE.token_tables["long"].weight


def rows(
    initializer: str = "", num_vectors: int = 1, *, concept_id: str = "c", noise: float = 0.0, seed: int = 0,
    start: LearnedEmbedding | None = None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    concept = Concept(
        concept_id=concept_id,
        placeholder_token="<c>",
        images=("x",),
        initializer=initializer,
        num_vectors=num_vectors,
    )
    return initial_rows(concept, BACKBONE, noise=noise, seed=seed, start=start)


def test_a_word_starts_at_its_vector() -> None:
    for key, table in BACKBONE.token_tables.items():
        torch.testing.assert_close(rows("cat")[key], table.weight[VOCABULARY.tokenize("cat")])


def test_a_phrase_starts_at_the_mean_of_its_tokens() -> None:
    expected = WEIGHT[VOCABULARY.tokenize("stuffed animal toy")].mean(0, keepdim=True)
    torch.testing.assert_close(rows("stuffed animal toy")["long"], expected)


def test_nothing_starts_at_the_vocabularys_mean() -> None:
    torch.testing.assert_close(rows()["long"], WEIGHT.mean(0, keepdim=True))


def test_an_embedding_starts_where_it_ended() -> None:
    learned = {key: torch.randn(2, dim) for key, dim in DIMS.items()}
    started = rows("cat", 2, start=LearnedEmbedding(placeholder_token="<old>", vectors=learned))
    assert all(torch.equal(started[key], learned[key]) for key in DIMS)


def test_an_embedding_that_does_not_fit() -> None:
    learned = {key: torch.randn(2, dim) for key, dim in DIMS.items()}
    with pytest.raises(ValueError, match=r"'<old>' holds \(2, 24\) for text encoder 'long'.* needs \(3, 24\)"):
        rows("cat", 3, start=LearnedEmbedding(placeholder_token="<old>", vectors=learned))
    del learned["short"]
    with pytest.raises(ValueError, match="holds nothing for text encoder 'short'"):
        rows("cat", 2, start=LearnedEmbedding(placeholder_token="<old>", vectors=learned))


def test_random_rows_are_spread_like_the_vocabulary() -> None:
    drawn = rows(num_vectors=2000, noise=1.0)["long"]
    torch.testing.assert_close(drawn.mean(0), WEIGHT.mean(0), atol=0.04, rtol=0)
    torch.testing.assert_close(drawn.std(0), WEIGHT.std(0), atol=0.04, rtol=0)


def test_further_rows_differ_even_without_noise() -> None:
    first, second, third = rows("cat", 3)["long"]
    torch.testing.assert_close(first, WEIGHT[VOCABULARY.tokenize("cat")][0])
    assert not torch.equal(second, third)
    assert 0.05 < ((second - first) / WEIGHT.std(0)).std() < 0.2


def test_decided_by_the_concept_and_the_seed() -> None:
    start = rows("cat", 2, noise=0.5)["long"]
    assert torch.equal(start, rows("cat", 2, noise=0.5)["long"])
    assert not torch.equal(start, rows("cat", 2, noise=0.5, seed=1)["long"])
    assert not torch.equal(start, rows("cat", 2, noise=0.5, concept_id="d")["long"])


def test_one_row_of_a_start_is_where_all_begin() -> None:
    learned = {key: torch.randn(1, dim) for key, dim in DIMS.items()}
    first, second, third = rows("cat", 3, start=LearnedEmbedding(placeholder_token="<old>", vectors=learned))["long"]
    assert torch.equal(first, learned["long"][0])
    assert not torch.equal(second, third)
    assert 0.05 < ((second - first) / WEIGHT.std(0)).std() < 0.2


def test_the_whole_vocabulary_is_gone_through_only_if_need_be_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def note(name: str) -> None:
        function = getattr(Tensor, name)

        def noting(tensor: Tensor, *arguments: int) -> Tensor:
            done.extend([name] if len(tensor) == VOCAB_SIZE else [])
            return function(tensor, *arguments)

        monkeypatch.setattr(Tensor, name, noting)

    note("mean")
    note("std")
    backbone, word = ToyBackbone(), Concept(concept_id="c", placeholder_token="<c>", images=("x",), initializer="cat")
    initial_rows(word, backbone, noise=0.0, seed=0)
    assert done == []
    for _ in range(2):
        initial_rows(word, backbone, noise=0.5, seed=0)
        initial_rows(replace(word, initializer=""), backbone, noise=0.0, seed=0)
    assert sorted(done) == ["mean"] * len(DIMS) + ["std"] * len(DIMS)


CONCEPT = Concept(concept_id="c", placeholder_token="<c>", images=("x",), initializer="dog toy")


def test_encoder_output_is_the_encoders_state_at_the_words_place(tiny_backbone: Backbone) -> None:
    start, end = 0, 3
    ids = to_tensors([encode_prompt("dog toy", {}, tiny_backbone.vocabularies)])
    hidden = tiny_backbone.encode_prompts(ids, {}).hidden[0]
    vector = encoder_output(CONCEPT, tiny_backbone)["clip_l"]
    torch.testing.assert_close(vector, hidden[start + 1 : end].mean(0))
    chosen = StartChooser(tiny_backbone, InitConfig(method="encoder_output"))(CONCEPT, [])
    assert chosen.embedding is not None
    assert torch.equal(chosen.embedding.vectors["clip_l"], vector[None])


def test_encoder_output_needs_a_word_and_states_as_wide_as_vectors(tiny_backbone: Backbone) -> None:
    with pytest.raises(ValueError, match=r"'c' has no initializer, which init\.method 'encoder_output'"):
        encoder_output(replace(CONCEPT, initializer=""), tiny_backbone)
    with pytest.raises(ValueError, match=r"states of text encoder 'long' are 32 wide but its vectors 24"):
        encoder_output(CONCEPT, BACKBONE)
    with pytest.raises(ValueError, match=r"norm_control = 'clamp'.*'none' with init.method 'encoder_output'"):
        InversionConfig(init=InitConfig(method="encoder_output"))


class ColourJudge:
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
    judge = ColourJudge()
    choose = StartChooser(tiny_backbone, InitConfig(method="auto"), judge)
    asked = judge.texts_asked
    for colour, word in (("red", "red"), ("green", "tree"), ("blue", "blue")):
        start = choose(CONCEPT, [Image.new("RGB", (8, 8), colour), Image.new("RGB", (8, 8), colour)])
        assert start.concept == replace(CONCEPT, initializer=word)
        assert start.embedding is not None
        expected = tiny_backbone.token_tables["clip_l"].weight[tiny_backbone.vocabularies["clip_l"].tokenize(word)]
        assert torch.equal(start.embedding.vectors["clip_l"], expected)
        assert start.reason.startswith(f"auto: {word} (cosine ")
    assert asked == judge.texts_asked == len(tiny_backbone.words())


def test_learning_starts_where_it_was_chosen(tiny_backbone: Backbone) -> None:
    config = InversionConfig(steps=1, learning_rate=1e-9, init=InitConfig(method="auto"))
    photos = [Image.new("RGB", (8, 8), "blue")]
    (learned,) = learn(tiny_backbone, [(CONCEPT, photos)], config, extractor=ColourJudge())
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
    start = StartChooser(tiny_backbone, config, ColourJudge())(CONCEPT, [Image.new("RGB", (8, 8), "white")])
    assert start.concept.initializer == "big cat"


@pytest.mark.parametrize("method", ["auto", "amortised"])
def test_looking_at_photos_needs_an_extractor_and_words(tiny_backbone: Backbone, method: str) -> None:
    with pytest.raises(ValueError, match=f"init.method '{method}' looks at the photos with a CLIP"):
        StartChooser(tiny_backbone, InitConfig(method=method))
    with pytest.raises(ValueError, match=r"init.words = \['cat'\]: must be 3 words or more"):
        StartChooser(tiny_backbone, InitConfig(method=method, words=("cat",)), ColourJudge())


def test_amortised_is_the_word_where_it_is_unsure(tiny_backbone: Backbone) -> None:
    """A random model draws the same grey whatever the word, so there is nothing to be learned from its words."""
    words = ("red", "tree", "blue", "cat", "dog")
    choose = StartChooser(tiny_backbone, InitConfig(method="amortised", words=words), ColourJudge())
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

    def words(self) -> list[str]:
        return [str(i) for i in range(40)]

    def photo(self, word: int) -> Image.Image:
        return Image.new("RGB", (4, 4), tuple(self.colours[word].tolist()))


class PaintJudge(ColourJudge):
    def texts(self, texts: Sequence[str]) -> Tensor:
        return PaintBox().features()[[int(text.split()[-1]) for text in texts]]


def test_amortised_moves_the_word_towards_the_photos(monkeypatch: pytest.MonkeyPatch) -> None:
    box = PaintBox()
    drawn = lambda _backbone, words, _seed: [box.photo(int(word)) for word in words]  # noqa: E731
    monkeypatch.setattr("textual_inversion.amortise.draw_words", drawn)
    vectors = box.token_tables["k"].weight
    concept = replace(CONCEPT, initializer="3")

    def start(word: str, examples: Sequence[Example] = ()) -> Tensor:
        choose = StartChooser(box, InitConfig(method="amortised"), PaintJudge(), examples=examples)
        chosen = choose(replace(concept, initializer=word), [box.photo(9)])
        assert (chosen.reason, chosen.concept.initializer) == ("amortised", word)
        assert chosen.embedding is not None
        return chosen.embedding.vectors["k"][0]

    assert torch.cosine_similarity(vectors[3], vectors[9], dim=0) < 0.97
    assert torch.cosine_similarity(start("3"), vectors[9], dim=0) > 0.99
    assert torch.cosine_similarity(start(""), vectors[9], dim=0) > 0.99
    elsewhere = LearnedEmbedding(placeholder_token="<old>", vectors={"k": -vectors[9:10]})
    persuaded = start("", [Example(elsewhere, [box.photo(9)])] * 20)
    assert torch.cosine_similarity(persuaded, vectors[9], dim=0) < 0.9
