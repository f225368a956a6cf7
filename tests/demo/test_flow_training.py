"""The training of the demo's rectified-flow transformer, on tiny sizes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

from demo.autoencoder import LATENT_CHANNELS
from demo.denoiser import new_scheduler
from demo.flow_model import PROMPT_LENGTH, TransformerSize, new_transformer, standardise_inputs, start_text_encoders
from demo.flow_training import (
    FlowTraining,
    Scenes,
    Teacher,
    load_teacher,
    logit_normal_timesteps,
    read_scenes,
    train_flow,
    whole_words,
)
from demo.grid import load_pipeline
from demo.loop import Budget, Randomness
from demo.mixtures import mix
from demo.pool import Pool
from demo.tokenizer import encode
from tests.tiny_models import MAX_LENGTH, tiny_tokenizer
from textual_inversion.families import load_backbone
from textual_inversion.families.base import stack_prompts
from textual_inversion.prompts import encode_prompt

CPU = torch.device("cpu")
SIZE = TransformerSize(layers=2, heads=2, head_width=8)
WIDTH = 16
TOKENIZER = tiny_tokenizer()
UNNAMED_ID = len(TOKENIZER)
WORDS = whole_words(TOKENIZER)


def text_config() -> dict[str, Any]:
    return {
        "vocab_size": len(TOKENIZER), "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": MAX_LENGTH, "projection_dim": WIDTH,
        "bos_token_id": TOKENIZER.bos_token_id, "eos_token_id": TOKENIZER.eos_token_id,
        "pad_token_id": TOKENIZER.pad_token_id,
    }  # fmt: skip


def save_trained_models(folder: Path, seed: int) -> tuple[Path, Path]:
    """Write a Stable Diffusion folder and a CLIP as other stages write them; returns `model` and `clip`."""
    torch.manual_seed(seed)
    model, clip = folder / "model", folder / "clip"
    CLIPTextModel(CLIPTextConfig(**text_config())).save_pretrained(model / "text_encoder")
    UNet2DConditionModel(
        sample_size=8, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), layers_per_block=1,
        cross_attention_dim=WIDTH, attention_head_dim=2, norm_num_groups=4,
    ).save_pretrained(model / "unet")  # fmt: skip
    AutoencoderKL(
        sample_size=64, block_out_channels=(8,) * 4, latent_channels=LATENT_CHANNELS, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).save_pretrained(model / "vae")  # fmt: skip
    new_scheduler().save_pretrained(model / "scheduler")
    TOKENIZER.save_pretrained(model / "tokenizer")
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 8}  # fmt: skip
    CLIPModel(CLIPConfig(text_config=text_config(), vision_config=vision, projection_dim=WIDTH)).save_pretrained(clip)
    return model, clip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_trained_models(tmp_path_factory.mktemp("trained"), seed=1)


@pytest.fixture(scope="module")
def pool() -> Pool:
    rng = np.random.default_rng(2)
    captions = ["a photo of a cat", "a photo of a dog on the beach", "a photo of a toy"]
    return Pool(
        pictures=rng.integers(0, 256, (3, 64, 64, 3), dtype=np.uint8),
        captions=captions,
        names=[("cat",), ("dog",), ("toy",)],
        attributes=[("plain", "white", "", "", "", "")] * 3,
    )


@pytest.fixture(scope="module")
def scenes(pool: Pool) -> Scenes:
    latents = torch.randn(3, LATENT_CHANNELS, 8, 8, generator=torch.Generator().manual_seed(2)).half()
    return read_scenes(pool, latents, tiny_tokenizer(), np.random.default_rng(0))


def random_transformer() -> SD3Transformer2DModel:
    """Make a transformer of which no weight is zero."""
    torch.manual_seed(0)
    transformer = new_transformer(2 * WIDTH, SIZE)
    for parameter in transformer.parameters():
        nn.init.normal_(parameter, std=0.2)
    return transformer


def new_training(trained: tuple[Path, Path], scenes: Scenes, transformer: SD3Transformer2DModel) -> FlowTraining:
    empty_ids = encode(TOKENIZER, [""])[0]
    encoders, teacher = start_text_encoders(*trained), load_teacher(trained[0], CPU)
    randomness = Randomness(seed=0, device=CPU)
    return FlowTraining(transformer, encoders, teacher, scenes, WORDS, empty_ids, randomness, captions=12)


def test_timesteps_are_logit_normal_and_one_in_each_slice() -> None:
    timesteps = logit_normal_timesteps(20, torch.Generator().manual_seed(0), CPU)
    levels = (timesteps + 0.5) / 1000
    quantiles = torch.special.ndtr(torch.logit(levels) - 0.5)
    assert sorted((quantiles * 20).long().tolist()) == list(range(20))
    assert timesteps.tolist() != sorted(timesteps.tolist())


class ExactUNet(nn.Module):
    """U-Net that predicts v without error for normally distributed latents of one mean and deviation."""

    device = CPU

    def __init__(self, mean: float, deviation: float) -> None:
        super().__init__()
        self.mean, self.deviation = mean, deviation

    def forward(self, x_t: Tensor, timesteps: Tensor, _: Tensor) -> SimpleNamespace:
        abar = new_scheduler().alphas_cumprod
        levels = (1 - abar).sqrt() / (abar.sqrt() + (1 - abar).sqrt())
        level = torch.from_numpy(np.interp(timesteps, np.arange(1000), levels)).float()[:, None, None, None]
        norm = torch.hypot(1 - level, level)
        signal, sigma = (1 - level) / norm, level / norm
        gain = signal * self.deviation**2 / (signal**2 * self.deviation**2 + sigma**2)
        x_0 = self.mean + gain * (x_t - signal * self.mean)
        return SimpleNamespace(sample=(signal * x_t - x_0) / sigma)


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (0.7, 0.0), (-0.3, 0.5)])
def test_the_teachers_velocity_is_the_flows(mean: float, deviation: float) -> None:
    teacher = Teacher(ExactUNet(mean, deviation), new_scheduler().alphas_cumprod)
    s = torch.tensor([0.05, 0.3, 0.5004, 0.8, 0.93])
    x_t = torch.randn(5, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    got = teacher.velocity(x_t, s, torch.zeros(5, 1, 1))
    s = s[:, None, None, None]
    gain = (1 - s) * deviation**2 / ((1 - s) ** 2 * deviation**2 + s**2)
    x_0 = mean + gain * (x_t - (1 - s) * mean)
    torch.testing.assert_close(got, (x_t - x_0) / s, rtol=1e-3, atol=1e-3)


def test_pure_noise_has_the_timestep_of_the_schedules_end() -> None:
    teacher = Teacher(ExactUNet(0.7, 0.0), new_scheduler().alphas_cumprod)
    assert teacher.timesteps(torch.tensor([0.0, 1.0])).tolist() == [0, 999]
    torch.testing.assert_close(teacher.timesteps(teacher.levels[[3, 500]]), torch.tensor([3.0, 500.0]))
    noise = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(teacher.velocity(noise, torch.ones(1), torch.zeros(1, 1, 1)), noise - 0.7)


def test_scenes_whose_captions_do_not_fit_are_left_out(pool: Pool) -> None:
    longer = Pool(pool.pictures, [*pool.captions[:2], "a toy" + " a" * 18], pool.names, pool.attributes)
    scenes = read_scenes(longer, torch.arange(3), tiny_tokenizer(), np.random.default_rng(0))
    assert scenes.latents.tolist() == [0, 1]
    assert torch.equal(scenes.named_ids, encode(TOKENIZER, pool.captions[:2]))
    assert (scenes.unnamed_ids == UNNAMED_ID).sum(1).tolist() == [1, 1]


def test_whole_words_are_words_of_three_letters_or_more() -> None:
    words = {TOKENIZER.convert_ids_to_tokens(index) for index in WORDS.tolist()}
    assert {"cat</w>", "photo</w>"} <= words
    assert "a</w>" not in words


def test_loss_is_the_plain_formula(trained: tuple[Path, Path], scenes: Scenes) -> None:
    transformer = random_transformer()
    loss, _ = new_training(trained, scenes, transformer).loss(0.0)
    loss.backward()
    ours = transformer.context_embedder.weight.grad.clone()

    transformer.zero_grad()
    same = new_training(trained, scenes, transformer)
    transformer.set_attn_processor(JointAttnProcessor2_0())
    x_0, ids = same.draw_batch()
    randomness = same.randomness.torch
    x_0 = x_0.repeat_interleave(2, 0)
    eps = torch.randn(x_0.shape, generator=randomness)
    sigma = (logit_normal_timesteps(24, randomness, CPU) + 1) / 1000
    x_t = (1 - sigma)[:, None, None, None] * x_0 + sigma[:, None, None, None] * eps
    mixtures = mix(12, same.tables[0], randomness)
    is_unnamed = ids == UNNAMED_ID
    known = ids.masked_fill(is_unnamed, 0)
    texts = []
    for vocabulary, table in zip(same.vocabularies, same.tables, strict=True):
        made = mixtures.rows(table)[:, None]
        texts.append((known, torch.where(is_unnamed[..., None], made, vocabulary.table(known))))
    hidden, pooled, states = (each.repeat_interleave(2, 0) for each in plain_conditioning(trained, texts))
    zeros = torch.zeros(24, 256, 2 * WIDTH)
    prediction = transformer(x_t, torch.cat([hidden, zeros], 1), pooled, 1000 * sigma).sample
    losses = (prediction - same.teacher.velocity(x_t, sigma, states)).square().mean((1, 2, 3))
    losses.mean().backward()
    torch.testing.assert_close(loss, losses.mean())
    torch.testing.assert_close(ours, transformer.context_embedder.weight.grad, rtol=1e-3, atol=1e-5)
    assert is_unnamed.any()


def plain_conditioning(trained: tuple[Path, Path], texts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Encode rows by the towers as saved, in place of token ids."""
    model, clip = trained
    encoder, tower = CLIPTextModel.from_pretrained(model / "text_encoder"), CLIPModel.from_pretrained(clip)
    outputs = []
    for each, (ids, inputs) in zip((encoder, tower.text_model), texts, strict=True):
        with mock.patch.object(each.get_input_embeddings(), "forward", return_value=inputs), torch.no_grad():
            outputs.append(each(ids, output_hidden_states=True))
    hidden = torch.cat([output.hidden_states[1][:, :PROMPT_LENGTH] for output in outputs], -1)
    pooled = torch.cat([outputs[0].pooler_output, tower.text_projection(outputs[1].pooler_output).detach()], -1)
    return hidden, pooled, outputs[0].last_hidden_state


