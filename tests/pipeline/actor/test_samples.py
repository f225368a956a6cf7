"""Sample pictures of a concept and their scores, with a judge that sees nothing but colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline.actor.samples import Samples, draw_samples, initializer_requests, sample_requests, score
from pipeline.sample_config import GridConfig
from tests.tiny_models import DIM, RESOLUTION
from textual_inversion.concept import Concept, LearnedEmbedding
from textual_inversion.config import InversionConfig, SamplingConfig
from textual_inversion.extractors import ClipExtractor
from textual_inversion.families import load_backbone
from textual_inversion.families.base import Backbone
from textual_inversion.learning import learn
from textual_inversion.photos import open_photo

ROOT = Path(__file__).parents[3]

GRID = GridConfig(
    prompts=("a photo of a {}", "{} snow"),
    style_prompts=("{} art",),
    images_per_prompt=2,
    sampling=SamplingConfig(steps=2, batch_size=8),
)


def concept(**changes: str) -> Concept:
    fields = {"concept_id": "toy", "placeholder_token": "<toy>", "initializer": "cat"} | changes
    return Concept(**fields, images=("x",))  # type: ignore[arg-type]  # all are strings


def learned() -> LearnedEmbedding:
    rows = torch.randn(1, DIM, generator=torch.Generator().manual_seed(3))
    return LearnedEmbedding(placeholder_token="<toy>", vectors={"clip_l": rows})


def test_learned_and_initial_share_prompts_and_noise(tiny_backbone: Backbone) -> None:
    samples = draw_samples(tiny_backbone, concept(), learned(), GRID, seed=0)
    assert samples.prompts == GRID.prompts
    for columns in samples.learned, samples.initial:
        assert [[picture.size for picture in column] for column in columns] == [[(RESOLUTION, RESOLUTION)] * 2] * 2
    assert samples.learned[0][0].tobytes() != samples.initial[0][0].tobytes()

    as_cat = LearnedEmbedding(placeholder_token="<toy>", vectors={"clip_l": _row_of(tiny_backbone, "cat")})
    again = draw_samples(tiny_backbone, concept(), as_cat, GRID, seed=0)
    assert again.learned[0][0].tobytes() == samples.initial[0][0].tobytes()
    assert samples.sheet([Image.new("RGB", (40, 30))]).width > RESOLUTION


def test_styles_have_their_own_prompts_and_no_word_no_baseline(tiny_backbone: Backbone) -> None:
    samples = draw_samples(tiny_backbone, concept(category="style", initializer=""), learned(), GRID, seed=0)
    assert (samples.prompts, len(samples.learned), samples.initial) == (GRID.style_prompts, 1, [])


def test_a_class_noun_follows_the_concept_and_changes_nothing_else(tiny_backbone: Backbone) -> None:
    plain = [(one.prompt, one.seed) for one in sample_requests(concept(), learned(), GRID, 0)]
    with_noun = replace(learned(), class_noun="cat")
    requests = sample_requests(concept(), with_noun, GRID, 0)
    num_learned = len(plain) // 2
    assert [one.prompt for one in requests[:num_learned:2]] == ["a photo of a {} cat", "{} cat snow"]
    assert [one.prompt for one in requests[num_learned::2]] == ["a photo of a cat", "cat snow"]
    assert [one.seed for one in requests] == [seed for _, seed in plain]

    bare = draw_samples(tiny_backbone, concept(), learned(), GRID, seed=0)
    drawn = draw_samples(tiny_backbone, concept(), with_noun, GRID, seed=0)
    assert drawn.learned[0][0].tobytes() != bare.learned[0][0].tobytes()
    assert drawn.initial[0][0].tobytes() == bare.initial[0][0].tobytes()
    assert drawn.name == "<toy> cat"
    assert drawn.sheet([]).tobytes() != replace(drawn, name="<toy>").sheet([]).tobytes()
    judge = Colours()
    score(judge, [Image.new("RGB", (4, 4))], drawn)  # type: ignore[arg-type]  # a stand-in for ClipExtractor
    assert judge.read == ["a photo of a", "snow"], "no text of CLIP-T names the concept"


def test_concepts_that_start_from_one_word_share_its_pictures() -> None:
    toy, other = (initializer_requests(concept(concept_id=name), GRID, 0) for name in ("toy", "other"))
    assert toy == other
    assert toy == sample_requests(concept(), learned(), GRID, 0)[len(toy) :]
    assert toy != initializer_requests(concept(), GRID, 1), "another run has other noise"
    assert initializer_requests(concept(initializer=""), GRID, 0) == []


@pytest.mark.parametrize("number", [1, 2, 5])
def test_the_initializer_may_be_drawn_of_the_first_prompts_alone(number: int) -> None:
    every = initializer_requests(concept(), GRID, 0)
    of_first = min(number, len(GRID.prompts)) * GRID.images_per_prompt
    assert initializer_requests(concept(), replace(GRID, initializer_prompts=number), 0) == every[:of_first]


@pytest.mark.slow
def test_on_the_demo_model_concepts_are_more_like_their_photos_by_the_name_they_were_learned_by() -> None:
    backbone = load_backbone(str(ROOT / "demo/model"), device="cpu", precision="float32")
    judge = ClipExtractor(str(ROOT / "demo/clip"), "cpu")
    cases = []
    for name, word in (("tiger", "cat"), ("koala", "bear")):
        photos = [open_photo(path.read_bytes()) for path in sorted((ROOT / "demo/images" / name).glob("*.png"))]
        cases.append((concept(concept_id=name, placeholder_token=f"<{name}>", initializer=word), photos))
    embeddings = learn(backbone, cases, InversionConfig(steps=100, class_cue=True), slots=2)
    grid = GridConfig(prompts=("a photo of a {}",), images_per_prompt=4, sampling=SamplingConfig(steps=12))

    def mean_likeness(embeddings: Sequence[LearnedEmbedding]) -> float:
        return fmean(
            score(judge, photos, draw_samples(backbone, one, embedding, grid, seed=0))["clip_i"]
            for (one, photos), embedding in zip(cases, embeddings, strict=True)
        )

    bare = [replace(embedding, class_noun="") for embedding in embeddings]
    assert mean_likeness(embeddings) > mean_likeness(bare)


class Colours:
    """Features are the mean colour; a text means red or blue."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.read: list[str] = []

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        self.seen.append(len(pictures))
        return torch.tensor([picture.resize((1, 1)).getpixel((0, 0)) for picture in pictures]).float()

    def texts(self, texts: Sequence[str]) -> Tensor:
        self.read += texts
        return torch.tensor([[255.0, 0, 0] if "red" in text else [0, 0, 255.0] for text in texts])


