"""Measure what a feature extractor sees in the demo world: `python -m demo.sensitivity`.

Every held-out object is drawn anew, in poses and places that no photo in `demo/images` shows. The first table says how
often such a scene is nearer to the photos of its own object than to those of every other one. For the second table a
scene is changed; scene and changed copy are compared with another pose of the same object on white. `noticed` is the
share of scenes whose changed copy is farther from that pose than the scene itself, 50 % for an extractor that is blind
to the change. `loss` is what the change takes from the cosine, as a share of what another object takes from it.

The art is that of `demo.art`. `--outside` adds EfficientNet-Lite0, trained on photographs (extra `perceptual`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from demo.art import Atlas, load_atlas
from demo.captions import BACKGROUNDS
from demo.objects import HELD_OUT
from demo.perceptual import Features, efficientnet
from demo.world import ART_SET_OF_STYLE, STYLES, Scene, draw
from textual_inversion.extractors import load_extractor
from textual_inversion.fidelity import psnr, to_array
from textual_inversion.photos import open_photo

HERE = Path(__file__).parent
PART_PX = 12
"""Side of the square that is erased from an object, px."""
SYMMETRIC_DB = 18.0
"""PSNR between a picture and its mirror image above which the object counts as symmetric: its mirror image shows
hardly anything else than another pose does."""
_BLUR_PX = 1.0
_POSES = 8
_SCENES_PER_KIND = 4
_WHITE = 250
"""Level from which a pixel of a white scene counts as background."""

Change = Callable[[Image.Image, np.random.Generator], Image.Image]


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """Fresh scenes of one held-out object, and its committed photos."""

    photos: list[Image.Image]
    scenes: dict[str, list[Image.Image]]
    """Kind ("white ground", "other ground" or "other style", a filter over the drawing) -> scenes. The white ones
    differ by pose alone."""


def erase_part(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Return the picture with a white square of `PART_PX` around a random point of the object, on a white ground."""
    levels = np.asarray(picture.convert("RGB"))
    rows, columns = np.nonzero(levels.min(2) < _WHITE)
    point = rng.integers(len(rows))
    top, left = rows[point] - PART_PX // 2, columns[point] - PART_PX // 2
    changed = picture.copy()
    changed.paste((255, 255, 255), (int(left), int(top), int(left) + PART_PX, int(top) + PART_PX))
    return changed


def turn_hue(picture: Image.Image, _: np.random.Generator) -> Image.Image:
    """Return the picture with every hue turned by a sixth of the circle."""
    hue, saturation, value = picture.convert("HSV").split()
    turned = hue.point(lambda level: (level + 43) % 256)
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


CHANGES: dict[str, Change] = {
    "mirrored": lambda picture, _: ImageOps.mirror(picture),
    "a part erased": erase_part,
    "blurred": lambda picture, _: picture.filter(ImageFilter.GaussianBlur(_BLUR_PX)),
    "hues turned": turn_hue,
}


def photos_of(concept_id: str) -> list[Image.Image]:
    """Return the committed photos of a held-out object."""
    return [open_photo(path.read_bytes()) for path in sorted((HERE / "images" / concept_id).glob("*.png"))]


def draw_objects(atlas: Atlas, seed: int) -> dict[str, Drawn]:
    """Return concept id -> its fresh scenes and its photos, for every held-out object."""
    others = [name for name in BACKGROUNDS if name != "white"]
    styles = [name for name in STYLES if name != "plain" and name not in ART_SET_OF_STYLE]
    found = {}
    for number, held in enumerate(HELD_OUT):
        rng = np.random.default_rng((seed, number))
        kinds = {
            "white ground": [Scene(held.object)] * _POSES,
            "other ground": [Scene(held.object, background=each) for each in rng.choice(others, _SCENES_PER_KIND)],
            "other style": [Scene(held.object, style=each) for each in rng.choice(styles, _SCENES_PER_KIND)],
        }
        found[held.concept_id] = Drawn(
            photos=photos_of(held.concept_id),
            scenes={kind: [draw(scene, atlas, rng) for scene in scenes] for kind, scenes in kinds.items()},
        )
    return found


