"""Files of trained encoders, and the doubt about photos unlike those of the training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.textual_inversion.test_encoder import CAUSAL, FEATURES, means, photo, trained_network
from tests.toy_backbone import DIMS, ToyBackbone
from textual_inversion.adapter_config import AdapterShape
from textual_inversion.concept import Concept
from textual_inversion.config import AdapterConfig
from textual_inversion.encoder import canonical_order
from textual_inversion.encoder_file import Doubt, TrainedEncoder, check_adapter, dump_encoder, load_encoder
from textual_inversion.formats import to_bytes

BACKBONE = ToyBackbone()
CONCEPT = Concept(concept_id="c", placeholder_token="<c>", images=("x",), num_vectors=2)


def doubt() -> Doubt:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 3, generator=generator) @ torch.diag(torch.tensor([1.0, 3.0, 0.1]))
    return Doubt.fit(features[:100], [features[first : first + 2] for first in range(100, 200, 2)])


ENCODER = TrainedEncoder(
    network=trained_network(),
    doubt=doubt(),
    model_hash=BACKBONE.model_hash(),
    extractor_hash="e" * 32,
    categories=("object",),
    record={"steps": "10"},
)


def test_a_file_gives_the_same_rows_but_for_rounding() -> None:
    loaded = load_encoder(dump_encoder(ENCODER), BACKBONE, ENCODER.extractor_hash)
    assert loaded.network.config == ENCODER.network.config
    assert (loaded.categories, dict(loaded.record)) == (("object",), {"steps": "10"})
    assert loaded.doubt.max_distance == ENCODER.doubt.max_distance
    features = FEATURES(canonical_order([photo(0), photo(1)]))
    classes = {key: vectors[0] for key, vectors in means(1).items()}
    for key, rows in loaded.embedding("<c>", features, classes).vectors.items():
        known = ENCODER.embedding("<c>", features, classes).vectors[key]
        assert rows.shape == (2, DIMS[key])
        assert float((rows - known).norm() / (known - classes[key]).norm()) < 0.02


def test_a_file_has_the_same_bytes_every_time() -> None:
    assert dump_encoder(ENCODER) == dump_encoder(ENCODER)
    loaded = load_encoder(dump_encoder(ENCODER), BACKBONE, ENCODER.extractor_hash)
    assert dump_encoder(loaded) == dump_encoder(ENCODER)


def test_an_encoder_of_another_model_or_extractor_is_refused() -> None:
    for other, name in (
        (replace(ENCODER, model_hash="m" * 32), "model"),
        (replace(ENCODER, extractor_hash="x" * 32), "extractor"),
    ):
        with pytest.raises(ValueError, match=f"trained for another {name} .* train an encoder for this one"):
            load_encoder(dump_encoder(other), BACKBONE, ENCODER.extractor_hash)


def test_other_files_are_refused() -> None:
    with pytest.raises(ValueError, match="no file of an encoder"):
        load_encoder(to_bytes({"<c>": torch.zeros(1, 4)}, {}), BACKBONE, "")
    with pytest.raises(ValueError, match="safetensors"):
        load_encoder(b"not one", BACKBONE, "")


def test_distances_are_measured_in_the_trainings_own_units() -> None:
    known = doubt()
    near, far = torch.tensor([[0.0, 3.0, 0.0]]), torch.tensor([[0.0, 0.0, 3.0]])
    assert known.distance(near) < known.max_distance < known.distance(far)
    assert 1 < known.max_distance < 2


def test_concepts_unlike_those_of_the_training_are_doubted() -> None:
    features = torch.zeros(2, FEATURES.sizes().width)
    assert ENCODER.why_unreliable(CONCEPT, features) == ""
    features[:, 2] = 5.0
    assert "the photos lie" in ENCODER.why_unreliable(CONCEPT, features)
    style = replace(CONCEPT, category="style")
    assert "category object, not style" in ENCODER.why_unreliable(style, features)
    assert "it makes 2 vectors, not 1" in ENCODER.why_unreliable(replace(CONCEPT, num_vectors=1), features)


def test_a_file_gives_the_same_adapters_but_for_rounding() -> None:
    known = replace(ENCODER, network=trained_network(adapter=CAUSAL, scale=30.0))
    data = dump_encoder(known)
    loaded = load_encoder(data, BACKBONE, ENCODER.extractor_hash)
    assert loaded.network.adapter == CAUSAL
    assert dump_encoder(loaded) == data
    features = FEATURES(canonical_order([photo(0), photo(1)]))
    classes = {key: vectors[0] for key, vectors in means(1).items()}
    ours, theirs = (each.embedding("<c>", features, classes).adapter for each in (loaded, known))
    assert ours is not None
    assert theirs is not None
    assert (ours.kind, ours.scale) == (theirs.kind, theirs.scale) == ("causal", 2.0)
    assert set(ours.tensors) == {f"{key}.fc2" for key in DIMS}
    for name, pair in ours.tensors.items():
        for tensor, other in zip(pair, theirs.tensors[name], strict=True):
            assert float((tensor - other).norm() / other.norm()) < 0.02
    assert ENCODER.embedding("<c>", features, classes).adapter is None


@pytest.mark.parametrize(
    ("found", "wanted", "said"),
    [
        (CAUSAL, AdapterConfig(), r"encoder\.adapter\.kind = 'causal', but inversion\.adapter\.kind is 'none'"),
        (AdapterShape(), CAUSAL, r"encoder\.adapter\.kind = 'none', but inversion\.adapter\.kind is 'causal'"),
        (CAUSAL, replace(CAUSAL, rank=4), r"encoder\.adapter\.rank = 2, but inversion\.adapter\.rank is 4"),
        (CAUSAL, replace(CAUSAL, targets=("fc1",)), r"encoder\.adapter\.targets = \('fc2',\), but .* \('fc1',\)"),
    ],
)
def test_another_adapter_than_that_of_learning_is_refused(found: AdapterShape, wanted: AdapterShape, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_adapter(found, wanted)


def test_equal_adapters_go_together() -> None:
    check_adapter(CAUSAL, AdapterConfig(kind="causal", rank=2, alpha=4.0, targets=("fc2",), learning_rate=0.1))
    check_adapter(AdapterShape(rank=1), AdapterConfig(rank=3))
