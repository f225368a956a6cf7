"""The training of an encoder through a toy model: what is learned, what stays, and what a draw depends on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from tests.textual_inversion.test_encoder import CAUSAL, CONFIG, FEATURES, PixelExtractor, photo
from tests.toy_backbone import MAX_LENGTH, ToyBackbone
from textual_inversion.adapter_config import AdapterShape
from textual_inversion.concept import Concept
from textual_inversion.encoder import NO_ADAPTER, ConceptEncoder, PhotoFeatures
from textual_inversion.encoder_config import EncoderTrainingConfig
from textual_inversion.encoder_training import ConceptExample, EncoderTrainer, encode_example
from textual_inversion.errors import BadInput, NotFinite

BACKBONE = ToyBackbone()


def example(number: int, photos: int = 3, captions: tuple[str, ...] = ()) -> ConceptExample:
    concept = Concept(
        concept_id=f"c{number}",
        placeholder_token="<c>",
        images=("x",) * photos,
        initializer="dog toy",
        captions=captions,
    )
    return encode_example(concept, [photo(10 * number + i) for i in range(photos)], BACKBONE, FEATURES)


EXAMPLES = [example(number, photos=1 + number % 4) for number in range(8)]


def with_rows(example: ConceptExample) -> ConceptExample:
    """Give a concept learned rows, within the bound on offsets."""
    rows = {key: table.mean + table.deviation * torch.ones(2, 1) for key, table in BACKBONE.token_tables.items()}
    return replace(example, learned_rows=rows)


def trainer(wrap: type[nn.Module] | None = None, adapter: AdapterShape = NO_ADAPTER, **settings: Any) -> EncoderTrainer:
    torch.manual_seed(0)
    network: Any = ConceptEncoder(CONFIG, FEATURES.sizes(), BACKBONE, adapter)
    values = {"steps": 400, "warmup_steps": 5, "learning_rate": 1e-2, "offset_weight": 0.0, **settings}
    return EncoderTrainer(wrap(network) if wrap else network, BACKBONE, EncoderTrainingConfig(**values))


def parameters(run: EncoderTrainer) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in run.state_dict()["network"].values()]


def test_training_lowers_the_loss_and_changes_the_network_alone() -> None:
    frozen = {key: table.weight.clone() for key, table in BACKBONE.token_tables.items()}
    run = trainer()
    before = run.evaluate(EXAMPLES)
    for _ in range(60):
        losses = run.step(EXAMPLES).losses
    assert set(losses) == {"denoising", "gradient_norm"}
    assert run.evaluate(EXAMPLES) < before
    for key, table in BACKBONE.token_tables.items():
        assert torch.equal(table.weight, frozen[key])
        assert table.weight.grad is None


def test_adapters_alone_lower_the_loss() -> None:
    """The rows stay at the class vectors, so that nothing but the adapters can have done it."""
    run = trainer(adapter=CAUSAL, learning_rate=0.1)
    run._encoder.offsets.requires_grad_(False)
    before = run.evaluate(EXAMPLES)
    start = run._encoder.get_buffer("adapter_start").clone()
    for _ in range(40):
        run.step(EXAMPLES)
    assert run.evaluate(EXAMPLES) < before
    assert not any(layer.weight.any() for layer in run._encoder.offsets.values())
    assert run._encoder.adapter_change.weight.any()
    assert torch.equal(run._encoder.get_buffer("adapter_start"), start)
    assert all(table.weight.grad is None for table in BACKBONE.token_tables.values())


def test_the_penalty_holds_rows_to_the_class_word() -> None:
    free, held = trainer(), trainer(offset_weight=100.0)
    for _ in range(30):
        free.step(EXAMPLES)
        losses = held.step(EXAMPLES).losses
    assert losses["class_distance"] > 0

    def offset(run: EncoderTrainer) -> float:
        return sum(float(layer.weight.norm()) for layer in run.averaged.offsets.values())  # type: ignore[operator]

    assert offset(held) < 0.7 * offset(free)


def test_rows_are_drawn_to_those_that_were_learned() -> None:
    """Half of the concepts have some; the distance of the other half is zero."""
    examples = [with_rows(each) for each in EXAMPLES[:4]] + EXAMPLES[4:]
    weight = 1e5  # the denoising loss of this model is about 1,000
    run = trainer(row_weight=weight)
    first = run.step(examples).losses["row_distance"]
    for _ in range(60):
        last = run.step(examples).losses["row_distance"]
    assert 0 < last < 0.5 * first
    at_start = trainer(row_weight=weight).step(examples[:4]).losses["row_distance"]
    assert first == pytest.approx(at_start / 2)  # the mean is over all concepts
    assert trainer(row_weight=weight).step(EXAMPLES).losses["row_distance"] == 0.0
    assert "row_distance" not in trainer().step(examples).losses


def test_concepts_without_learned_rows_are_trained_as_without_the_distance() -> None:
    free, held = trainer(), trainer(row_weight=10.0)
    for run in (free, held):
        run.step(EXAMPLES)
        run.step(EXAMPLES)
    assert all(torch.equal(a, b) for a, b in zip(parameters(free), parameters(held), strict=True))


def test_a_resumed_training_ends_with_the_same_bits() -> None:
    whole = trainer()
    for _ in range(6):
        whole.step(EXAMPLES)
    first = trainer()
    for _ in range(3):
        first.step(EXAMPLES)
    second = trainer()
    second.load_state_dict(first.state_dict())
    for _ in range(3):
        second.step(EXAMPLES)
    assert all(torch.equal(a, b) for a, b in zip(parameters(whole), parameters(second), strict=True))
    averages = zip(whole.averaged.parameters(), second.averaged.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in averages)


@pytest.mark.parametrize(
    ("adapter", "row_weight"),
    [(NO_ADAPTER, 0.0), (CAUSAL, 0.0), (NO_ADAPTER, 0.1)],
    ids=["rows", "rows and adapter", "learned rows"],
)
def test_gradients_of_two_workers_average_to_that_of_one(adapter: AdapterShape, row_weight: float) -> None:
    """What data-parallel training relies on: a concept's draws do not depend on its company. Learned rows are those of
    three concepts of the first worker and none of the second."""
    all_examples = [with_rows(each) for each in EXAMPLES[:3]] + EXAMPLES[3:]

    def gradient(examples: list[ConceptExample]) -> torch.Tensor:
        run = trainer(adapter=adapter, max_grad_norm=1e9, learning_rate=1e-9, row_weight=row_weight)
        run.step(EXAMPLES)
        run.step(examples)
        return torch.cat([parameter.grad.flatten() for parameter in run._encoder.parameters()])  # type: ignore[union-attr]

    halves = (gradient(all_examples[:4]) + gradient(all_examples[4:])) / 2
    torch.testing.assert_close(halves, gradient(all_examples), rtol=1e-4, atol=1e-7)


class Wrapped(nn.Module):
    """As torch's wrapper for data-parallel training: the network is its `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any) -> Any:
        return self.module(*inputs)


