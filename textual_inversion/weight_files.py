"""Read the headers of safetensors files, and samples of their values, without torch.

The format: eight bytes with the header's length, the header as JSON (name of each tensor -> precision, shape and place
of its bytes), and the tensors' bytes to the end of the file.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

_MAX_HEADER_BYTES = 100_000_000
"""Largest header that the safetensors library reads."""
_LFS_POINTER = b"version https://git-lfs"
_SAMPLED_BYTES = 64
_FLOATS: Mapping[str, tuple[str, int]] = {
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F32": ("<u4", 0x7F800000),
    "F64": ("<u8", 0x7FF0000000000000),
}
"""Precision -> its numbers as unsigned integers, and the bits that are all set in NaN and infinity alone."""
_REPEATED = tuple(
    re.compile(pattern)
    for pattern in (
        r"((?:.*\.)?(resnets|attentions|transformer_blocks|layers|resblocks)\.\d+\.)(?!transformer_blocks\.)(.+)",
        r"(.*\.(?:down|up)\.\d+\.(block)\.\d+\.)(.+)",
        r"(.*\.(?:input_blocks|middle_block|output_blocks)()\.[\d.]+)((?:in_layers|emb_layers|out_layers)\..+)",
    )
)
"""Names of weights in modules of which a network has several, in the layouts of diffusers and of the original code: the
module, its kind, and the rest."""
_NOT_IN_ALL = ("conv_shortcut.", "nin_shortcut.")
"""Parts that some of such modules have and others have not."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor's entry in the header of a file."""

    file: Path
    dtype: str
    """Precision in the format's own words, such as `F16`."""
    shape: tuple[int, ...]
    start: int
    """Place of its first byte in the file."""
    num_bytes: int


def is_lfs_pointer(path: Path) -> bool:
    """Return whether a file is the text that Git LFS leaves in place of one that was not downloaded."""
    with path.open("rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER


def read_metadata(path: Path) -> dict[str, str]:
    """Read the notes in a file's header. Raises ValueError as `read_header` does."""
    header, _ = _parsed(path)
    notes = header.get("__metadata__")
    return {str(key): str(value) for key, value in notes.items()} if isinstance(notes, dict) else {}


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read a file's header: name of each tensor -> its entry.

    Raises ValueError, with a remedy, if the file is no whole safetensors file.
    """
    header, begin = _parsed(path)
    try:
        tensors = {
            name: StoredTensor(path, str(entry["dtype"]), tuple(map(int, entry["shape"])), begin + first, last - first)
            for name, entry in header.items()
            if name != "__metadata__"
            for first, last in [entry["data_offsets"]]
        }
    except (KeyError, TypeError, ValueError) as error:
        raise _broken(path, "has a damaged header") from error
    end = max((each.start + each.num_bytes for each in tensors.values()), default=begin)
    size = path.stat().st_size
    if end != size:
        raise _broken(path, f"was cut short or is damaged: it has {size:,} bytes where its header speaks of {end:,}")
    return tensors


def read_index(path: Path) -> dict[str, str]:
    """Read the index of weights in several files: name of each tensor -> name of its file.

    Raises ValueError if it is no such index.
    """
    try:
        named = json.loads(path.read_text())["weight_map"]
        return {str(tensor): str(file) for tensor, file in named.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(path, "is no index of weight files") from error


def not_finite(tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Return the names of tensors with NaN or infinity among their first values (64 bytes), file by file."""
    files: dict[Path, list[tuple[str, StoredTensor]]] = defaultdict(list)
    for name, tensor in tensors.items():
        files[tensor.file].append((name, tensor))
    found = []
    for path, each in files.items():
        with path.open("rb") as file:
            found += [name for name, tensor in each if not _is_finite(file, tensor)]
    return found


def missing_parts(names: Iterable[str]) -> list[str]:
    """Return names of weights that a repeated module of a network lacks and another one of its kind has, sorted.

    Every layer of a text encoder, and every residual, attention and transformer block of a U-Net or an autoencoder, has
    the same parts, with or without a shortcut.
    """
    parts: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in names:
        match = next(filter(None, (pattern.fullmatch(name) for pattern in _REPEATED)), None)
        if match and not match[3].startswith(_NOT_IN_ALL):
            parts[match[2]][match[1]].add(match[3])
    return sorted(
        module + part
        for modules in parts.values()
        for module, own in modules.items()
        for part in set().union(*modules.values()) - own
    )


def _parsed(path: Path) -> tuple[dict[str, Any], int]:
    """Read a file's header as JSON, and the place where its tensors begin."""
    if is_lfs_pointer(path):
        raise _broken(path, "is a pointer of Git LFS, not the file itself: run `git lfs pull`")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= _MAX_HEADER_BYTES:
            raise _broken(path, "is no safetensors file")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise _broken(path, "is no safetensors file") from error
    if not isinstance(header, dict):
        raise _broken(path, "has a damaged header")
    return header, 8 + length


def _is_finite(file: BinaryIO, tensor: StoredTensor) -> bool:
    """Return whether the first values of a tensor are finite; true for 8 bits and for integers."""
    if tensor.dtype not in _FLOATS:
        return True
    kind, exponent = _FLOATS[tensor.dtype]
    file.seek(tensor.start)
    values = np.frombuffer(file.read(min(_SAMPLED_BYTES, tensor.num_bytes)), kind)
    return not ((values & exponent) == exponent).any()


def _broken(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} {reason}; copy or download it again")
