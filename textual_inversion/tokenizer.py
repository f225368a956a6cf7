"""The tokenizer of a CLIP text encoder, read without the model.

This module needs no torch, and as a rule no transformers, whose import takes longer than everything else in a dry run.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from textual_inversion.errors import BadInput, first_line
from textual_inversion.single_file import complete_tokenizer

TEXT_ENCODER_KEY = "clip_l"
"""The only text encoder's key, whatever its width (SD2 has OpenCLIP-H in this place)."""

_OWN_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|"
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """One CLIP text encoder's `prompts.Vocabulary`."""

    def __init__(self, tokenizer: Any, max_positions: int, size: int) -> None:
        """Wrap a fast tokenizer of transformers (untyped), or a `PlainClip`.

        `max_positions`, `size`: numbers of positions and of vocabulary ids of the text encoder.
        """
        self._tokenizer = tokenizer
        self.size = size
        self.end_of_text: int = tokenizer.eos_token_id
        self.unknown = self.end_of_text  # CLIP has no token of its own for what is not in its vocabulary
        self.max_length: int = min(tokenizer.model_max_length, max_positions)
        """Number of ids in an assembled prompt, start, end and padding included."""
        self.max_tokens = self.max_length - 2
        # a fast tokenizer sets its padding mode and then encodes: two steps, which threads must not interleave
        self._lock = threading.Lock()

    def tokenize(self, text: str) -> list[int]:
        """Return the vocabulary ids of a text, without start, end or padding."""
        with self._lock:
            encoded = self._tokenizer(text, add_special_tokens=False, padding=False, truncation=False, verbose=False)
        return list(encoded.input_ids)

    def single_token_words(self) -> list[str]:
        """Return the words of letters a-z that are one token; CLIP's vocabulary marks tokens that end a word."""
        found = (re.fullmatch(r"([a-z]{3,})</w>", token) for token in self._tokenizer.get_vocab())
        return sorted(match[1] for match in found if match)

    def assemble(self, ids: Sequence[int]) -> list[int]:
        """Add start, end and padding: `max_length` ids. Raises BadInput if they do not fit."""
        padding = self.max_tokens - len(ids)
        if padding < 0:
            raise BadInput(too_long(len(ids), self.max_tokens))
        tokenizer = self._tokenizer
        return [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id] + [tokenizer.pad_token_id] * padding


def too_long(num_tokens: int, max_tokens: int) -> str:
    """Return the message that a prompt does not fit."""
    return (
        f"{num_tokens} tokens are {num_tokens - max_tokens} more than the {max_tokens} that fit; shorten the prompt or "
        "use fewer vectors"
    )


def read_tokenizer(directory: Path | str, component: str = "tokenizer") -> Any:
    """Read a CLIP tokenizer of a diffusers directory with transformers."""
    from transformers import CLIPTokenizerFast

    with complete_tokenizer(Path(directory), component) as whole:
        return CLIPTokenizerFast.from_pretrained(str(whole), subfolder=component, local_files_only=True)


class PlainClip:
    """CLIP's tokenizer, built from its files with the library that transformers' `CLIPTokenizer` uses.

    The class has those attributes of a fast tokenizer of transformers that `Tokenizer` needs. Texts in which special
    tokens may be written out are passed to transformers' own tokenizer.
    """

    def __init__(self, directory: Path, component: str = "tokenizer") -> None:
        """Read the tokenizer in one folder of a diffusers directory.

        Raises ValueError, KeyError or OSError if it is not a CLIP tokenizer without additions.
        """
        folder = directory / component
        config = json.loads((folder / "tokenizer_config.json").read_text())
        special = folder / "special_tokens_map.json"
        if special.exists() and "added_tokens_decoder" not in config:  # as transformers reads older directories
            config |= json.loads(special.read_text())
        if config.get("tokenizer_class") not in ("CLIPTokenizer", "CLIPTokenizerFast"):
            raise ValueError(f"{config.get('tokenizer_class')} is no CLIP tokenizer")
        if (folder / "added_tokens.json").exists() or config.get("additional_special_tokens"):
            raise ValueError("it has tokens of its own")
        self._folder = directory, component
        with complete_tokenizer(directory, component) as whole:
            self._backend = _backend(whole / component, config)
        self._normalized = self._backend.normalizer.normalize_str
        self._vocabulary: dict[str, int] = self._backend.get_vocab()
        names = {name: _content(config, name) for name in ("bos", "eos", "pad", "unk")}
        self._special = {name.lower() for name in names.values()}
        ids = {name: self._vocabulary[text] for name, text in names.items()}
        self.bos_token_id = ids["bos"]
        self.eos_token_id = ids["eos"]
        self.pad_token_id = ids["pad"]
        added = config.get("added_tokens_decoder", {})
        if not {int(number) for number in added} <= set(ids.values()):
            raise ValueError("it has tokens of its own")
        self.model_max_length = int(config.get("model_max_length", 10**9))

    def __call__(self, text: str, **_options: object) -> Any:
        """Tokenize a text: an object with `input_ids`, without start, end or padding."""
        if any(name in form for form in (text.lower(), self._normalized(text)) for name in self._special):
            return self._whole(text, add_special_tokens=False, padding=False, truncation=False, verbose=False)
        return SimpleNamespace(input_ids=self._backend.encode(text, add_special_tokens=False).ids)

    def get_vocab(self) -> dict[str, int]:
        return self._vocabulary

    @cached_property
    def _whole(self) -> Any:
        return read_tokenizer(*self._folder)