def test_a_wrapped_network_is_trained_the_same() -> None:
    plain, wrapped = trainer(), trainer(Wrapped)
    for run in (plain, wrapped):
        run.step(EXAMPLES)
        run.step(EXAMPLES)
    assert all(torch.equal(a, b) for a, b in zip(parameters(plain), parameters(wrapped), strict=True))


def poisoned(number: int) -> ConceptExample:
    example = EXAMPLES[number]
    return ConceptExample(concept=example.concept, features=example.features, moments=example.moments * torch.nan)


def test_a_concept_whose_loss_is_not_finite_takes_no_part_in_a_step() -> None:
    """The others are learned from as they would be with a loss of zero in its place."""
    run, other = trainer(max_grad_norm=1e9), trainer(max_grad_norm=1e9)
    result = run.step([*EXAMPLES[1:], poisoned(0)])
    assert (result.left_out, run.step_number) == (("c0",), 1)
    assert result.loss == pytest.approx(other.step(EXAMPLES[1:]).loss * 7 / 8)
    ours, others = (torch.cat([each.grad.flatten() for each in one._encoder.parameters()]) for one in (run, other))
    torch.testing.assert_close(ours, others * 7 / 8)
    assert run.held_out_losses([EXAMPLES[1], poisoned(0)]).isfinite().tolist() == [True, False]


def test_a_step_without_a_finite_loss_changes_nothing() -> None:
    run = trainer(weight_decay=0.0)
    before = parameters(run)
    result = run.step([poisoned(0), poisoned(1)])
    assert (result.left_out, result.loss) == (("c0", "c1"), 0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(run), strict=True))
    assert all(parameter.grad is not None for parameter in run._encoder.parameters())  # other workers wait for it


def test_a_poisoned_concept_is_refused_when_it_is_encoded() -> None:
    class Broken(PixelExtractor):
        def images_and_patches(self, pictures: Any) -> Any:
            pooled, patches = super().images_and_patches(pictures)
            return pooled * torch.nan, patches

    features = PhotoFeatures(BACKBONE, Broken(), CONFIG)  # type: ignore[arg-type]
    with pytest.raises(NotFinite, match=r"concept 'c0'.*not finite"):
        encode_example(EXAMPLES[0].concept, [photo(0)], BACKBONE, features)


def test_a_caption_that_does_not_fit_the_model_is_refused_when_its_concept_is_encoded() -> None:
    """A step may draw it with the class noun, `dog toy`, behind the word."""
    longest = f"a {{}}{' sun' * (MAX_LENGTH - 5 - CONFIG.num_vectors)}"
    assert example(0, photos=1, captions=(longest,)).concept.captions == (longest,)
    with pytest.raises(BadInput, match=r"prompt 'a {} dog toy sun .*tokens do not fit"):
        example(0, photos=1, captions=(f"{longest} sun",))


def test_a_photo_is_drawn_with_its_own_caption() -> None:
    run = trainer(class_noun_share=0.5)
    captions = ("a {} on a tree", "the {} by the clock", "one {}")
    captioned = example(0, captions=captions)
    seen = set()
    for step in range(40):
        batch = run._draws(captioned, "encoder", step).batch
        for ids in batch.ids["long"].tolist():
            seen.add(tuple(ids))
    assert len(seen) == 6  # with and without the noun
