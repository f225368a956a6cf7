"""TextBoost++: text states of each cross-attention layer, against plain torch and an untouched U-Net of diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from tests.tiny_models import DIM, MAX_LENGTH
from textual_inversion.compile_trial import Pass, compile_checked
from textual_inversion.conditioning import Conditioning, LayerChanges, concatenate
from textual_inversion.config import AdapterConfig
from textual_inversion.cross_attention import layer_changes
from textual_inversion.families import load_backbone
from textual_inversion.families.base import Backbone
from textual_inversion.lora import AdapterBatch, acting_positions, initial_adapter

BLOCKS = (
    "down_blocks.0.attentions.0.transformer_blocks.0",
    "mid_block.attentions.0.transformer_blocks.0",
    "up_blocks.1.attentions.0.transformer_blocks.0",
    "up_blocks.1.attentions.1.transformer_blocks.0",
)
"""The tiny model's blocks with cross-attention, in order of execution."""

LAYERS = tuple(f"unet.{block}.cross_attention" for block in BLOCKS)
PLUS_PLUS = ("fc2", "cross_attention")
SCALE = 1.5

Pairs = dict[str, tuple[Tensor, Tensor]]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def an_adapter(backbone: Backbone, seed: int, rank: int = 2, targets: tuple[str, ...] = PLUS_PLUS) -> Pairs:
    """Layer -> (down, up), neither of them zero."""
    start = initial_adapter(backbone.adapter_layers, targets, rank, torch.Generator().manual_seed(seed))
    return {name: (down, 0.1 * draw(seed + i, *up.shape)) for i, (name, (down, up)) in enumerate(start.items())}


def a_batch(adapters: list[Pairs], concept: list[int], positions: Tensor) -> AdapterBatch:
    stacked = {
        name: (torch.stack([a[name][0] for a in adapters]), torch.stack([a[name][1] for a in adapters]))
        for name in adapters[0]
    }
    scale = torch.full((len(adapters),), SCALE)
    return AdapterBatch(tensors=stacked, concept=torch.tensor(concept), scale=scale, positions={"clip_l": positions})


def some_prompts(backbone: Backbone) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Three prompts with a concept at different places and one without; the concept's row; where an adapter acts."""
    vocabulary = backbone.vocabularies["clip_l"]
    row = vocabulary.size
    texts = [("a photo of a", "on the beach"), ("", "toy"), ("a dark photo of the moon and", "")]
    ids = [[*vocabulary.tokenize(before), row, *vocabulary.tokenize(after)] for before, after in texts]
    ids.append(vocabulary.tokenize("a photo of a cat"))
    stacked = torch.tensor([vocabulary.assemble(each) for each in ids])
    positions = acting_positions("causal", stacked, stacked == row, vocabulary.end_of_text)
    return stacked, {"clip_l": 0.3 * draw(9, 1, DIM)}, positions


def encode(backbone: Backbone, *batches: AdapterBatch) -> Conditioning:
    ids, rows, _ = some_prompts(backbone)
    return backbone.encode_prompts({"clip_l": ids}, rows, batches)


def predict(backbone: Backbone, conditioning: Conditioning) -> Tensor:
    latents = draw(7, len(conditioning), *backbone.latent_shape)
    return backbone.predict(latents, torch.linspace(1, 900, len(conditioning)).long(), conditioning)


def plain_prediction(model: Path, hidden: Tensor, pairs: Pairs, positions: Tensor) -> Tensor:
    """A U-Net of diffusers whose keys and values are made of H + m * scale * up down H, by hooks of their own."""
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet").requires_grad_(False).eval()
    for block, layer in zip(BLOCKS, LAYERS, strict=True):
        down, up = pairs[layer]
        attention = unet.get_submodule(f"{block}.attn2")

        def change(_module: Any, args: tuple[Tensor], down: Tensor = down, up: Tensor = up) -> tuple[Tensor]:
            (states,) = args
            return (states + positions[..., None] * SCALE * (states @ down.T) @ up.T,)

        for projection in (attention.to_k, attention.to_v):
            projection.register_forward_pre_hook(change)
    latents = draw(7, len(hidden), unet.config.in_channels, 8, 8)
    timesteps = torch.linspace(1, 900, len(hidden)).long()
    prediction: Tensor = unet(latents, timesteps, encoder_hidden_states=hidden).sample
    return prediction


def test_the_layers_are_named_in_order_of_execution(tiny_backbone: Backbone) -> None:
    assert tuple(name for name in tiny_backbone.adapter_layers if name.endswith("cross_attention")) == LAYERS
    assert {tiny_backbone.adapter_layers[name] for name in LAYERS} == {(DIM, DIM)}


