"""The tokenizer of a BERT text encoder (WordPiece, Devlin et al. 2019), read without the model.

This module needs neither torch nor transformers, so that a dry run stays fast.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers

from textual_inversion.errors import BadInput, first_line
from textual_inversion.tokenizer import too_long

TEXT_ENCODER_KEY = "bert"
"""Key of the only text encoder."""

PROMPT_LENGTH = 77
"""Number of ids that diffusers' LDMTextToImagePipeline pads every prompt to."""

_SPECIAL = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
"""Texts of the special tokens in a folder that does not say; those of transformers."""


class WordPiece:
    """One BERT text encoder's `prompts.Vocabulary`: "[CLS] words [SEP]", padded with "[PAD]"."""

    def __init__(self, vocabulary: Mapping[str, int], settings: Mapping[str, Any]) -> None:
        """Build the tokenizer that transformers' `BertTokenizer` builds from the same files.

        `vocabulary`: token -> id. `settings`: content of `tokenizer_config.json`. Raises ValueError if a special token
        is not in the vocabulary.
        """
        special = {name: _content(settings, name) for name in _SPECIAL}
        missing = sorted(set(special.values()) - vocabulary.keys())
        if missing:
            raise ValueError(f"the vocabulary lacks the special token {missing[0]!r}")
        self._backend = Backend(models.WordPiece(dict(vocabulary), unk_token=special["unk"]))
        self._backend.normalizer = normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
            strip_accents=settings.get("strip_accents"),
            lowercase=settings.get("do_lower_case", True),
        )
        self._backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self._backend.add_special_tokens(sorted(set(special.values())))  # found where they are written out in a text
        self._words = vocabulary
        self._start, self._padding = vocabulary[special["cls"]], vocabulary[special["pad"]]
        self.size = len(vocabulary)
        self.end_of_text = vocabulary[special["sep"]]
        self.unknown = vocabulary[special["unk"]]
        self.max_tokens = PROMPT_LENGTH - 2

    def tokenize(self, text: str) -> list[int]:
        """Return the vocabulary ids of a text, without start, end or padding."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def single_token_words(self) -> list[str]:
        """Return the words of letters a-z that are one token; "##" marks tokens that go on with a word."""
        return sorted(token for token in self._words if re.fullmatch(r"[a-z]{3,}", token))

    def assemble(self, ids: Sequence[int]) -> list[int]:
        """Add start, end and padding: `PROMPT_LENGTH` ids. Raises BadInput if they do not fit."""
        padding = self.max_tokens - len(ids)
        if padding < 0:
            raise BadInput(too_long(len(ids), self.max_tokens))
        return [self._start, *ids, self.end_of_text, *[self._padding] * padding]


def load_vocabularies(directory: Path) -> dict[str, WordPiece]:
    """Read the vocabulary of a BERT latent diffusion model in the diffusers layout, text encoder key -> vocabulary.

    Raises ValueError if the tokenizer cannot be read, is no plain BertTokenizer, or does not fit the text encoder.
    """
    try:
        vocabulary = _read(directory / "tokenizer")
        config = json.loads((directory / "bert" / "config.json").read_text())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the tokenizer of the model in {directory} cannot be read: {first_line(error)}") from error
    # ids from the table's size up stand for learned rows
    table_size = int(config.get("vocab_size", 30522))
    if vocabulary.size > table_size:
        raise ValueError(
            f"the tokenizer of the model in {directory} has {vocabulary.size} ids, but the text encoder has vectors "
            f"for {table_size}"
        )
    vocabulary.size = table_size
    return {TEXT_ENCODER_KEY: vocabulary}


def _read(folder: Path) -> WordPiece:
    """Read a tokenizer's folder, with a `vocab.txt` or the `tokenizer.json` of newer versions of transformers."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) if path.exists() else {}
    kind = settings.get("tokenizer_class", "BertTokenizer")
    if kind not in ("BertTokenizer", "BertTokenizerFast"):
        raise ValueError(f"{kind} is no BERT tokenizer")
    special = folder / "special_tokens_map.json"
    if special.exists():
        settings = json.loads(special.read_text()) | settings
    stored = folder / "tokenizer.json"
    if stored.exists():
        content = json.loads(stored.read_text())
        vocabulary: dict[str, int] = dict(content["model"]["vocab"])
        added = {token["content"] for token in content.get("added_tokens", [])}
    else:
        lines = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
        vocabulary = {line.rstrip("\r"): i for i, line in enumerate(lines) if line or i < len(lines) - 1}
        added = set()
    added |= {token["content"] for token in settings.get("added_tokens_decoder", {}).values()}
    more = folder / "added_tokens.json"
    added |= json.loads(more.read_text()).keys() if more.exists() else set()
    own = sorted(added - {_content(settings, name) for name in _SPECIAL})
    if own:
        raise ValueError(f"it has tokens of its own, such as {own[0]!r}")
    return WordPiece(vocabulary, settings)


def _content(settings: Mapping[str, Any], name: str) -> str:
    """Return a special token's text; transformers' default if the settings have none."""
    token = settings.get(f"{name}_token") or _SPECIAL[name]
    return str(token["content"] if isinstance(token, dict) else token)
