"""A larger world's training starts where the smaller one ended."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from demo.denoiser import new_unet
from demo.tokenizer import make_tokenizer
from demo.warm_start import grow_unet, transfer_clip, transfer_rows, transfer_text_encoder
from textual_inversion.weights import load_pretrained

COMMITTED_UNET = Path(__file__).parents[2] / "demo/model/unet"
WIDTH, OLD_LENGTH = 8, 24
OLD_TEXTS = ["a photo of a cat", "a photo of a lemon", "the cat on the beach"] * 20
NEW_TEXTS = [*OLD_TEXTS, *["a zebra beside a lemon", "the zebra upside down"] * 20]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """Old and new tokenizer; the old one is shorter and lacks the zebra."""
    folder = tmp_path_factory.mktemp("tokenizers")
    old = make_tokenizer(OLD_TEXTS, folder / "old", vocab_size=560)
    old.model_max_length = OLD_LENGTH
    return old, make_tokenizer(NEW_TEXTS, folder / "new", vocab_size=620)


def _text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length, projection_dim=WIDTH, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def _row_of(tokenizer: CLIPTokenizer, rows: torch.Tensor, token: str) -> torch.Tensor:
    return rows[tokenizer.get_vocab()[token]]


def test_shared_tokens_keep_their_rows_and_others_start_at_the_mean_of_their_pieces(
    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer],
) -> None:
    old, new = tokenizers
    rows = torch.randn(len(old), WIDTH, generator=torch.Generator().manual_seed(0))
    table = transfer_rows(rows, old, new)
    assert table.shape == (len(new), WIDTH)
    shared = old.get_vocab().keys() & new.get_vocab().keys()
    assert {"cat</w>", "lemon</w>", old.eos_token} <= shared
    for token in shared:
        assert torch.equal(_row_of(new, table, token), _row_of(old, rows, token)), token
    assert "zebra</w>" in new.get_vocab().keys() - shared
    pieces = old("zebra", add_special_tokens=False).input_ids
    assert len(pieces) > 1
    assert torch.equal(_row_of(new, table, "zebra</w>"), rows[pieces].mean(0))


def test_text_encoder_gives_known_words_the_states_they_had(tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]) -> None:
    old, new = tokenizers
    torch.manual_seed(0)
    known = CLIPTextModel(_text_config(old)).half().eval()
    encoder = transfer_text_encoder(known, old, new).eval()
    assert encoder.dtype == torch.float32
    assert encoder.config.vocab_size == len(new)
    assert encoder.config.max_position_embeddings == new.model_max_length > OLD_LENGTH
    assert encoder.config.eos_token_id == new.eos_token_id
    with torch.no_grad():
        ids = [torch.tensor([tokenizer("a photo of a lemon").input_ids]) for tokenizer in (old, new)]
        before, after = (
            model(input_ids=each).last_hidden_state for model, each in zip((known.float(), encoder), ids, strict=True)
        )
    assert ids[0].shape == ids[1].shape
    torch.testing.assert_close(after, before)
    positions = encoder.state_dict()[next(key for key in encoder.state_dict() if "position_embedding" in key)]
    assert torch.equal(
        positions[OLD_LENGTH:], positions[OLD_LENGTH - 1 : OLD_LENGTH].expand(new.model_max_length - OLD_LENGTH, -1)
    )


def test_clip_keeps_its_image_tower(tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]) -> None:
    old, new = tokenizers
    vision = {
        "hidden_size": WIDTH, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 16, "patch_size": 8, "projection_dim": WIDTH,
    }  # fmt: skip
    known = CLIPModel(CLIPConfig(text_config=_text_config(old).to_dict(), vision_config=vision, projection_dim=WIDTH))
    clip = transfer_clip(known, old, new)
    assert clip.config.text_config.vocab_size == len(new)
    assert clip.config.text_config.max_position_embeddings == new.model_max_length
    before, after = known.state_dict(), clip.state_dict()
    kept = [key for key in before if key.startswith(("vision_model.", "visual_projection", "logit_scale"))]
    assert len(kept) > 10
    assert all(torch.equal(before[key], after[key]) for key in kept)


def _tiny_unet(inner: str, *, width: int = 16) -> UNet2DConditionModel:
    """Make a U-Net whose inner blocks are of the kind `inner`, "" or "CrossAttn"."""
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(width, 2 * width), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", f"{inner}DownBlock2D"),
        up_block_types=(f"{inner}UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=2, norm_num_groups=8,
    ).eval()  # fmt: skip


def _outputs(*unets: UNet2DConditionModel, width: int = WIDTH) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, unets[0].config.in_channels, 8, 8, generator=generator)
    hidden = torch.randn(2, 5, width, generator=generator)
    with torch.no_grad():
        return [unet(latents, torch.tensor([10, 900]), hidden).sample for unet in unets]


def test_a_deeper_unet_starts_as_the_function_of_the_shallower_one() -> None:
    torch.manual_seed(0)
    old, new = _tiny_unet(""), _tiny_unet("CrossAttn")
    for module in new.modules():
        if isinstance(module, Transformer2DModel):
            nn.init.zeros_(module.proj_out.weight)
            nn.init.zeros_(module.proj_out.bias)
    grown = grow_unet(old, new)
    assert sum(each.numel() for each in grown.parameters()) > sum(each.numel() for each in old.parameters())
    before, after = _outputs(old, grown)
    assert before.std() > 0.01
    assert torch.equal(before, after)


def test_the_committed_unet_grows_into_a_new_one() -> None:
    committed = load_pretrained(UNet2DConditionModel, str(COMMITTED_UNET)).float().eval()
    grown = grow_unet(committed, new_unet()).eval()
    before, after = _outputs(committed, grown, width=committed.config.cross_attention_dim)
    assert before.std() > 0.1
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("old", "new"), [(_tiny_unet("CrossAttn"), _tiny_unet("")), (_tiny_unet("", width=32), _tiny_unet(""))]
)
def test_a_weight_without_a_place_is_refused(old: UNet2DConditionModel, new: UNet2DConditionModel) -> None:
    with pytest.raises(ValueError, match="does not fit the new U-Net"):
        grow_unet(old, new)
