"""Ways to run the networks of every family that take less memory: what they change, and what they save."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.textual_inversion.families.learning import concept, config, embedding_of, learn
from tests.tiny_flux import tiny_flux
from tests.tiny_models import tiny_latent_diffusion, tiny_stable_diffusion
from tests.tiny_sd3 import tiny_stable_diffusion_3
from tests.tiny_sdxl import tiny_stable_diffusion_xl
from textual_inversion.adapter_config import CROSS_ATTENTION
from textual_inversion.compile_trial import Pass, compile_checked, pass_results
from textual_inversion.config import AdapterConfig
from textual_inversion.families import load_backbone
from textual_inversion.families.base import Backbone, MemorySaving

CHECKPOINTING = MemorySaving(checkpoints_gradients=True)
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "sd": tiny_stable_diffusion,
    "sdxl": tiny_stable_diffusion_xl,
    "sd3": tiny_stable_diffusion_3,
    "ldm": tiny_latent_diffusion,
    "flux": tiny_flux,
}


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    torch.set_num_threads(1)
    model = FAMILIES[request.param](tmp_path_factory.mktemp(request.param))
    return load_backbone(str(model), device="cpu", precision="float32")


@pytest.fixture
def backbone(loaded: Backbone) -> Iterator[Backbone]:
    yield loaded
    loaded.save_memory(MemorySaving())


def an_adapter(backbone: Backbone) -> AdapterConfig:
    """Settings of an adapter that acts in the denoiser, too, where the model has layers for it."""
    has_layers = any(name.endswith(CROSS_ATTENTION) for name in backbone.adapter_layers)
    targets = ("fc2", CROSS_ATTENTION) if has_layers else ("fc2",)
    return AdapterConfig(kind="causal", rank=2, learning_rate=0.05, targets=targets)


def results_and_kept_bytes(backbone: Backbone, one: Pass) -> tuple[list[Tensor], int]:
    """Return a pass's results, and the bytes that its forward pass keeps for its backward pass, weights included."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = pass_results(backbone, one)
    return results, sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("with_adapter", [False, True])
def test_checkpointing_changes_nothing_that_several_concepts_learn(backbone: Backbone, with_adapter: bool) -> None:
    settings = config(steps=2, adapter=an_adapter(backbone) if with_adapter else AdapterConfig())
    plain = learn(backbone, settings, concept(0), concept(1))
    backbone.save_memory(CHECKPOINTING)
    saving = learn(backbone, settings, concept(0), concept(1))
    for name, outcome in plain.items():
        torch.testing.assert_close(saving[name].curve, outcome.curve, rtol=1e-5, atol=1e-6)
        ours, theirs = embedding_of(saving[name]), embedding_of(outcome)
        torch.testing.assert_close(ours.vectors, theirs.vectors, rtol=1e-4, atol=1e-5)
        if theirs.adapter:
            assert ours.adapter is not None
            torch.testing.assert_close(dict(ours.adapter.tensors), dict(theirs.adapter.tensors), rtol=1e-4, atol=1e-5)


def test_checkpointing_keeps_less_and_gives_the_same_gradients(backbone: Backbone) -> None:
    one = Pass(3, gradients=True, adapter=an_adapter(backbone))
    plain, plain_bytes = results_and_kept_bytes(backbone, one)
    backbone.save_memory(CHECKPOINTING)
    saving, saving_bytes = results_and_kept_bytes(backbone, one)
    assert saving_bytes < plain_bytes
    for ours, theirs in zip(saving, plain, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
def test_checkpointing_goes_with_a_compiled_denoiser(tiny_model: Path) -> None:
    """Traced, not built: the compiler itself takes a minute."""
    backbone = load_backbone(str(tiny_model), device="cpu", precision="float32")
    one = Pass(2, gradients=True, adapter=an_adapter(backbone))
    plain = pass_results(backbone, one)
    backbone.save_memory(CHECKPOINTING)
    assert compile_checked(backbone, [one], backend="aot_eager")
    for ours, theirs in zip(pass_results(backbone, one), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_slices_give_the_same_pictures_and_tiles_do_not(backbone: Backbone, caplog: pytest.LogCaptureFixture) -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, *backbone.latent_shape, generator=generator)
    pixels = torch.rand(3, 3, backbone.resolution, backbone.resolution, generator=generator)
    plain = backbone.decode(latents), backbone.encode_images(pixels)
    with caplog.at_level(logging.WARNING):
        backbone.save_memory(MemorySaving(slices=True))
    torch.testing.assert_close((backbone.decode(latents), backbone.encode_images(pixels)), plain)
    backbone.save_memory(MemorySaving(tiles=True))
    tiled = backbone.decode(latents)
    assert tiled.shape == plain[0].shape
    if caplog.records:
        assert "VQModel has no slicing" in caplog.text
        assert torch.equal(tiled, plain[0])
    else:
        assert not torch.allclose(tiled, plain[0], atol=1e-4)
    backbone.save_memory(MemorySaving())
    assert torch.equal(backbone.decode(latents), plain[0])
