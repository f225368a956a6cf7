"""The training of the demo's rectified-flow transformer, on tiny sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

from demo.autoencoder import LATENT_CHANNELS
from demo.flow_model import TransformerSize, new_transformer, standardise_inputs, start_text_encoders
from demo.flow_training import FlowTraining, logit_normal_timesteps, train_flow
from demo.grid import load_pipeline
from demo.latent_pool import LatentPool, cumulative_probability
from demo.loop import Budget, Randomness
from demo.tokenizer import encode
from tests.tiny_models import MAX_LENGTH, tiny_tokenizer
from textual_inversion.families import load_backbone
from textual_inversion.families.base import stack_prompts
from textual_inversion.prompts import encode_prompt

CPU = torch.device("cpu")
SIZE = TransformerSize(layers=2, heads=2, head_width=8)
WIDTH = 16
NUM_FEATURES = 6
TOKENIZER = tiny_tokenizer()
UNNAMED_ID = len(TOKENIZER)


def text_config() -> dict[str, Any]:
    return {
        "vocab_size": len(TOKENIZER), "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": MAX_LENGTH, "projection_dim": WIDTH,
        "bos_token_id": TOKENIZER.bos_token_id, "eos_token_id": TOKENIZER.eos_token_id,
        "pad_token_id": TOKENIZER.pad_token_id,
    }  # fmt: skip


def save_trained_models(folder: Path, seed: int) -> tuple[Path, Path]:
    """Write a text encoder and a CLIP as the stages before write them; returns the folders `model` and `clip`."""
    torch.manual_seed(seed)
    model, clip = folder / "model", folder / "clip"
    CLIPTextModel(CLIPTextConfig(**text_config())).save_pretrained(model / "text_encoder")
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 8}  # fmt: skip
    CLIPModel(CLIPConfig(text_config=text_config(), vision_config=vision, projection_dim=WIDTH)).save_pretrained(clip)
    return model, clip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_trained_models(tmp_path_factory.mktemp("trained"), seed=1)


@pytest.fixture(scope="module")
def pool() -> LatentPool:
    generator = torch.Generator().manual_seed(2)
    ids = encode(TOKENIZER, ["a photo of a cat", "a photo of a dog on the beach", "a photo of a toy"])
    ids[2, 5] = UNNAMED_ID
    return LatentPool(
        latents=torch.randn(3, LATENT_CHANNELS, 8, 8, generator=generator).half(),
        input_ids=ids,
        objects=torch.tensor([-1, -1, 0]),
        features=torch.randn(1, NUM_FEATURES, generator=generator),
        cumulative=cumulative_probability(["plain", "style", "unnamed"]),
    )


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=64, block_out_channels=(8,) * 4, latent_channels=LATENT_CHANNELS, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip


def random_transformer() -> SD3Transformer2DModel:
    """Make a transformer of which no weight is zero."""
    torch.manual_seed(0)
    transformer = new_transformer(2 * WIDTH, SIZE)
    for parameter in transformer.parameters():
        nn.init.normal_(parameter, std=0.2)
    return transformer


def new_training(trained: tuple[Path, Path], pool: LatentPool, transformer: SD3Transformer2DModel) -> FlowTraining:
    empty_ids = encode(TOKENIZER, [""])[0]
    encoders = start_text_encoders(*trained)
    return FlowTraining(transformer, encoders, pool, empty_ids, Randomness(seed=0, device=CPU), captions=12)


def test_timesteps_are_logit_normal_and_one_in_each_slice() -> None:
    timesteps = logit_normal_timesteps(20, torch.Generator().manual_seed(0), CPU)
    levels = (timesteps + 0.5) / 1000
    quantiles = torch.special.ndtr(torch.logit(levels) - 0.5)
    assert sorted((quantiles * 20).long().tolist()) == list(range(20))
    assert timesteps.tolist() != sorted(timesteps.tolist())


def test_loss_is_the_plain_formula(trained: tuple[Path, Path], pool: LatentPool) -> None:
    transformer = random_transformer()
    training = new_training(trained, pool, transformer)
    loss, figures = training.loss(0.0)
    loss.backward()
    ours = transformer.context_embedder.weight.grad.clone()

    transformer.zero_grad()
    transformer.set_attn_processor(JointAttnProcessor2_0())
    randomness = Randomness(seed=0, device=CPU)
    rows = pool.sample(12, randomness.numpy)
    is_empty = randomness.numpy.random(12) < 0.1
    x_0 = pool.latents[rows].float()
    eps = torch.randn(x_0.shape, generator=randomness.torch)
    sigma = (logit_normal_timesteps(12, randomness.torch, CPU) + 1) / 1000
    x_t = (1 - sigma)[:, None, None, None] * x_0 + sigma[:, None, None, None] * eps
    texts = []
    for table, words in zip(training.vocabularies, training.words, strict=True):
        made = words(pool.features[[0] * 12], randomness.torch)
        ids = torch.where(torch.from_numpy(is_empty)[:, None], encode(TOKENIZER, [""]), pool.input_ids[rows])
        is_unnamed = ids == UNNAMED_ID
        ids = ids.masked_fill(is_unnamed, 0)
        texts.append((ids, torch.where(is_unnamed[..., None], made[:, None], table.table(ids))))
    hidden, pooled = plain_conditioning(trained, texts)
    zeros = torch.zeros(12, 256, 2 * WIDTH)
    prediction = transformer(x_t, torch.cat([hidden, zeros], 1), pooled, 1000 * sigma).sample
    losses = (prediction - (eps - x_0)).square().mean((1, 2, 3))
    losses.mean().backward()
    torch.testing.assert_close(loss, losses.mean())
    torch.testing.assert_close(figures["unnamed"], losses[rows == 2].mean().item())
    torch.testing.assert_close(ours, transformer.context_embedder.weight.grad, rtol=1e-3, atol=1e-5)
    assert (rows == 2).any()
    assert is_empty.any()


def plain_conditioning(trained: tuple[Path, Path], texts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Encode rows by the towers as saved, in place of token ids."""
    model, clip = trained
    encoder, tower = CLIPTextModel.from_pretrained(model / "text_encoder"), CLIPModel.from_pretrained(clip)
    hidden, pooled = [], []
    for each, (ids, inputs) in zip((encoder, tower.text_model), texts, strict=True):
        with mock.patch.object(each.get_input_embeddings(), "forward", return_value=inputs):
            output = each(ids, output_hidden_states=True)
        hidden.append(output.hidden_states[1])
        pooled.append(output.pooler_output)
    pooled[1] = tower.text_projection(pooled[1])
    return torch.cat(hidden, -1), torch.cat(pooled, -1)


