"""Estimates of memory against what real passes keep, and against figures of models too large for a test."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_flux import tiny_flux
from tests.tiny_models import tiny_extractor, tiny_latent_diffusion
from tests.tiny_sd3 import tiny_stable_diffusion_3
from tests.tiny_sdxl import tiny_stable_diffusion_xl
from tests.toy_backbone import ToyBackbone
from textual_inversion.config import AdapterConfig, InversionConfig, PenaltyConfig, SamplingConfig
from textual_inversion.extractors import ClipExtractor
from textual_inversion.families import load_backbone
from textual_inversion.families.base import Backbone, MemorySaving
from textual_inversion.memory_estimate import (
    PassMemory,
    draw_made_up,
    drawing_memory,
    learn_made_up,
    learning_memory,
    trace,
)

FAMILIES: dict[str, Callable[[Path], Path]] = {
    "sdxl": tiny_stable_diffusion_xl,
    "sd3": tiny_stable_diffusion_3,
    "ldm": tiny_latent_diffusion,
    "flux": tiny_flux,
}

PLUS_PLUS = AdapterConfig(kind="causal", rank=2, targets=("fc2", "cross_attention"))
LORA = AdapterConfig(kind="lora", rank=2)


@pytest.fixture
def backbone(tiny_backbone: Backbone) -> Iterator[Backbone]:
    yield tiny_backbone
    tiny_backbone.save_memory(MemorySaving())


def kept_in_fact(work: Callable[[], object]) -> int:
    """Bytes of all storages that autograd keeps of a pass on real tensors, apart from those that were there before."""
    tensors = [each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter)]
    before = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in before:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        InversionConfig(batch_size=2),
        InversionConfig(batch_size=1, adapter=PLUS_PLUS),
        InversionConfig(batch_size=1, adapter=LORA, penalties=PenaltyConfig(knowledge=0.1)),
    ],
    ids=["rows", "cross-attention", "knowledge"],
)
def test_the_estimate_is_what_a_real_pass_keeps(backbone: Backbone, config: InversionConfig, checkpoints: bool) -> None:
    backbone.save_memory(MemorySaving(checkpoints_gradients=checkpoints))
    estimate = learning_memory(backbone, config, slots=2)
    assert estimate.kept == kept_in_fact(lambda: learn_made_up(backbone, config, slots=2))
    assert estimate.peak > estimate.kept > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_estimate_holds_for_every_family(family: str, tmp_path: Path) -> None:
    backbone = load_backbone(str(FAMILIES[family](tmp_path)), device="cpu", precision="float32")
    config = InversionConfig(batch_size=2, adapter=LORA)
    kept = []
    for checkpoints in (False, True):
        backbone.save_memory(MemorySaving(checkpoints_gradients=checkpoints))
        kept.append(learning_memory(backbone, config, slots=2).kept)
        assert kept[-1] == kept_in_fact(lambda: learn_made_up(backbone, config, slots=2))
    assert kept[1] < kept[0]


def test_the_estimate_counts_pictures_that_are_compared(backbone: Backbone, tmp_path: Path) -> None:
    """The penalty decodes each prediction, and gradients pass through the autoencoder and the extractor."""
    features = ClipExtractor(str(tiny_extractor("clip", tmp_path)), "cpu").pixel_features
    config = InversionConfig(batch_size=1, penalties=PenaltyConfig(clip=0.1))
    estimate = learning_memory(backbone, config, 2, features)
    assert estimate.kept == kept_in_fact(lambda: learn_made_up(backbone, config, 2, features))
    assert estimate.kept > learning_memory(backbone, InversionConfig(batch_size=1), 2, features).kept


def test_more_concepts_take_more_memory_and_nothing_is_left_behind() -> None:
    backbone = ToyBackbone()
    before = draw_made_up(backbone, SamplingConfig(batch_size=2))
    one, two, three = (learning_memory(backbone, InversionConfig(batch_size=2), slots) for slots in (1, 2, 3))
    assert one.weights == two.weights == three.weights
    assert 0 < two.peak - one.peak == three.peak - two.peak
    assert drawing_memory(backbone, SamplingConfig()).kept == 0
    assert torch.equal(draw_made_up(backbone, SamplingConfig(batch_size=2)), before)


def test_slices_take_less_memory_to_decode(backbone: Backbone) -> None:
    latents = torch.zeros(8, *backbone.latent_shape)
    whole = trace(lambda: backbone.decode(latents))
    backbone.save_memory(MemorySaving(slices=True))
    sliced = trace(lambda: backbone.decode(latents))
    assert sliced.peak < whole.peak / 2
    assert sliced.weights == whole.weights


def test_what_is_made_counts_until_it_is_freed() -> None:
    weight = torch.zeros(1000)

    def work() -> None:
        first = weight + 1
        second = first * 2
        del first
        third = second[:500] + second[500:]
        del second, third

    assert trace(work) == PassMemory(weights=4000, kept=0, peak=8000)
