"""Prompts are encoded once each, alike in any company, and with the adapters that act on them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.textual_inversion.example_requests import adapted_requests, an_embedding
from textual_inversion.families.base import Backbone
from textual_inversion.generate import ImageRequest, encode_request
from textual_inversion.prompt_encoder import PromptEncoder, TokenizedPrompt


def prompts_of(backbone: Backbone, requests: Sequence[ImageRequest]) -> list[TokenizedPrompt]:
    prompts = [encode_request(backbone, request).prompt for request in requests]
    return [*prompts, *[prompt.empty(backbone.vocabularies) for prompt in prompts]]


@pytest.fixture
def encoded(tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The prompts that name no concept in each pass of the text encoder from now on."""
    passes: list[int] = []
    plain = tiny_backbone.encode_prompts

    def counted(ids: dict[str, torch.Tensor], *others: Any) -> Any:
        passes.append(int((ids["clip_l"] < tiny_backbone.vocabularies["clip_l"].size).all(1).sum()))
        return plain(ids, *others)

    monkeypatch.setattr(tiny_backbone, "encode_prompts", counted)
    return passes


def test_a_prompt_is_encoded_once_and_the_empty_one_once_for_all(tiny_backbone: Backbone, encoded: list[int]) -> None:
    encoder = PromptEncoder(tiny_backbone)
    concepts = [an_embedding(seed) for seed in range(3)]
    prompts = prompts_of(tiny_backbone, [ImageRequest("a <c>", seed, (c,)) for c in concepts for seed in range(5)])
    first = encoder(prompts).hidden
    assert encoded == [1 + 4], "three prompts and the empty one are one pass, filled up with that"
    assert len(first.unique(dim=0)) == 4
    assert torch.equal(encoder(prompts[::-1]).hidden, first.flip(0))
    assert len(encoded) == 1
    encoder(prompts_of(tiny_backbone, [ImageRequest("a photo of a <c>", 0, (concepts[0],))]))
    assert encoded[1:] == [0], "only what is new"


def test_states_do_not_depend_on_company_or_on_what_is_kept(tiny_backbone: Backbone) -> None:
    requests = adapted_requests(tiny_backbone)
    prompts = prompts_of(tiny_backbone, [replace(request, prompt=request.prompt + end) for end in ("", " toy", " !")
                                         for request in requests])  # fmt: skip
    together = PromptEncoder(tiny_backbone)(prompts).hidden
    forgetful = PromptEncoder(tiny_backbone, kept=1)
    alone = torch.cat([forgetful([prompt]).hidden for prompt in prompts])
    assert torch.equal(together, alone)
    assert torch.equal(forgetful(prompts).hidden, together), "more at a time than are kept"
    assert not together.requires_grad


def test_several_threads_may_share_an_encoder(tiny_backbone: Backbone) -> None:
    encoder = PromptEncoder(tiny_backbone, kept=4)
    prompts = prompts_of(tiny_backbone, adapted_requests(tiny_backbone))
    expected = PromptEncoder(tiny_backbone)(prompts).hidden
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: encoder(prompts).hidden, range(16)):
            assert torch.equal(found, expected)


def test_the_empty_prompt_is_adapted_as_the_prompt_is(tiny_backbone: Backbone) -> None:
    """As in a pipeline that has loaded a LoRA; a causal adapter finds no concept there."""
    asked = [encode_request(tiny_backbone, request) for request in adapted_requests(tiny_backbone)[:3]]
    prompts = [request.prompt.empty(tiny_backbone.vocabularies) for request in asked]
    lora, plain, causal = PromptEncoder(tiny_backbone)(prompts).hidden
    assert prompts[1] == prompts[2] != prompts[0]
    assert torch.equal(causal, plain)
    assert not torch.equal(lora, plain)


def test_changes_of_two_concepts_in_a_prompt_add_up(tiny_backbone: Backbone) -> None:
    """Two adapters equal one whose layers are both side by side."""
    request = adapted_requests(tiny_backbone)[3]
    first, second = (embedding.adapter for embedding in request.embeddings)
    assert first is not None
    assert second is not None
    both = {
        name: (torch.cat([down, second.tensors[name][0]]), torch.cat([up, second.tensors[name][1]], dim=1))
        for name, (down, up) in first.tensors.items()
    }
    merged = replace(request.embeddings[0], adapter=replace(first, tensors=both))
    other = replace(request, embeddings=(merged, replace(request.embeddings[1], adapter=None)))
    hidden = [PromptEncoder(tiny_backbone)([encode_request(tiny_backbone, r).prompt]).hidden for r in (request, other)]
    torch.testing.assert_close(hidden[0], hidden[1], rtol=0, atol=1e-5)


def test_each_causal_adapter_begins_at_its_own_concept(tiny_backbone: Backbone) -> None:
    """In "a <d> and a <c>": between the two only the adapter of <d> acts, whatever <c> comes with."""
    causal = adapted_requests(tiny_backbone)[4]
    d, c = causal.embeddings
    ids = encode_request(tiny_backbone, causal).prompt.ids["clip_l"]
    place = ids.index(tiny_backbone.vocabularies["clip_l"].size + 1)  # <c> has the rows after <d>
    without = replace(causal, embeddings=(d, replace(c, adapter=None)))
    prompts = [encode_request(tiny_backbone, request).prompt for request in (causal, without)]
    both, only_d = PromptEncoder(tiny_backbone)(prompts).hidden
    assert torch.equal(both[:place], only_d[:place])
    assert (both[place:] != only_d[place:]).any(1).all()
