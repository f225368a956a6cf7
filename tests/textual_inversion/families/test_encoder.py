"""One encoder for every family: trained through a tiny random model, it makes the rows that a concept starts from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest
import torch
from torch import nn

from tests.textual_inversion.families.test_memory_saving import FAMILIES
from tests.textual_inversion.test_encoder import CAUSAL, photo
from tests.tiny_models import tiny_extractor
from textual_inversion.adapter_config import AdapterShape
from textual_inversion.concept import Concept
from textual_inversion.config import AdapterConfig, InitConfig, InversionConfig
from textual_inversion.encoder import NO_ADAPTER, ConceptEncoder, PhotoFeatures, canonical_order
from textual_inversion.encoder_config import EncoderConfig, EncoderTrainingConfig
from textual_inversion.encoder_file import Doubt, TrainedEncoder, dump_encoder, load_encoder
from textual_inversion.encoder_training import EncoderTrainer, encode_example
from textual_inversion.extractors import ClipExtractor
from textual_inversion.families import load_backbone
from textual_inversion.families.base import Backbone
from textual_inversion.initialise import class_vectors, learning_encoders
from textual_inversion.learning import learn

CONFIG = EncoderConfig(hidden=16, patch_dim=3, grid_side=2, latent_side=2)
CONCEPTS = [
    Concept(concept_id=f"c{number}", placeholder_token="<c>", images=("x", "y"), initializer="cat")
    for number in range(4)
]
PHOTOS = [[photo(2 * number), photo(2 * number + 1)] for number in range(4)]


@pytest.fixture(scope="module", params=FAMILIES)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    torch.set_num_threads(1)
    model = FAMILIES[request.param](tmp_path_factory.mktemp(request.param))
    return load_backbone(str(model), device="cpu", precision="float32")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> ClipExtractor:
    return ClipExtractor(str(tiny_extractor("clip", tmp_path_factory.mktemp("clip"))), "cpu")


def trained(backbone: Backbone, features: PhotoFeatures, adapter: AdapterShape) -> TrainedEncoder:
    """An encoder after a few steps, as its file gives it."""
    pairs = zip(CONCEPTS, PHOTOS, strict=True)
    examples = [encode_example(concept, photos, backbone, features) for concept, photos in pairs]
    torch.manual_seed(0)
    network = ConceptEncoder(features.config, features.sizes(), backbone, adapter)
    trainer = EncoderTrainer(network, backbone, EncoderTrainingConfig(steps=3, warmup_steps=0, learning_rate=0.05))
    for _ in range(3):
        assert trainer.step(examples).left_out == ()
    pooled = features.sizes().pooled
    encoder = TrainedEncoder(
        network=trainer.averaged,
        doubt=Doubt(mean=torch.zeros(pooled), whitening=torch.eye(pooled), max_distance=1e6),
        model_hash=backbone.model_hash(),
        extractor_hash="e",
        categories=("object",),
    )
    return load_encoder(dump_encoder(encoder), backbone, "e")


def modules_of(owner: object) -> list[nn.Module]:
    """Return the modules that an object holds, itself or in collections and objects of its own."""
    found = []
    for value in vars(owner).values():
        parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else [value]
        for part in parts:
            if isinstance(part, nn.Module):
                found.append(part)
            elif type(part).__module__.startswith("textual_inversion") and hasattr(part, "__dict__"):
                found += modules_of(part)
    return found


@pytest.mark.parametrize("adapter", [NO_ADAPTER, CAUSAL], ids=["rows", "rows and adapter"])
def test_gradients_reach_the_encoder_alone(backbone: Backbone, clip: ClipExtractor, adapter: AdapterShape) -> None:
    modules = {id(module): module for module in (*modules_of(backbone), *modules_of(clip))}.values()
    assert sum(parameter.numel() for module in modules for parameter in module.parameters()) > 10_000
    before = [{name: value.clone() for name, value in module.state_dict().items()} for module in modules]
    features = PhotoFeatures(backbone, clip, CONFIG)
    examples = [encode_example(CONCEPTS[number], PHOTOS[number], backbone, features) for number in range(2)]
    torch.manual_seed(0)
    network = ConceptEncoder(CONFIG, features.sizes(), backbone, adapter)
    trainer = EncoderTrainer(network, backbone, EncoderTrainingConfig(warmup_steps=0))
    for _ in range(2):  # in the first step, the gradient ends at the last layers, which are zero
        trainer.step(examples)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())
    for module, known in zip(modules, before, strict=True):
        assert all(parameter.grad is None for parameter in module.parameters())
        assert all(torch.equal(value, known[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("adapter", [NO_ADAPTER, CAUSAL], ids=["rows", "rows and adapter"])
def test_a_concept_starts_from_what_an_encoder_of_its_model_makes(
    backbone: Backbone, clip: ClipExtractor, adapter: AdapterShape
) -> None:
    features = PhotoFeatures(backbone, clip, CONFIG)
    encoder = trained(backbone, features, adapter)
    classes = class_vectors(CONCEPTS[0], backbone)
    made = encoder.embedding("<c>", features(canonical_order(PHOTOS[0])), classes)
    for key, rows in made.vectors.items():
        assert rows.isfinite().all()
        assert torch.equal(rows[0], classes[key]) == (key not in learning_encoders(backbone))
    config = InversionConfig(
        steps=0,
        init=InitConfig(method="encoder", encoder="given"),
        adapter=AdapterConfig(**dataclasses.asdict(adapter)),
    )
    [learned] = learn(backbone, [(CONCEPTS[0], PHOTOS[0])], config, extractor=clip, encoder=encoder)
    for key, rows in made.vectors.items():
        torch.testing.assert_close(learned.vectors[key], rows)
    assert (learned.adapter is None) == (made.adapter is None) == (adapter is NO_ADAPTER)
    if learned.adapter and made.adapter:
        assert any(bool(up.any()) for _, up in made.adapter.tensors.values())
        for name, pair in made.adapter.tensors.items():
            torch.testing.assert_close(learned.adapter.tensors[name], pair)


def test_an_encoder_reads_the_denoiser_of_a_u_net(backbone: Backbone, clip: ClipExtractor) -> None:
    config = dataclasses.replace(CONFIG, denoiser_side=2)
    if not backbone.has_up_path:
        with pytest.raises(ValueError, match=r"encoder.network.denoiser_side .* no U-Net"):
            PhotoFeatures(backbone, clip, config)
        return
    features, without = PhotoFeatures(backbone, clip, config), PhotoFeatures(backbone, clip, CONFIG)
    sizes, photos = features.sizes(), PHOTOS[0]
    read, others = features(photos), without(photos)
    assert torch.equal(read[:, : others.shape[1]], others)
    own = read[:, others.shape[1] :]
    assert own.shape == (2, sizes.denoiser_cells * sizes.denoiser)
    assert not torch.allclose(own[0], own[1])
    encoder = trained(backbone, features, NO_ADAPTER)
    classes = class_vectors(CONCEPTS[0], backbone)
    whole = encoder.embedding("<c>", read, classes).vectors
    cut = encoder.embedding("<c>", torch.cat([others, torch.zeros_like(own)], dim=1), classes).vectors
    assert not all(torch.equal(rows, cut[key]) for key, rows in whole.items())
