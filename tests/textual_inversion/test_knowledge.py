"""Knowledge preservation: which prompts are drawn, and how far the adapted text encoder is from the frozen one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.tiny_models import DIM, MAX_LENGTH
from textual_inversion.adapter_config import AdapterKind
from textual_inversion.concept import Concept
from textual_inversion.conditioning import Conditioning
from textual_inversion.config import AdapterConfig, InversionConfig, PenaltyConfig
from textual_inversion.families import load_backbone
from textual_inversion.families.base import Backbone
from textual_inversion.knowledge import MAX_CAPTIONS, KnowledgePreservation, freeze, read_captions
from textual_inversion.learning import learn
from textual_inversion.lora import TARGETS, AdapterBatch, acting_positions, group_adapters, initial_adapter
from textual_inversion.prompts import encode_prompt

CAPTIONS = ("a cat on the beach", "a blue clock", "the moon and a tree", "snow", "a red toy")
A_DOG = Concept(concept_id="dog", placeholder_token="<dog>", images=("a.png",), initializer="dog")


@pytest.fixture(scope="module")
def knowledge(tiny_backbone: Backbone) -> KnowledgePreservation:
    return KnowledgePreservation(tiny_backbone, CAPTIONS)


def ids_of(backbone: Backbone, prompt: str) -> tuple[int, ...]:
    return tuple(encode_prompt(prompt, {}, backbone.vocabularies)["clip_l"])


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
        positions={"clip_l": torch.ones(num_prompts, MAX_LENGTH, dtype=torch.bool)},
    )


def test_the_distance_is_the_papers() -> None:
    a, b = torch.randn(3, 4, 5, generator=generator(1)), torch.randn(3, 4, 5, generator=generator(2))
    expected = []
    for x, y in zip(a, b, strict=True):
        cosines = [x[i].dot(y[i]) / (x[i].norm() * y[i].norm()) for i in range(4)]
        expected.append(sum(1 - c for c in cosines) / 4)
    torch.testing.assert_close(Conditioning(hidden=a).cosine_distance(Conditioning(hidden=b)), torch.stack(expected))
    half = Conditioning(hidden=a.bfloat16()).cosine_distance(Conditioning(hidden=b.bfloat16()))
    assert half.dtype == torch.float32


def test_the_distance_is_zero_at_the_start_and_grows_with_the_change(
    tiny_backbone: Backbone, knowledge: KnowledgePreservation
) -> None:
    drawn = knowledge.draw(16, knowledge.class_prompts(A_DOG, "textual_inversion"), generator())
    distances = [
        tiny_backbone.encode_prompts(drawn.ids, {}, [an_adapter_everywhere(tiny_backbone, 16, up)]).cosine_distance(
            drawn.conditioning
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
    before = tiny_backbone.encode_prompts(drawn.ids, {}, [batch]).cosine_distance(drawn.conditioning).mean()
    for leaf, gradient in zip(leaves, torch.autograd.grad(before, leaves), strict=True):
        leaf.data -= 0.05 * gradient
    after = tiny_backbone.encode_prompts(drawn.ids, {}, [batch]).cosine_distance(drawn.conditioning).mean()
    assert after < before


def test_a_tenth_is_empty_and_a_tenth_names_the_class(
    tiny_backbone: Backbone, knowledge: KnowledgePreservation
) -> None:
    of_class = knowledge.class_prompts(A_DOG, "textual_inversion")
    assert of_class is not None
    assert len(of_class) == 27
    drawn = knowledge.draw(4000, of_class, generator())
    (dog,) = tiny_backbone.vocabularies["clip_l"].tokenize("dog")
    ids = drawn.ids["clip_l"]
    empty = (ids == torch.tensor(ids_of(tiny_backbone, ""))).all(1)
    of_a_dog = (ids == dog).any(1)
    assert empty.float().mean() == pytest.approx(0.1, abs=0.02)
    assert of_a_dog.float().mean() == pytest.approx(0.1, abs=0.02)
    others = {tuple(each) for each in ids[~empty & ~of_a_dog].tolist()}
    assert others == {ids_of(tiny_backbone, caption) for caption in CAPTIONS}
    assert {tuple(each) for each in ids[of_a_dog].tolist()} == {tuple(each) for each in of_class.ids["clip_l"].tolist()}


def test_a_concept_without_a_class_word_has_no_class_prompts(knowledge: KnowledgePreservation) -> None:
    assert (
        knowledge.class_prompts(
            Concept(concept_id="x", placeholder_token="<x>", images=("a.png",)), "textual_inversion"
        )
        is None
    )
    drawn = knowledge.draw(500, None, generator())
    assert len({tuple(ids) for ids in drawn.ids["clip_l"].tolist()}) == 1 + len(CAPTIONS)


def test_draws_come_from_the_generator_alone(knowledge: KnowledgePreservation) -> None:
    of_class = knowledge.class_prompts(A_DOG, "textual_inversion")
    first = knowledge.draw(8, of_class, generator(3))
    torch.rand(5)
    knowledge.draw(3, None, generator(4))
    again = knowledge.draw(8, of_class, generator(3))
    assert torch.equal(first.ids["clip_l"], again.ids["clip_l"])
    assert torch.equal(first.conditioning.hidden, again.conditioning.hidden)
    assert not torch.equal(first.ids["clip_l"], knowledge.draw(8, of_class, generator(4)).ids["clip_l"])


def test_frozen_states_are_the_plain_text_encoders(tiny_backbone: Backbone) -> None:
    frozen = freeze(tiny_backbone, read_captions("")[:40])
    states = frozen.conditioning.hidden
    assert states.shape == (40, MAX_LENGTH, DIM)
    assert not states.requires_grad
    for i in (0, 33, 39):
        alone = tiny_backbone.encode_prompts(frozen[torch.tensor([i])].ids, {}).hidden[0]
        torch.testing.assert_close(states[i], alone, rtol=0, atol=1e-5)


def test_a_caption_that_is_too_long_is_cut(tiny_backbone: Backbone) -> None:
    ids = freeze(tiny_backbone, ["cat " * 50]).ids["clip_l"][0].tolist()
    assert tuple(ids) == ids_of(tiny_backbone, "cat " * (MAX_LENGTH - 2))


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
    with pytest.raises(ValueError, match="1501 captions for knowledge preservation: 1 to 1500"):
        KnowledgePreservation(tiny_backbone, ["a cat"] * 1501)


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
    captions = read_captions("demo/model/captions.txt")
    (tmp_path / "kept.txt").write_text("\n".join(captions[::2]))
    others = freeze(backbone, captions[1::8])

    def strayed(kind: AdapterKind, weight: float) -> float:
        config = InversionConfig(
            steps=60,  # the longer, the farther an adapter strays that nothing holds
            adapter=AdapterConfig(kind=kind, learning_rate=1e-3),
            penalties=PenaltyConfig(knowledge=weight, captions=str(tmp_path / "kept.txt") if weight else ""),
        )
        (embedding,) = learn(backbone, [(teapot, photos)], config)
        assert embedding.adapter is not None
        ids, end_of_text = others.ids["clip_l"], backbone.vocabularies["clip_l"].end_of_text
        where = acting_positions(embedding.adapter.kind, ids, torch.zeros_like(ids, dtype=torch.bool), end_of_text)
        adapters = group_adapters([[(embedding.adapter, {"clip_l": acts})] for acts in where], backbone.device)
        with torch.no_grad():
            adapted = backbone.encode_prompts(others.ids, {}, adapters)
            return float(adapted.cosine_distance(others.conditioning).mean())

    assert 0 < strayed("lora", 1.0) < 0.5 * strayed("lora", 0.0)
    assert strayed("causal", 0.0) < 1e-6
