"""The two nouns that cross every boundary: what to learn, and what was learned.

Standard library only, so that planning and reporting can import them without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Category = Literal["object", "style"]


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


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnedEmbedding:
    """The trained rows of one concept, for every text encoder of the model that learned them."""

    placeholder_token: str
    vectors: Mapping[str, Tensor]
    """Text encoder key (`clip_l`, ...) -> float32 CPU tensor [num_vectors, dim]."""

    metadata: Mapping[str, str] = field(default_factory=dict)
    """Provenance: base model, step, norm, pooling rule and the like; strings, as safetensors headers hold."""
