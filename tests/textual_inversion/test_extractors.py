"""CLIP features against transformers' own model, tokenizer and image processor, on a tiny random CLIP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from tests.tiny_models import tiny_tokenizer
from textual_inversion.extractors import ClipExtractor

SIDE = 32
TEXTS = ["a photo of a cat", "", "a painting in the style of " * 9]


def processor(**options: Any) -> Any:
    """transformers' PIL image processor, under the name this version has for it."""
    cls = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    return cls(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, **options)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=20, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=8
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12)
    directory = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0)
    sizes = [(SIDE, SIDE), (64, 48), (40, 70), (16, 20)]
    return [Image.fromarray(noise.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def test_features_equal_transformers_own(directory: Path, pictures: list[Image.Image]) -> None:
    extractor = ClipExtractor(str(directory), device="cpu")
    model = CLIPModel.from_pretrained(directory).eval()
    tokens = tiny_tokenizer()(TEXTS, padding=True, truncation=True, max_length=20, return_tensors="pt")
    pixels = processor()(pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        theirs = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels)
    torch.testing.assert_close(extractor.images(pictures), theirs.image_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(extractor.texts(TEXTS), theirs.text_embeds, rtol=0, atol=1e-5)


def test_the_directorys_own_image_settings_are_used(directory: Path, pictures: list[Image.Image]) -> None:
    default = ClipExtractor(str(directory), device="cpu").images(pictures)
    path = directory / "preprocessor_config.json"
    path.write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": SIDE + 4}))
    try:
        extractor = ClipExtractor(str(directory), device="cpu")
    finally:
        path.unlink()
    settings = processor(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    settings.size = transformers.image_processing_utils.get_size_dict(SIDE + 4, default_to_square=False)
    pixels = settings(pictures, size={"shortest_edge": SIDE + 4}, return_tensors="pt")["pixel_values"]
    model = CLIPModel.from_pretrained(directory).eval()
    with torch.no_grad():
        tokens = tiny_tokenizer()(["a"], return_tensors="pt")
        theirs = model(**tokens, pixel_values=pixels).image_embeds
    torch.testing.assert_close(extractor.images(pictures), theirs, rtol=0, atol=1e-5)
    assert not torch.allclose(default, theirs, atol=1e-3)


def test_features_have_unit_norm_and_do_not_depend_on_company(directory: Path, pictures: list[Image.Image]) -> None:
    extractor = ClipExtractor(str(directory), device="cpu")
    many = extractor.images(pictures * 10)
    torch.testing.assert_close(many.norm(dim=1), torch.ones(40))
    torch.testing.assert_close(many[:4], extractor.images(pictures), rtol=0, atol=1e-6)
    assert extractor.images([]).shape == (0, 12)
    assert extractor.texts([]).shape == (0, 12)


def test_what_is_no_clip_is_refused(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot load a CLIP model from"):
        ClipExtractor(str(tmp_path), device="cpu")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"cannot load a CLIP model from .*safetensors"):
        ClipExtractor(str(tmp_path), device="cpu")
