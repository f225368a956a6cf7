"""Features of every kind of extractor against transformers' own model and image processor, on tiny random models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tests.tiny_models import EXTRACTOR_PX as SIDE
from tests.tiny_models import tiny_extractor, tiny_tokenizer
from textual_inversion.extractors import ClipExtractor, ImageExtractor, load_extractor

TEXTS = ["a photo of a cat", "", "a painting in the style of " * 9]
PROCESSORS = {
    "clip": "CLIP", "siglip": "Siglip", "vit": "ViT", "dinov2": "Bit", "dinov2_with_registers": "Bit",
    "resnet": "ConvNext",
}  # fmt: skip
KINDS = list(PROCESSORS)


def processor(kind: str, **options: Any) -> Any:
    """transformers' PIL image processor of a kind, under the name this version has for it."""
    name = PROCESSORS[kind]
    cls = getattr(transformers, f"{name}ImageProcessorPil", None) or getattr(transformers, f"{name}ImageProcessor")
    if kind == "resnet":
        options = {"size": {"shortest_edge": 224}, **options}
    elif kind in ("clip", "dinov2", "dinov2_with_registers"):
        options = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}, **options}
    else:
        options = {"size": {"height": SIDE, "width": SIDE}, **options}
    return cls(**options)


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, tiny_extractor(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_extractor("clip", tmp_path_factory.mktemp("a-clip"))


@pytest.fixture
def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0)
    sizes = [(SIDE, SIDE), (64, 48), (40, 70), (16, 20)]
    return [Image.fromarray(noise.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def their_image_features(kind: str, directory: Path, pixels: torch.Tensor) -> torch.Tensor:
    """What each family's own forward pass gives, unit length."""
    model = transformers.AutoModel.from_pretrained(directory).eval()
    with torch.no_grad():
        if kind in ("clip", "siglip"):
            ids = torch.tensor([[3, 4, 5]])
            return model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels).image_embeds
        output = model(pixel_values=pixels)
    feature = output.last_hidden_state[:, 0] if kind == "vit" else output.pooler_output
    return torch.nn.functional.normalize(feature.flatten(1), dim=1)


def test_image_features_equal_transformers_own(model: tuple[str, Path], pictures: list[Image.Image]) -> None:
    kind, directory = model
    settings = processor(kind)
    if kind == "vit":
        settings.resample = Image.Resampling.BILINEAR
    pixels = settings(pictures, return_tensors="pt")["pixel_values"]
    extractor = load_extractor(str(directory), device="cpu")
    assert isinstance(extractor, ClipExtractor) == (kind in ("clip", "siglip"))
    torch.testing.assert_close(
        extractor.images(pictures), their_image_features(kind, directory, pixels), rtol=0, atol=1e-5
    )


def test_patches_are_a_map_of_the_last_states(model: tuple[str, Path], pictures: list[Image.Image]) -> None:
    kind, directory = model
    extractor = load_extractor(str(directory), device="cpu")
    features, patches = extractor.images_and_patches(pictures)
    assert torch.equal(features, extractor.images(pictures))
    side = patches.shape[2]
    assert patches.shape[0] == len(pictures)
    assert patches.shape[3] == side
    if kind == "resnet":
        assert torch.allclose(torch.nn.functional.normalize(patches.mean((2, 3)), dim=1), features, atol=1e-5)
        return
    network = transformers.AutoModel.from_pretrained(directory).eval()
    vision = network.vision_model if kind in ("clip", "siglip") else network
    with torch.no_grad():
        pixels = torch.stack([extractor._preprocessing(picture) for picture in pictures])
        states = vision(pixel_values=pixels).last_hidden_state
    for row in range(side):
        for column in range(side):
            token = states.shape[1] - side**2 + row * side + column
            torch.testing.assert_close(patches[:, :, row, column], states[:, token], rtol=0, atol=1e-5)


def test_the_directorys_own_image_settings_are_used(model: tuple[str, Path], pictures: list[Image.Image]) -> None:
    kind, directory = model
    default = load_extractor(str(directory), device="cpu").images(pictures)
    size = {"size": {"shortest_edge": SIDE + 9}} if kind not in ("siglip", "vit") else {}
    settings = processor(kind, image_mean=[0.4] * 3, image_std=[0.3] * 3, resample=0, **size)
    settings.save_pretrained(directory)
    try:
        extractor = load_extractor(str(directory), device="cpu")
    finally:
        (directory / "preprocessor_config.json").unlink()
    theirs = their_image_features(kind, directory, settings(pictures, return_tensors="pt")["pixel_values"])
    torch.testing.assert_close(extractor.images(pictures), theirs, rtol=0, atol=1e-5)
    assert not torch.allclose(default, theirs, atol=1e-3)


@pytest.mark.parametrize(("side", "share"), [(48, 1.0), (100, 0.5), (384, 0.875)])
def test_a_share_of_the_picture_is_kept_as_transformers_does(
    side: int, share: float, tmp_path: Path, pictures: list[Image.Image]
) -> None:
    tiny_extractor("resnet", tmp_path)
    settings = processor("resnet", size={"shortest_edge": side}, crop_pct=share)
    settings.save_pretrained(tmp_path)
    pictures = pictures if side >= 384 else [picture.resize((90, 60)) for picture in pictures]
    theirs = their_image_features("resnet", tmp_path, settings(pictures, return_tensors="pt")["pixel_values"])
    ours = load_extractor(str(tmp_path), device="cpu").images(pictures)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_text_features_equal_transformers_own(kind: str, tmp_path: Path) -> None:
    tiny_extractor(kind, tmp_path)
    model = transformers.AutoModel.from_pretrained(tmp_path).eval()
    # SigLIP always sees its full length of padding, and no mask
    padding: Any = "max_length" if kind == "siglip" else True
    tokens = tiny_tokenizer()(TEXTS, padding=padding, truncation=True, max_length=20, return_tensors="pt")
    if kind == "siglip":
        del tokens["attention_mask"]
    with torch.no_grad():
        theirs = model(**tokens, pixel_values=torch.zeros(1, 3, SIDE, SIDE)).text_embeds
    torch.testing.assert_close(ClipExtractor(str(tmp_path), "cpu").texts(TEXTS), theirs, rtol=0, atol=1e-5)


def test_features_have_unit_norm_and_do_not_depend_on_company(clip: Path, pictures: list[Image.Image]) -> None:
    extractor = ClipExtractor(str(clip), device="cpu")
    many = extractor.images(pictures * 10)
    torch.testing.assert_close(many.norm(dim=1), torch.ones(40))
    torch.testing.assert_close(many[:4], extractor.images(pictures), rtol=0, atol=1e-6)
    assert extractor.images([]).shape == extractor.texts([]).shape == (0, 0)


def test_what_is_no_extractor_is_refused(clip: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot load a feature extractor from .*no config.json"):
        load_extractor(str(tmp_path), device="cpu")
    config = json.loads((clip / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"cannot load a feature extractor from .*safetensors"):
        load_extractor(str(tmp_path), device="cpu")
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "model_type": "bert", "auto_map": {"AutoModel": "x.Y"}})
    )
    with pytest.raises(ValueError, match=r"is a 'bert' model; a feature extractor is one of clip, siglip, vit, dinov2"):
        load_extractor(str(tmp_path), device="cpu")


