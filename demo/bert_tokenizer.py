"""Make the vocabulary of the demo's BERT text encoder, and align its tokens with those of the CLIP tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase, digits

import numpy as np
import torch
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import BertTokenizer, CLIPTokenizer

from textual_inversion.wordpiece import PROMPT_LENGTH

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_PUNCTUATION = "!\"#&'()*+,-./:;<>?"


def make_wordpiece(captions: Sequence[str], folder: Path) -> BertTokenizer:
    """Make the tokenizer and save it: every word of the captions is one token, and other words are spelt in letters."""
    split = pre_tokenizers.BertPreTokenizer()
    counts = Counter(word for text in captions for word, _ in split.pre_tokenize_str(text.lower()))
    spelling = [*ascii_lowercase, *digits]
    tokens = [*_SPECIAL, *_PUNCTUATION, *spelling, *(f"##{each}" for each in spelling)]
    tokens += sorted(set(counts) - set(tokens), key=lambda word: (-counts[word], word))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = BertTokenizer(vocab=vocabulary, do_lower_case=True, model_max_length=PROMPT_LENGTH)
    tokenizer.save_pretrained(folder)
    return load_wordpiece(folder)


def load_wordpiece(folder: Path) -> BertTokenizer:
    """Load the tokenizer saved in `folder`."""
    return BertTokenizer.from_pretrained(folder)


@dataclass(frozen=True, slots=True)
class PairedCaptions:
    """Captions in the ids of both text encoders."""

    teacher_ids: Tensor
    """Ids for the CLIP text encoder, int64 [captions, its length]."""
    student_ids: Tensor
    """Ids for the BERT text encoder, int64 [captions, 77]."""
    aligned: Tensor
    """Position of the teacher's state that each of the student's states corresponds to, -1 for none, int64
    [captions, 77]. A word corresponds to the teacher's last token of that word, padding to padding."""

    def __len__(self) -> int:
        return len(self.student_ids)

    def __getitem__(self, rows: Tensor) -> PairedCaptions:
        return PairedCaptions(self.teacher_ids[rows], self.student_ids[rows], self.aligned[rows])

    def to(self, device: torch.device) -> PairedCaptions:
        """Return the captions on the device."""
        return PairedCaptions(self.teacher_ids.to(device), self.student_ids.to(device), self.aligned.to(device))


def pair_captions(captions: Sequence[str], teacher: CLIPTokenizer, student: BertTokenizer) -> PairedCaptions:
    """Encode captions for both text encoders. Those longer than the teacher's length in either are left out."""
    length = teacher.model_max_length
    theirs = teacher(list(captions), return_offsets_mapping=True)
    ours = student(list(captions), return_offsets_mapping=True)
    kept = [index for index, ids in enumerate(theirs.input_ids) if max(len(ids), len(ours.input_ids[index])) <= length]
    teacher_ids = torch.full((len(kept), length), teacher.pad_token_id)
    student_ids = torch.full((len(kept), PROMPT_LENGTH), student.pad_token_id)
    aligned = torch.full((len(kept), PROMPT_LENGTH), -1)
    for row, index in enumerate(kept):
        their_ids, our_ids = theirs.input_ids[index], ours.input_ids[index]
        teacher_ids[row, : len(their_ids)] = torch.tensor(their_ids)
        student_ids[row, : len(our_ids)] = torch.tensor(our_ids)
        ends = np.array([end for _, end in theirs.offset_mapping[index][1:-1]])
        our_ends = np.array([end for _, end in ours.offset_mapping[index][1:-1]])
        words = 1 + np.searchsorted(ends, our_ends)
        rest = np.arange(len(their_ids) - 1, length)  # end of text and padding
        positions = np.concatenate([[0], words, rest])[:PROMPT_LENGTH]
        aligned[row, : len(positions)] = torch.from_numpy(positions)
    return PairedCaptions(teacher_ids, student_ids, aligned)
