"""The training of the demo's encoder: what it begins with."""

from __future__ import annotations

import torch

from demo.encoder_training import copy_known
from tests.textual_inversion.test_encoder import BACKBONE, CONFIG, FEATURES, means, trained_network
from textual_inversion.encoder import ConceptEncoder, FeatureSizes


def test_a_network_that_reads_more_begins_with_the_same_rows() -> None:
    sizes = FEATURES.sizes()
    other = trained_network()
    wider = FeatureSizes(
        pooled=sizes.pooled, patch=sizes.patch, cells=sizes.cells, latents=sizes.latents, denoiser=5, denoiser_cells=4
    )
    network = ConceptEncoder(CONFIG, wider, BACKBONE)
    copy_known(network, other)
    features = torch.randn(1, 2, wider.width, generator=torch.Generator().manual_seed(0))
    is_present = torch.ones(1, 2, dtype=torch.bool)
    rows = network(features, is_present, means(1))
    known = other(features[:, :, : sizes.width], is_present, means(1))
    for key, expected in known.items():
        torch.testing.assert_close(rows[key], expected)
        assert not torch.equal(expected[0, 0], BACKBONE.token_tables[key].mean)
