"""Knowledge preservation: which prompts are drawn, and how far the adapted text encoder is from the frozen one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.tiny_models import DIM, MAX_LENGTH
from textual_inversion.concept import Concept
from textual_inversion.config import AdapterConfig, AdapterKind, InversionConfig, PenaltyConfig
from textual_inversion.families import load_backbone
from textual_inversion.families.base import Backbone
from textual_inversion.knowledge import MAX_CAPTIONS, KnowledgePreservation, distance, freeze, read_captions
from textual_inversion.learn import learn
from textual_inversion.lora import TARGETS, AdapterBatch, initial_adapter, join, positions

CAPTIONS = ("a cat on the beach", "a blue clock", "the moon and a tree", "snow", "a red toy")
A_DOG = Concept(concept_id="dog", placeholder_token="<dog>", images=("a.png",), initializer="dog")


@pytest.fixture(scope="module")
def knowledge(tiny_backbone: Backbone) -> KnowledgePreservation:
    return KnowledgePreservation(tiny_backbone, CAPTIONS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def an_adapter_everywhere(backbone: Backbone, num_prompts: int, up: float) -> AdapterBatch:
    start = initial_adapter(backbone.adapter_layers, TARGETS, 4, generator(1))
    return AdapterBatch(
        tensors={
            name: (down[None], up * torch.randn(1, *zero.shape, generator=generator(2)))
            for name, (down, zero) in start.items()
        },
        concept=torch.zeros(num_prompts, dtype=torch.long),
        scale=torch.ones(1),
        positions=torch.ones(num_prompts, backbone.max_length, dtype=torch.bool),
    )


def test_the_distance_is_the_papers() -> None:
    a, b = torch.randn(3, 4, 5, generator=generator(1)), torch.randn(3, 4, 5, generator=generator(2))
    expected = []
    for x, y in zip(a, b, strict=True):
        cosines = [x[i].dot(y[i]) / (x[i].norm() * y[i].norm()) for i in range(4)]
        expected.append(sum(1 - c for c in cosines) / 4)
    torch.testing.assert_close(distance(a, b), torch.stack(expected))
    assert distance(a.bfloat16(), b.bfloat16()).dtype == torch.float32


def test_the_distance_is_zero_at_the_start_and_grows_with_the_change(
    tiny_backbone: Backbone, knowledge: KnowledgePreservation
) -> None:
    drawn = knowledge.draw(16, knowledge.of_class(A_DOG), generator())
    distances = [
        distance(
            tiny_backbone.encode_prompts(drawn.ids, {}, [an_adapter_everywhere(tiny_backbone, 16, up)]).hidden,
            drawn.states,
        )
        for up in (0.0, 0.02, 0.1)
    ]
    assert distances[0].abs().max() < 1e-6
    assert distances[1].min() > 1e-5
    assert (distances[2] > 4 * distances[1]).all()


def test_a_step_down_the_gradient_brings_the_encoder_back(
    tiny_backbone: Backbone, knowledge: KnowledgePreservation
) -> None:
    drawn = knowledge.draw(8, None, generator())
    batch = an_adapter_everywhere(tiny_backbone, 8, 0.1)
    leaves = [tensor.requires_grad_() for pair in batch.tensors.values() for tensor in pair]
    before = distance(tiny_backbone.encode_prompts(drawn.ids, {}, [batch]).hidden, drawn.states).mean()
    for leaf, gradient in zip(leaves, torch.autograd.grad(before, leaves), strict=True):
        leaf.data -= 0.05 * gradient
    assert distance(tiny_backbone.encode_prompts(drawn.ids, {}, [batch]).hidden, drawn.states).mean() < before


def test_a_tenth_is_empty_and_a_tenth_names_the_class(
    tiny_backbone: Backbone, knowledge: KnowledgePreservation
) -> None:
    of_class = knowledge.of_class(A_DOG)
    assert of_class is not None
    assert len(of_class) == 27
    drawn = knowledge.draw(4000, of_class, generator())
    (dog,) = tiny_backbone.tokenize("dog")
    empty = (drawn.ids == torch.tensor(tiny_backbone.assemble([]))).all(1)
    of_a_dog = (drawn.ids == dog).any(1)
    assert empty.float().mean() == pytest.approx(0.1, abs=0.02)
    assert of_a_dog.float().mean() == pytest.approx(0.1, abs=0.02)
    others = {tuple(ids) for ids in drawn.ids[~empty & ~of_a_dog].tolist()}
    assert others == {tuple(tiny_backbone.assemble(tiny_backbone.tokenize(caption))) for caption in CAPTIONS}
    assert {tuple(ids) for ids in drawn.ids[of_a_dog].tolist()} == {tuple(ids) for ids in of_class.ids.tolist()}


def test_a_concept_without_a_class_word_has_no_class_prompts(knowledge: KnowledgePreservation) -> None:
    assert knowledge.of_class(Concept(concept_id="x", placeholder_token="<x>", images=("a.png",))) is None
    drawn = knowledge.draw(500, None, generator())
    assert len({tuple(ids) for ids in drawn.ids.tolist()}) == 1 + len(CAPTIONS)


def test_draws_come_from_the_generator_alone(knowledge: KnowledgePreservation) -> None:
    of_class = knowledge.of_class(A_DOG)
    first = knowledge.draw(8, of_class, generator(3))
    torch.rand(5)
    knowledge.draw(3, None, generator(4))
    again = knowledge.draw(8, of_class, generator(3))
    assert torch.equal(first.ids, again.ids)
    assert torch.equal(first.states, again.states)
    assert not torch.equal(first.ids, knowledge.draw(8, of_class, generator(4)).ids)


def test_frozen_states_are_the_plain_text_encoders(tiny_backbone: Backbone) -> None:
    frozen = freeze(tiny_backbone, read_captions("")[:40])
    assert frozen.states.shape == (40, MAX_LENGTH, DIM)
    assert not frozen.states.requires_grad
    for i in (0, 33, 39):
        alone = tiny_backbone.encode_prompts(frozen.ids[i : i + 1], {}).hidden[0]
        torch.testing.assert_close(frozen.states[i], alone, rtol=0, atol=1e-5)


def test_a_caption_that_is_too_long_is_cut(tiny_backbone: Backbone) -> None:
    ids = freeze(tiny_backbone, ["cat " * 50]).ids[0].tolist()
    assert ids == tiny_backbone.assemble(tiny_backbone.tokenize("cat " * (MAX_LENGTH - 2)))


def test_the_packages_captions_are_many_and_plain() -> None:
    captions = read_captions("")
    assert 300 <= len(captions) <= MAX_CAPTIONS
    assert len(set(captions)) == len(captions)
    assert all(2 <= len(caption.split()) <= 12 and "{" not in caption for caption in captions)


def test_captions_of_ones_own(tmp_path: Path, tiny_backbone: Backbone) -> None:
    path = tmp_path / "captions.txt"
    path.write_text("a cat\n\n  été à la mer \n")
    assert read_captions(str(path)) == ("a cat", "été à la mer")
    path.write_text("\n \n")
    with pytest.raises(ValueError, match=r"captions.txt' holds no captions"):
        read_captions(str(path))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot be read as a text file"):
        read_captions(str(path))
    with pytest.raises(ValueError, match=r"penalties.captions = '/nowhere'"):
        read_captions("/nowhere")
    with pytest.raises(ValueError, match="1001 captions for knowledge preservation: 1 to 1000"):
        KnowledgePreservation(tiny_backbone, ["a cat"] * 1001)


@pytest.mark.slow
def test_on_the_demo_model_other_captions_stay_nearer(tmp_path: Path) -> None:
    """Captions that were not among those preserved: the term generalises; a causal adapter needs none."""
    torch.set_num_threads(1)
    backbone = load_backbone("demo/model", device="cpu", precision="float32")
    paths = sorted(Path("demo/images/teapot").glob("*.png"))
    teapot = Concept(
        concept_id="teapot", placeholder_token="<t>", images=tuple(map(str, paths)), initializer="coffee"
    )  # fmt: skip
    photos = [Image.open(path).convert("RGB") for path in paths]
    captions = read_captions("")
    (tmp_path / "kept.txt").write_text("\n".join(captions[::2]))
    others = freeze(backbone, captions[1::8])

    def strayed(kind: AdapterKind, weight: float) -> float:
        config = InversionConfig(
            steps=20,
            adapter=AdapterConfig(kind=kind, learning_rate=1e-3),
            penalties=PenaltyConfig(knowledge=weight, captions=str(tmp_path / "kept.txt") if weight else ""),
        )
        (embedding,) = learn(backbone, [(teapot, photos)], config)
        assert embedding.adapter is not None
        none_of_concept = torch.zeros_like(others.ids, dtype=torch.bool)
        where = positions(embedding.adapter.kind, others.ids, none_of_concept, backbone.end_of_text)
        adapters = join([[(embedding.adapter, acts)] for acts in where], backbone.device)
        with torch.no_grad():
            return float(distance(backbone.encode_prompts(others.ids, {}, adapters).hidden, others.states).mean())

    assert 0 < strayed("lora", 1.0) < 0.5 * strayed("lora", 0.0)
    assert strayed("causal", 0.0) < 1e-6
