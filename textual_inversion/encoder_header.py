"""The header of an encoder's file, by which an encoder of another model is refused before torch is imported."""

from __future__ import annotations

import json
from collections.abc import Mapping

FORMAT = "concept encoder 1"
BY_ENCODER = "encoder"
"""Name of the start of a concept whose rows an encoder made."""
ENCODER_UNSURE = "words, the encoder was unsure"
"""Beginning of the name of a concept's start where the encoder was unsure; the reason follows."""


def check_encoder(data: bytes, model_hash: str, extractor_hash: str) -> None:
    """Raise ValueError for other content than an encoder's file, and for an encoder of another model or extractor, by
    their digests. `data` may end where the file's header does."""
    end = 8 + int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8:end]).get("__metadata__", {})
    except (ValueError, AttributeError) as error:
        raise ValueError("not a safetensors file; it was cut short or is of another format") from error
    check_encoder_header(header, model_hash, extractor_hash)


def check_encoder_header(header: Mapping[str, str], model_hash: str, extractor_hash: str) -> None:
    """Raise ValueError unless the header is that of an encoder of this model and extractor, by their digests."""
    if header.get("format") != FORMAT:
        raise ValueError(
            f"no file of an encoder (format {header.get('format')!r}, not {FORMAT!r}); name one that this release's "
            "`python -m pipeline.train_encoder` wrote"
        )
    for name, found, wanted in (
        ("model", header["model_hash"], model_hash),
        ("extractor", header["extractor_hash"], extractor_hash),
    ):
        if found != wanted:
            raise ValueError(
                f"the encoder was trained for another {name} (digest {found}; this {name}'s is {wanted}); use that "
                f"{name}, or train an encoder for this one by `python -m pipeline.train_encoder`"
            )