def test_a_new_transformer_predicts_zero_and_reads_standard_inputs(
    trained: tuple[Path, Path], pool: LatentPool
) -> None:
    transformer = new_transformer(2 * WIDTH, SIZE)
    training = new_training(trained, pool, transformer)
    training.standardise()
    hidden, pooled = training.encode(pool.input_ids, pool.features[[0] * 3])
    assert not transformer(torch.randn(3, LATENT_CHANNELS, 8, 8), hidden, pooled, torch.ones(3)).sample.any()
    loss, _ = training.loss(0.0)
    loss.backward()
    assert transformer.proj_out.weight.grad.abs().max() > 0


def test_standardised_inputs_have_mean_0_and_deviation_1() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    inputs = torch.randn(2, 500, 4) * torch.tensor([1.0, 10.0, 0.1, 3.0]) + torch.tensor([5.0, 0.0, -1.0, 2.0])
    flat = inputs.flatten(0, 1)
    expected = layer((flat - flat.mean(0)) / flat.std(0))
    standardise_inputs(layer, inputs)
    torch.testing.assert_close(layer(flat), expected, rtol=1e-4, atol=1e-4)


def test_text_encoders_stay_and_the_words_are_learned(trained: tuple[Path, Path], pool: LatentPool) -> None:
    training = new_training(trained, pool, random_transformer())
    training.loss(0.0)[0].backward()
    assert all(parameter.grad is None for parameter in training.encoders.parameters())
    assert all(parameter.grad.abs().max() > 0 for parameter in training.words.parameters())


