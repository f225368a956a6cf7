"""The encoder that the demo ships: it belongs to the model and the extractor beside it."""

from __future__ import annotations

from pathlib import Path

from pipeline.inputs.models import extractor_hash, model_hash
from textual_inversion.encoder_file import check_encoder

ROOT = Path(__file__).resolve().parents[2]


def test_the_shipped_encoder_is_of_the_shipped_model() -> None:
    data = (ROOT / "demo" / "encoder" / "encoder.safetensors").read_bytes()
    check_encoder(data, model_hash("demo/model"), extractor_hash("demo/clip"))
