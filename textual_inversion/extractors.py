"""Pictures and texts -> features of a frozen judge model. The scores made from them are in `metrics`."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizerFast
from transformers.utils import cached_file

# Radford et al. 2021's own, for a directory that does not state them
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_CHUNK = 32


class ClipExtractor:
    """CLIP image and text features (Radford et al. 2021) from any transformers `CLIPModel`, in float32.

    Threads may share one extractor.
    """

    def __init__(self, model: str, device: str = "auto") -> None:
        """`model`: a directory or hub id with safetensors weights and its own tokenizer; its
        `preprocessor_config.json`, if it has one, sets size, mean and deviation. Raises ValueError if it has not."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            clip: Any = CLIPModel.from_pretrained(model, use_safetensors=True, dtype=torch.float32)
            self._tokenizer: Any = CLIPTokenizerFast.from_pretrained(model)
        except (OSError, TypeError) as error:
            raise ValueError(
                f"cannot load a CLIP model from {model!r} ({error}); give a directory or hub id with config.json, "
                ".safetensors weights and tokenizer files"
            ) from error
        self._clip = clip.requires_grad_(False).eval().to(device)
        self._device = torch.device(device)
        self._length = min(self._tokenizer.model_max_length, clip.config.text_config.max_position_embeddings)
        self._lock = threading.Lock()  # tokenizing first sets a mode on the shared tokenizer

        settings = _preprocessor_settings(model)
        self._side: int = clip.config.vision_config.image_size
        self._resize_px = _edge(settings.get("size"), self._side)
        self._mean = torch.tensor(settings.get("image_mean", _CLIP_MEAN)).view(3, 1, 1)
        self._std = torch.tensor(settings.get("image_std", _CLIP_STD)).view(3, 1, 1)

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """[n, dim] unit-norm features on the CPU."""
        chunks = []
        for start in range(0, len(pictures), _CHUNK):
            pixels = torch.stack([self._pixels(picture) for picture in pictures[start : start + _CHUNK]])
            with torch.no_grad():
                # through the parts: what get_image_features returns differs between transformers 4 and 5
                pooled = self._clip.vision_model(pixel_values=pixels.to(self._device)).pooler_output
                chunks.append(self._clip.visual_projection(pooled))
        return self._unit(chunks)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """[n, dim] unit-norm features on the CPU. A text too long for the model is cut, as CLIP-T always did."""
        chunks = []
        for start in range(0, len(texts), _CHUNK):
            with self._lock:
                tokens = self._tokenizer(
                    list(texts[start : start + _CHUNK]), padding="max_length", truncation=True,
                    max_length=self._length, return_tensors="pt",
                )  # fmt: skip
            with torch.no_grad():
                pooled = self._clip.text_model(
                    input_ids=tokens.input_ids.to(self._device), attention_mask=tokens.attention_mask.to(self._device)
                ).pooler_output
                chunks.append(self._clip.text_projection(pooled))
        return self._unit(chunks)

    def _unit(self, chunks: Sequence[Tensor]) -> Tensor:
        if not chunks:
            return torch.empty(0, self._clip.config.projection_dim)
        return F.normalize(torch.cat(list(chunks)), dim=1).cpu()

    def _pixels(self, picture: Image.Image) -> Tensor:
        """CLIP's preprocessing: shorter edge resized (bicubic), centre cropped, normalised; [3, side, side]."""
        picture = picture.convert("RGB")
        scale = self._resize_px / min(picture.size)
        width, height = (max(self._resize_px, int(edge * scale)) for edge in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self._side) // 2, (height - self._side) // 2
        picture = picture.crop((left, top, left + self._side, top + self._side))
        levels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        pixels = levels.view(self._side, self._side, 3).permute(2, 0, 1).float() / 255
        return (pixels - self._mean) / self._std


def _preprocessor_settings(model: str) -> Mapping[str, Any]:
    path = cached_file(model, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    if path is None:
        return {}
    settings: Mapping[str, Any] = json.loads(Path(path).read_text())
    return settings


def _edge(size: Any, default: int) -> int:
    """The shorter edge to resize to, px, from either form that image processor configs have."""
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size.get("height")
    return int(size or default)
