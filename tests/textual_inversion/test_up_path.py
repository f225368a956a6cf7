"""Gradients through the U-Net's up path alone, against an untouched U-Net of diffusers with inputs cut off by hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from tests.textual_inversion.families.learning import concept, config, embedding_of, learn, learned_alone_as_together
from tests.tiny_models import tiny_stable_diffusion
from tests.tiny_sd3 import tiny_stable_diffusion_3
from tests.tiny_sdxl import tiny_stable_diffusion_xl
from textual_inversion import families
from textual_inversion.compile_trial import Pass, compile_checked, pass_results
from textual_inversion.conditioning import FRAMING, Conditioning
from textual_inversion.config import AdapterConfig
from textual_inversion.engine import Engine
from textual_inversion.families import check_gradient_path, load_backbone
from textual_inversion.families.base import Backbone, MemorySaving
from textual_inversion.families.latent import LatentBackbone
from textual_inversion.memory_estimate import learning_memory

FAMILIES: dict[str, Callable[[Path], Path]] = {"sd": tiny_stable_diffusion, "sdxl": tiny_stable_diffusion_xl}
WHOLE, UP_PATH = Pass(2, gradients=True), Pass(2, gradients=True, gradient_path="up_path")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES[request.param](tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture(scope="module")
def loaded(model: Path) -> Backbone:
    torch.set_num_threads(1)
    return load_backbone(str(model), device="cpu", precision="float32")


@pytest.fixture
def backbone(loaded: Backbone) -> Iterator[Backbone]:
    yield loaded
    loaded.save_memory(MemorySaving())


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some_text(backbone: Backbone) -> Conditioning:
    """States and pooled vectors of made-up prompts, as leaves."""
    ids = {key: torch.tensor([each.assemble([])] * 2) for key, each in backbone.vocabularies.items()}
    like = backbone.encode_prompts(ids, {})
    pooled = None if like.pooled is None else draw(2, *like.pooled.shape).requires_grad_()
    return replace(like, hidden=draw(1, *like.hidden.shape).requires_grad_(), pooled=pooled)


def results(predict: Callable[[Tensor, Tensor, Conditioning], Tensor], text: Conditioning, shape: Any) -> list[Tensor]:
    """Return the prediction and the gradients of its square."""
    prediction = predict(draw(3, 2, *shape), torch.tensor([100, 700]), text)
    return [prediction.detach(), *torch.autograd.grad(prediction.square().sum(), text.encodings())]


def untouched(model: Path) -> Any:
    """A U-Net whose down blocks and middle are given inputs without gradients."""
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet").requires_grad_(False).eval()

    def cut_off(_block: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def cut(value: Any) -> Any:
            return value.detach() if isinstance(value, Tensor) else value

        return tuple(map(cut, args)), {name: cut(value) for name, value in keywords.items()}

    for block in (*unet.down_blocks, unet.mid_block):
        block.register_forward_pre_hook(cut_off, with_kwargs=True)

    def predict(latents: Tensor, timesteps: Tensor, text: Conditioning) -> Tensor:
        further = {}
        if text.pooled is not None:
            framing = text.extras[FRAMING]
            further = {"text_embeds": text.pooled, "time_ids": torch.cat([framing, framing[:, :2]], dim=1)}
        output: Tensor = unet(
            latents, timesteps, encoder_hidden_states=text.hidden, added_cond_kwargs=further or None
        ).sample
        return output

    return predict


@pytest.mark.parametrize("checkpoints", [False, True])
def test_gradients_are_those_of_a_down_path_and_middle_with_constant_inputs(
    backbone: Backbone, model: Path, checkpoints: bool
) -> None:
    backbone.save_memory(MemorySaving(checkpoints_gradients=checkpoints))
    text = some_text(backbone)
    ours = results(backbone.predict, replace(text, gradient_path="up_path"), backbone.latent_shape)
    theirs = results(untouched(model), text, backbone.latent_shape)
    whole = results(backbone.predict, text, backbone.latent_shape)
    assert torch.equal(ours[0], whole[0])
    for one, other, all_of_it in zip(ours, theirs, whole, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        assert one is ours[0] or not torch.allclose(one, all_of_it, rtol=1e-2)


def test_whole_gradients_are_the_same_before_and_after(backbone: Backbone) -> None:
    before = pass_results(backbone, WHOLE)
    between = pass_results(backbone, UP_PATH)
    after = pass_results(backbone, WHOLE)
    assert torch.equal(before[0], between[0])
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert not torch.equal(before[1], between[1])


def test_concepts_learn_by_it_alone_as_together(backbone: Backbone) -> None:
    settings = config(steps=3, gradient_path="up_path", adapter=AdapterConfig(kind="causal", rank=2))
    learned = learned_alone_as_together(backbone, settings, concept(0), concept(1))
    whole = learn(backbone, replace(settings, gradient_path="whole"), concept(0))
    theirs = embedding_of(whole["c0"])
    assert learned[0].adapter is not None
    for key, rows in learned[0].vectors.items():
        assert rows.isfinite().all()
        assert not torch.equal(rows, theirs.vectors[key])


@pytest.mark.parametrize("checkpoints", [False, True])
def test_less_is_kept_for_the_backward_pass(backbone: Backbone, checkpoints: bool) -> None:
    backbone.save_memory(MemorySaving(checkpoints_gradients=checkpoints))
    whole, up_path = (learning_memory(backbone, config(gradient_path=path), slots=2) for path in ("whole", "up_path"))
    assert up_path.kept < whole.kept
    assert up_path.weights == whole.weights


def test_a_model_without_a_u_net_is_refused(tmp_path: Path) -> None:
    backbone = load_backbone(str(tiny_stable_diffusion_3(tmp_path / "model")), device="cpu", precision="float32")
    with pytest.raises(ValueError, match=r"inversion.gradient_path = 'up_path': .* no U-Net.*; set it to 'whole'"):
        Engine(backbone, config(gradient_path="up_path"), slots=1, seed=0)
    with pytest.raises(ValueError, match=r"inversion.gradient_path = 'up_path': .* no U-Net"):
        check_gradient_path(str(tmp_path / "model"), "up_path")
    check_gradient_path(str(tmp_path / "model"), "whole")


def test_a_familys_row_says_what_its_backbones_say() -> None:
    for family in families.FAMILIES.values():
        own = [
            each
            for each in vars(import_module(family.module)).values()
            if getattr(each, "__module__", "") == family.module
        ]
        [backbone_class] = [each for each in own if isinstance(each, type) and issubclass(each, LatentBackbone)]
        assert family.layout is not None
        assert family.layout.has_up_path == backbone_class.has_up_path


@pytest.mark.slow
def test_a_compiled_denoiser_has_both_gradients(tmp_path: Path) -> None:
    """Traced, not built: the compiler itself takes a minute."""
    backbone = load_backbone(str(tiny_stable_diffusion(tmp_path / "model")), device="cpu", precision="float32")
    passes = [WHOLE, UP_PATH, Pass(3, gradients=False, gradient_path="up_path")]
    plain = [pass_results(backbone, each) for each in passes]
    assert compile_checked(backbone, passes, backend="aot_eager")
    for one, before in zip(passes, plain, strict=True):
        for ours, theirs in zip(pass_results(backbone, one), before, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_compiler_that_errs_in_the_up_path_alone_is_found(tmp_path: Path) -> None:
    backbone = load_backbone(str(tiny_stable_diffusion(tmp_path / "model")), device="cpu", precision="float32")

    def wrong_without_gradients(module: Any, _inputs: list[Tensor]) -> Any:
        has_constant_blocks = any("_set_grad_enabled" in str(node.target) for node in module.graph.nodes)
        return lambda *inputs: tuple(2 * x for x in module(*inputs)) if has_constant_blocks else module(*inputs)

    assert compile_checked(backbone, [WHOLE], backend=wrong_without_gradients)  # type: ignore[arg-type]
    passes = [WHOLE, UP_PATH]
    assert not compile_checked(backbone, passes, backend=wrong_without_gradients, or_plain=True)  # type: ignore[arg-type]
