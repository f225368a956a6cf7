"""Learn a byte-pair tokenizer of CLIP's form with a small vocabulary from the world's captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from textual_inversion.single_file import clip_vocabulary

MAX_LENGTH = 32
"""Tokens of every padded caption, in training as in the pipeline (diffusers pads to `model_max_length`)."""
_SPLIT = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
_END = "<|endoftext|>"


def _learn_merges(captions: Sequence[str], vocab_size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Learn vocabulary and merges of CLIP's scheme: all bytes, all word-final bytes, merges, two special tokens."""
    import json

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split()) for merge in model["merges"]]
    return clip_vocabulary("".join(merge) for merge in merges), merges


def make_tokenizer(captions: Sequence[str], folder: Path, vocab_size: int = 2000) -> CLIPTokenizer:
    """Learn the tokenizer and save it; padding is with the end token, as in CLIP."""
    vocab, merges = _learn_merges(captions, vocab_size)
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH, pad_token=_END, unk_token=_END)
    tokenizer.save_pretrained(folder)
    return load_tokenizer(folder)


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """Load the tokenizer saved in `folder`."""
    return CLIPTokenizer.from_pretrained(folder)


def encode(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> torch.Tensor:
    """Return token ids padded to the tokenizer's length, int64 (caption, token).

    Raises ValueError if a caption does not fit; none is cut.
    """
    length = tokenizer.model_max_length
    rows = tokenizer(list(captions)).input_ids
    longest = max(range(len(rows)), key=lambda index: len(rows[index]))
    if len(rows[longest]) > length:
        raise ValueError(f"caption of {len(rows[longest])} tokens: {captions[longest]!r}")
    ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
    return ids
