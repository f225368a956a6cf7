"""Concept and LearnedEmbedding, the input and the result of an inversion, which every part of the project exchanges.

Standard library only, so that planning and reporting can import them without torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from textual_inversion.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

Category = Literal["object", "style"]


def whole_word_pattern(*words: str) -> str:
    """Return a regular expression with one group that matches any of the words as a whole word.

    `cat` does not match in `catalog` or in `<cat>`. Where two words match, the one given first wins.
    """
    return rf"(?<![\w<])({'|'.join(re.escape(word) for word in words)})(?![\w>])"


@dataclass(frozen=True, kw_only=True, slots=True)
class Concept:
    """A thing or a style to learn from a few photos."""

    concept_id: str
    """Name of the concept in the results, unique within a run; also seeds the concept's random numbers."""

    placeholder_token: str
    """Word that stands for the concept in prompts, e.g. `<cat-toy>`."""

    images: tuple[str, ...] = ()
    """Paths or URIs of the photos, in manifest order; none for pictures without addresses. The core never opens them;
    its callers pass decoded pictures."""

    initializer: str = ""
    """Vocabulary word or phrase whose vectors the rows start from; empty starts at the vocabulary's mean vector."""

    category: Category = "object"
    """Category that selects which of the paper's template lists the training prompts come from."""

    num_vectors: int = 1
    """Number of rows that the placeholder token stands for."""

    masks: tuple[str, ...] = ()
    """Paths or URIs of the photos' masks (white where the concept is), one a photo in the same order, or none."""

    captions: tuple[str, ...] = ()
    """Descriptions of the photos, one a photo in the same order, with `{}` for the concept ("a {} on a red sofa"), used
    in place of the templates; or none."""

    start_from: str = ""
    """Path or URI of an embedding file whose rows learning starts from, in place of the initializer's vectors; or
    empty. The core never opens it."""

    def __post_init__(self) -> None:
        if not self.concept_id:
            raise BadInput("concept_id is empty; give every concept a name of its own")
        if self.placeholder_token.split() != [self.placeholder_token]:
            raise BadInput(
                f"placeholder_token {self.placeholder_token!r} of concept {self.concept_id!r} must be one word "
                "without spaces, for example '<my-thing>'"
            )
        if self.category not in ("object", "style"):
            raise BadInput(f"category {self.category!r} of concept {self.concept_id!r} must be 'object' or 'style'")
        if self.num_vectors < 1:
            raise BadInput(f"num_vectors of concept {self.concept_id!r} is {self.num_vectors}; it must be at least 1")
        for name, values in (("masks", self.masks), ("captions", self.captions)):
            if self.images and values and len(values) != len(self.images):
                raise BadInput(
                    f"concept {self.concept_id!r} has {len(values)} {name} for {len(self.images)} images; give one for "
                    "each image, in the same order, or none"
                )
        for caption in self.captions:
            if not re.search(whole_word_pattern("{}"), caption):
                raise BadInput(
                    f"caption {caption!r} of concept {self.concept_id!r} has no {{}}, as a word of its own, to say "
                    "where the concept stands"
                )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LearnedAdapter:
    """A low-rank change of the text encoder, and of what cross-attention takes from it, that was learned with a concept
    (TextBoost). Compared by identity."""

    kind: Literal["lora", "causal"]
    """Positions that are changed. `lora`: all. `causal`: those from the concept's first token on, padding excepted."""

    scale: float
    """Factor of the change, alpha / rank."""

    tensors: Mapping[str, tuple[Tensor, Tensor]]
    """Name of a layer, as in `Backbone.adapter_layers` -> (down [rank, in], up [out, rank]), float32 on the CPU."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LearnedEmbedding:
    """The learned rows of one concept for every text encoder of the model. Compared by identity."""

    placeholder_token: str
    """Placeholder token of the concept."""

    vectors: Mapping[str, Tensor]
    """Text encoder key (`clip_l`, ...) -> float32 CPU tensor [num_vectors, dim]."""

    class_noun: str = ""
    """Noun that follows the placeholder token in prompts, as it did in learning (`prompts.name_in_prompt`); empty if
    the concept was learned without the class cue."""

    adapter: LearnedAdapter | None = None
    """Adapter to use together with the vectors; None if the concept was learned without one."""

    metadata: Mapping[str, str] = field(default_factory=dict)
    """Provenance, such as base model, step, norm and pooling rule; strings, as safetensors headers require."""

    @property
    def num_vectors(self) -> int:
        """Rows of the first text encoder; a model's text encoders have equally many (`generate.check_fits`)."""
        return len(next(iter(self.vectors.values())))
