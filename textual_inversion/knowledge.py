"""Knowledge preservation (TextBoost v1): keep the adapted text encoder near the frozen one on unrelated prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from textual_inversion.concept import Concept
from textual_inversion.conditioning import Conditioning, concatenate
from textual_inversion.config import TemplateSet
from textual_inversion.families.base import Backbone, stack_prompts
from textual_inversion.prompts import encode_cut, fill, training_templates
from textual_inversion.transfer import to_device

EMPTY_SHARE = 0.1
"""Share of the prompts that are empty (TextBoost's code)."""

CLASS_SHARE = 0.1
"""Share of the prompts that are templates with the concept's class word (TextBoost's code)."""

MAX_CAPTIONS = 1500
"""Most captions. Their frozen states stay on the device: about 0.24 MB each for Stable Diffusion 1.5 in float32, half
in bfloat16."""

_PROMPTS_PER_PASS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class FrozenPrompts:
    """Prompts and their conditioning without an adapter; all on the backbone's device."""

    ids: Mapping[str, Tensor]
    """Text encoder key -> [prompts, length]."""
    conditioning: Conditioning
    """Conditioning of the prompts without an adapter, [prompts]."""

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.conditioning)

    def __getitem__(self, prompts: Tensor) -> FrozenPrompts:
        """Select prompts by their indices [n], on the same device."""
        ids = {key: each[prompts] for key, each in self.ids.items()}
        return FrozenPrompts(ids=ids, conditioning=self.conditioning[prompts])

    def where(self, chosen: Tensor, other: FrozenPrompts) -> FrozenPrompts:
        """Take each prompt from these where `chosen` [prompts] (bool) is true and from `other` elsewhere."""
        ids = {key: torch.where(chosen[:, None], each, other.ids[key]) for key, each in self.ids.items()}
        return FrozenPrompts(ids=ids, conditioning=self.conditioning.where(chosen, other.conditioning))


def concatenate_frozen(parts: Sequence[FrozenPrompts]) -> FrozenPrompts:
    """Concatenate prompts of one model."""
    return FrozenPrompts(
        ids={key: torch.cat([part.ids[key] for part in parts]) for key in parts[0].ids},
        conditioning=concatenate([part.conditioning for part in parts]),
    )


class KnowledgePreservation:
    """Draws of prompts y with their frozen encodings E0(y).

    The term itself is `Conditioning.cosine_distance` of the adapted E(y) from E0(y).
    """

    def __init__(self, backbone: Backbone, captions: Sequence[str]) -> None:
        """Encode every caption once. Raises ValueError if there are none, or more than `MAX_CAPTIONS`."""
        if not 1 <= len(captions) <= MAX_CAPTIONS:
            raise ValueError(f"{len(captions)} captions for knowledge preservation: 1 to {MAX_CAPTIONS} are needed")
        self._backbone = backbone
        self._general = freeze(backbone, ["", *captions])

    def class_prompts(self, concept: Concept, templates: TemplateSet) -> FrozenPrompts | None:
        """Encode the concept's training templates with its initializer word; None if it has no such word."""
        if not concept.initializer:
            return None
        texts = training_templates(concept, class_cue=False, templates=templates)
        return freeze(self._backbone, [fill(text, concept.initializer) for text in texts])

    def draw(self, size: int, class_prompts: FrozenPrompts | None, generator: torch.Generator) -> FrozenPrompts:
        """Draw `size` prompts for one concept's next step. The generator gives three draws of that size in any case."""
        share = torch.rand(size, generator=generator)
        caption = torch.randint(1, len(self._general), (size,), generator=generator)
        template = torch.randint(2**31, (size,), generator=generator)
        device = self._backbone.device
        drawn = self._general[to_device(torch.where(share < EMPTY_SHARE, 0, caption), device)]
        if class_prompts is None:
            return drawn
        is_class = to_device((share >= EMPTY_SHARE) & (share < EMPTY_SHARE + CLASS_SHARE), device)
        return class_prompts[to_device(template % len(class_prompts), device)].where(is_class, drawn)


def read_captions(path: str) -> tuple[str, ...]:
    """Read the captions in a text file, one a line, or the package's own if `path` is empty: some 460 of ordinary
    scenes and pictures, written for models of the breadth of Stable Diffusion.

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
    """Encode prompts without an adapter; one that is too long for a text encoder is cut, as its tokenizer would."""
    ids = stack_prompts([encode_cut(prompt, backbone.vocabularies) for prompt in prompts])
    ids = {key: to_device(each, backbone.device) for key, each in ids.items()}
    parts = [
        backbone.encode_prompts({key: each[start : start + _PROMPTS_PER_PASS] for key, each in ids.items()}, {})
        for start in range(0, len(prompts), _PROMPTS_PER_PASS)
    ]
    return FrozenPrompts(ids=ids, conditioning=concatenate(parts))
