"""What is committed of the demo: model, judge, concept pictures and manifests fit each other and their limits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from demo.make_manifests import MANIFEST_SCHEMA, PROMPTS_SCHEMA, STYLE_INITIALIZERS, manifest, prompts
from demo.objects import HELD_OUT
from demo.tokenizer import MAX_LENGTH, load_tokenizer
from pipeline.inputs.models import extractor_hash
from pipeline.store.parquet import read_table
from textual_inversion.concept import Concept
from textual_inversion.encoder import PhotoFeatures, canonical_order
from textual_inversion.encoder_file import load_encoder
from textual_inversion.extractors import ClipExtractor
from textual_inversion.families import load_backbone

ROOT = Path(__file__).parents[2]
MODEL, CLIP, IMAGES = ROOT / "demo/model", ROOT / "demo/clip", ROOT / "demo/images"
ENCODER = ROOT / "demo/encoder/encoder.safetensors"
MANIFEST, PROMPTS = ROOT / "manifests/demo.parquet", ROOT / "manifests/demo_prompts.parquet"


def _size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(MODEL)


def test_the_encoder_knows_the_demos_objects_and_leaves_its_styles_alone() -> None:
    backbone = load_backbone(str(MODEL), device="cpu", precision="float32")
    data = ENCODER.read_bytes()
    assert len(data) <= 5 * 2**18
    encoder = load_encoder(data, backbone, extractor_hash(str(CLIP)))
    features = PhotoFeatures(backbone, ClipExtractor(str(CLIP), "cpu"), encoder.network.config)
    for row in manifest().to_pylist():
        photos = [Image.open(MANIFEST.parent / path).convert("RGB") for path in row["images"]]
        concept = Concept(
            concept_id=row["concept_id"],
            placeholder_token=row["placeholder"],
            images=tuple(row["images"]),
            category=row["category"],
        )
        reason = encoder.why_unreliable(concept, features(canonical_order(photos)))
        assert bool(reason) == (row["category"] == "style"), (row["concept_id"], reason)


def test_model_is_small_and_loads_plainly(pipeline: StableDiffusionPipeline) -> None:
    assert _size_bytes(MODEL) <= 40 * 2**20
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.tokenizer.model_max_length == MAX_LENGTH == pipeline.text_encoder.config.max_position_embeddings
    assert pipeline.unet.dtype == pipeline.text_encoder.dtype == pipeline.vae.dtype == torch.float32


def test_model_draws(pipeline: StableDiffusionPipeline) -> None:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    picture = pipeline("a photo of a cat", num_inference_steps=2, height=64, width=64, generator=generator).images[0]
    assert picture.size == (64, 64)


def test_special_ids_are_the_tokenizers(pipeline: StableDiffusionPipeline) -> None:
    config, tokenizer = pipeline.text_encoder.config, pipeline.tokenizer
    assert config.eos_token_id == tokenizer.eos_token_id != 2
    assert config.bos_token_id == tokenizer.bos_token_id
    assert config.vocab_size == len(tokenizer)


def test_judge_is_small_and_loads_plainly() -> None:
    assert _size_bytes(CLIP) <= 10 * 2**20
    model, tokenizer = CLIPModel.from_pretrained(CLIP), CLIPTokenizer.from_pretrained(CLIP)
    assert model.dtype == torch.float32
    assert model.config.text_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.text_config.max_position_embeddings == tokenizer.model_max_length


def test_held_out_names_were_not_in_the_tokenizers_text() -> None:
    tokenizer = load_tokenizer(MODEL / "tokenizer")
    taught = {"bear", "top", "whale", "teddy", "house"}  # words of other names
    for held in HELD_OUT:
        unseen = [word for word in held.object.name.split() if word not in taught]
        whole_words = [word for word in unseen if f"{word}</w>" in tokenizer.get_vocab()]
        assert len(whole_words) < max(1, len(unseen)) or len(held.object.name.split()) > 1, held


def test_initializers_are_single_tokens() -> None:
    tokenizer = load_tokenizer(MODEL / "tokenizer")
    for row in read_table(MANIFEST).to_pylist():
        assert len(tokenizer.tokenize(row["initializer"])) == 1, row


def test_manifest_is_what_the_script_writes() -> None:
    stored = read_table(MANIFEST)
    assert stored.schema.equals(MANIFEST_SCHEMA)
    assert stored.equals(manifest())
    assert 8 <= stored.num_rows <= 12
    assert read_table(PROMPTS).equals(prompts())
    assert read_table(PROMPTS).schema.equals(PROMPTS_SCHEMA)


def test_manifest_pictures_exist() -> None:
    for row in read_table(MANIFEST).to_pylist():
        for uri in row["images"]:
            with Image.open(MANIFEST.parent / uri) as picture:
                assert picture.size == (64, 64)
                assert picture.mode == "RGB"


def test_every_held_out_object_has_pictures() -> None:
    for concept_id in [*(held.concept_id for held in HELD_OUT), *STYLE_INITIALIZERS]:
        assert 3 <= len(list((IMAGES / concept_id).glob("*.png"))) <= 5, concept_id