def test_an_extractor_without_texts_is_no_clip(tmp_path: Path) -> None:
    tiny_extractor("dinov2", tmp_path)
    assert not hasattr(ImageExtractor(str(tmp_path), "cpu"), "texts")
    with pytest.raises(ValueError, match="is a dinov2 model, which knows no texts"):
        ClipExtractor(str(tmp_path), device="cpu")


def test_a_tokenizer_that_is_missing(tmp_path: Path) -> None:
    tiny_extractor("clip", tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="has no tokenizer file"):
        ClipExtractor(str(tmp_path), device="cpu")


def test_pixel_features_are_those_of_the_picture_and_can_be_differentiated(model: tuple[str, Path]) -> None:
    kind, directory = model
    extractor = ImageExtractor(str(directory), "cpu")
    ramp = np.linspace(0, 255, 48)
    picture = Image.fromarray(np.stack(np.broadcast_arrays(ramp, ramp[:, None], 128), 2).astype(np.uint8))
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
    pixels.requires_grad_()
    features = extractor.pixel_features(pixels)
    assert torch.cosine_similarity(features, extractor.images([picture])).item() > 0.995
    (grad,) = torch.autograd.grad(features.square().sum(), pixels)
    assert grad.isfinite().all()
    border = 4 if kind == "resnet" else 0  # of which the central crop leaves nothing
    assert (grad.abs().sum((0, 1))[border : 48 - border, border : 48 - border] > 0).all()
