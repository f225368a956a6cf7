"""The differences between two fingerprints, in words: row, photos, masks and settings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_MAX_VALUE = 80


def input_differences(
    before: Mapping[str, Any], now: Mapping[str, Any], addresses_before: Sequence[str], addresses: Sequence[str]
) -> list[str]:
    """Describe what differs in row, photos, masks and start between two `plan.fingerprint_inputs`.

    The addresses are those of the photos; settings are left to `settings_differences`.
    """
    found = [f"row: {line}" for line in tree_differences(before["concept"], now["concept"])]
    found += _photo_differences(before["images"], now["images"], addresses_before, addresses)
    masks_before = before.get("masks", [])
    masks = now.get("masks", [])
    if masks_before != masks:
        changed = f"{len(masks_before)} before, {len(masks)} now"
        found.append(f"masks: {changed if len(masks) != len(masks_before) else 'other bytes, or another order'}")
    if before.get("start_from") != now.get("start_from"):
        found.append("start_from: another embedding, or one where there was none")
    return found


def settings_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe what differs between two `plan.settings_of`; a hash is named by what it is the hash of."""
    hashes = {
        "model": "the model's files",
        "extractor": "the feature extractor's files",
        "inversion.penalties.captions": "the file of captions",
        "inversion.init.earlier_run": "the earlier run",
        "inversion.init.encoder": "the encoder",
        "inversion.init.extractor": "the files of the encoder's feature extractor",
        "format": "this program's own format",
    }
    return [
        f"{hashes[name]} ({name})" if name in hashes else f"{name}: {old} -> {new}"
        for name, old, new in changed_values(before, now)
    ]


def tree_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe every field that differs as `name: old -> new`."""
    return [f"{name}: {old} -> {new}" for name, old, new in changed_values(before, now)]


def changed_values(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return the dotted name of every field that differs, and both values as text; "nothing" where a tree has none."""
    flat_before = dict(flatten(before))
    flat_now = dict(flatten(now))
    names = dict.fromkeys((*flat_before, *flat_now))
    return [
        (name, _text(name, flat_before), _text(name, flat_now))
        for name in names
        if flat_before.get(name) != flat_now.get(name)
    ]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted names and values; tuples become lists, like in JSON."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value


def _text(name: str, values: Mapping[str, Any]) -> str:
    return _short(values[name]) if name in values else "nothing"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MAX_VALUE else f"{text[:_MAX_VALUE]}..."


def _photo_differences(
    before: Sequence[str], now: Sequence[str], addresses_before: Sequence[str], addresses: Sequence[str]
) -> Iterator[str]:
    if before == now:
        return
    if sorted(before) == sorted(now):
        yield "photos: the same in another order"
        return
    # Where the address stayed, photos are compared by address: one that was overwritten is not one that was removed.
    old = dict(zip(addresses_before, before, strict=False))
    overwritten = {uri for uri, identity in zip(addresses, now, strict=False) if old.get(uri, identity) != identity}
    for number, (uri, identity) in enumerate(zip(addresses, now, strict=False), 1):
        if uri in overwritten:
            yield f"photo {number} has other bytes: {uri}"
        elif identity not in before:
            yield f"photo {number} is new: {uri}"
    for uri, identity in zip(addresses_before, before, strict=False):
        if uri not in overwritten and identity not in now:
            yield f"a photo is gone: {uri}"
    if len(before) != len(now):
        yield f"photos: {len(before)} before, {len(now)} now"
