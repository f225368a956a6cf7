"""Make the README's picture from a finished demo run: `python -m demo.result_picture output/demo`.

Each concept has a row: two of its photos, then pictures drawn with its learned word.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from pipeline.store.parquet import read_table, read_tables

HERE = Path(__file__).parent
PROMPTS = (
    "a photo of a {}",
    "a photo of a {} on the beach",
    "a photo of a {} in the snow",
    "a {} on a red background",
    "a pencil sketch of a {}",
)
CELL_PX = 64
GAP_PX = 4
COLUMNS = 2


def strip(photos: list[Image.Image], drawn: list[Image.Image]) -> Image.Image:
    """Arrange photos, a gap and drawn pictures side by side."""
    pictures = [picture.resize((CELL_PX, CELL_PX), Image.Resampling.BICUBIC) for picture in (*photos, *drawn)]
    step = CELL_PX + GAP_PX
    sheet = Image.new("RGB", (step * len(pictures) + 3 * GAP_PX, step), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i * step + (3 * GAP_PX if i >= len(photos) else 0), 0))
    return sheet


def main() -> None:
    """Put all objects' strips on one sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    results = read_table(output / "results.parquet").to_pylist()
    drawn = {
        (row["concept_id"], row["prompt"]): row["path"] for row in read_tables(output / "images/metadata").to_pylist()
    }
    strips = []
    for row in results:
        if row["category"] == "object" and row["status"] == "done":
            photos = [Image.open(HERE / "images" / row["concept_id"] / f"{i}.png") for i in (0, 2)]
            paths = [drawn[row["concept_id"], prompt.format(row["prompt_as"])] for prompt in PROMPTS]
            strips.append(strip(photos, [Image.open(output / path) for path in paths]))
    width, height = strips[0].size
    lines = -(-len(strips) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (width + 5 * GAP_PX), lines * height), "white")
    for i, each in enumerate(strips):
        sheet.paste(each, (i // lines * (width + 5 * GAP_PX), i % lines * height))
    sheet.save(HERE / "result.webp", quality=60, method=6)


if __name__ == "__main__":
    main()
