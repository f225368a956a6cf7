"""Sets of 10^7 keys in sorted arrays, which take 16 or 24 bytes a key where a set of strings takes 150."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]


def digest_words(texts: Iterable[str]) -> Words:
    """Return the 16-byte BLAKE2b digests of texts, [n, 2]."""
    return as_words(b"".join(hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts), 2)


def as_words(data: bytes, num_words: int) -> Words:
    """Return keys of `num_words` times 8 bytes, one behind the other, as an array [n, num_words]."""
    return np.frombuffer(data, np.uint64).reshape(-1, num_words)


class KeyIndex:
    """The rows of a table by their keys, [n, words]. Keys are looked up by their first word and compared whole."""

    def __init__(self, keys: Words) -> None:
        """Index rows 0 to n - 1."""
        self._rows = np.argsort(keys[:, 0], kind="stable").astype(np.uint32)
        self._keys = keys[self._rows]
        self._first = np.ascontiguousarray(self._keys[:, 0])

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, keys: Words) -> NDArray[np.int64]:
        """Return the row of each key, [n]; the last one where several rows have it, and -1 where none has."""
        found = np.full(len(keys), -1, np.int64)
        place = np.searchsorted(self._first, keys[:, 0], "right") - 1
        open_ = np.arange(len(keys))
        while len(open_):
            open_ = open_[place[open_] >= 0]
            open_ = open_[self._first[place[open_]] == keys[open_, 0]]
            is_same = (self._keys[place[open_]] == keys[open_]).all(axis=1)
            found[open_[is_same]] = self._rows[place[open_[is_same]]]
            open_ = open_[~is_same]
            place[open_] -= 1
        return found

    def has_first(self, keys: Words) -> NDArray[np.bool_]:
        """Return whether the index has a key with the same first word, [n]."""
        place = np.searchsorted(self._first, keys[:, 0], "right") - 1
        return np.isin(keys[:, 0], self._first[place[place >= 0]])
