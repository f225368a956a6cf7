"""Adapters of a text encoder against plain torch: what changes, where, and what keeps its bits."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.tiny_models import DIM
from textual_inversion.concept import LearnedAdapter
from textual_inversion.families.base import Backbone
from textual_inversion.lora import (
    TARGETS,
    AdaptableLayers,
    AdapterBatch,
    acting_positions,
    initial_adapter,
    merged_state_dict,
)

FC2 = "encoder.layers.0.mlp.fc2"


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def an_adapter(backbone: Backbone, seed: int, targets: tuple[str, ...] = TARGETS, rank: int = 3) -> dict[str, Any]:
    """Layer -> (down, up), neither of them zero."""
    start = initial_adapter(backbone.adapter_layers, targets, rank, torch.Generator().manual_seed(seed))
    return {name: (down, 0.1 * draw(seed + i, *up.shape)) for i, (name, (down, up)) in enumerate(start.items())}


def a_batch(
    adapters: list[dict[str, tuple[Tensor, Tensor]]], concept: list[int], positions: Tensor, scale: float = 1.5
) -> AdapterBatch:
    stacked = {
        name: (torch.stack([a[name][0] for a in adapters]), torch.stack([a[name][1] for a in adapters]))
        for name in adapters[0]
    }
    scales = torch.tensor([scale * (i + 1) for i in range(len(adapters))])
    return AdapterBatch(tensors=stacked, concept=torch.tensor(concept), scale=scales, positions={"clip_l": positions})


def some_prompts(backbone: Backbone) -> tuple[Tensor, dict[str, Tensor]]:
    """Four prompts with a concept at different places, one prompt without; the concept's two rows."""
    vocabulary = backbone.vocabularies["clip_l"]
    row = vocabulary.size
    texts = [("a photo of a", "on the beach"), ("", "toy"), ("the cool", ""), ("a dark photo of the moon and", "")]
    ids = [[*vocabulary.tokenize(before), row, row + 1, *vocabulary.tokenize(after)] for before, after in texts]
    ids.append(vocabulary.tokenize("a photo of a cat"))
    return torch.tensor([vocabulary.assemble(i) for i in ids]), {"clip_l": 0.3 * draw(9, 2, DIM)}


def everywhere(ids: Tensor) -> Tensor:
    return torch.ones_like(ids, dtype=torch.bool)


def encode(backbone: Backbone, ids: Tensor, rows: dict[str, Tensor], *batches: AdapterBatch) -> Tensor:
    with torch.no_grad():
        return backbone.encode_prompts({"clip_l": ids}, rows, batches).hidden


def test_a_change_is_the_papers_sum_prompt_by_prompt() -> None:
    weight, bias, inputs = draw(0, 7, 5), draw(1, 7), draw(2, 3, 4, 5)
    down, up = draw(3, 2, 2, 5), draw(4, 2, 7, 2)
    scale, concept = torch.tensor([0.5, 2.0]), torch.tensor([1, -1, 0])
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 1]])
    batch = AdapterBatch(tensors={FC2: (down, up)}, concept=concept, scale=scale, positions={"clip_l": mask})

    expected = F.linear(inputs, weight, bias)
    for i, c in ((0, 1), (2, 0)):
        for j in range(4):
            expected[i, j] += mask[i, j] * scale[c] * (up[c] @ (down[c] @ inputs[i, j]))
    outputs = F.linear(inputs, weight, bias)
    torch.testing.assert_close(batch.change("clip_l", FC2, inputs, outputs), expected)
    assert batch.change("clip_l", "another layer", inputs, outputs) is outputs


def test_every_linear_layer_of_every_block_is_found(tiny_backbone: Backbone) -> None:
    assert sum(name.startswith("encoder.") for name in tiny_backbone.adapter_layers) == 2 * 6
    assert tiny_backbone.adapter_layers[FC2] == (2 * DIM, DIM)
    assert tiny_backbone.adapter_layers["encoder.layers.1.self_attn.q_proj"] == (DIM, DIM)


def test_names_do_not_depend_on_the_version_of_transformers() -> None:
    """Up to version 4 everything was inside `text_model`."""
    block = nn.ModuleDict({"mlp": nn.ModuleDict({"fc2": nn.Linear(4, 3), "norm": nn.LayerNorm(3)})})
    inner = nn.ModuleDict({"encoder": nn.ModuleDict({"layers": nn.ModuleList([block])})})
    outer = nn.ModuleDict({"text_model": inner, "projection": nn.Linear(3, 3)})
    assert AdaptableLayers(outer, "clip_l").layers == AdaptableLayers(inner, "clip_l").layers == {FC2: (4, 3)}
    assert AdaptableLayers(inner, "clip_g", prefix="second.").layers == {f"second.{FC2}": (4, 3)}


