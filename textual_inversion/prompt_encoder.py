"""Encoding of prompts for sampling: each prompt is encoded once, however many pictures are drawn with it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from textual_inversion.concept import LearnedEmbedding
from textual_inversion.conditioning import Conditioning, concatenate
from textual_inversion.families.base import Backbone, stack_prompts
from textual_inversion.lora import ActingAdapter, acting_positions, group_adapters
from textual_inversion.prompts import Vocabularies, encode_prompt
from textual_inversion.transfer import to_device

PROMPTS_PER_PASS = 8
"""Prompts of a concept's sample grid: four, and the same with its initializer word."""


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """A prompt as ids, and the concepts that ids beyond the vocabularies stand for. Equal ones are encoded alike."""

    encoder_ids: tuple[tuple[str, tuple[int, ...]], ...]
    """(text encoder key, ids of its length) pairs; id `size + i` is the i-th row of the prompt's concepts, one concept
    after the other."""
    concepts: tuple[tuple[LearnedEmbedding, range], ...] = ()
    """The prompt's concepts, with the numbers of their rows. The changes of their adapters are added over the whole
    prompt."""

    @classmethod
    def from_ids(
        cls, ids: Mapping[str, Sequence[int]], concepts: Sequence[tuple[LearnedEmbedding, range]] = ()
    ) -> TokenizedPrompt:
        """Make a prompt of what `prompts.encode_prompt` returns."""
        return cls(tuple((key, tuple(each)) for key, each in ids.items()), tuple(concepts))

    @property
    def ids(self) -> dict[str, tuple[int, ...]]:
        """Token ids by text encoder key."""
        return dict(self.encoder_ids)

    @property
    def num_rows(self) -> int:
        """Rows of all concepts together."""
        return sum(len(rows) for _, rows in self.concepts)

    def acting_everywhere(self) -> tuple[LearnedEmbedding, ...]:
        """Return the prompt's concepts with `lora` adapters, which act on every prompt of a picture, as in a pipeline
        that has loaded them; `causal` ones act in prompts that name their concept."""
        return tuple(each for each, _ in self.concepts if each.adapter and each.adapter.kind == "lora")

    def with_acting(self, embeddings: Sequence[LearnedEmbedding]) -> TokenizedPrompt:
        """Return the prompt with further concepts, which it does not name and whose adapters act on it."""
        own = [each for each, _ in self.concepts]
        first = self.num_rows
        added = []
        for embedding in embeddings:
            if embedding not in own:
                added.append((embedding, range(first, first + embedding.num_vectors)))
                first += embedding.num_vectors
        return replace(self, concepts=(*self.concepts, *added))

    def empty(self, vocabularies: Vocabularies) -> TokenizedPrompt:
        """Return the empty prompt that goes with this one in classifier-free guidance. Prompts without `lora` adapters
        share one."""
        return TokenizedPrompt.from_ids(encode_prompt("", {}, vocabularies)).with_acting(self.acting_everywhere())


class PromptEncoder:
    """A backbone's text encoders with a cache of the prompts that were encoded last.

    Passes always have the same shape, so that a prompt's states never depend on its company (`generate.generate` says
    what holds to the bit). Any number of threads may use one encoder.
    """

    def __init__(self, backbone: Backbone, kept: int = 256, *, shares_passes: bool = True) -> None:
        """Start with an empty cache.

        `kept`: number of prompts whose conditioning stays in it, on the device. `shares_passes`: encode several prompts
        in one pass; without it each prompt has a pass of its own.
        """
        self.backbone = backbone
        self._kept = kept
        self._prompts_per_pass = PROMPTS_PER_PASS if shares_passes else 1
        self._lock = threading.Lock()
        self._cache: OrderedDict[TokenizedPrompt, Conditioning] = OrderedDict()

    def __call__(self, prompts: Sequence[TokenizedPrompt]) -> Conditioning:
        """Return the conditioning of these prompts, [prompts], without gradients."""
        wanted = dict.fromkeys(prompts)
        with self._lock:
            found = {prompt: self._cache[prompt] for prompt in wanted if prompt in self._cache}
        missing = [prompt for prompt in wanted if prompt not in found]
        for start in range(0, len(missing), self._prompts_per_pass):
            some = missing[start : start + self._prompts_per_pass]
            padded = [*some, *[some[-1]] * (self._prompts_per_pass - len(some))]
            encoded = self._encode(padded)
            found |= {prompt: encoded[i : i + 1] for i, prompt in enumerate(some)}
        with self._lock:
            for prompt in wanted:
                self._cache[prompt] = found[prompt]
                self._cache.move_to_end(prompt)
            while len(self._cache) > self._kept:
                self._cache.popitem(last=False)
        return concatenate([found[prompt] for prompt in prompts])

    @torch.no_grad()
    def _encode(self, prompts: Sequence[TokenizedPrompt]) -> Conditioning:
        """Encode prompts in one pass; their rows are laid end to end."""
        backbone = self.backbone
        num_rows = [prompt.num_rows for prompt in prompts]
        shifts = torch.tensor([sum(num_rows[:i]) for i in range(len(prompts))])[:, None]
        ids = {}
        for key, own in stack_prompts([prompt.ids for prompt in prompts]).items():
            size = backbone.vocabularies[key].size
            ids[key] = to_device(torch.where(own >= size, own + shifts, own), backbone.device)
        embeddings = [embedding for prompt in prompts for embedding, _ in prompt.concepts]
        rows = {
            key: to_device(torch.cat([each.vectors[key].float() for each in embeddings]), backbone.device)
            for key in backbone.token_tables
            if embeddings
        }
        adapters = [_acting_adapters(prompt, backbone.vocabularies) for prompt in prompts]
        return backbone.encode_prompts(ids, rows, group_adapters(adapters, backbone.device))


def _acting_adapters(prompt: TokenizedPrompt, vocabularies: Vocabularies) -> list[ActingAdapter]:
    """Return the adapters of a prompt's concepts with the positions where each acts."""
    own_ids = {key: torch.tensor(ids) for key, ids in prompt.encoder_ids}

    def acts(kind: Literal["lora", "causal"], rows: range) -> dict[str, Tensor]:
        positions = {}
        for key, ids in own_ids.items():
            row = ids - vocabularies[key].size
            is_concept = (row >= rows.start) & (row < rows.stop)
            positions[key] = acting_positions(kind, ids, is_concept, vocabularies[key].end_of_text)
        return positions

    adapted = [(embedding.adapter, rows) for embedding, rows in prompt.concepts if embedding.adapter]
    return [(adapter, acts(adapter.kind, rows)) for adapter, rows in adapted]
