"""A conditioning is moved around whole: whatever is done to one part is done to all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from textual_inversion.conditioning import FRAMING, GUIDANCE, Conditioning, concatenate


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some(size: int, seed: int = 0) -> Conditioning:
    return Conditioning(
        hidden=random(size, 5, 3, seed=seed),
        pooled=random(size, 4, seed=seed + 1),
        extras={"time_ids": random(size, 6, seed=seed + 2), "mask": random(size, 5, seed=seed + 3) > 0},
    )


def assert_equal(ours: Conditioning, *parts: Tensor) -> None:
    """Parts in the order hidden, pooled, mask, time ids."""
    assert ours.extras.keys() == {"time_ids", "mask"}
    for found, expected in zip(ours.tensors(), parts, strict=True):
        assert torch.equal(found, expected)


def of_all(change: Callable[[Tensor], Tensor], one: Conditioning) -> list[Tensor]:
    assert one.pooled is not None
    return [change(part) for part in (one.hidden, one.pooled, one.extras["mask"], one.extras["time_ids"])]


@pytest.mark.parametrize("prompts", [slice(1, 3), slice(2, 2), torch.tensor([3, 0, 3])])
def test_prompts_are_selected_in_every_part(prompts: slice | Tensor) -> None:
    one = some(4)
    assert len(one) == 4
    assert_equal(one[prompts], *of_all(lambda part: part[prompts], one))


def test_concatenation_undoes_selection() -> None:
    one = some(4)
    assert_equal(concatenate([one[:1], one[1:3], one[3:]]), *of_all(lambda part: part, one))


def test_each_prompt_is_taken_from_one_or_the_other() -> None:
    one, other, chosen = some(3), some(3, seed=7), torch.tensor([True, False, True])
    taken = one.where(chosen, other)
    for i, source in enumerate((one, other, one)):
        assert_equal(taken[i : i + 1], *of_all(lambda part, i=i: part[i : i + 1], source))


def test_one_prompt_is_repeated() -> None:
    one = some(1)
    assert_equal(one.repeat(3), *of_all(lambda part: torch.cat([part] * 3), one))


def test_every_part_is_moved() -> None:
    assert {part.device.type for part in some(2).to(torch.device("meta")).tensors()} == {"meta"}


def test_every_part_is_cut_off_its_graph() -> None:
    one = Conditioning(hidden=random(1, 2, 3).requires_grad_() * 2, pooled=random(1, 3).requires_grad_() * 2)
    assert all(part.requires_grad for part in one.tensors())
    assert not any(part.requires_grad for part in one.detach().tensors())


def test_a_family_without_pooled_vectors_and_extras() -> None:
    one = Conditioning(hidden=random(2, 5, 3))
    both = concatenate([one, one[:1]])
    assert (both.pooled, both.extras) == (None, {})
    assert torch.equal(both.hidden, torch.cat([one.hidden, one.hidden[:1]]))
    assert [part is one.hidden for part in one.encodings()] == [True]


def test_only_what_the_text_decides_is_compared() -> None:
    one = some(3)
    other = Conditioning(hidden=one.hidden, pooled=one.pooled, extras=some(3, seed=5).extras)
    torch.testing.assert_close(one.cosine_distance(other), torch.zeros(3), rtol=0, atol=1e-6)
    turned = Conditioning(hidden=one.hidden, pooled=-some(3).encodings()[1], extras=one.extras)
    torch.testing.assert_close(one.cosine_distance(turned), torch.full((3,), 2.0))


def test_a_framing_is_taken_by_families_that_read_it() -> None:
    one, framing = some(2), random(2, 4, seed=9)
    assert one.framed(framing) is one
    reads = replace(one, extras={**one.extras, FRAMING: torch.zeros(2, 4)})
    assert reads.framed(None) is reads
    framed = reads.framed(framing)
    assert torch.equal(framed.extras[FRAMING], framing)
    assert torch.equal(framed.hidden, one.hidden)
    assert torch.equal(framed.extras["mask"], one.extras["mask"])


def test_a_guidance_scale_is_taken_by_families_that_read_it() -> None:
    one = some(2)
    assert one.guided(3.5) is one
    guided = replace(one, extras={**one.extras, GUIDANCE: torch.ones(2)}).guided(3.5)
    assert guided.extras[GUIDANCE].tolist() == [3.5, 3.5]
    assert torch.equal(guided.hidden, one.hidden)


def test_zeros_take_the_place_of_encodings_alone() -> None:
    one = some(2)
    assert one.pooled is not None
    zeros = (torch.zeros_like(part) for part in (one.hidden, one.pooled))
    assert_equal(one.zeroed(), *zeros, one.extras["mask"], one.extras["time_ids"])
