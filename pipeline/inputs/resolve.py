"""Addresses in a configuration, made the same on every machine."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.config import RunConfig
from pipeline.config_file import parse_config, to_tree
from pipeline.inputs.models import portable
from pipeline.store.addresses import absolute, absolute_output

_ADDRESSES: dict[str, Callable[[str], str]] = {
    "manifest": absolute,
    "output": absolute_output,
    "model": portable,
    "extractor": portable,
    "evaluation.dino": portable,
    "gate.others": absolute,
    "inversion.penalties.captions": absolute,
    "inversion.init.earlier_run": absolute,
    "inversion.init.encoder": absolute,
    "inversion.init.extractor": portable,
    "encoder.from_run": absolute,
    "encoder.init_from": absolute,
}
"""Settings that are addresses -> the function that makes one the same on every machine."""


def resolve_addresses(config: RunConfig) -> RunConfig:
    """Return the configuration with all addresses absolute, so that actors on other machines agree on them.

    Empty settings stay empty. Raises ValueError for a scheme that is not known.
    """
    tree = to_tree(config)
    for name, resolve in _ADDRESSES.items():
        *sections, key = name.split(".")
        section = tree
        for each in sections:
            section = section[each]
        if section[key]:
            section[key] = resolve(section[key])
    generation = tree["generation"]
    generation["learned"] = [absolute_source(source) for source in generation["learned"]]
    return parse_config(tree)


def absolute_source(source: str) -> str:
    """Return a source of learned concepts, `[WORD=]URI`, with an absolute URI."""
    word, equals, uri = source.partition("=")
    if not equals or "/" in word:
        return absolute(source)
    return f"{word}={absolute(uri)}"
