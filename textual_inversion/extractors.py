"""Features of pictures and texts, computed by a frozen feature extractor: CLIP, SigLIP, DINO, DINOv2 or a ResNet.

The model's config.json says which kind a directory or hub id holds, its preprocessor_config.json how pictures are
prepared. The scores computed from features are in `metrics`.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoTokenizer
from transformers.utils import cached_file

from textual_inversion.errors import first_line
from textual_inversion.model_files import check_hub_id
from textual_inversion.preprocessing import Preprocessing
from textual_inversion.transfer import to_device
from textual_inversion.weights import load_pretrained

_BATCH_SIZE = 32
"""Pictures or texts in one forward pass."""
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
_BILINEAR = 2
_BICUBIC = 3
_CLIP_COLOURS = {"image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711)}
_HALF_COLOURS = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
_DEFAULT_SIDE_PX = 224
"""Side of the pixels of a model whose configuration names none, as a convolutional network's."""
_UNUSED = [r"^(classifier|pooler)\."]
"""Heads behind the class token of a ViT or DINOv2 checkpoint; features are read before them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _ModelKind:
    """Properties of one `model_type`: how to load it, and where its features come out."""

    image_features: Callable[[Any, Tensor], tuple[Tensor, Tensor]]
    """Function of the model and pixels [batch, 3, height, width] that returns features [batch, dim] and the last
    states: of tokens [batch, tokens, dim], those of the patches last, or a map [batch, dim, rows, columns]."""
    text_features: Callable[[Any, Tensor, Tensor], Tensor] | None = None
    """Function of the model, token ids and attention mask [batch, tokens] that returns features [batch, dim]; None for
    a kind without a text encoder."""
    load_options: Mapping[str, Any]
    """Keyword arguments for `from_pretrained`."""
    preprocessing: Mapping[str, Any]
    """Entries for those missing in preprocessor_config.json, as transformers' own image processor has them."""


# Features are read from the models' parts: what get_image_features returns differs between transformers 4 and 5.


