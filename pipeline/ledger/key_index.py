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

    @property
    def keys(self) -> Words:
        """The keys, ordered by their first word, [n, words]."""
        return self._keys

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


class KeySet:
    """A growing set of keys, in sorted arrays of which each is at least twice as long as the next."""

    def __init__(self) -> None:
        """Start empty."""
        self._parts: list[KeyIndex] = []

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def add(self, keys: Words) -> NDArray[np.bool_]:
        """Add keys, [n, words]; return whether each is new, [n]: neither in the set nor earlier among `keys`."""
        is_new = np.zeros(len(keys), np.bool_)
        is_new[np.unique(keys, axis=0, return_index=True)[1]] = True
        is_new &= ~self.has(keys)
        added = keys[is_new]
        while self._parts and len(self._parts[-1]) < 2 * len(added):
            added = np.concatenate([self._parts.pop().keys, added])
        if len(added):
            self._parts.append(KeyIndex(added))
        return is_new

    def has(self, keys: Words) -> NDArray[np.bool_]:
        """Return whether each key is in the set, [n]."""
        found = np.zeros(len(keys), np.bool_)
        for part in self._parts:
            found |= part.find(keys) >= 0
        return found

    def minus(self, other: KeySet) -> KeySet:
        """Return the keys that are not in another set."""
        rest = KeySet()
        for part in self._parts:
            rest.add(part.keys[~other.has(part.keys)])
        return rest
