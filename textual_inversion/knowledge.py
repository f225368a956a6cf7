"""Knowledge preservation (TextBoost v1): keep the adapted text encoder near the frozen one on unrelated prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from textual_inversion.concept import Concept
from textual_inversion.families.base import Backbone
from textual_inversion.prompts import fill, training_templates
from textual_inversion.transfer import to_device

EMPTY_SHARE, CLASS_SHARE = 0.1, 0.1
"""How many of the prompts are the empty one, and templates with the concept's class word (TextBoost's code)."""

MAX_CAPTIONS = 1000
"""Their frozen states stay on the device: about 0.24 MB each for Stable Diffusion 1.5 in float32, half in bfloat16."""

_ENCODED_AT_A_TIME = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class FrozenPrompts:
    """Prompts and what the text encoder makes of them without an adapter; all on the backbone's device."""

    ids: Tensor
    """[prompts, max_length]"""
    states: Tensor
    """[prompts, max_length, dim] in the denoiser's dtype"""

    def __len__(self) -> int:
        return len(self.ids)


class KnowledgePreservation:
    """Draws the prompts y and knows their frozen states E0(y); see `distance` for the term itself."""

    def __init__(self, backbone: Backbone, captions: Sequence[str]) -> None:
        """Encodes every caption once. Raises ValueError if there are none, or more than `MAX_CAPTIONS`."""
        if not 1 <= len(captions) <= MAX_CAPTIONS:
            raise ValueError(f"{len(captions)} captions for knowledge preservation: 1 to {MAX_CAPTIONS} are needed")
        self._backbone = backbone
        self._general = freeze(backbone, ["", *captions])

    def of_class(self, concept: Concept) -> FrozenPrompts | None:
        """The concept's training templates with its initializer word in its place; None if it has no such word."""
        if not concept.initializer:
            return None
        templates = training_templates(concept, class_cue=False)
        return freeze(self._backbone, [fill(template, concept.initializer) for template in templates])

    def draw(self, size: int, of_class: FrozenPrompts | None, generator: torch.Generator) -> FrozenPrompts:
        """`size` prompts for one concept's next step. Three draws of that size, whatever they decide."""
        share = torch.rand(size, generator=generator)
        caption = torch.randint(1, len(self._general), (size,), generator=generator)
        template = torch.randint(2**31, (size,), generator=generator)
        device = self._backbone.device
        chosen = to_device(torch.where(share < EMPTY_SHARE, 0, caption), device)
        ids, states = self._general.ids[chosen], self._general.states[chosen]
        if of_class is not None:
            takes = to_device((share >= EMPTY_SHARE) & (share < EMPTY_SHARE + CLASS_SHARE), device)
            which = to_device(template % len(of_class), device)
            ids = torch.where(takes[:, None], of_class.ids[which], ids)
            states = torch.where(takes[:, None, None], of_class.states[which], states)
        return FrozenPrompts(ids=ids, states=states)


def distance(states: Tensor, frozen: Tensor) -> Tensor:
    """TextBoost v1: mean over tokens, padding included, of 1 - cos(E(y), E0(y)).

    [batch, length, dim] adapted and frozen states -> [batch] float32, zero to rounding before the first step.
    """
    return 1 - F.cosine_similarity(states.float(), frozen.float(), dim=-1).mean(1)


def read_captions(path: str) -> tuple[str, ...]:
    """The captions in a text file, one a line, or those that come with the package if `path` is empty.

    Raises ValueError if the file cannot be read or holds none.
    """
    if not path:
        text = files("textual_inversion").joinpath("captions.txt").read_text(encoding="utf-8")
    else:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"penalties.captions = {path!r} cannot be read as a text file: {error}") from error
    captions = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not captions:
        raise ValueError(f"penalties.captions = {path!r} holds no captions; write one a line")
    return captions


@torch.no_grad()
def freeze(backbone: Backbone, prompts: Sequence[str]) -> FrozenPrompts:
    """Encode prompts without an adapter; one that is too long for the text encoder is cut, as its tokenizer would."""
    longest = backbone.max_length - 2
    ids = torch.tensor([backbone.assemble(backbone.tokenize(prompt)[:longest]) for prompt in prompts])
    ids = to_device(ids, backbone.device)
    states = [backbone.encode_prompts(part, {}).hidden for part in torch.split(ids, _ENCODED_AT_A_TIME)]
    return FrozenPrompts(ids=ids, states=torch.cat(states))