def test_words_continue_the_denoisers(trained: tuple[Path, Path], pool: LatentPool) -> None:
    training = new_training(trained, pool, random_transformer())
    known = {key: torch.randn_like(value) for key, value in training.words[0].state_dict().items()}
    tables = [vocabulary.table.weight for vocabulary in training.vocabularies]
    training.continue_words(known)
    for network, table in zip(training.words, tables, strict=True):
        torch.testing.assert_close(network.layers[1].weight, known["layers.1.weight"])
        torch.testing.assert_close(network.centre, table.mean(0))


def run(
    trained: tuple[Path, Path],
    pool: LatentPool,
    folder: Path,
    checkpoint: Path,
    steps: int,
    size: TransformerSize = SIZE,
) -> dict[str, Tensor]:
    model, clip = trained
    train_flow(
        pool, TOKENIZER, new_vae(), folder, checkpoint, budget=Budget(steps=steps), device=CPU, seed=3, model=model,
        clip=clip, decay_from=0.9, size=size, captions=4,
    )  # fmt: skip
    return torch.load(checkpoint, weights_only=False)


def test_a_stopped_training_continues_bit_for_bit(trained: tuple[Path, Path], pool: LatentPool, tmp_path: Path) -> None:
    whole = run(trained, pool, tmp_path / "whole", tmp_path / "whole.ckpt", steps=4)
    run(trained, pool, tmp_path / "parts", tmp_path / "parts.ckpt", steps=2)
    others = save_trained_models(tmp_path / "others", seed=7)  # the checkpoint's text encoders count, not these
    parts = run(others, pool, tmp_path / "parts", tmp_path / "parts.ckpt", steps=4)
    for part in ("transformer", "text_encoders", "words"):
        assert whole[part].keys() == parts[part].keys()
        for key, value in whole[part].items():
            assert torch.equal(value, parts[part][key]), (part, key)
    for each in ("text_encoder", "text_encoder_2", "transformer"):
        (ours,) = (tmp_path / "whole" / each).glob("*.safetensors")
        assert ours.read_bytes() == (tmp_path / "parts" / each / ours.name).read_bytes()


def test_diffusers_pipeline_draws_with_the_saved_folder_and_the_family_serves_it(
    trained: tuple[Path, Path], pool: LatentPool, tmp_path: Path
) -> None:
    folder = tmp_path / "flow"
    run(trained, pool, folder, tmp_path / "flow.ckpt", steps=2)
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
    torch.testing.assert_close(ours.hidden, hidden[:, :MAX_LENGTH])
    torch.testing.assert_close(ours.pooled, pooled)


@pytest.mark.slow
def test_a_training_learns_to_draw_what_the_caption_says(
    trained: tuple[Path, Path], pool: LatentPool, tmp_path: Path
) -> None:
    folder = tmp_path / "flow"
    run(
        trained, pool, folder, tmp_path / "flow.ckpt", steps=300, size=TransformerSize(layers=2, heads=2, head_width=32)
    )
    pipeline = load_pipeline(folder)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        ["a photo of a cat", "a photo of a dog on the beach"], num_inference_steps=10, height=64, width=64,
        guidance_scale=1.0, output_type="latent", generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    shown = pool.latents[:2].float().flatten(1)
    likeness = torch.cosine_similarity(drawn.flatten(1)[:, None], shown[None], dim=-1)
    assert likeness.diagonal().min() > 0.8
    assert (likeness - torch.eye(2)).abs().max() < 0.5
