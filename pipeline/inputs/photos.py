"""Fetch photos and masks within the limits of the settings `photos`.

A manifest's addresses may come from another party, so they are all fetched here. Addresses on the command line and in
the configuration are not limited: a person who may start a job may read what the job reads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from pipeline.config import PhotoConfig
from pipeline.store import http_client
from pipeline.store.addresses import read_bytes, read_with_etag
from pipeline.store.errors import InputChanged, describe_error, is_client_error
from pipeline.store.redact import foreign_text, redact
from textual_inversion.concept import Concept
from textual_inversion.errors import BadInput
from textual_inversion.photos import open_mask, open_photo

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from PIL import Image

_LASTING_ERRORS = (BadInput, FileNotFoundError, PermissionError, IsADirectoryError)


def fetch(uri: str, photos: PhotoConfig) -> bytes:
    """Return the bytes of a whole object, at most `photos.max_bytes`.

    Raises BadInput, FileNotFoundError or PermissionError for errors that last, and other OSErrors for errors that
    another attempt may mend. The texts hold no credentials.
    """
    check_scheme(uri, photos)
    with _errors_without_credentials():
        if scheme_of(uri) in ("http", "https"):
            rules = http_client.AccessRules(schemes=photos.schemes, networks=photos.private_networks)
            return http_client.read(uri, photos.max_bytes, rules)
        return read_bytes(uri, photos.max_bytes)


def content_md5(data: bytes) -> str:
    """Return the MD5 of a photo's or mask's bytes, 32 hex digits, by which a plan identifies it (`content_hash`)."""
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def fetch_as_planned(uri: str, photos: PhotoConfig, planned: str) -> bytes:
    """Return the bytes of an object whose content is still the one that a plan identified by `planned`.

    Raises InputChanged if it is another, and what `fetch` raises.
    """
    data = fetch(uri, photos)
    if content_md5(data) == planned:
        return data
    with _errors_without_credentials():
        # where S3 encrypts with its owner's keys, the plan holds an entity tag that is no MD5
        tagged = read_with_etag(uri, photos.max_bytes)
    if tagged is not None and tagged[1] == planned:
        return tagged[0]
    raise InputChanged(f"{redact(uri)} has changed since the plan was made")


@contextmanager
def _errors_without_credentials() -> Iterator[None]:
    """Turn the errors of reading an address into those of `fetch`."""
    try:
        yield
    except _LASTING_ERRORS as error:
        kind = next(kind for kind in _LASTING_ERRORS if isinstance(error, kind))
        raise kind(foreign_text(str(error))) from None
    except (ValueError, ImportError) as error:  # the address, the size, or a store whose client is not installed
        raise BadInput(foreign_text(str(error))) from None
    except OSError as error:
        raise OSError(foreign_text(str(error)) or type(error).__name__) from None
    except MemoryError:  # no address is to blame
        raise
    except Exception as error:  # a store's client may raise anything
        raise (OSError if is_client_error(error) else BadInput)(describe_error(error)) from None


def open_pictures(
    concept: Concept, photos: PhotoConfig, planned: Mapping[str, Sequence[str]] | None = None
) -> tuple[list[Image.Image], list[Image.Image]]:
    """Fetch and decode a concept's photos and their masks (none, or one each).

    `planned` are the `plan.fingerprint_inputs` that hold the hashes of `images` and `masks`; the bytes that are read
    must be these. Raises InputChanged naming the first picture that is another, and BadInput naming the first that
    cannot be fetched or used, or if there are too many pixels in all. OSErrors that another attempt may mend are raised
    as they are.
    """
    pictures: list[Image.Image] = []
    pixels = 0
    hashes = _planned_hashes(concept.images, planned, "images")
    for uri in concept.images:
        decode = partial(open_photo, max_pixels=photos.max_pixels)
        picture = _open_picture("photo", uri, photos, hashes.get(uri, ""), decode)
        pixels += picture.width * picture.height
        if pixels > photos.max_concept_pixels:
            raise BadInput(
                f"its first {len(pictures) + 1} photos hold {pixels:,} px, more than photos.max_concept_pixels = "
                f"{photos.max_concept_pixels:,}; scale them down or give fewer"
            )
        pictures.append(picture)
    pairs = zip(concept.masks, pictures, strict=False)  # as many masks as photos, or none
    hashes = _planned_hashes(concept.masks, planned, "masks")
    masks = [
        _open_picture(
            "mask", uri, photos, hashes.get(uri, ""), partial(open_mask, photo=photo, max_pixels=photos.max_pixels)
        )
        for uri, photo in pairs
    ]
    return pictures, masks


def _planned_hashes(uris: Sequence[str], planned: Mapping[str, Sequence[str]] | None, name: str) -> Mapping[str, str]:
    """Return address -> hash in the plan; empty without a plan."""
    return dict(zip(uris, planned.get(name, ()), strict=True)) if planned else {}


def _open_picture(
    kind: str, uri: str, photos: PhotoConfig, planned: str, decode: Callable[[bytes], Image.Image]
) -> Image.Image:
    """Fetch and decode one picture. Raises BadInput or InputChanged naming its kind, its address and the reason."""
    try:
        return decode(fetch_as_planned(uri, photos, planned) if planned else fetch(uri, photos))
    except InputChanged as error:
        raise InputChanged(f"{kind} {error}") from None
    except _LASTING_ERRORS as error:
        raise BadInput(f"{kind} {redact(uri)}: {redact(str(error))}") from None


def check_scheme(uri: str, photos: PhotoConfig) -> None:
    """Raise BadInput unless the settings allow photos from an address of this scheme."""
    if (scheme := scheme_of(uri)) not in photos.schemes:
        raise BadInput(
            f"photos may not come from {scheme}://; the setting photos.schemes allows {', '.join(photos.schemes)}"
        )


def scheme_of(uri: str) -> str:
    """Return the scheme of an address in lower case; `file` for a plain path."""
    return uri.partition("://")[0].lower() if "://" in uri else "file"
