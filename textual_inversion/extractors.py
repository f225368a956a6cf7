"""Pictures and texts -> features of a frozen judge model. The scores made from them are in `metrics`.

Which judge a directory or hub id holds is read off its config.json; how it wants its pictures, off its
preprocessor_config.json.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoTokenizer
from transformers.utils import cached_file

_CHUNK = 32
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
_BILINEAR, _BICUBIC = 2, 3
_CLIP_COLOURS = {"image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711)}
_HALF_COLOURS = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kind:
    """A row of data for each `model_type`: where its features come out, and what its preprocessing defaults to."""

    image_features: Callable[[Any, Tensor], Tensor]
    text_features: Callable[[Any, Tensor, Tensor], Tensor] | None = None
    options: Mapping[str, Any]
    """For loading."""
    preprocessing: Mapping[str, Any]
    """Of keys that a directory does not state, as transformers' own image processor of this kind has them."""


# Features come through the models' parts: what get_image_features returns differs between transformers 4 and 5.


def _clip_images(model: Any, pixels: Tensor) -> Tensor:
    return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)  # type: ignore[no-any-return]


def _clip_texts(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    pooled = model.text_model(input_ids=ids, attention_mask=mask).pooler_output
    return model.text_projection(pooled)  # type: ignore[no-any-return]


def _siglip_images(model: Any, pixels: Tensor) -> Tensor:
    return model.vision_model(pixel_values=pixels).pooler_output  # type: ignore[no-any-return]


def _siglip_texts(model: Any, ids: Tensor, _mask: Tensor) -> Tensor:
    """Without a mask: SigLIP was trained to see the padding."""
    return model.text_model(input_ids=ids).pooler_output  # type: ignore[no-any-return]


def _class_token(model: Any, pixels: Tensor) -> Tensor:
    """The class token after the last norm: the feature of Caron et al. 2021 (DINO) and of DINOv2."""
    return model(pixel_values=pixels).last_hidden_state[:, 0]  # type: ignore[no-any-return]


_DINOV2 = _Kind(
    image_features=_class_token, options={},
    preprocessing={"resample": _BICUBIC, "do_center_crop": True, **_CLIP_COLOURS},
)  # fmt: skip
_KINDS: Mapping[str, _Kind] = {
    "clip": _Kind(
        image_features=_clip_images, text_features=_clip_texts, options={},
        preprocessing={"resample": _BICUBIC, "do_center_crop": True, **_CLIP_COLOURS},
    ),
    "siglip": _Kind(
        image_features=_siglip_images, text_features=_siglip_texts, options={},
        preprocessing={"resample": _BICUBIC, "do_center_crop": False, **_HALF_COLOURS},
    ),
    "vit": _Kind(
        image_features=_class_token, options={"add_pooling_layer": False},
        preprocessing={"resample": _BILINEAR, "do_center_crop": False, **_HALF_COLOURS},
    ),
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
}  # fmt: skip


class ImageExtractor:
    """Image features of any CLIP (Radford et al. 2021), SigLIP, DINO or DINOv2 in transformers layout, in float32.

    Threads may share one extractor.
    """

    def __init__(self, model: str, device: str = "auto") -> None:
        """`model`: a directory or hub id with config.json and safetensors weights. Raises ValueError if it has not."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._kind = _kind_of(model)
        try:
            network: Any = AutoModel.from_pretrained(
                model, use_safetensors=True, trust_remote_code=False, dtype=torch.float32, **self._kind.options
            )
        except (OSError, TypeError) as error:
            raise _cannot_load(model, error) from error
        self._model = network.requires_grad_(False).eval().to(device)
        self._device = torch.device(device)
        config = network.config
        self._preprocessing = _Preprocessing.of(model, self._kind, getattr(config, "vision_config", config).image_size)

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """[n, dim] unit-norm features on the CPU; [0, 0] of no pictures."""
        chunks = []
        for start in range(0, len(pictures), _CHUNK):
            pixels = torch.stack([self._preprocessing(picture) for picture in pictures[start : start + _CHUNK]])
            with torch.no_grad():
                chunks.append(self._kind.image_features(self._model, pixels.to(self._device)))
        return _unit(chunks)

    def pixel_features(self, pixels: Tensor) -> Tensor:
        """[batch, 3, height, width] in [-1, 1] -> [batch, dim] features, not of unit norm, through which gradients
        reach the pixels. Torch resizes here, and PIL in `images`: cosines between the two are near 1, not 1."""
        features = self._kind.image_features(self._model, self._preprocessing.tensor(pixels.to(self._device)))
        return features.to(pixels.device)


class ClipExtractor(ImageExtractor):
    """The same with text features in the same space, for CLIP-T: CLIP, or SigLIP in its place."""

    def __init__(self, model: str, device: str = "auto") -> None:
        """`model` needs tokenizer files, too. Raises ValueError if it has none or knows no texts."""
        super().__init__(model, device)
        if self._kind.text_features is None:
            name = self._model.config.model_type
            raise ValueError(f"{model!r} is a {name} model, which knows no texts; CLIP-T needs a CLIP or SigLIP")
        self._text_features = self._kind.text_features
        if not any(_file(model, name) for name in _TOKENIZER_FILES):
            # transformers 5 would make an empty tokenizer, and every text would be the same
            raise ValueError(f"{model!r} has no tokenizer file ({', '.join(_TOKENIZER_FILES)})")
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        except (OSError, TypeError, ValueError, ImportError) as error:  # SigLIP's own needs the sentencepiece package
            raise ValueError(f"cannot load the tokenizer of {model!r} ({error})") from error
        positions = self._model.config.text_config.max_position_embeddings
        self._length = min(self._tokenizer.model_max_length, positions)
        self._lock = threading.Lock()  # tokenizing first sets a mode on the shared tokenizer

    def texts(self, texts: Sequence[str]) -> Tensor:
        """[n, dim] unit-norm features on the CPU. A text too long for the model is cut, as CLIP-T always did."""
        chunks = []
        for start in range(0, len(texts), _CHUNK):
            with self._lock:
                tokens = self._tokenizer(
                    list(texts[start : start + _CHUNK]), padding="max_length", truncation=True,
                    max_length=self._length, return_tensors="pt", return_attention_mask=True,
                )  # fmt: skip
            ids, mask = tokens.input_ids.to(self._device), tokens.attention_mask.to(self._device)
            with torch.no_grad():
                chunks.append(self._text_features(self._model, ids, mask))
        return _unit(chunks)


def load_extractor(model: str, device: str = "auto") -> ImageExtractor:
    """Whatever judge the directory or hub id holds, a ClipExtractor if it knows texts. Raises ValueError if none."""
    return ClipExtractor(model, device) if _kind_of(model).text_features else ImageExtractor(model, device)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Preprocessing:
    """A picture -> the pixels a judge was trained on, as transformers' PIL image processors make them."""

    size: tuple[int, ...]
    """(height, width), or (shorter edge,), px."""
    crop: tuple[int, int] | None
    resample: Image.Resampling
    scale: float
    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, model: str, kind: _Kind, image_size: int) -> _Preprocessing:
        """By the model's preprocessor_config.json, and its kind's defaults where it says nothing."""
        stated = _read_json(model, "preprocessor_config.json") or {}
        settings: dict[str, Any] = {**kind.preprocessing, **stated}
        crops = bool(settings["do_center_crop"])
        size = settings.get("size") or image_size
        if isinstance(size, int):  # the old form: CLIP's shorter edge, everybody else's square
            size = {"shortest_edge": size} if crops else {"height": size, "width": size}
        shorter = size.get("shortest_edge")
        if settings.get("do_normalize", True):
            mean, std = settings["image_mean"], settings["image_std"]
        else:
            mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        return cls(
            size=(int(shorter),) if shorter else (int(size["height"]), int(size["width"])),
            crop=_height_width(settings.get("crop_size") or image_size) if crops else None,
            resample=Image.Resampling(settings["resample"]),
            scale=settings.get("rescale_factor", 1 / 255),
            mean=torch.tensor(mean).view(3, 1, 1),
            std=torch.tensor(std).view(3, 1, 1),
        )

    def __call__(self, picture: Image.Image) -> Tensor:
        """[3, height, width]."""
        picture = picture.convert("RGB")
        picture = picture.resize(self._target(*picture.size), self.resample)
        if self.crop:
            height, width = self.crop
            left, top = (picture.width - width) // 2, (picture.height - height) // 2
            picture = picture.crop((left, top, left + width, top + height))
        levels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        pixels = levels.view(picture.height, picture.width, 3).permute(2, 0, 1).float() * self.scale
        return (pixels - self.mean) / self.std

    def tensor(self, pixels: Tensor) -> Tensor:
        """The same of pixels [batch, 3, height, width] in [-1, 1], with gradients."""
        width, height = self._target(pixels.shape[3], pixels.shape[2])
        mode = "bilinear" if self.resample == Image.Resampling.BILINEAR else "bicubic"
        levels = F.interpolate((pixels + 1) / 2, size=(height, width), mode=mode, antialias=True).clamp(0, 1)
        if self.crop:
            top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
            levels = levels[:, :, top : top + self.crop[0], left : left + self.crop[1]]
        return (levels * 255 * self.scale - self.mean.to(pixels.device)) / self.std.to(pixels.device)

    def _target(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) to resize to."""
        if len(self.size) == 2:
            return self.size[1], self.size[0]
        edge, shorter = self.size[0], min(width, height)
        width, height = (edge if side == shorter else edge * side // shorter for side in (width, height))
        return width, height


def _kind_of(model: str) -> _Kind:
    try:
        config = _read_json(model, "config.json")
    except OSError as error:  # no such hub id, or no network
        raise _cannot_load(model, error) from error
    if config is None:
        raise _cannot_load(model, "no config.json")
    model_type = str(config.get("model_type"))
    if model_type not in _KINDS:
        raise ValueError(f"{model!r} is a {model_type!r} model; a judge is one of {', '.join(_KINDS)}")
    return _KINDS[model_type]


def _cannot_load(model: str, cause: object) -> ValueError:
    return ValueError(
        f"cannot load a judge model from {model!r} ({cause}); give a directory or hub id with config.json and "
        ".safetensors weights"
    )


def _file(model: str, name: str) -> Path | None:
    """A file of the model's; None when there is no such file."""
    path = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
    return Path(path) if path else None


def _read_json(model: str, name: str) -> dict[str, Any] | None:
    path = _file(model, name)
    return json.loads(path.read_text()) if path else None


def _height_width(size: int | Mapping[str, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size["height"]), int(size["width"]))


def _unit(chunks: Sequence[Tensor]) -> Tensor:
    return F.normalize(torch.cat(list(chunks)), dim=1).cpu() if chunks else torch.empty(0, 0)
