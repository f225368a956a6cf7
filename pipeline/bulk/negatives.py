"""Learned concepts that negative prompts name besides the concept that is drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cached_property, lru_cache

from pipeline.actor.library import Library, open_library
from pipeline.config import RunConfig
from pipeline.inputs.prompt_table import Prompt, fill_holes
from pipeline.ledger.digest import digest
from textual_inversion.adapter_formats import dump_adapter
from textual_inversion.concept import LearnedEmbedding
from textual_inversion.formats import dump_diffusers

_TEXTS_KEPT = 1024


class NegativeConcepts:
    """The concepts of `generation.learned`, by the negative prompts that name them."""

    def __init__(self, config: RunConfig) -> None:
        self._sources = config.generation.learned
        self.named_in = lru_cache(_TEXTS_KEPT)(self._named_in)
        self.digest_of = lru_cache(_TEXTS_KEPT)(self._digest_of)

    @cached_property
    def _library(self) -> Library:
        return open_library(self._sources)

    def _named_in(self, text: str) -> tuple[LearnedEmbedding, ...]:
        """Return the embeddings of the placeholder tokens in a text, from which the drawn concept's own is removed.

        Raises ValueError for a word in angle brackets that is none of them, for one that is several, and for an
        embedding that cannot be read.
        """
        if not text or (not self._sources and "<" not in text):
            return ()
        try:
            return tuple(concept.read() for concept in self._library.in_prompt(text))
        except ValueError as error:
            raise ValueError(f"negative {error} (generation.learned names the concepts to choose from)") from error

    def _digest_of(self, text: str) -> str:
        """Return the digest of the contents of those embeddings, empty without any. Raises ValueError as `named_in`."""
        contents = [
            [each.placeholder_token, _sha256(dump_diffusers(each)), _sha256(dump_adapter(each)) if each.adapter else ""]
            for each in self.named_in(text)
        ]
        return digest(contents) if contents else ""


def check_negative_prompts(config: RunConfig, prompts: Iterable[Prompt]) -> None:
    """Raise ValueError for a negative prompt that names a concept which is not in `generation.learned`, or an embedding
    there that cannot be read: before anything is learned, not after."""
    concepts = NegativeConcepts(config)
    for text in dict.fromkeys(prompt.negative or config.generation.negative_prompt for prompt in prompts):
        concepts.digest_of(fill_holes(text, "", ""))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