def test_scores() -> None:
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    samples = Samples(
        prompts=("{}", "red {}", "blue {}"),
        learned=[[red], [red], [blue, red]],
        initial=[[blue], [red], [red, red]],
    )
    judge = Colours()
    scores = score(judge, [red, red, blue], samples)  # type: ignore[arg-type]  # a stand-in for ClipExtractor
    assert scores == pytest.approx(
        {
            "clip_i": 2 / 3,
            "clip_t": (1 + 1 / 2) / 2,
            "clip_i_initializer": 1 / 3,
            "clip_t_initializer": 1 / 2,
            "clip_i_photos": (1 / 2 + 1 / 2 + 0) / 3,
        }
    )
    assert (sum(judge.seen), judge.read) == (3 + 4 + 4, ["red", "blue"]), "each picture and text is looked at once"


def test_the_nearest_other_concept_is_asked_for_the_first_prompts_pictures() -> None:
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    samples = Samples(prompts=("{}", "red {}"), learned=[[red], [blue]], initial=[])
    seen: list[list[list[float]]] = []

    def nearest(pictures: Tensor) -> float:
        seen.append(pictures.tolist())
        return 0.25

    judge: ClipExtractor = Colours()  # type: ignore[assignment]  # a stand-in
    assert score(judge, [red], samples, nearest) == {**score(judge, [red], samples), "clip_i_others": 0.25}
    assert seen == [[[255, 0, 0]]]


def test_the_initializer_has_no_clip_t_without_pictures_of_all_prompts() -> None:
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    judge: ClipExtractor = Colours()  # type: ignore[assignment]  # a stand-in
    whole = Samples(prompts=("{}", "red {}"), learned=[[red], [red]], initial=[[blue], [red]])
    scores = score(judge, [red], whole)
    del scores["clip_t_initializer"]
    assert score(judge, [red], replace(whole, initial=whole.initial[:1])) == scores


def test_prompts_that_say_nothing_besides_the_concept_have_no_clip_t() -> None:
    red = Image.new("RGB", (4, 4), "red")
    samples = Samples(prompts=("{}",), learned=[[red]], initial=[])
    assert score(Colours(), [red], samples) == {"clip_i": pytest.approx(1)}  # type: ignore[arg-type]  # a stand-in


def _row_of(backbone: Backbone, word: str) -> Tensor:
    (token,) = backbone.vocabularies["clip_l"].tokenize(word)
    return backbone.token_tables["clip_l"].weight[token : token + 1]
