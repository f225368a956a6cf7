"""The digest of a JSON value: fingerprints, and the names of settings and of plan rows, are made with it."""

from __future__ import annotations

import hashlib
import json

_AS_IS = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)
_ESCAPED = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def digest(value: object, *, escape_non_ascii: bool = False) -> str:
    r"""Return 32 hex digits, the BLAKE2b hash of a JSON value's text with sorted keys and no spaces.

    `escape_non_ascii` writes characters beyond ASCII as \uXXXX before the text is hashed. Fingerprints and settings are
    hashed without escapes and plan rows of the bulk stages with them; outputs hold both, so neither may change: a
    picture of a prompt in Japanese would be drawn again.
    """
    encoder = _ESCAPED if escape_non_ascii else _AS_IS
    return hashlib.blake2b(encoder.encode(value).encode(), digest_size=16).hexdigest()
