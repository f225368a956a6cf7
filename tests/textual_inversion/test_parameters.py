from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.toy_backbone import DIMS, VOCAB_SIZE, VOCABULARY, ToyBackbone, plain_views, toy_ids
from textual_inversion.augment_config import AugmentConfig
from textual_inversion.concept import Category, Concept
from textual_inversion.config import AdapterConfig, InversionConfig
from textual_inversion.lora import initial_adapter
from textual_inversion.paired_augment import TRANSFORM_SETS
from textual_inversion.parameters import ADAPTER, AdapterLayout, Layout, num_photos

BACKBONE = ToyBackbone()
LORA = AdapterConfig(kind="lora", rank=3, alpha=6.0, targets=("fc2",))
CONCEPT = Concept(concept_id="c", placeholder_token="<c>", images=("x",) * 4, num_vectors=2)


def layout(**settings: object) -> Layout:
    return Layout.from_config(BACKBONE, InversionConfig(**settings), max_vectors=4)


def tensors(seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    first = initial_adapter(BACKBONE.adapter_layers, ("fc2",), 3, generator)
    return {name: (down, torch.randn(up.shape, generator=generator)) for name, (down, up) in first.items()}


def test_an_adapter_as_one_block_and_back() -> None:
    adapter = AdapterLayout(BACKBONE, LORA)
    blocks = torch.stack([adapter.flatten(tensors(seed)) for seed in (1, 2)])
    assert blocks.shape == (2, *adapter.shape)
    numbers = sum(half.numel() for pair in tensors(1).values() for half in pair)
    assert 0 <= blocks[0].numel() - numbers < 1024
    assert blocks[0].flatten()[numbers:].abs().sum() == 0
    split = adapter.unflatten(blocks)
    for seed in (1, 2):
        for name, (down, up) in tensors(seed).items():
            assert torch.equal(split[name][0][seed - 1], down)
            assert torch.equal(split[name][1][seed - 1], up)
    learned = adapter.learned(blocks[1])
    assert (learned.kind, learned.scale) == ("lora", 2.0)
    assert torch.equal(learned.tensors["long.fc2"][1], tensors(2)["long.fc2"][1])


def test_an_adapter_of_another_shape() -> None:
    other = {name: (down[:2], up[:, :2]) for name, (down, up) in tensors(1).items()}
    with pytest.raises(ValueError, match="does not fit the model or the adapter settings"):
        AdapterLayout(BACKBONE, LORA).flatten(other)


@pytest.mark.parametrize(
    ("settings", "auxiliary"),
    [
        ({}, 0),
        ({"per_image_tokens": True}, 5),
        ({"augment": AugmentConfig(paired=1)}, len(TRANSFORM_SETS["release"].tokens)),
        ({"augment": AugmentConfig(paired=1, paired_set="late")}, len(TRANSFORM_SETS["late"].tokens)),
    ],
)
def test_rows_are_the_concepts_and_then_the_auxiliary(settings: dict[str, object], auxiliary: int) -> None:
    one = layout(**settings)
    assert one.shapes(CONCEPT, 5) == {key: (2 + auxiliary, dim) for key, dim in DIMS.items()}
    parameters = one.initial_parameters(CONCEPT, 5, seed=0, start=None)
    assert {key: tuple(rows.shape) for key, rows in parameters.items()} == one.shapes(CONCEPT, 5)
    assert one.max_rows >= 4 + auxiliary
    kept = one.embedding(CONCEPT, parameters, {"step": "3"})
    assert {key: rows.tolist() for key, rows in kept.vectors.items()} == {
        key: parameters[key][:2].tolist() for key in DIMS
    }
    assert kept.adapter is None


@pytest.mark.parametrize("category", ["object", "style"])
def test_the_embedding_keeps_the_class_noun_that_it_was_learned_with(category: Category) -> None:
    concept = dataclasses.replace(CONCEPT, initializer="stuffed toy", category=category)
    for settings, noun in (({}, ""), ({"class_cue": True}, "stuffed toy")):
        one = layout(**settings)
        parameters = one.initial_parameters(concept, 1, seed=0, start=None)
        assert one.embedding(concept, parameters, {}).class_noun == noun
    assert layout(class_cue=True).embedding(CONCEPT, parameters, {}).class_noun == ""


def test_a_photos_row_is_drawn_from_the_vocabularys_distribution() -> None:
    parameters = layout(per_image_tokens=True).initial_parameters(CONCEPT, 32, seed=0, start=None)
    for key, table in BACKBONE.token_tables.items():
        rows = parameters[key][2:]
        assert rows.mean() == pytest.approx(float(table.weight.mean()), abs=0.05)
        assert rows.std(0).mean() == pytest.approx(float(table.weight.std(0).mean()), rel=0.15)
        assert len({tuple(row.tolist()) for row in rows}) == 32


def test_groups_have_their_own_rates_and_norms() -> None:
    groups = layout(learning_rate=0.1, weight_decay=0.01, norm_control="sphere", norm_cap=2.0, adapter=LORA).groups(3)
    assert list(groups) == [*DIMS, ADAPTER]
    for key, table in BACKBONE.token_tables.items():
        group = groups[key]
        assert (group.learning_rate, group.weight_decay, group.norm_control) == (0.1, 0.01, "sphere")
        assert group.norm == pytest.approx(2 * table.mean_norm)
        assert group.values.shape == (3, 4, table.dim)
    adapter = groups[ADAPTER]
    assert (adapter.learning_rate, adapter.weight_decay, adapter.norm_control) == (LORA.learning_rate, 0.0, "none")
    assert adapter.values.shape == (3, *AdapterLayout(BACKBONE, LORA).shape)


def test_a_causal_adapter_acts_from_the_concepts_own_rows_on() -> None:
    """Not from a row that only helps, and in each prompt by the concept whose sample it is."""
    one = layout(adapter=AdapterConfig(kind="causal", targets=("fc2",)), augment=AugmentConfig(paired=1))
    rows = one.max_rows
    is_placeholder_row = torch.zeros(2, rows)
    is_placeholder_row[0, :1] = 1
    is_placeholder_row[1, :2] = 1
    prompts = [[5, VOCAB_SIZE + 3, 6, VOCAB_SIZE, 7], [5, VOCAB_SIZE + rows + 1, 6]]
    ids = toy_ids([VOCABULARY.assemble(prompt) for prompt in prompts])
    values = {ADAPTER: torch.zeros(2, *one.adapter.shape)}
    (batch,) = one.adapters(values, ids, is_placeholder_row)
    assert batch.concept.tolist() == [0, 1]
    for positions in batch.positions.values():
        assert positions[0].nonzero().flatten().tolist() == [4, 5, 6]  # its row, the word after it, the end
        assert positions[1].nonzero().flatten().tolist() == [2, 3, 4]


def test_photos_are_counted_by_the_views() -> None:
    assert num_photos(plain_views(torch.zeros(3, 2, 1, 1, 1))) == 1
    assert num_photos(plain_views(torch.zeros(0, 2, 1, 1, 1))) == 0
