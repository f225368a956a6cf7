"""The vocabularies of a model with several text encoders, read without the model: CLIPs, and T5.

This module needs no torch, and as a rule no transformers, so that a dry run stays fast.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from textual_inversion.errors import BadInput, first_line
from textual_inversion.prompts import Vocabulary
from textual_inversion.tokenizer import load_clip, too_long

CLIP_KEYS = ("clip_l", "clip_g")
"""Keys of the CLIP text encoders, in the order of their folders; the keys of embeddings in other tools, too."""

T5_KEY = "t5xxl"
"""Key of the T5 text encoder, whatever its size; ComfyUI's key for its rows in a file."""

T5_LENGTH = 256
"""Number of ids that a prompt is padded to for T5: the default of StableDiffusion3Pipeline, and what FLUX.1 schnell was
trained with."""

_T5_LENGTH_WITH_GUIDANCE = 512
"""The same of a transformer that reads the guidance scale, FLUX.1 dev: the default of FluxPipeline."""


class T5Tokenizer:
    """One T5 text encoder's `prompts.Vocabulary`: "words </s>", padded with "<pad>"."""

    def __init__(self, backend: Any, size: int, length: int = T5_LENGTH) -> None:
        """Wrap a tokenizer of the tokenizers library (untyped). `size`: number of vectors of the text encoder, which is
        rounded up and more than the tokenizer has ids. `length`: number of ids of a prompt.

        Raises ValueError if a special token is missing.
        """
        self._backend = backend
        special = {name: backend.token_to_id(name) for name in ("</s>", "<pad>", "<unk>")}
        missing = [name for name, number in special.items() if number is None]
        if missing:
            raise ValueError(f"the vocabulary lacks the special token {missing[0]!r}")
        self.size = size
        self.end_of_text: int = special["</s>"]
        self.unknown: int = special["<unk>"]
        self._padding: int = special["<pad>"]
        self.max_tokens = length - 1

    def tokenize(self, text: str) -> list[int]:
        """Return the vocabulary ids of a text, without end or padding."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def assemble(self, ids: Sequence[int]) -> list[int]:
        """Add end and padding, up to the length of a prompt. Raises BadInput if they do not fit."""
        padding = self.max_tokens - len(ids)
        if padding < 0:
            raise BadInput(too_long(len(ids), self.max_tokens))
        return [*ids, self.end_of_text, *[self._padding] * padding]


def components(directory: Path) -> dict[str, tuple[str, str]]:
    """Find a model's text encoders: key -> names of the tokenizer's and the text encoder's folder.

    The index tells which class is in the folder "tokenizer" with "text_encoder", "tokenizer_2" with "text_encoder_2",
    and so on; entries that are null or missing are text encoders that the model does without. Raises ValueError for a
    tokenizer of another class, and if one folder of a pair is missing.
    """
    index = json.loads((directory / "model_index.json").read_text())
    found: dict[str, tuple[str, str]] = {}
    clip_keys = iter(CLIP_KEYS)
    for number in ("", "_2", "_3"):
        pair = f"tokenizer{number}", f"text_encoder{number}"
        classes = [(index.get(name) or [None, None])[1] for name in pair]
        if classes == [None, None]:
            continue
        if None in classes:
            absent = pair[classes.index(None)]
            raise ValueError(f"the model in {directory} has no {absent!r} in model_index.json, which the other needs")
        kind = str(classes[0]).removesuffix("Fast")
        key = next(clip_keys, None) if kind == "CLIPTokenizer" else T5_KEY if kind == "T5Tokenizer" else None
        if key is None or key in found:
            raise ValueError(f"the model in {directory} has a {kind} in {pair[0]!r}, which is not supported there")
        found[key] = pair
    return found


def load_vocabularies(directory: Path) -> dict[str, Vocabulary]:
    """Read the vocabularies of a model in the diffusers layout, text encoder key -> vocabulary.

    Raises ValueError if a tokenizer cannot be read.
    """
    return {
        key: _load_t5(directory, *pair) if key == T5_KEY else load_clip(directory, *pair)
        for key, pair in components(directory).items()
    }


def _load_t5(directory: Path, component: str, text_encoder: str) -> T5Tokenizer:
    try:
        config = json.loads((directory / text_encoder / "config.json").read_text())
        stored = directory / component / "tokenizer.json"
        if stored.exists():
            backend = Backend.from_file(str(stored))
        else:  # older folders have a SentencePiece model, which transformers converts
            from transformers import T5TokenizerFast

            folder = str(directory)
            backend = T5TokenizerFast.from_pretrained(
                folder, subfolder=component, local_files_only=True
            ).backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        return T5Tokenizer(backend, int(config.get("vocab_size", 32128)), _t5_length(directory))
    except Exception as error:  # the tokenizers library raises plain exceptions
        raise ValueError(
            f"the tokenizer {component!r} of the model in {directory} cannot be read: {first_line(error)}"
        ) from error


def _t5_length(directory: Path) -> int:
    """Return the number of ids of a T5's prompts."""
    transformer = json.loads((directory / "transformer" / "config.json").read_text())
    return _T5_LENGTH_WITH_GUIDANCE if transformer.get("guidance_embeds") else T5_LENGTH
