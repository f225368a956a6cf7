"""Draw what the demo learned in both ways, side by side: `python -m demo.both_ways output/demo output/demo-encoder`.

Each object has a line: two of its photos, then its pictures after a growing number of samples, learned from its word
and, at the right, from the rows that the encoder made of its photos. Both draw from the same noise.
"""

from __future__ import annotations

import argparse
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from pipeline.config import RunConfig
from pipeline.ledger.records import ConceptRecord, latest, load_records
from pipeline.report.comparison import Side
from pipeline.store.addresses import absolute
from pipeline.store.storage import RunStore
from textual_inversion.encoder_header import BY_ENCODER
from textual_inversion.grids import find_cells, fit, label_font
from textual_inversion.prompts import fill
from textual_inversion.strips import Strip

FIRST_STEPS = (0, 50)
"""Steps that are shown besides the last one."""
PLACE = "a photo of a {} on the beach"
"""Prompt of the sample grid whose first picture is shown last."""
CELL_PX = 128
GAP_PX = 4
MARGIN_PX = 12
LINE_PX = 19
PHOTOS = (0, 2)
INK = (40, 40, 40)


@dataclass(frozen=True, slots=True)
class Way:
    """An object as one of the runs learned it."""

    title: str
    """What learning started from, what it took and how near it came, in a line."""
    pictures: list[tuple[str, Image.Image]]
    """Labels and pictures."""


def read_ways(output: str) -> dict[str, tuple[ConceptRecord, Way]]:
    """Return concept id -> record and way of each object that a run has learned."""
    config = Side.read(output).config
    store = RunStore(output)
    return {
        record.concept_id: (record, Way(_title(record, config), _pictures(record, config, store)))
        for record in latest(load_records(store))
        if record.status == "done" and record.category == "object"
    }


def _title(record: ConceptRecord, config: RunConfig) -> str:
    """Say where a concept started, what all its tries took together, and how near it came."""
    started = "from the encoder" if record.start == BY_ENCODER else f"from the word {record.initializer!r}"
    tries = record.tries or (record,)
    samples = config.inversion.batch_size * sum(each.steps for each in tries)
    seconds = sum(each.seconds for each in tries)
    below = ", below gate" if record.gate == "below" else ""
    return f"{started}, {samples} samples, {seconds:.0f} s, CLIP-I {record.scores['clip_i']:.2f}{below}"


def _pictures(record: ConceptRecord, config: RunConfig, store: RunStore) -> list[tuple[str, Image.Image]]:
    """Return the previews at the first steps and at the last one, and the picture of the place, each with its label."""
    strip = Strip.from_png(store.get(record.result.previews))
    steps = dict.fromkeys([*(step for step in FIRST_STEPS if step in strip.pictures), max(strip.pictures)])
    found = [(f"{step * config.inversion.batch_size} samples", strip.pictures[step]) for step in steps]
    sheet = Image.open(io.BytesIO(store.get(record.result.grid)))
    prompts = config.grid.prompts
    labels = [fill(prompt, record.name_in_prompts) for prompt in prompts]
    cells = find_cells(sheet.size, len(record.images), labels, config.grid.images_per_prompt)
    if cells is None or PLACE not in prompts:
        raise ValueError(f"{store.uri(record.result.grid)}: no sample grid with a row for {PLACE!r}")
    return [*found, ("on the beach", sheet.crop(cells.rows[prompts.index(PLACE)][0]))]


def draw(lines: list[tuple[str, list[Image.Image], Way, Way]]) -> Image.Image:
    """Draw a line for each (name, photos, way from the word, way from the encoder)."""
    groups = [
        (Way(name, [("photo", photo) for photo in photos]), from_word, from_encoder)
        for name, photos, from_word, from_encoder in lines
    ]
    pitch = CELL_PX + GAP_PX
    lefts = [MARGIN_PX]
    for column in zip(*groups, strict=True):
        lefts.append(lefts[-1] + max(len(way.pictures) for way in column) * pitch + MARGIN_PX)
    height = 2 * LINE_PX + pitch + MARGIN_PX
    sheet = Image.new("RGB", (lefts[-1], MARGIN_PX + len(lines) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for number, line in enumerate(groups):
        top = MARGIN_PX + number * height
        for left, way in zip(lefts, line, strict=False):
            pen.text((left, top), way.title, fill=INK, font=label_font())
            for place, (label, picture) in enumerate(way.pictures):
                x = left + place * pitch
                pen.text((x, top + LINE_PX), label, fill=INK, font=label_font())
                sheet.paste(fit(picture.convert("RGB"), CELL_PX), (x, top + 2 * LINE_PX))
    return sheet


def both_ways(from_words: str, from_encoder: str) -> Image.Image:
    """Return the picture of the objects that both runs have learned. Raises ValueError if there are none."""
    words, encoder = read_ways(from_words), read_ways(from_encoder)
    shared = [name for name in words if name in encoder]
    if not shared:
        raise ValueError(f"{from_words} and {from_encoder} have learned no object of the same id")
    lines = []
    for name in shared:
        record, way = words[name]
        photos = [Image.open(record.images[i]) for i in PHOTOS]
        lines.append((name, photos, way, encoder[name][1]))
    return draw(lines)


def main() -> None:
    """Draw and store the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("from_words", metavar="WORDS", help="output of the run that learned from words, on a disk")
    parser.add_argument("from_encoder", metavar="ENCODER", help="output of the run that started from the encoder")
    parser.add_argument("--output", type=Path, default=Path("output/both-ways.png"), metavar="FILE")
    options = parser.parse_args()
    picture = both_ways(absolute(options.from_words), absolute(options.from_encoder))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    picture.save(options.output)
    print(f"both ways side by side: {options.output}")


if __name__ == "__main__":
    main()