def test_a_new_transformer_predicts_zero_and_reads_standard_inputs(trained: tuple[Path, Path], scenes: Scenes) -> None:
    transformer = new_transformer(2 * WIDTH, SIZE)
    training = new_training(trained, scenes, transformer)
    training.standardise()
    hidden, pooled, _ = training.encode(scenes.unnamed_ids)
    assert not transformer(torch.randn(3, LATENT_CHANNELS, 8, 8), hidden, pooled, torch.ones(3)).sample.any()
    loss, _ = training.loss(0.0)
    loss.backward()
    assert transformer.proj_out.weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in training.encoders.parameters())


def test_standardised_inputs_have_mean_0_and_deviation_1() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    inputs = torch.randn(2, 500, 4) * torch.tensor([1.0, 10.0, 0.1, 3.0]) + torch.tensor([5.0, 0.0, -1.0, 2.0])
    flat = inputs.flatten(0, 1)
    expected = layer((flat - flat.mean(0)) / flat.std(0))
    standardise_inputs(layer, inputs)
    torch.testing.assert_close(layer(flat), expected, rtol=1e-4, atol=1e-4)


def run(
    trained: tuple[Path, Path], pool: Pool, folder: Path, work: Path, steps: int, size: TransformerSize = SIZE
) -> dict[str, Tensor]:
    work.mkdir(exist_ok=True)
    train_flow(
        pool, *trained, folder, work, budget=Budget(steps=steps), device=CPU, seed=3, decay_from=0.9, size=size,
        captions=4,
    )  # fmt: skip
    return torch.load(work / "flow.ckpt", weights_only=False)


