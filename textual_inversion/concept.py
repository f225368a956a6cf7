"""The two nouns that cross every boundary: what to learn, and what was learned.

Standard library only, so that planning and reporting can import them without torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Category = Literal["object", "style"]


def whole_word(*words: str) -> str:
    """Pattern with one group that finds any of the words standing alone: `cat` is not found in `catalog` or `<cat>`.
    Where two could match, the first given wins."""
    return rf"(?<![\w<])({'|'.join(re.escape(word) for word in words)})(?![\w>])"


@dataclass(frozen=True, kw_only=True, slots=True)
class Concept:
    """One thing to learn from a few photos."""

    concept_id: str
    """Unique within a run; names the concept in results and seeds its randomness."""

    placeholder_token: str
    """The word a user types in prompts to mean this concept, e.g. `<cat-toy>`."""

    images: tuple[str, ...]
    """Where its photos are, in manifest order. The core never opens them; it is handed decoded pictures."""

    initializer: str = ""
    """Vocabulary word or phrase whose vectors are the start; empty starts at the vocabulary's mean vector."""

    category: Category = "object"
    """Which of the paper's template lists its training prompts come from."""

    num_vectors: int = 1
    """How many embedding rows the placeholder stands for."""

    masks: tuple[str, ...] = ()
    """Where the masks of its photos are, one a photo in the same order, or none: white where the concept is."""

    captions: tuple[str, ...] = ()
    """What each photo shows, one a photo in the same order, with `{}` for the concept ("a {} on a red sofa"); they
    take the place of the templates."""

    def __post_init__(self) -> None:
        if not self.concept_id:
            raise ValueError("concept_id is empty; give every concept a name of its own")
        if not self.placeholder_token or any(c.isspace() for c in self.placeholder_token):
            raise ValueError(
                f"placeholder_token {self.placeholder_token!r} of concept {self.concept_id!r} must be one word "
                "without spaces, for example '<my-thing>'"
            )
        if not self.images:
            raise ValueError(f"concept {self.concept_id!r} has no images; give it 3 to 5 photos")
        if self.category not in ("object", "style"):
            raise ValueError(f"category {self.category!r} of concept {self.concept_id!r} must be 'object' or 'style'")
        if self.num_vectors < 1:
            raise ValueError(f"num_vectors of concept {self.concept_id!r} is {self.num_vectors}; it must be at least 1")
        for name, values in (("masks", self.masks), ("captions", self.captions)):
            if values and len(values) != len(self.images):
                raise ValueError(
                    f"concept {self.concept_id!r} has {len(values)} {name} for {len(self.images)} images; give one for "
                    "each image, in the same order, or none"
                )
        for caption in self.captions:
            if not re.search(whole_word("{}"), caption):
                raise ValueError(
                    f"caption {caption!r} of concept {self.concept_id!r} has no {{}}, as a word of its own, to say "
                    "where the concept stands"
                )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LearnedAdapter:
    """A low-rank change of the text encoder that was learned with a concept (TextBoost). Equal to itself alone."""

    kind: Literal["lora", "causal"]
    """`lora`: acts at every position. `causal`: from the concept's first token on, padding excepted."""

    scale: float
    """alpha / rank"""

    tensors: Mapping[str, tuple[Tensor, Tensor]]
    """Name of a linear layer within the text encoder -> (down [rank, in], up [out, rank]), float32 on the CPU."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LearnedEmbedding:
    """The trained rows of one concept, for every text encoder of the model that learned them. Equal to itself alone."""

    placeholder_token: str
    vectors: Mapping[str, Tensor]
    """Text encoder key (`clip_l`, ...) -> float32 CPU tensor [num_vectors, dim]."""

    adapter: LearnedAdapter | None = None
    """Used with the vectors, if the concept was learned with one."""

    metadata: Mapping[str, str] = field(default_factory=dict)
    """Provenance: base model, step, norm, pooling rule and the like; strings, as safetensors headers hold."""
