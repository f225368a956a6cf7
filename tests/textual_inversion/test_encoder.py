"""The encoder's network: sets of photos, the bound on offsets, and the features that it reads."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.toy_backbone import DIMS, ToyBackbone
from textual_inversion.adapter_config import AdapterShape
from textual_inversion.encoder import NO_ADAPTER, ConceptEncoder, FeatureSizes, PhotoFeatures, canonical_order
from textual_inversion.encoder_config import EncoderConfig
from textual_inversion.parameters import ADAPTER

BACKBONE = ToyBackbone()
CONFIG = EncoderConfig(hidden=16, patch_dim=3, grid_side=2, latent_side=2, num_vectors=2)
CAUSAL = AdapterShape(kind="causal", rank=2, alpha=4.0, targets=("fc2",))


class PixelExtractor:
    """Sees a picture's mean colour, and as its patches the colours of a grid."""

    def images_and_patches(self, pictures: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        grids = [np.asarray(picture.convert("RGB").resize((4, 4), Image.Resampling.BOX)) for picture in pictures]
        patches = torch.tensor(np.stack(grids)).permute(0, 3, 1, 2).float() / 255
        return patches.mean((2, 3)), patches


FEATURES = PhotoFeatures(BACKBONE, PixelExtractor(), CONFIG)


def photo(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (12, 10, 3), dtype=np.uint8))


def trained_network(
    config: EncoderConfig = CONFIG, scale: float = 0.3, adapter: AdapterShape = NO_ADAPTER
) -> ConceptEncoder:
    """A network whose last layers are no longer zero."""
    torch.manual_seed(0)
    network = ConceptEncoder(config, FEATURES.sizes(), BACKBONE, adapter)
    last = [*network.offsets.values(), *([network.adapter_change] if network.adapter_layout else [])]
    for layer in last:
        torch.nn.init.normal_(layer.weight, std=scale)
    return network


def means(count: int) -> dict[str, Tensor]:
    return {key: table.mean.expand(count, -1) for key, table in BACKBONE.token_tables.items()}


def rows_of(network: ConceptEncoder, photos: Sequence[Image.Image]) -> dict[str, Tensor]:
    features = FEATURES(canonical_order(photos))[None]
    with torch.no_grad():
        return network(features, torch.ones(features.shape[:2], dtype=torch.bool), means(1))


def test_features_are_those_of_extractor_and_autoencoder() -> None:
    sizes = FEATURES.sizes()
    assert sizes == FeatureSizes(pooled=3, patch=3, cells=4, latents=8)
    features = FEATURES([photo(0), photo(1)])
    assert features.shape == (2, sizes.width)
    assert sizes.width == 3 + 12 + 8
    assert not torch.equal(features[0], features[1])
    without = PhotoFeatures(BACKBONE, PixelExtractor(), EncoderConfig(grid_side=2, latent_side=0))
    assert torch.equal(without([photo(0)]), features[:1, :15])


def test_a_new_network_keeps_the_class_vectors() -> None:
    network = ConceptEncoder(CONFIG, FEATURES.sizes(), BACKBONE)
    rows = rows_of(network, [photo(0)])
    for key, dim in DIMS.items():
        assert rows[key].shape == (1, 2, dim)
        assert torch.equal(rows[key][0, 0], BACKBONE.token_tables[key].mean)


def test_rows_are_the_same_bits_in_any_order_of_the_photos() -> None:
    network = trained_network()
    photos = [photo(seed) for seed in range(3)]
    first = rows_of(network, photos)
    for order in itertools.permutations(photos):
        assert all(torch.equal(rows, first[key]) for key, rows in rows_of(network, order).items())
    assert not torch.equal(rows_of(network, photos[:2])["long"], first["long"])


def test_padding_changes_nothing() -> None:
    network = trained_network()
    features = FEATURES([photo(0), photo(1), photo(2)])[None]
    is_present = torch.tensor([[True, True, False]])
    padded = network(features, is_present, means(1))
    alone = network(features[:, :2], is_present[:, :2], means(1))
    for key in DIMS:
        torch.testing.assert_close(padded[key], alone[key])


@pytest.mark.parametrize("limit", [0.5, 4.0])
def test_offsets_stay_below_their_bound(limit: float) -> None:
    config = EncoderConfig(hidden=16, patch_dim=3, grid_side=2, latent_side=2, num_vectors=2, max_offset=limit)
    rows = rows_of(trained_network(config, scale=100.0), [photo(0)])
    for key, table in BACKBONE.token_tables.items():
        norms = (rows[key][0] - table.mean).norm(dim=1) / table.deviation.norm()
        assert ((norms <= limit * 1.0001) & (norms > 0.9 * limit)).all()


def test_a_text_encoder_that_learns_no_rows_keeps_its_vectors() -> None:
    backbone = ToyBackbone()
    backbone.token_tables["short"].learns_rows = False
    network = ConceptEncoder(CONFIG, FEATURES.sizes(), backbone)
    assert list(network.offsets) == ["long"]
    features = FEATURES([photo(0)])[None]
    rows = network(features, torch.ones(1, 1, dtype=torch.bool), means(1))
    assert torch.equal(rows["short"][0, 1], backbone.token_tables["short"].mean)


def test_a_new_network_makes_adapters_that_change_nothing() -> None:
    torch.manual_seed(0)
    network = ConceptEncoder(CONFIG, FEATURES.sizes(), BACKBONE, CAUSAL)
    values = rows_of(network, [photo(0)])
    assert set(values) == {*DIMS, ADAPTER}
    assert network.adapter_layout is not None
    made = network.adapter_layout.unflatten(values[ADAPTER])
    assert {name: (down.shape, up.shape) for name, (down, up) in made.items()} == {
        f"{key}.fc2": ((1, 2, dim), (1, 32, 2)) for key, dim in DIMS.items()
    }
    for down, up in made.values():
        assert float(down.norm()) > 0
        assert not up.any()


def test_adapters_depend_on_the_photos() -> None:
    network = trained_network(adapter=CAUSAL, scale=30.0)
    one, again, other = (rows_of(network, [photo(seed)])[ADAPTER] for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert float((one - other).abs().max()) > 1e-3


def test_an_adapter_of_layers_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"adapter\.targets = \('wi_0',\).*has no such layers"):
        ConceptEncoder(CONFIG, FEATURES.sizes(), BACKBONE, AdapterShape(kind="lora", targets=("wi_0",)))
