"""Read a report as a person and as its script do: tags, texts, and the data inside."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any


class Page(HTMLParser):
    """Tags with attributes, texts, styles, scripts and data of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.code: dict[str, str] = {}
        """Content of the last `style` and of the last `script` that is run."""
        self.data: dict[str, Any] = {}
        """Text that the script reads; empty if there is none."""
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside = "data" if dict(attrs).get("type") == "application/json" else tag

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "data":
            self.data = json.loads(data)
        elif self._inside:
            self.code[self._inside] = data
        else:
            self.texts.append(data)

    def values(self, tag: str, name: str) -> list[str]:
        return [attributes[name] or "" for each, attributes in self.tags if each == tag and name in attributes]

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def column(self, name: str) -> list[Any]:
        """Return a column's value in each row inside the page."""
        place = [column["name"] for column in self.data["columns"]].index(name)
        return [row[place] for row in self.data["rows"]]


def part_values(script: str) -> list[Any]:
    """Return what a part of a report hands to the page."""
    match = re.fullmatch(r'reportPart\("\w+", \d+, (.*)\);\n', script)
    assert match is not None
    found: list[Any] = json.loads(match[1])
    return found
