"""The picture that shows concepts learned from a word beside the same from the encoder."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from demo.both_ways import CELL_PX, both_ways, read_ways
from pipeline.config import RunConfig
from pipeline.config_file import load_config, to_tree
from pipeline.ledger.records import ConceptRecord, Try, put_record
from pipeline.store.storage import RunStore
from textual_inversion.grids import grid
from textual_inversion.strips import Strip

COLOURS = {0: "red", 50: "orange", 100: "yellow", 200: "green"}


def picture(colour: str) -> Image.Image:
    return Image.new("RGB", (64, 64), colour)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def learned(store: RunStore, name: str, steps: int, **values: Any) -> None:
    """Store what a run leaves of a concept: record, strip of previews, and grid, with blue pictures on the beach."""
    photos = [picture("gray")] * 3
    record = ConceptRecord(
        concept_id=name,
        fingerprint=name.encode().hex().ljust(32, "0"),
        status="done",
        placeholder_token=f"<{name}>",
        initializer="cat",
        images=tuple(store.uri(f"photos/{i}.png") for i in range(3)),
        scores={"clip_i": 0.75},
        steps=steps,
        seconds=12.4,
        **values,
    )
    for i, photo in enumerate(photos):
        store.put(f"photos/{i}.png", png(photo))
    strip = Strip()
    for step in (step for step in COLOURS if step <= steps):
        strip = strip.with_picture(step, picture(COLOURS[step]))
    store.put(record.folder.previews, strip.to_png())
    rows = [
        (prompt.format(f"<{name}>"), [picture("blue" if "beach" in prompt else "white")] * 2)
        for prompt in RunConfig().grid.prompts
    ]
    store.put(record.folder.grid, png(grid(photos, rows)))
    put_record(store, record)


def run(folder: Path, *settings: str) -> RunStore:
    store = RunStore(str(folder))
    store.put("run.json", json.dumps({"config": to_tree(load_config("", settings, output=store.root))}).encode())
    return store


def colours(image: Image.Image) -> set[tuple[int, ...]]:
    return {colour for _, colour in image.getcolors(1 << 16)}


def test_each_object_that_both_runs_learned_has_a_line(tmp_path: Path) -> None:
    words, encoder = run(tmp_path / "words", "inversion.batch_size=4"), run(tmp_path / "encoder")
    learned(words, "tiger", 200, start="words")
    learned(words, "chalk", 200, start="words", category="style")
    learned(encoder, "tiger", 50, start="encoder")
    learned(encoder, "chalk", 50, start="encoder", category="style")
    learned(encoder, "koala", 50, start="encoder")
    sheet = both_ways(words.root, encoder.root)
    assert CELL_PX < sheet.height < 2 * CELL_PX
    left, right = sheet.crop((0, 0, 800, sheet.height)), sheet.crop((840, 0, *sheet.size))
    red, orange, yellow, green, blue = ((255, 0, 0), (255, 165, 0), (255, 255, 0), (0, 128, 0), (0, 0, 255))
    assert {red, orange, green, blue} <= colours(left), "before, after 50 steps, at the end, on the beach"
    assert yellow not in colours(left)
    assert {red, orange, blue} <= colours(right)
    assert green not in colours(right)


def test_titles_say_what_it_took(tmp_path: Path) -> None:
    store = run(tmp_path, "inversion.batch_size=4")
    learned(store, "tiger", 50, start="encoder")
    first = Try(rung="", fingerprint="e" * 32, steps=50, seconds=10.0)
    kept = Try(rung="inversion.init.method=words", fingerprint="f" * 32, steps=200, seconds=12.4)
    learned(store, "lemon", 200, start="words", tries=(first, kept))
    learned(store, "house", 200, start="words, the encoder was unsure: the photos lie far", gate="below")
    ways = read_ways(store.root)
    titles = {name: way.title for name, (_, way) in ways.items()}
    assert titles == {
        "tiger": "from the encoder, 200 samples, 12 s, CLIP-I 0.75",
        "lemon": "from the word 'cat', 1000 samples, 22 s, CLIP-I 0.75",
        "house": "from the word 'cat', 800 samples, 12 s, CLIP-I 0.75, below gate",
    }
    labels = [label for label, _ in ways["lemon"][1].pictures]
    assert labels == ["0 samples", "200 samples", "800 samples", "on the beach"]


def test_runs_without_a_shared_object_are_refused(tmp_path: Path) -> None:
    words, encoder = run(tmp_path / "words"), run(tmp_path / "encoder")
    learned(words, "tiger", 200, start="words")
    learned(encoder, "koala", 50, start="encoder")
    with pytest.raises(ValueError, match="have learned no object of the same id"):
        both_ways(words.root, encoder.root)
