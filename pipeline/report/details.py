"""Details of a concept on the page, shown when it is opened: tries, bulk pictures, photos, curve and facts.

The concepts that come first have their pictures inside the page, made small. The page shows all others from the run's
own files, which lie beside it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from pipeline.config import RunConfig
from pipeline.report.curves import read_curve
from pipeline.report.html import Picture, embed
from pipeline.report.sheet_layouts import UNKNOWN_LAYOUT, SheetLayouts
from pipeline.report.spool import DrawnPicture, Spool
from pipeline.store.redact import redact
from pipeline.store.storage import ConceptFolder, RunStore
from textual_inversion.prompts import HOLE
from textual_inversion.strips import strip_cells

log = logging.getLogger(__name__)

MAX_EMBEDDED_PICTURES = 1000
"""Largest number of bulk pictures inside the page; the others are shown from the run's files."""

_SHEET_PX = 960
_PICTURE_PX = 256
_THREADS = 8
_BATCH = 64
"""Pictures read at a time."""


class Details:
    """Reader of each concept's details, from the spool and from the run's files."""

    def __init__(self, store: RunStore, config: RunConfig, spool: Spool) -> None:
        self.layouts = SheetLayouts(config.grid)
        self.num_missing = 0
        """Pictures that were to be inside the page and cannot be shown."""
        self._store = store
        self._spool = spool
        self._max_pixels = config.photos.max_pixels

    def embedded(self, stop: int) -> list[dict[str, Any]]:
        """Return the details of the concepts at positions 0 to `stop` - 1, with their pictures."""
        found = list(self.linked(0, stop))
        about = [row for row, _ in self._spool.rows(0, stop)]
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="report") as pool:
            for detail, read in zip(found, pool.map(self._read_files, about, found), strict=True):
                sheets = read.pop("tries")
                detail["tries"] = [{**each, **sheet} for each, sheet in zip(detail["tries"], sheets, strict=True)]
                strip = read.pop("strip", None)
                if strip is not None and strip.data_uri:
                    detail["previews"]["picture"] = strip.data_uri
                    if strip.full_size != detail["previews"]["size"]:  # the strip of a later attempt, or of none
                        detail["previews"]["cells"] = []
                detail |= read
            wanted = [row for detail in found for row in detail["pictures"] if row[2]][:MAX_EMBEDDED_PICTURES]
            for start in range(0, len(wanted), _BATCH):
                rows = wanted[start : start + _BATCH]
                contents = self._store.get_many(row[2] for row in rows)
                pictures = pool.map(self._small, (contents[row[2]] for row in rows))
                for row, picture in zip(rows, pictures, strict=True):
                    row.append(picture.data_uri)
                    self.num_missing += bool(picture.note)
        return found

    def linked(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Yield the details of the concepts at these positions, in their order, without pictures."""
        for first in range(start, stop, _BATCH):
            last = min(stop, first + _BATCH)
            yield from self._linked(first, last, dict(self._spool.pictures(first, last)))

    def _linked(self, start: int, stop: int, drawn: dict[int, list[DrawnPicture]]) -> Iterator[dict[str, Any]]:
        for position, details in self._spool.details(start, stop):
            if details is None:  # a bad row
                yield {"tries": [], "pictures": []}
                continue
            yield {
                "facts": details["facts"],
                "photos": details["photos"],
                "tries": details["tries"],
                "pictures": [_described(each, details["name"]) for each in drawn.get(position, ())],
                "previews": _strip_layout(details["previews"]) if details["previews"] else None,
            }

    def _read_files(self, row: dict[str, Any], details: dict[str, Any]) -> dict[str, Any]:
        """Return the sample grids of a concept and of its tries, and its curve, as far as they can be read."""
        if row["values"]["status"] != "done":
            return {"tries": [{} for _ in details["tries"]]}
        folder = ConceptFolder(row["values"]["concept"], row["result"])
        tries = [ConceptFolder(folder.concept_id, each["fingerprint"]) for each in details["tries"]]
        paths = list(dict.fromkeys(each.grid for each in (folder, *tries)))
        strips = [folder.previews] if details["previews"] else []
        contents = self._store.get_many([*paths, folder.curve, *strips])
        place = (row["num_photos"], row["name"], row["category"])
        sheets = {path: read_sheet(contents[path], self.layouts, place, self._max_pixels) for path in paths}
        self.num_missing += bool(sheets[folder.grid]["note"])
        try:
            content = contents[folder.curve]
            curve = read_curve(content) if isinstance(content, bytes) else None
        except Exception:  # on damaged files, Arrow's readers raise nearly everything
            curve = None
        return {
            "strip": read_picture(contents[folder.previews], _SHEET_PX, self._max_pixels) if strips else None,
            **sheets[folder.grid],
            "curve": asdict(curve) if curve else None,
            "tries": [
                sheets[each.grid] if not of["error"] else {} for each, of in zip(tries, details["tries"], strict=True)
            ],
        }

    def _small(self, content: bytes | OSError) -> Picture:
        return read_picture(content, _PICTURE_PX, self._max_pixels)


def read_sheet(
    content: bytes | OSError, layouts: SheetLayouts, place: tuple[int, str, str], max_pixels: int
) -> dict[str, Any]:
    """Return a sample grid as the page's script reads it: picture, size, number of its layout, note where it cannot be
    shown.

    `place` is the concept's number of photos, its name in prompts and its category.
    """
    picture = read_picture(content, _SHEET_PX, max_pixels)
    layout = layouts.of_sheet(picture.full_size, *place) if picture.data_uri else UNKNOWN_LAYOUT
    note = redact(f"no sample grid: {picture.note}") if picture.note else ""
    return {"sheet": picture.data_uri, "size": [picture.width, picture.height], "layout": layout, "note": note}


def read_picture(content: bytes | OSError, side_px: int, max_pixels: int) -> Picture:
    """Return a stored picture made small, or the reason why there is none. On damaged files PIL raises nearly
    everything."""
    try:
        if isinstance(content, OSError):
            raise content
        return embed(content, side_px, max_pixels)
    except Exception as error:
        return Picture(note=redact(str(error) or type(error).__name__))


def _strip_layout(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the layout of a strip as the page's script reads it: its size, and the step and box of each picture."""
    size, boxes = strip_cells(facts["cell_px"], len(facts["steps"]))
    placed = [(left, top, right - left, bottom - top) for left, top, right, bottom in boxes]
    return {"size": size, "cells": list(zip(facts["steps"], placed, strict=True))}


def _described(picture: DrawnPicture, name: str) -> list[Any]:
    """Return a bulk picture as the page's script reads it: prompt with a hole for the concept, seed, path, error."""
    prompt = picture.prompt.replace(name, HOLE) if name else picture.prompt
    return [prompt, picture.seed, picture.path, picture.error]
