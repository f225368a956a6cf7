"""The encoder that the demo ships: it belongs to the model and the extractor beside it, and knows what it is for."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from pipeline.inputs.manifest import ManifestRow, read_manifest
from pipeline.inputs.models import extractor_hash, model_hash
from textual_inversion.encoder import PhotoFeatures
from textual_inversion.encoder_file import load_encoder
from textual_inversion.encoder_header import check_encoder
from textual_inversion.extractors import load_extractor
from textual_inversion.families import load_backbone

ROOT = Path(__file__).resolve().parents[2]
DATA = (ROOT / "demo" / "encoder" / "encoder.safetensors").read_bytes()


def test_the_shipped_encoder_is_of_the_shipped_model() -> None:
    check_encoder(DATA, model_hash("demo/model"), extractor_hash("demo/clip"))


def test_it_relies_on_the_demos_objects_and_doubts_blank_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The objects are none that it was trained on."""
    monkeypatch.chdir(ROOT)
    backbone = load_backbone("demo/model", device="cpu", precision="float32")
    encoder = load_encoder(DATA, backbone, extractor_hash("demo/clip"))
    features = PhotoFeatures(backbone, load_extractor("demo/clip", "cpu"), encoder.network.config)
    rows = [row for row in read_manifest("manifests/demo.parquet") if isinstance(row, ManifestRow)]
    objects = [row.concept for row in rows if row.concept.category == "object"]
    assert len(objects) == 10
    for concept in objects:
        photos = [Image.open(path).convert("RGB") for path in concept.images]
        assert encoder.why_unreliable(concept, features(photos)) == ""
    blank = features([Image.new("RGB", (64, 64), "grey")])
    assert "the photos lie" in encoder.why_unreliable(objects[0], blank)