def test_each_layers_states_are_the_papers_sum() -> None:
    """Eq. 8: H_l = H + Diag(m) A_l(H), prompt by prompt, also for a layer that an adapter leaves alone."""
    layers = ["first", "second", "third"]
    hidden, mask = draw(0, 3, 5, 4), draw(1, 3, 5) > 0
    tensors = {name: (draw(2 + i, 2, 2, 4), draw(5 + i, 2, 4, 2)) for i, name in enumerate(("first", "third"))}
    scale, concept = torch.tensor([0.5, 2.0]), torch.tensor([1, -1, 0])
    batch = AdapterBatch(tensors=tensors, concept=concept, scale=scale, positions={"words": mask})
    changes = layer_changes(layers, hidden, [batch], "words")
    assert changes is not None
    for layer, name in enumerate(layers):
        expected = hidden.clone()
        for i, c in ((0, 1), (2, 0)):
            if name in tensors:
                down, up = tensors[name]
                expected[i] += mask[i, :, None] * scale[c] * (hidden[i] @ down[c].T) @ up[c].T
        torch.testing.assert_close(changes.states(hidden, layer), expected)
        assert torch.equal(changes.states(hidden, layer)[1], hidden[1])
    assert layer_changes(["another"], hidden, [batch], "words") is None
    assert layer_changes(layers, hidden, [], "words") is None


def test_keys_and_values_are_made_of_the_layers_own_states(tiny_backbone: Backbone, tiny_model: Path) -> None:
    pairs = an_adapter(tiny_backbone, 3)
    positions = some_prompts(tiny_backbone)[2]
    with torch.no_grad():
        conditioning = encode(tiny_backbone, a_batch([pairs], [0] * 4, positions))
        ours, plain = (
            predict(tiny_backbone, conditioning),
            predict(tiny_backbone, Conditioning(hidden=conditioning.hidden)),
        )
        theirs = plain_prediction(tiny_model, conditioning.hidden, pairs, positions)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (ours - plain).flatten(1).abs().amax(1)[:3].min() > 0.01