def test_before_the_first_step_nothing_is_changed(tiny_backbone: Backbone) -> None:
    ids, rows = some_prompts(tiny_backbone)
    start = initial_adapter(tiny_backbone.adapter_layers, TARGETS, 4, torch.Generator().manual_seed(0))
    batch = a_batch([start], [0] * len(ids), everywhere(ids))
    assert torch.equal(encode(tiny_backbone, ids, rows, batch), encode(tiny_backbone, ids, rows))
    assert start[FC2][0].std() == pytest.approx(1 / 4, rel=0.2)
    assert initial_adapter(tiny_backbone.adapter_layers, ("fc2",), 4, torch.Generator()).keys() == {
        "encoder.layers.0.mlp.fc2", "encoder.layers.1.mlp.fc2",
    }  # fmt: skip


def test_a_prompt_without_an_adapter_keeps_its_bits(tiny_backbone: Backbone) -> None:
    ids, rows = some_prompts(tiny_backbone)
    adapters = [an_adapter(tiny_backbone, 1), an_adapter(tiny_backbone, 2)]
    adapters[0][FC2][1].fill_(float("nan"))  # not even what is broken reaches a neighbour
    changed = encode(tiny_backbone, ids, rows, a_batch(adapters, [1, -1, 0, -1, 1], everywhere(ids)))
    plain = encode(tiny_backbone, ids, rows)
    assert torch.equal(changed[[1, 3]], plain[[1, 3]])
    assert (changed[0] - plain[0]).abs().max() > 0.01
    assert changed[2].isnan().any()


def test_concepts_in_one_batch_equal_one_at_a_time(tiny_backbone: Backbone) -> None:
    ids, rows = some_prompts(tiny_backbone)
    adapters = [an_adapter(tiny_backbone, seed) for seed in range(3)]
    concept = [2, 0, 1, -1, 2]
    together = encode(tiny_backbone, ids, rows, a_batch(adapters, concept, everywhere(ids)))
    for i, c in enumerate(concept):
        only = [c if j == i else -1 for j in range(len(ids))]
        same_shape = encode(tiny_backbone, ids, rows, a_batch(adapters, only, everywhere(ids)))
        assert torch.equal(together[i], same_shape[i])
        one = slice(i, i + 1)
        alone = encode(tiny_backbone, ids[one], rows, a_batch(adapters, [c], everywhere(ids[one])))
        torch.testing.assert_close(together[one], alone, rtol=0, atol=1e-5)


def test_changes_of_several_batches_add_up(tiny_backbone: Backbone) -> None:
    """Two adapters of rank 3 and 2 in one prompt are one of rank 5: the sum of their changes."""
    ids, rows = some_prompts(tiny_backbone)
    first, second = an_adapter(tiny_backbone, 1), an_adapter(tiny_backbone, 2, rank=2)
    both = {
        name: (torch.cat([first[name][0], second[name][0]]), torch.cat([first[name][1], second[name][1]], dim=1))
        for name in first
    }
    use = [0] * len(ids)
    summed = encode(tiny_backbone, ids, rows, *(a_batch([a], use, everywhere(ids)) for a in (first, second)))
    expected = encode(tiny_backbone, ids, rows, a_batch([both], use, everywhere(ids)))
    torch.testing.assert_close(summed, expected, rtol=0, atol=1e-5)


def test_causal_positions_begin_at_the_concept_and_end_with_the_text() -> None:
    end, row = 9, 10
    ids = torch.tensor([
        [8, 1, row, row + 1, 2, end, end, end],  # padded with the end of the text (Stable Diffusion 1)
        [8, row, 2, row, end, 0, 0, 0],  # padded with another word (2), the concept named twice
        [8, 1, 2, end, end, end, end, end],  # without the concept
    ])  # fmt: skip
    expected = [[0, 0, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0, 0, 0], [0] * 8]
    assert acting_positions("causal", ids, ids >= row, end).int().tolist() == expected
    assert acting_positions("lora", ids, ids >= row, end).all()


@pytest.mark.parametrize("targets", [("fc2",), TARGETS])
def test_a_causal_adapter_leaves_what_stands_before_the_concept(
    tiny_backbone: Backbone, targets: tuple[str, ...]
) -> None:
    """TextBoost v2: the prefix and prompts without V* keep their bits; V* and what follows change."""
    ids, rows = some_prompts(tiny_backbone)
    vocabulary = tiny_backbone.vocabularies["clip_l"]
    of_concept = ids >= vocabulary.size
    where = acting_positions("causal", ids, of_concept, vocabulary.end_of_text)
    batch = a_batch([an_adapter(tiny_backbone, 3, targets)], [0] * len(ids), where)
    changed, plain = encode(tiny_backbone, ids, rows, batch), encode(tiny_backbone, ids, rows)
    for i in range(4):
        first = int(of_concept[i].int().argmax())
        assert torch.equal(changed[i, :first], plain[i, :first])
        assert (changed[i, first:] != plain[i, first:]).any(dim=1).all()
    assert torch.equal(changed[4], plain[4])