def _clip_images(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    output = model.vision_model(pixel_values=pixels)
    return model.visual_projection(output.pooler_output), output.last_hidden_state


def _clip_texts(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    pooled = model.text_model(input_ids=ids, attention_mask=mask).pooler_output
    return model.text_projection(pooled)  # type: ignore[no-any-return]


def _siglip_images(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    output = model.vision_model(pixel_values=pixels)
    return output.pooler_output, output.last_hidden_state


def _siglip_texts(model: Any, ids: Tensor, _mask: Tensor) -> Tensor:
    """Return text features computed without the mask: SigLIP was trained to see the padding."""
    return model.text_model(input_ids=ids).pooler_output  # type: ignore[no-any-return]


def _class_token(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Take the class token after the last norm: the feature of Caron et al. 2021 (DINO) and of DINOv2."""
    states = model(pixel_values=pixels).last_hidden_state
    return states[:, 0], states


def _pooled_map(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Take the mean of the last feature map: the feature of a ResNet in MoCo (He et al. 2020) and in DINO."""
    output = model(pixel_values=pixels)
    return output.pooler_output.flatten(1), output.last_hidden_state


_DINOV2 = _ModelKind(
    image_features=_class_token,
    load_options={},
    preprocessing={"resample": _BICUBIC, "do_center_crop": True, **_CLIP_COLOURS},
)
_MODEL_KINDS: Mapping[str, _ModelKind] = {
    "clip": _ModelKind(
        image_features=_clip_images,
        text_features=_clip_texts,
        load_options={},
        preprocessing={"resample": _BICUBIC, "do_center_crop": True, **_CLIP_COLOURS},
    ),
    "siglip": _ModelKind(
        image_features=_siglip_images,
        text_features=_siglip_texts,
        load_options={},
        preprocessing={"resample": _BICUBIC, "do_center_crop": False, **_HALF_COLOURS},
    ),
    "vit": _ModelKind(
        image_features=_class_token,
        load_options={"add_pooling_layer": False},
        preprocessing={"resample": _BILINEAR, "do_center_crop": False, **_HALF_COLOURS},
    ),
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
    "resnet": _ModelKind(
        image_features=_pooled_map,
        load_options={},
        preprocessing={"resample": _BICUBIC, "do_center_crop": False, "crop_pct": 0.875, **_HALF_COLOURS},
    ),
}


class ImageExtractor:
    """Image features of a CLIP (Radford et al. 2021), SigLIP, DINO, DINOv2 or ResNet in transformers layout, in
    float32.

    Threads may share one extractor.
    """

    def __init__(self, model: str, device: str = "auto") -> None:
        """Load a directory or hub id with config.json and safetensors weights. Raises ValueError if it is not one."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._kind = _kind_of(model)
        try:
            network: Any = load_pretrained(
                AutoModel,
                model,
                unused=_UNUSED,
                trust_remote_code=False,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # so that the error can name them
                **self._kind.load_options,
            )
        except (OSError, TypeError) as error:
            raise _cannot_load(model, error) from error
        self._model = network.requires_grad_(False).eval().to(device)
        self._device = torch.device(device)
        stated = _read_json(model, "preprocessor_config.json") or {}
        image_size = getattr(getattr(network.config, "vision_config", network.config), "image_size", _DEFAULT_SIDE_PX)
        self._preprocessing = Preprocessing.from_settings({**self._kind.preprocessing, **stated}, image_size)

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return the pictures' features, [n, dim], of unit norm and on the CPU; [0, 0] for no pictures."""
        return _unit_norm([features for features, _ in self._passes(pictures)])

    def images_and_patches(self, pictures: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Return the pictures' features as `images` does, [n, dim], and the states of their patches as maps, [n, width,
        rows, columns], on the CPU. There must be a picture."""
        features, states = zip(*self._passes(pictures), strict=True)
        return _unit_norm(features), torch.cat([_patch_map(each) for each in states]).cpu()

    def pixel_features(self, pixels: Tensor) -> Tensor:
        """Return features [batch, dim], not of unit norm, through which gradients reach the pixels.

        pixels: [batch, 3, height, width] in [-1, 1]. Torch resizes them here, and PIL in `images`: the cosine between
        the two features of one picture is near 1, not 1.
        """
        features, _ = self._kind.image_features(self._model, self._preprocessing.tensor(pixels.to(self._device)))
        return features.to(pixels.device)

    def _passes(self, pictures: Sequence[Image.Image]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield features and last states of the pictures, one forward pass after the other."""
        for start in range(0, len(pictures), _BATCH_SIZE):
            pixels = torch.stack([self._preprocessing(picture) for picture in pictures[start : start + _BATCH_SIZE]])
            with torch.no_grad():
                yield self._kind.image_features(self._model, to_device(pixels, self._device))


class ClipExtractor(ImageExtractor):
    """Image features and text features in one space, for CLIP-T: those of a CLIP, or of a SigLIP in its place."""

    def __init__(self, model: str, device: str = "auto") -> None:
        """Load a model and its tokenizer. Raises ValueError if it has no text encoder or no tokenizer files."""
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
            raise ValueError(f"cannot load the tokenizer of {model!r} ({first_line(error)})") from error
        positions = self._model.config.text_config.max_position_embeddings
        self._max_length = min(self._tokenizer.model_max_length, positions)
        self._lock = threading.Lock()  # tokenizing first sets a mode on the shared tokenizer

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Return the texts' features, [n, dim], of unit norm and on the CPU.

        A text too long for the model is cut, as is usual for CLIP-T.
        """
        features = []
        for start in range(0, len(texts), _BATCH_SIZE):
            with self._lock:
                tokens = self._tokenizer(
                    list(texts[start : start + _BATCH_SIZE]),
                    padding="max_length",
                    truncation=True,
                    max_length=self._max_length,
                    return_tensors="pt",
                    return_attention_mask=True,
                )
            ids = to_device(tokens.input_ids, self._device)
            mask = to_device(tokens.attention_mask, self._device)
            with torch.no_grad():
                features.append(self._text_features(self._model, ids, mask))
        return _unit_norm(features)


def load_extractor(model: str, device: str = "auto") -> ImageExtractor:
    """Load a directory or hub id of any known kind, as a ClipExtractor if it has a text encoder.

    Raises ValueError if it holds no model of a known kind.
    """
    return ClipExtractor(model, device) if _kind_of(model).text_features else ImageExtractor(model, device)


def _kind_of(model: str) -> _ModelKind:
    try:
        if not Path(model).is_dir():
            check_hub_id(model)
        config = _read_json(model, "config.json")
    except (OSError, ValueError) as error:  # no hub id, no such model there, or no network
        raise _cannot_load(model, error) from error
    if config is None:
        raise _cannot_load(model, "no config.json")
    model_type = str(config.get("model_type"))
    if model_type not in _MODEL_KINDS:
        raise ValueError(
            f"{model!r} is a {model_type!r} model; a feature extractor is one of {', '.join(_MODEL_KINDS)}"
        )
    return _MODEL_KINDS[model_type]


def _cannot_load(model: str, cause: object) -> ValueError:
    return ValueError(
        f"cannot load a feature extractor from {model!r} ({cause}); give a directory or hub id with config.json and "
        ".safetensors weights"
    )


def _file(model: str, name: str) -> Path | None:
    """Return the path of a model's file, or None if the model has no such file."""
    path = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
    return Path(path) if path else None


def _read_json(model: str, name: str) -> dict[str, Any] | None:
    path = _file(model, name)
    return json.loads(path.read_text()) if path else None


def _patch_map(states: Tensor) -> Tensor:
    """Return the states of the patches as maps [batch, dim, rows, columns]: the last square number of tokens, behind
    class and register tokens; states that are a map are returned as they are."""
    if states.ndim == 4:
        return states
    batch, tokens, dim = states.shape
    side = math.isqrt(tokens)
    return states[:, -(side**2) :].transpose(1, 2).reshape(batch, dim, side, side)


def _unit_norm(features: Sequence[Tensor]) -> Tensor:
    """Concatenate features and scale each to unit norm, on the CPU."""
    return F.normalize(torch.cat(list(features)), dim=1).cpu() if features else torch.empty(0, 0)