def test_gradients_are_those_of_plain_hooks(tiny_backbone: Backbone, tiny_model: Path) -> None:
    """They reach the adapter and, through H, what made it; the frozen U-Net gets none."""
    pairs = an_adapter(tiny_backbone, 3, targets=("cross_attention",))
    positions = some_prompts(tiny_backbone)[2]
    rows = some_prompts(tiny_backbone)[1]["clip_l"]

    def gradients(forward: Any) -> list[Tensor]:
        leaves = [half.clone().requires_grad_() for name in LAYERS for half in pairs[name]]
        own = {name: (leaves[2 * i], leaves[2 * i + 1]) for i, name in enumerate(LAYERS)}
        row = rows.clone().requires_grad_()
        return list(torch.autograd.grad(forward(own, row).square().mean(), [*leaves, row]))

    def ours(own: Pairs, row: Tensor) -> Tensor:
        batch = a_batch([own], [0] * 4, positions)
        ids = {"clip_l": some_prompts(tiny_backbone)[0]}
        return predict(tiny_backbone, tiny_backbone.encode_prompts(ids, {"clip_l": row}, [batch]))

    def theirs(own: Pairs, row: Tensor) -> Tensor:
        ids = {"clip_l": some_prompts(tiny_backbone)[0]}
        return plain_prediction(tiny_model, tiny_backbone.encode_prompts(ids, {"clip_l": row}).hidden, own, positions)

    for one, other in zip(gradients(ours), gradients(theirs), strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    unet: Any = tiny_backbone._network  # type: ignore[attr-defined]
    assert not any(weight.requires_grad for weight in unet.parameters())


def test_before_the_first_step_nothing_is_changed(tiny_backbone: Backbone) -> None:
    start = initial_adapter(tiny_backbone.adapter_layers, PLUS_PLUS, 1, torch.Generator().manual_seed(0))
    with torch.no_grad():
        changed = encode(tiny_backbone, a_batch([start], [0] * 4, some_prompts(tiny_backbone)[2]))
        assert changed.changes is not None
        assert torch.equal(predict(tiny_backbone, changed), predict(tiny_backbone, encode(tiny_backbone)))


def test_what_stands_before_the_concept_and_other_prompts_keep_their_bits(tiny_backbone: Backbone) -> None:
    positions = some_prompts(tiny_backbone)[2]
    conditioning = encode(tiny_backbone, a_batch([an_adapter(tiny_backbone, 3)], [0] * 4, positions))
    plain = encode(tiny_backbone)
    before = positions.cumsum(1) == 0
    assert conditioning.changes is not None
    for layer in range(len(LAYERS)):
        states = conditioning.changes.states(conditioning.hidden, layer)
        assert torch.equal(states[~positions], conditioning.hidden[~positions])
        assert torch.equal(states[before], plain.hidden[before])
        assert (states[positions] != conditioning.hidden[positions]).any(dim=1).all()
    assert torch.equal(predict(tiny_backbone, conditioning)[3], predict(tiny_backbone, plain)[3])


def test_a_prompt_without_an_adapter_keeps_its_bits_beside_a_broken_one(tiny_backbone: Backbone) -> None:
    adapters = [an_adapter(tiny_backbone, 1), an_adapter(tiny_backbone, 2)]
    adapters[0][LAYERS[0]][1].fill_(float("nan"))
    positions = some_prompts(tiny_backbone)[2]
    changed = predict(tiny_backbone, encode(tiny_backbone, a_batch(adapters, [0, -1, 1, -1], positions)))
    plain = predict(tiny_backbone, encode(tiny_backbone))
    assert torch.equal(changed[[1, 3]], plain[[1, 3]])
    assert changed[0].isnan().any()
    assert changed[2].isfinite().all()


def test_concepts_in_one_batch_equal_one_at_a_time(tiny_backbone: Backbone) -> None:
    """Also with adapters of another rank beside them, which make the batch's changes of higher rank."""
    adapters = [an_adapter(tiny_backbone, seed) for seed in range(2)]
    other = an_adapter(tiny_backbone, 5, rank=3)
    positions = some_prompts(tiny_backbone)[2]
    concept = [1, -1, 0, 1]
    mixed = a_batch(adapters, concept, positions), a_batch([other], [-1, 0, -1, -1], positions)
    together = predict(tiny_backbone, encode(tiny_backbone, *mixed))
    for i, c in enumerate(concept):
        only = [c if j == i else -1 for j in range(4)]
        batch = a_batch(adapters, only, positions) if c >= 0 else a_batch([other], [-1, 0, -1, -1], positions)
        assert torch.equal(together[i], predict(tiny_backbone, encode(tiny_backbone, batch))[i])


def test_two_concepts_of_one_prompt_add_up(tiny_backbone: Backbone) -> None:
    """Two adapters of rank 2 and 3 are one of rank 5: the sum of their changes."""
    first, second = (an_adapter(tiny_backbone, seed, seed, targets=("cross_attention",)) for seed in (2, 3))
    both = {
        name: (torch.cat([first[name][0], second[name][0]]), torch.cat([first[name][1], second[name][1]], dim=1))
        for name in first
    }
    positions = some_prompts(tiny_backbone)[2]
    summed = encode(tiny_backbone, *(a_batch([each], [0] * 4, positions) for each in (first, second)))
    expected = encode(tiny_backbone, a_batch([both], [0] * 4, positions))
    torch.testing.assert_close(predict(tiny_backbone, summed), predict(tiny_backbone, expected), rtol=0, atol=1e-5)


def test_prompts_of_different_rank_share_a_conditioning() -> None:
    """As the cache of prompts has them: one without changes, one of rank 1 and one of rank 2."""

    def some(rank: int | None) -> Conditioning:
        changes = (
            None if rank is None else LayerChanges(weights=draw(rank, 1, rank, 2, 5), directions=draw(9, 1, rank, 2, 3))
        )
        return Conditioning(hidden=draw(3, 1, 5, 3), changes=changes)

    parts = [some(None), some(2), some(1)]
    joined = concatenate(parts)
    assert joined.changes is not None
    assert joined.changes.weights.shape == (3, 2, 2, 5)
    assert len(joined.encodings()) == 3
    for layer in range(2):
        states = joined.changes.states(joined.hidden, layer)
        for i, part in enumerate(parts):
            alone = part.changes.states(part.hidden, layer) if part.changes else part.hidden
            assert torch.equal(states[i : i + 1], alone)
    again = joined[torch.tensor([2, 0])].changes
    assert again is not None
    assert torch.equal(again.weights, joined.changes.weights[[2, 0]])


def passes_with_changes() -> list[Pass]:
    adapter = AdapterConfig(kind="causal", rank=2, targets=PLUS_PLUS)
    return [
        Pass(2, gradients=True, adapter=adapter),
        Pass(3, gradients=False, adapter=adapter),
        Pass(3, gradients=False),
    ]


@pytest.mark.slow
def test_a_compiler_that_loses_the_gradient_to_the_changes_is_found(tiny_model: Path) -> None:
    backbone = load_backbone(str(tiny_model), device="cpu", precision="float32")
    assert compile_checked(backbone, passes_with_changes(), backend="eager")

    def forgetful(module: Any, _inputs: list[Tensor]) -> Any:
        def is_of_the_changes(x: object) -> bool:
            return isinstance(x, Tensor) and x.shape == (2, 2, len(LAYERS), DIM)

        return lambda *inputs: module(*(x.detach() if is_of_the_changes(x) else x for x in inputs))

    assert not compile_checked(backbone, passes_with_changes(), backend=forgetful, or_plain=True)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_compiled_denoiser_takes_the_changes(tiny_model: Path) -> None:
    backbone = load_backbone(str(tiny_model), device="cpu", precision="float32")
    assert compile_checked(backbone, passes_with_changes())


def test_the_length_is_the_text_encoders(tiny_backbone: Backbone) -> None:
    conditioning = encode(
        tiny_backbone, a_batch([an_adapter(tiny_backbone, 0)], [0] * 4, some_prompts(tiny_backbone)[2])
    )
    assert conditioning.changes is not None
    assert conditioning.changes.weights.shape == (4, 2, len(LAYERS), MAX_LENGTH)
    assert conditioning.changes.directions.shape == (4, 2, len(LAYERS), DIM)
