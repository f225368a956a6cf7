"""The features behind a U-Net's middle block, against an untouched U-Net of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from tests.tiny_models import tiny_latent_diffusion, tiny_stable_diffusion
from tests.tiny_sd3 import tiny_stable_diffusion_3
from tests.tiny_sdxl import tiny_stable_diffusion_xl
from textual_inversion.conditioning import FRAMING
from textual_inversion.families import check_denoiser_features, load_backbone

FAMILIES: dict[str, Callable[[Path], Path]] = {
    "sd": tiny_stable_diffusion,
    "sdxl": tiny_stable_diffusion_xl,
    "ldm": tiny_latent_diffusion,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_those_behind_the_middle_block(family: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = FAMILIES[family](tmp_path / "model")
    backbone = load_backbone(str(model), device="cpu", precision="float32")
    ids = {key: torch.tensor([each.assemble([])] * 2) for key, each in backbone.vocabularies.items()}
    text = backbone.encode_prompts(ids, {})
    latents = torch.randn((2, *backbone.latent_shape), generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([100, 700])
    before = backbone.predict(latents, timesteps, text)

    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet").eval()
    seen: list[Tensor] = []
    unet.mid_block.register_forward_hook(lambda _block, _inputs, output: seen.append(output))
    further: dict[str, Any] = {}
    if text.pooled is not None:
        framing = text.extras[FRAMING]
        further = {"text_embeds": text.pooled, "time_ids": torch.cat([framing, framing[:, :2]], dim=1)}
    with torch.no_grad():
        unet(latents, timesteps, encoder_hidden_states=text.hidden, added_cond_kwargs=further or None)

    features = backbone.middle_features(latents, timesteps, text)
    assert features[0].std() > 0
    torch.testing.assert_close(features, seen[0])
    assert torch.equal(backbone.predict(latents, timesteps, text), before)
    check_denoiser_features(str(model), 2)


def test_a_model_without_a_u_net_is_refused(tmp_path: Path) -> None:
    model = str(tiny_stable_diffusion_3(tmp_path / "model"))
    refusal = r"encoder.network.denoiser_side is over 0, but .* no U-Net.*; set it to 0"
    with pytest.raises(ValueError, match=refusal):
        check_denoiser_features(model, 2)
    check_denoiser_features(model, 0)
    backbone = load_backbone(model, device="cpu", precision="float32")
    latents = torch.zeros(1, *backbone.latent_shape)
    ids = {key: torch.tensor([each.assemble([])]) for key, each in backbone.vocabularies.items()}
    with pytest.raises(ValueError, match=refusal):
        backbone.middle_features(latents, torch.tensor([100]), backbone.encode_prompts(ids, {}))
