"""The settings that the results of a run depend on, with the present content of what they name."""

from __future__ import annotations

from typing import Any

from pipeline.config import RunConfig
from pipeline.inputs.content_hash import content_hashes
from pipeline.inputs.models import MAX_ENCODER_BYTES, extractor_hash, model_hash, with_captions
from pipeline.ledger.plan import earlier_hash, settings_of
from pipeline.store.addresses import MAX_BYTES


def current_settings(config: RunConfig) -> dict[str, Any]:
    """Return `settings_of` a configuration. Raises ValueError for a model, file or run that cannot be read."""
    init = config.inversion.init
    return settings_of(
        config,
        model_hash=model_hash(config.model),
        extractor_hash=extractor_hash(config.extractor),
        captions_hash=captions_hash(with_captions(config).inversion.penalties.captions),
        earlier_hash=earlier_hash(init.earlier_run),
        encoder_hash=_file_hash(
            "inversion.init.encoder", init.encoder if init.method == "encoder" else "", MAX_ENCODER_BYTES
        ),
        encoder_extractor_hash=extractor_hash(init.extractor),
    )


def captions_hash(path: str) -> str:
    """Return the content hash of the file of captions; empty for the captions that come with the package.

    Raises ValueError if the file cannot be read.
    """
    return _file_hash("inversion.penalties.captions", path)


def _file_hash(setting: str, uri: str, limit: int = MAX_BYTES) -> str:
    """Return the content hash of the file that a setting names; empty for an empty address.

    Raises ValueError if the file cannot be read, or is larger than `limit` bytes.
    """
    identity = content_hashes([uri], limit=limit)[uri] if uri else ""
    if not isinstance(identity, str):
        raise ValueError(f"{setting} = {uri!r} cannot be read: {identity}")
    return identity
