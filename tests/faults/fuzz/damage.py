"""Damage to bytes and to JSON, drawn by hypothesis."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

WAYS = ("flip", "set", "cut", "delete", "repeat", "insert", "number", "splice", "empty")
"""Ways of changing bytes: one byte xored or replaced, the end cut off, some bytes deleted, repeated or inserted, four
bytes replaced by an extreme number, the end of another file put in place of the own, and everything deleted."""

_NUMBERS = (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\0\0\0\1", b"\x80\0\0\0")

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 7, 2**31, 10**9, 10**30, 1.5, float("nan"), float("inf"), "", "x", "\x1b[2J", "\ud800",
    "../..", [], [1], [[]], {}, {"a": 1}, [None, None], ["x", "y"], "[" * 50,
)  # fmt: skip
"""Values put in place of one in a JSON document."""


@dataclass(frozen=True, slots=True)
class ByteDamage:
    """One change of bytes. Places count modulo the length, so that any damage fits any file."""

    way: str
    at: int
    length: int
    value: int

    def apply(self, data: bytes, other: bytes = b"") -> bytes:
        """Return the damaged bytes; `other` is what `splice` takes the end of."""
        at = self.at % (len(data) + 1)
        head, byte, tail = data[:at], data[at : at + 1], data[at + 1 :]
        match self.way:
            case "flip":
                return head + bytes(each ^ (self.value or 1) for each in byte) + tail
            case "set":
                return head + bytes([self.value]) * len(byte) + tail
            case "cut":
                return head
            case "delete":
                return head + data[at + self.length :]
            case "repeat":
                return data[: at + self.length] + data[at:]
            case "insert":
                return head + bytes([self.value]) * self.length + data[at:]
            case "number":
                return head + _NUMBERS[self.value % len(_NUMBERS)] + data[at + 4 :]
            case "splice":
                return head + other[self.at % (len(other) + 1) :]
            case _:
                return b""


_PLACES = st.one_of(st.integers(0, 64), st.integers(0, 2**20), st.integers(0, 2**20).map(lambda n: -1 - n % 200))
BYTE_DAMAGE = st.builds(
    ByteDamage,
    way=st.sampled_from(WAYS),
    at=_PLACES,
    length=st.integers(1, 40),
    value=st.one_of(st.sampled_from((0, 1, 0x7F, 0x80, 0xFF)), st.integers(0, 255)),
)


@dataclass(frozen=True, slots=True)
class JsonDamage:
    """One change of a JSON document: a value replaced or deleted. Places count modulo the number of values."""

    at: int
    is_deleted: bool
    value: Any

    def apply(self, data: bytes) -> bytes:
        """Return the changed document; bytes that are none as they are."""
        try:
            tree = json.loads(data)
        except ValueError:
            return data
        holder = [tree]
        places = list(_places(holder))
        owner, key = places[self.at % len(places)]
        if self.is_deleted and owner is not holder:
            del owner[key]
        else:
            owner[key] = self.value
        return json.dumps(holder[0]).encode()


JSON_DAMAGE = st.builds(
    JsonDamage, at=st.integers(0, 10_000), is_deleted=st.sampled_from((False, False, True)),
    value=st.sampled_from(ODD_VALUES),
)  # fmt: skip


def _places(owner: Any) -> Any:
    """Yield (list or dictionary, key) of every value below `owner`."""
    for key, value in list(enumerate(owner) if isinstance(owner, list) else owner.items()):
        yield owner, key
        if isinstance(value, dict | list):
            yield from _places(value)


def damaged(data: bytes, damages: Sequence[ByteDamage], other: bytes = b"") -> bytes:
    """Return bytes after all damages, in their order."""
    for damage in damages:
        data = damage.apply(data, other)
    return data


def with_right_checksums(data: bytes) -> bytes:
    """Return a PNG with the checksum that each chunk's content asks for, so that damage reaches the decoder; bytes that
    are no PNG, and what follows a chunk that is cut short, as they are."""
    signature = b"\x89PNG\r\n\x1a\n"
    if not data.startswith(signature):
        return data
    mended, at = signature, len(signature)
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        end = at + 8 + length
        if end + 4 > len(data):
            break
        content = data[at + 4 : end]
        mended += data[at : at + 4] + content + struct.pack(">I", zlib.crc32(content))
        at = end + 4
    return mended + data[at:]
