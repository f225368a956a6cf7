"""Draw the concept pictures and write the demo's manifests: `python -m demo.make_manifests`.

`demo/images/<concept_id>/` gets the pictures of every held-out object and of the styles that the model never saw:
`line-art` (OpenMoji), `chalk` (near to taught styles) and `stained-glass` (far from them). Two further concepts belong
to `python -m demo.examples`: a known style as if it had no name, and a known word from a diverse set.
`manifests/demo.parquet` lists the concepts of the demo run, `manifests/demo_prompts.parquet` the prompts to draw them
with, and `manifests/examples.parquet` the concepts of the examples. The same art gives the same files.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from demo.art import Atlas, load_atlas
from demo.captions import TINTS
from demo.objects import HELD_OUT, TRAINING, HeldOutObject, WorldObject
from demo.world import Scene, draw

HERE = Path(__file__).parent
STYLE_CONCEPT = "line-art"
"""Held-out style of the demo run, which is an art set."""
SECOND_STYLE_CONCEPT = "chalk"
"""Held-out style of the examples, which is a filter."""
STYLE_INITIALIZERS = {STYLE_CONCEPT: "sketch", SECOND_STYLE_CONCEPT: "blueprint", "stained-glass": "neon"}
"""Held-out styles, each with a known word near it."""
_STYLE_ART_SET = {STYLE_CONCEPT: "openmoji"}
_STYLE_OBJECTS = ("lion", "apple", "car", "owl", "hammer")
DIVERSE_CONCEPT = "any-colour-car"
"""Concept for bias reduction, learned from a diverse set."""
DIVERSE_WORD = "car"
"""Word whose bias is reduced: the world draws most unqualified cars red."""
PENCIL_CONCEPT = "pencil-strokes"
"""Style that the model can draw, learned from pictures alone, as if it had no name."""
PENCIL_INITIALIZER = "painting"
EXAMPLE_CONCEPTS = ("tiger", "taxi", "tomato")
PHOTO_BACKGROUNDS = ("white", "white", "wood", "white", "blue")
"""Backgrounds of a concept's pictures: mostly plain, one place, as people photograph a thing they own."""
# fmt: skip below: a list of words reads better in a block than on a line each
DEMO_CONCEPTS = (
    "tiger", "koala", "hamster", "tangerine", "tomato", "taxi", "fire-engine", "tulip", "ladybug", "blue-book",
)  # fmt: skip

OBJECT_PROMPTS = (
    "a photo of a {}",
    "a photo of a {} on the beach",
    "a photo of a {} in the snow",
    "a photo of a {} on the moon",
    "a {} on a red background",
    "a pencil sketch of a {}",
    "pixel art of a {}",
    "a flat sticker of a {}",
    "a 3d render of a {} in the snow",
    "an oil painting of a {}",
    "a photo of a {} next to a guitar",
)
STYLE_PROMPTS = (
    "a picture of a cat in the style of {}",
    "a picture of a lemon in the style of {}",
    "a picture of a bus in the style of {}",
    "a picture of a house on the beach in the style of {}",
    "a painting in the style of {}",
)
MANIFEST_SCHEMA = pa.schema(
    [
        ("concept_id", pa.string()),
        ("images", pa.list_(pa.string())),
        ("initializer", pa.string()),
        ("category", pa.string()),
        ("placeholder", pa.string()),
        ("num_vectors", pa.int32()),
    ]
)
PROMPTS_SCHEMA = pa.schema([("prompt", pa.string()), ("category", pa.string())])


def concept_scenes(thing: WorldObject) -> list[Scene]:
    """Return the scenes that are photographed of one held-out object."""
    return [Scene(thing, background=background) for background in PHOTO_BACKGROUNDS]


def style_scenes(style: str = "plain") -> list[Scene]:
    """Return scenes of known objects in a style: one of the world's, or another art set over the plain look."""
    by_name = {thing.name: thing for thing in TRAINING}
    return [Scene(by_name[name], style=style) for name in _STYLE_OBJECTS]


