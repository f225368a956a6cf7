"""Colour profiles (ICC.1:2001-04) made of a few numbers, for tests."""

from __future__ import annotations

import struct

import numpy as np

DISPLAY_P3 = ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))
"""XYZ of red, green and blue in the profile connection space (D50)."""
ADOBE_RGB = ((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446))
SRGB = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))
_WHITE = (0.9642, 1.0, 0.8249)


def icc(primaries: tuple[tuple[float, ...], ...], gamma: float = 2.2) -> bytes:
    """Return a profile of RGB by its primaries and one gamma."""
    tags = {name: _xyz(value) for name, value in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)}
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))
    return _profile(b"RGB ", b"XYZ ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve))


def grey_icc(gamma: float) -> bytes:
    """Return a profile of grey by its gamma."""
    return _profile(b"GRAY", b"XYZ ", {b"kTRC": b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))})


def cmyk_icc(lightness: np.ndarray) -> bytes:
    """Return a profile of neutral inks. lightness: [2, 2, 2, 2] L* of each mixture of full or no C, M, Y and K."""
    table = np.full((16, 3), 128, np.uint8)
    table[:, 0] = (lightness.reshape(16) * 2.55).round()
    identity = struct.pack(">9i", *(65536, 0, 0, 0, 65536, 0, 0, 0, 65536))
    curves = bytes(range(256))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + curves * 4 + table.tobytes() + curves * 3
    return _profile(b"CMYK", b"Lab ", dict.fromkeys((b"A2B0", b"A2B1"), lut))


def _xyz(value: tuple[float, ...]) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(each * 65536) for each in value))


def _profile(space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    text = b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78)
    tags = {b"desc": text, b"cprt": b"text" + bytes(4) + b"none\0", b"wtpt": _xyz(_WHITE), **tags}
    offset = 128 + 4 + 12 * len(tags)
    index = struct.pack(">I", len(tags))
    body = b""
    for name, value in tags.items():
        value += bytes(-len(value) % 4)
        index += struct.pack(">4sII", name, offset + len(body), len(value))
        body += value
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    head = struct.pack(">I4sI4s4s4s", offset + len(body), bytes(4), 0x02400000, kind, space, connection)
    head += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp") + bytes(28) + _xyz(_WHITE)[8:]
    return head.ljust(128, b"\0") + index + body