def test_adapters_in_use_belong_to_the_thread_and_the_call(tiny_backbone: Backbone) -> None:
    ids, rows = some_prompts(tiny_backbone)
    plain = encode(tiny_backbone, ids, rows)
    batches = [a_batch([an_adapter(tiny_backbone, seed)], [0] * len(ids), everywhere(ids)) for seed in range(3)]
    expected = [encode(tiny_backbone, ids, rows, batch) for batch in batches]
    found: list[list[Tensor]] = [[] for _ in batches]

    def work(place: int) -> None:
        for _ in range(5):
            found[place].append(encode(tiny_backbone, ids, rows, batches[place]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    here = [encode(tiny_backbone, ids, rows) for _ in range(5)]
    for thread in threads:
        thread.join()
    assert all(torch.equal(plain, hidden) for hidden in here)
    assert all(torch.equal(a, b) for a, many in zip(expected, found, strict=True) for b in many)


def test_gradients_reach_each_concepts_own_adapter(tiny_backbone: Backbone) -> None:
    ids, rows = some_prompts(tiny_backbone)
    adapters = [an_adapter(tiny_backbone, seed) for seed in range(2)]
    upstream = draw(5, *ids.shape, DIM)

    def gradients(concept: list[int]) -> dict[str, tuple[Tensor, Tensor]]:
        batch = a_batch(adapters, concept, everywhere(ids))
        leaves = [t.requires_grad_() for pair in batch.tensors.values() for t in pair]
        weight = upstream * (torch.tensor(concept) >= 0)[:, None, None]
        hidden = tiny_backbone.encode_prompts({"clip_l": ids}, rows, [batch]).hidden
        flat = torch.autograd.grad((hidden * weight).sum(), leaves)
        return dict(zip(batch.tensors, zip(flat[::2], flat[1::2], strict=True), strict=True))

    together, first, second = gradients([0, 1, 0, -1, 1]), gradients([0, -1, 0, -1, -1]), gradients([-1, 1, -1, -1, 1])
    for name in adapters[0]:
        for part in (0, 1):
            assert first[name][part][0].abs().max() > 0
            assert not first[name][part][1].any()
            assert torch.equal(together[name][part][0], first[name][part][0])
            assert torch.equal(together[name][part][1], second[name][part][1])


def test_an_unknown_layer_is_refused(tiny_backbone: Backbone) -> None:
    ids, rows = some_prompts(tiny_backbone)
    batch = a_batch([{"encoder.layers.7.mlp.fc2": (draw(0, 1, 4), draw(1, 4, 1))}], [0] * len(ids), everywhere(ids))
    with pytest.raises(ValueError, match=r"changes 'encoder.layers.7.mlp.fc2', which this text encoder does not have"):
        encode(tiny_backbone, ids, rows, batch)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_merged_weights_equal_the_adapter_in_use(tiny_backbone: Any, prefix: str) -> None:
    ids, rows = some_prompts(tiny_backbone)
    tensors = an_adapter(tiny_backbone, 4)
    adapter = LearnedAdapter(kind="lora", scale=1.5, tensors=tensors)
    text_encoder = tiny_backbone._text_encoder
    state = {name: weight.clone() for name, weight in text_encoder.state_dict().items()}
    merged = merged_state_dict({prefix + name: weight for name, weight in state.items()}, adapter)
    changed = {name for name, weight in merged.items() if not torch.equal(weight, state[name.removeprefix(prefix)])}
    assert changed == {f"{prefix}{name}.weight" for name in tensors}

    expected = encode(tiny_backbone, ids, rows, a_batch([tensors], [0] * len(ids), everywhere(ids)))
    try:
        text_encoder.load_state_dict({name.removeprefix(prefix): weight for name, weight in merged.items()})
        found = encode(tiny_backbone, ids, rows)
    finally:
        text_encoder.load_state_dict(state)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - encode(tiny_backbone, ids, rows)).abs().max() > 0.01


def test_what_cannot_be_merged_is_refused(tiny_backbone: Any) -> None:
    state = tiny_backbone._text_encoder.state_dict()
    tensors = an_adapter(tiny_backbone, 4)
    with pytest.raises(ValueError, match="kind 'causal' acts at some positions only"):
        merged_state_dict(state, LearnedAdapter(kind="causal", scale=1.0, tensors=tensors))
    with pytest.raises(ValueError, match=r"no layer 'encoder.layers.0.mlp.fc2' of shape \[32, 5\]"):
        merged_state_dict(state, LearnedAdapter(kind="lora", scale=1.0, tensors={FC2: (draw(0, 1, 5), draw(1, 32, 1))}))
