"""A CLIP model's tokenizer without the model: enough to tell whether a prompt fits. Needs no torch."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Tokenizer:
    """Texts -> ids of the vocabulary, and ids -> a whole prompt."""

    def __init__(self, tokenizer: Any, max_positions: int) -> None:
        """`tokenizer`: a fast one of transformers (untyped). `max_positions`: of the text encoder."""
        self._tokenizer = tokenizer
        self.end_of_text: int = tokenizer.eos_token_id
        self.max_length: int = min(tokenizer.model_max_length, max_positions)
        """Tokens in a prompt, start and end included."""
        # a fast tokenizer is put into its padding mode and then used, in two steps, which threads may not interleave
        self._lock = threading.Lock()

    def tokenize(self, text: str) -> list[int]:
        """The vocabulary ids of a text, without start, end or padding."""
        with self._lock:
            encoded = self._tokenizer(text, add_special_tokens=False, padding=False, truncation=False, verbose=False)
        return list(encoded.input_ids)

    def words(self) -> list[str]:
        """Single-token words of letters a-z alone; a token that ends a word says so in CLIP's vocabulary."""
        found = (re.fullmatch(r"([a-z]{3,})</w>", token) for token in self._tokenizer.get_vocab())
        return sorted(match[1] for match in found if match)

    def assemble(self, ids: Sequence[int]) -> list[int]:
        """Add start, end and padding: `max_length` ids. Raises ValueError if they do not fit."""
        padding = self.max_length - len(ids) - 2
        if padding < 0:
            raise ValueError(
                f"{len(ids)} tokens are {-padding} more than the {self.max_length - 2} that fit; shorten the prompt "
                "or use fewer vectors"
            )
        tokenizer = self._tokenizer
        return [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id] + [tokenizer.pad_token_id] * padding


def read_tokenizer(directory: Path | str) -> Any:
    """The tokenizer of a diffusers directory, as transformers has it."""
    from transformers import CLIPTokenizerFast

    return CLIPTokenizerFast.from_pretrained(str(directory), subfolder="tokenizer", local_files_only=True)


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer that the model in a diffusers directory is used with. Raises ValueError if it cannot be read."""
    try:
        config = json.loads((directory / "text_encoder" / "config.json").read_text())
        return Tokenizer(read_tokenizer(directory), int(config.get("max_position_embeddings", 77)))
    except (OSError, ValueError) as error:
        raise ValueError(f"the tokenizer of the model in {directory} cannot be read: {error}") from error