def test_a_stopped_training_continues_bit_for_bit(trained: tuple[Path, Path], pool: Pool, tmp_path: Path) -> None:
    whole = run(trained, pool, tmp_path / "whole", tmp_path / "w", steps=4)
    run(trained, pool, tmp_path / "parts", tmp_path / "p", steps=2)
    parts = run(trained, pool, tmp_path / "parts", tmp_path / "p", steps=4)
    for part in ("transformer", "text_encoders"):
        assert whole[part].keys() == parts[part].keys()
        for key, value in whole[part].items():
            assert torch.equal(value, parts[part][key]), (part, key)
    for each in ("text_encoder", "text_encoder_2", "transformer"):
        (ours,) = (tmp_path / "whole" / each).glob("*.safetensors")
        assert ours.read_bytes() == (tmp_path / "parts" / each / ours.name).read_bytes()


def test_diffusers_pipeline_draws_with_the_saved_folder_and_the_family_serves_it(
    trained: tuple[Path, Path], pool: Pool, tmp_path: Path
) -> None:
    folder = tmp_path / "flow"
    run(trained, pool, folder, tmp_path / "work", steps=2)
    pipeline = load_pipeline(folder)
    assert isinstance(pipeline, StableDiffusion3Pipeline)
    pipeline.set_progress_bar_config(disable=True)
    assert {pipeline.transformer.dtype, pipeline.text_encoder.dtype, pipeline.text_encoder_2.dtype} == {torch.float32}
    arguments = {"num_inference_steps": 2, "height": 64, "width": 64, "guidance_scale": 2.0, "output_type": "np"}
    picture = pipeline("a photo of a cat", generator=torch.Generator().manual_seed(0), **arguments).images[0]
    assert picture.shape == (64, 64, 3)
    assert np.isfinite(picture).all()

    backbone = load_backbone(str(folder), device="cpu")
    assert (backbone.latent_shape, backbone.resolution) == ((LATENT_CHANNELS, 8, 8), 64)
    prompt = "a photo of a cat on the beach"
    ids = stack_prompts([encode_prompt(prompt, {}, backbone.vocabularies)])
    ours = backbone.encode_prompts(ids, {})
    hidden, _, pooled, _ = pipeline.encode_prompt(prompt, prompt, prompt, do_classifier_free_guidance=False)
    torch.testing.assert_close(ours.hidden, hidden[:, :PROMPT_LENGTH])
    torch.testing.assert_close(ours.pooled, pooled)