def likeness_table(objects: dict[str, Drawn], extractors: dict[str, Features]) -> str:
    """Return the first table: cosines of white scenes to own and other photos, and top-1 of every kind of scene."""
    kinds = list(next(iter(objects.values())).scenes)
    lines = [f"| features | own photos | other photos | {' | '.join(f'top-1, {kind}' for kind in kinds)} |"]
    lines.append("|---" * (len(kinds) + 3) + "|")
    for name, features in extractors.items():
        photos = [_unit(features(drawn.photos)) for drawn in objects.values()]
        own_cosines, other_cosines, rates = [], [], []
        for kind in kinds:
            hits = []
            for number, drawn in enumerate(objects.values()):
                scenes = _unit(features(drawn.scenes[kind]))
                cosines = torch.stack([(scenes @ known.T).mean(1) for known in photos], 1)
                hits.append((cosines.argmax(1) == number).float())
                if kind == "white ground":
                    own_cosines.append(cosines[:, number].mean())
                    other_cosines.append((cosines.sum(1) - cosines[:, number]).mean() / (len(photos) - 1))
            rates.append(100 * torch.cat(hits).mean())
        cells = [f"{torch.stack(values).mean():.3f}" for values in (own_cosines, other_cosines)]
        lines.append(f"| {name} | {' | '.join([*cells, *(f'{rate:.1f} %' for rate in rates)])} |")
    return "\n".join(lines) + "\n"


def sensitivity_table(objects: dict[str, Drawn], extractors: dict[str, Features], seed: int) -> str:
    """Return the second table: for every change, the share of scenes where it is noticed and its loss."""
    poses = [drawn.scenes["white ground"] for drawn in objects.values()]
    rng = np.random.default_rng(seed)
    changed = {name: [[change(picture, rng) for picture in each] for each in poses] for name, change in CHANGES.items()}
    is_counted = {name: [name != "mirrored" or not is_symmetric(each[0]) for each in poses] for name in CHANGES}
    heads = [f"{name} ({sum(counted)} objects): noticed | loss" for name, counted in is_counted.items()]
    lines = [f"| features | {' | '.join(heads)} |", "|---" * (2 * len(CHANGES) + 1) + "|"]
    for name, features in extractors.items():
        known = [_unit(features(each)) for each in poses]
        centres = torch.stack([each.mean(0) for each in known])
        cells = []
        for change, of_object in changed.items():
            noticed, losses = [], []
            for number, pictures in enumerate(of_object):
                if is_counted[change][number]:
                    same, after = _to_next_pose(known[number], _unit(features(pictures)))
                    others = (known[number] @ centres.T).mean(0)
                    other = (others.sum() - others[number]) / (len(others) - 1)
                    noticed.append((after < same).float().mean())
                    losses.append((same - after).mean() / (same.mean() - other))
            cells.append(f"{100 * torch.stack(noticed).mean():.0f} % | {torch.stack(losses).mean():.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def is_symmetric(picture: Image.Image) -> bool:
    """Return True for a picture that is `SYMMETRIC_DB` or nearer to its mirror image."""
    pixels = to_array(picture, picture.size)[None]
    return float(psnr(pixels, pixels.flip(2))) >= SYMMETRIC_DB


def _to_next_pose(known: Tensor, changed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosines [poses] of each scene, and of its changed copy, to the next pose of the same object."""
    following = known.roll(-1, 0)
    return (known * following).sum(1), (changed * following).sum(1)


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=1)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("extractors", nargs="*", default=[str(HERE / "clip"), str(HERE / "moco")], help="directories")
    parser.add_argument("--outside", action="store_true", help="add EfficientNet-Lite0")
    parser.add_argument("--work", type=Path, default=HERE / ".work", help="folder with the atlas of art")
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    extractors: dict[str, Features] = {
        "/".join(Path(path).parts[-2:]): load_extractor(path, "cpu").images for path in options.extractors
    }
    if options.outside:
        extractors["EfficientNet-Lite0"] = efficientnet()
    objects = draw_objects(load_atlas(options.work), options.seed)
    sys.stdout.write(likeness_table(objects, extractors) + "\n" + sensitivity_table(objects, extractors, options.seed))


if __name__ == "__main__":
    main()