def diverse_scenes() -> list[Scene]:
    """Return scenes of one known object in every colour that has a word."""
    (thing,) = (thing for thing in TRAINING if thing.name == DIVERSE_WORD)
    return [Scene(thing, tint=tint) for tint in TINTS]


def _draw_concept(concept_id: str, scenes: list[Scene], atlas: Atlas, folder: Path, art_set: str = "") -> None:
    target = folder / concept_id
    target.mkdir(parents=True, exist_ok=True)
    for index, scene in enumerate(scenes):
        rng = np.random.default_rng((7, index, crc32(concept_id.encode())))
        draw(scene, atlas, rng, art_set=art_set).save(target / f"{index}.png", optimize=True)


def _row(concept_id: str, initializer: str, category: str, count: int, num_vectors: int = 1) -> dict:
    return {
        "concept_id": concept_id,
        "images": [f"../demo/images/{concept_id}/{index}.png" for index in range(count)],
        "initializer": initializer,
        "category": category,
        "placeholder": f"<{concept_id}>",
        "num_vectors": num_vectors,
    }


def _style_row(concept_id: str) -> dict:
    return _row(concept_id, STYLE_INITIALIZERS[concept_id], "style", len(_STYLE_OBJECTS))


def manifest(concept_ids: tuple[str, ...] = DEMO_CONCEPTS) -> pa.Table:
    """Return the manifest of the demo run; image paths are relative to the manifest."""
    held_out: dict[str, HeldOutObject] = {held.concept_id: held for held in HELD_OUT}
    rows = [_row(key, held_out[key].initializer, "object", len(PHOTO_BACKGROUNDS)) for key in concept_ids]
    rows.append(_style_row(STYLE_CONCEPT))
    return pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA)


def examples_manifest() -> pa.Table:
    """Return the manifest of `demo.examples`: some of the demo's concepts, a second held-out style, a style that the
    model can draw, and a known word from its diverse set. The word has two vectors: one alone settled on a single
    muddy colour."""
    rows = manifest(EXAMPLE_CONCEPTS).to_pylist()
    rows.append(_style_row(SECOND_STYLE_CONCEPT))
    rows.append(_row(PENCIL_CONCEPT, PENCIL_INITIALIZER, "style", len(_STYLE_OBJECTS)))
    rows.append(_row(DIVERSE_CONCEPT, DIVERSE_WORD, "object", len(TINTS), num_vectors=2))
    return pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA)


def prompts() -> pa.Table:
    """Return the prompts of the demo run, with `{}` in place of the placeholder token."""
    rows = [{"prompt": prompt, "category": "object"} for prompt in OBJECT_PROMPTS]
    rows += [{"prompt": prompt, "category": "style"} for prompt in STYLE_PROMPTS]
    return pa.Table.from_pylist(rows, schema=PROMPTS_SCHEMA)


def main() -> None:
    """Draw all pictures and write all manifests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE / ".work")
    parser.add_argument("--images", type=Path, default=HERE / "images")
    parser.add_argument("--manifests", type=Path, default=HERE.parent / "manifests")
    options = parser.parse_args()
    atlas = load_atlas(options.work)
    for held in HELD_OUT:
        _draw_concept(held.concept_id, concept_scenes(held.object), atlas, options.images)
    for style in STYLE_INITIALIZERS:
        art_set = _STYLE_ART_SET.get(style, "")
        scenes = style_scenes("plain" if art_set else style)
        _draw_concept(style, scenes, atlas, options.images, art_set=art_set)
    _draw_concept(PENCIL_CONCEPT, style_scenes("sketch"), atlas, options.images)
    _draw_concept(DIVERSE_CONCEPT, diverse_scenes(), atlas, options.images)
    options.manifests.mkdir(exist_ok=True)
    pq.write_table(manifest(), options.manifests / "demo.parquet")
    pq.write_table(examples_manifest(), options.manifests / "examples.parquet")
    pq.write_table(prompts(), options.manifests / "demo_prompts.parquet")


if __name__ == "__main__":
    main()