def _backend(folder: Path, config: dict[str, Any]) -> Backend:
    unknown = _content(config, "unk")
    path = folder / "tokenizer.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    if stored:
        vocabulary = stored["model"]["vocab"]
        merges = stored["model"]["merges"]
        merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
    else:
        vocabulary, merges = BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    backend = Backend(
        BPE(
            vocab=vocabulary,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
            unk_token=unknown,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_OWN_WORDS + _WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    if stored and _steps(stored) != _steps(json.loads(backend.to_str())):
        raise ValueError("its tokenizer.json splits texts in a way of its own")
    return backend


def _steps(stored: dict[str, Any]) -> str:
    """Return the steps before tokenizing as JSON; old versions of transformers left special tokens out of the words."""
    steps = {name: stored[name] for name in ("normalizer", "pre_tokenizer")}
    return json.dumps(steps, sort_keys=True).replace(json.dumps(_OWN_WORDS)[1:-1], "")


def _content(config: dict[str, Any], name: str) -> str:
    """Return a special token's text; transformers' default if the configuration has none."""
    default = "<|startoftext|>" if name == "bos" else "<|endoftext|>"
    token = config.get(f"{name}_token") or default
    return str(token["content"] if isinstance(token, dict) else token)


def load_vocabularies(directory: Path) -> dict[str, Tokenizer]:
    """Read the vocabulary of a Stable Diffusion model in the diffusers layout, text encoder key -> vocabulary.

    Raises ValueError if the tokenizer cannot be read.
    """
    return {TEXT_ENCODER_KEY: load_clip(directory, "tokenizer", "text_encoder")}


def load_clip(directory: Path, component: str, text_encoder: str) -> Tokenizer:
    """Read the vocabulary of one CLIP text encoder of a diffusers directory, by the names of the two folders.

    Raises ValueError if the tokenizer cannot be read, or has ids for which the text encoder has no vectors: they would
    stand for learned rows, and libraries take memory for every number up to the largest.
    """
    try:
        config = json.loads((directory / text_encoder / "config.json").read_text())
        size = int(config.get("vocab_size", 49408))
        largest = _largest_id(directory / component)
        if largest >= size:
            raise ValueError(f"it has the id {largest}, but the text encoder has vectors for {size}")
        try:
            tokenizer: Any = PlainClip(directory, component)
        except Exception:  # files that are not CLIP's can raise nearly anything; transformers may know them
            tokenizer = read_tokenizer(directory, component)
        positions = config.get("max_position_embeddings", 77)
        return Tokenizer(tokenizer, int(positions), size)
    except (OSError, ValueError) as error:
        raise ValueError(f"the tokenizer of the model in {directory} cannot be read: {first_line(error)}") from error


def _largest_id(folder: Path) -> int:
    """Return the largest id of a tokenizer's vocabulary; 0 where its files hold none that is written as CLIP's."""
    for name, keys in (("tokenizer.json", ("model", "vocab")), ("vocab.json", ())):
        if (folder / name).is_file():
            content = json.loads((folder / name).read_text())
            for key in keys:
                content = content.get(key) if isinstance(content, dict) else None
            ids = content.values() if isinstance(content, dict) else ()
            return max((number for number in ids if isinstance(number, int)), default=0)
    return 0
