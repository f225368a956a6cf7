"""Places of the photos and samples on the sample grids of a run, so that the page can show each by itself."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from pipeline.sample_config import GridConfig
from textual_inversion.grids import SheetCells, cell_px_of, cells_of, find_cells
from textual_inversion.prompts import fill

UNKNOWN_LAYOUT = -1
"""Number that stands for a grid whose layout is not known; the page shows such a grid whole."""


class SheetLayouts:
    """The layouts of a run's sample grids, numbered; most concepts share one."""

    def __init__(self, grid: GridConfig) -> None:
        self.found: list[dict[str, Any]] = []
        """The layouts by number: size of the grid, and boxes (left, top, width, height in px) of its pictures."""
        self._grid = grid
        self._numbers: dict[str, int] = {}
        self._cells_px: Counter[int] = Counter()

    def of_sheet(self, size: tuple[int, int], num_photos: int, name: str, category: str) -> int:
        """Return the number of the layout of a grid of this size in px, `UNKNOWN_LAYOUT` if it has another.

        `name` is the concept's name in prompts.
        """
        labels = self._labels(name, category)
        cell = cell_px_of(size[0], len(labels), self._grid.images_per_prompt)
        if cell is not None:
            self._cells_px[cell] += 1
        return self._number(find_cells(size, num_photos, labels, self._grid.images_per_prompt))

    def expected(self, num_photos: int, name: str, category: str) -> int:
        """Return the number of the layout that a grid has if its cells are those of most grids seen so far;
        `UNKNOWN_LAYOUT` if none was seen."""
        if not self._cells_px:
            return UNKNOWN_LAYOUT
        ((cell, _),) = self._cells_px.most_common(1)
        return self._number(cells_of(cell, num_photos, self._labels(name, category), self._grid.images_per_prompt))

    def _labels(self, name: str, category: str) -> list[str]:
        return [fill(prompt, name) for prompt in self._grid.prompts_for(category)]

    def _number(self, cells: SheetCells | None) -> int:
        if cells is None:
            return UNKNOWN_LAYOUT
        layout = {"size": cells.size, "photos": _boxes(cells.photos), "rows": [_boxes(row) for row in cells.rows]}
        key = json.dumps(layout)
        if key not in self._numbers:
            self._numbers[key] = len(self.found)
            self.found.append(layout)
        return self._numbers[key]


def _boxes(cells: Sequence[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    return [(left, top, right - left, bottom - top) for left, top, right, bottom in cells]
