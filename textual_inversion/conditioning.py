"""Prompts as the denoiser takes them, each encoded once however many pictures are drawn with it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from textual_inversion.concept import LearnedEmbedding
from textual_inversion.families.base import Backbone, Conditioning
from textual_inversion.lora import join, positions
from textual_inversion.transfer import to_device

_PROMPTS_PER_PASS = 8
"""A concept's sample grid has so many: four prompts, and the same with its initializer word."""


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """A prompt as ids, and what the ids beyond the vocabulary stand for. Equal ones are encoded alike."""

    ids: tuple[int, ...]
    """[max_length]; id `vocab_size + i` is the i-th row of its concepts, one after the other."""
    concepts: tuple[tuple[LearnedEmbedding, range], ...] = ()
    """Each with the ids of its rows. Its adapter, if it has one, acts on the whole prompt; several are added."""

    def without_words(self, backbone: Backbone) -> TokenizedPrompt:
        """The empty prompt that goes with it in classifier-free guidance.

        Adapters act on it too, as in a pipeline that has loaded them: `lora` ones everywhere, `causal` ones nowhere, as
        it names no concept. So without `lora` ones it is the same for all.
        """
        acting = tuple(
            (embedding, own)
            for embedding, own in self.concepts
            if embedding.adapter and embedding.adapter.kind == "lora"
        )
        return TokenizedPrompt(tuple(backbone.assemble([])), acting)


class PromptEncoder:
    """The text encoder, with the prompts that it encoded last.

    Passes always have the same shape, so that a prompt's states never depend on its company (`generate.generate` says
    what holds to the bit). Any number of threads may use it.
    """

    def __init__(self, backbone: Backbone, kept: int = 256) -> None:
        """`kept`: prompts whose states stay, [length, dim] each, on the backbone's device."""
        self.backbone, self._kept = backbone, kept
        self._lock = threading.Lock()
        self._states: OrderedDict[TokenizedPrompt, Tensor] = OrderedDict()

    def __call__(self, prompts: Sequence[TokenizedPrompt]) -> Conditioning:
        """[prompts], without gradients."""
        wanted = dict.fromkeys(prompts)
        with self._lock:
            states = {prompt: self._states[prompt] for prompt in wanted if prompt in self._states}
        missing = [prompt for prompt in wanted if prompt not in states]
        for start in range(0, len(missing), _PROMPTS_PER_PASS):
            some = missing[start : start + _PROMPTS_PER_PASS]
            padded = [*some, *[some[-1]] * (_PROMPTS_PER_PASS - len(some))]
            states |= zip(some, self._encode(padded), strict=False)  # copies at the end are no more prompts
        with self._lock:
            for prompt in wanted:
                self._states[prompt] = states[prompt]
                self._states.move_to_end(prompt)
            while len(self._states) > self._kept:
                self._states.popitem(last=False)
        return Conditioning(hidden=torch.stack([states[prompt] for prompt in prompts]))

    @torch.no_grad()
    def _encode(self, prompts: Sequence[TokenizedPrompt]) -> Tensor:
        """[prompts, length, dim] in one pass, over their rows laid end to end."""
        backbone = self.backbone
        own_ids = torch.tensor([prompt.ids for prompt in prompts])
        num_rows = [sum(len(own) for _, own in prompt.concepts) for prompt in prompts]
        shifts = torch.tensor([sum(num_rows[:i]) for i in range(len(prompts))])
        ids = torch.where(own_ids >= backbone.vocab_size, own_ids + shifts[:, None], own_ids)
        rows = {
            key: torch.cat([e.vectors[key].float() for prompt in prompts for e, _ in prompt.concepts])
            for key in backbone.token_tables
            if any(num_rows)
        }
        adapters = [
            [
                (
                    e.adapter,
                    positions(e.adapter.kind, own, (own >= ids_.start) & (own < ids_.stop), backbone.end_of_text),
                )
                for e, ids_ in prompt.concepts
                if e.adapter
            ]
            for prompt, own in zip(prompts, own_ids, strict=True)
        ]
        on_device = {key: to_device(table, backbone.device) for key, table in rows.items()}
        return backbone.encode_prompts(
            to_device(ids, backbone.device), on_device, join(adapters, backbone.device)
        ).hidden
