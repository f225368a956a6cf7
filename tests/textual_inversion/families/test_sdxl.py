"""Stable Diffusion XL against diffusers' own pipeline, and through the engine."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load as load_tensors

from tests.textual_inversion.families.learning import (
    assert_pictures_depend_on_no_company_and_survive_files,
    assert_resumes,
    assert_vocabularies_alone_are_the_models,
    assignment,
    concept,
    config,
    edit,
    embedding_of,
    golden_losses,
    learn,
    learned_alone_as_together,
    photo,
    run,
    some_rows,
)
from tests.tiny_models import MAX_LENGTH, RESOLUTION
from tests.tiny_sdxl import LATENT_SHAPE, POOLED, WIDTHS, tiny_stable_diffusion_xl
from textual_inversion.adapter_formats import dump_adapter
from textual_inversion.augment_config import AugmentConfig
from textual_inversion.concept import LearnedEmbedding
from textual_inversion.config import AdapterConfig, PenaltyConfig, SamplingConfig, TimestepConfig
from textual_inversion.families import check_model, load_backbone, load_vocabularies
from textual_inversion.families.base import stack_prompts
from textual_inversion.formats import dump_diffusers
from textual_inversion.generate import ImageRequest, generate, initial_noise
from textual_inversion.initialise import encoder_output, initial_rows
from textual_inversion.latents import encode_views
from textual_inversion.prompts import encode_prompt

PROMPT = "a photo of a <c>"
LORA = AdapterConfig(kind="lora", rank=2, learning_rate=0.05)
SAMPLING = SamplingConfig(solver="ddim", steps=4, batch_size=1)
ENCODERS = {"clip_l": ("tokenizer", "text_encoder"), "clip_g": ("tokenizer_2", "text_encoder_2")}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_stable_diffusion_xl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def backbone(model: Path) -> Any:
    torch.set_num_threads(1)
    return load_backbone(str(model), device="cpu")


@pytest.fixture
def a_copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def diffusers_pipeline(model: Path, embedding: LearnedEmbedding | None = None, *, mended: bool = True) -> Any:
    """The pipeline of diffusers with an embedding's file loaded into both encoders by its own loader.

    `mended`: with the true end of the text in place of the legacy id 2, with which transformers pools at new tokens.
    """
    pipe = StableDiffusionXLPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    if mended:
        pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id
    if embedding is not None:
        rows = load_tensors(dump_diffusers(embedding))
        assert rows.keys() == {"clip_l", "clip_g"}
        for key, (tokenizer, encoder) in ENCODERS.items():
            pipe.load_textual_inversion(
                {embedding.placeholder_token: rows[key]},
                tokenizer=getattr(pipe, tokenizer),
                text_encoder=getattr(pipe, encoder),
            )
    return pipe


def an_embedding(backbone: Any, num_rows: int = 2) -> LearnedEmbedding:
    return LearnedEmbedding(placeholder_token="<c>", vectors=some_rows(backbone, num_rows))


def assert_alike(ours: Image.Image, theirs: Image.Image) -> None:
    difference = np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)
    assert abs(difference).max() <= 1


def test_conditioning_and_output_equal_the_pipelines(backbone: Any, model: Path) -> None:
    embedding = an_embedding(backbone)
    texts = [PROMPT, "", "the red photo of <c> cat"]
    ids = stack_prompts([encode_prompt(text, {"<c>": [0, 1]}, backbone.vocabularies) for text in texts])
    framings = torch.tensor([[480.0, 640.0, 3.0, 5.0], [32.0, 32.0, 0.0, 0.0], [1000.0, 700.0, 11.0, 0.0]])
    ours = backbone.encode_prompts(ids, embedding.vectors).framed(framings)
    pipe = diffusers_pipeline(model, embedding)
    with torch.no_grad():
        hidden, _, pooled, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False)
        torch.testing.assert_close(ours.hidden, hidden)
        torch.testing.assert_close(ours.pooled, pooled)
        latents = torch.randn(3, *LATENT_SHAPE, generator=torch.Generator().manual_seed(0))
        t = torch.tensor([900, 500, 20])
        size = (RESOLUTION, RESOLUTION)
        time_ids = torch.cat(
            [
                pipe._get_add_time_ids((int(h), int(w)), (int(top), int(left)), size, torch.float32, POOLED)
                for h, w, top, left in framings
            ]
        )
        added = {"text_embeds": pooled, "time_ids": time_ids}
        theirs = pipe.unet(latents, t, hidden, added_cond_kwargs=added, return_dict=False)[0]
    said = backbone.predict(latents, t, ours)
    torch.testing.assert_close(said, theirs)
    assert (ours.hidden[0] - ours.hidden[1]).abs().max() > 0.1
    unframed = backbone.predict(latents, t, backbone.encode_prompts(ids, embedding.vectors))
    torch.testing.assert_close(unframed[1], said[1])  # the second framing is the model's own whole picture
    assert (unframed - said)[[0, 2]].abs().amax((1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize("zeros", [True, False])
def test_a_picture_equals_the_pipelines(tmp_path: Path, zeros: bool) -> None:
    model = tiny_stable_diffusion_xl(tmp_path / "model", zeros=zeros)
    backbone: Any = load_backbone(str(model), device="cpu")
    assert backbone.guides_by_zeros == zeros
    embedding = an_embedding(backbone)
    (ours,) = generate(backbone, [ImageRequest(PROMPT, 5, (embedding,))], SAMPLING)
    pipe = diffusers_pipeline(model, embedding)
    latents = initial_noise(backbone, 5)[None]
    size = {"height": RESOLUTION, "width": RESOLUTION}
    (theirs,) = pipe(PROMPT, latents=latents, num_inference_steps=4, **size).images
    assert ours.size == (RESOLUTION, RESOLUTION)
    assert_alike(ours, theirs)
    negative = ImageRequest(PROMPT, 5, (embedding,), "a blurry <c>, dark", (embedding,))
    ours_away, again, plain = generate(
        backbone, [negative, replace(negative, negative_prompt="", negative_embeddings=()),
                   ImageRequest("a photo of a cat", 5)], replace(SAMPLING, batch_size=3)
    )  # fmt: skip
    (theirs_away,) = pipe(
        PROMPT, negative_prompt="a blurry <c>, dark", latents=latents, num_inference_steps=4, **size
    ).images
    assert_alike(ours_away, theirs_away)
    assert_alike(again, theirs)  # zeros stay zeros beside a negative prompt
    assert len({each.tobytes() for each in (ours, ours_away, plain)}) == 3

    wide = replace(negative, size_px=(2 * RESOLUTION, RESOLUTION), negative_prompt="", negative_embeddings=())
    (ours_wide,) = generate(backbone, [wide], SAMPLING)
    noise = initial_noise(backbone, 5, backbone.latent_shape_for(2 * RESOLUTION, RESOLUTION))[None]
    (theirs_wide,) = pipe(PROMPT, latents=noise, num_inference_steps=4, width=2 * RESOLUTION, height=RESOLUTION).images
    assert_alike(ours_wide, theirs_wide)


def test_a_picture_with_an_adapter_equals_the_pipelines(backbone: Any, model: Path, tmp_path: Path) -> None:
    """A LoRA of both encoders, by the pipeline's own loader."""
    embedding = embedding_of(learn(backbone, config(adapter=LORA), concept(0))["c0"])
    pipe = diffusers_pipeline(model, embedding)
    file = tmp_path / "adapter.safetensors"
    file.write_bytes(dump_adapter(embedding))
    pipe.load_lora_weights(tmp_path, weight_name=file.name)
    (ours,) = generate(backbone, [ImageRequest("a photo of a <c0>", 5, (embedding,))], SAMPLING)
    latents = initial_noise(backbone, 5)[None]
    (theirs,) = pipe(
        "a photo of a <c0>", latents=latents, num_inference_steps=4, height=RESOLUTION, width=RESOLUTION
    ).images
    assert_alike(ours, theirs)
    (plain,) = generate(backbone, [ImageRequest("a photo of a <c0>", 5, (replace(embedding, adapter=None),))], SAMPLING)
    assert abs(np.asarray(plain).astype(int) - np.asarray(ours).astype(int)).max() > 1


def test_the_pooled_vector_is_taken_at_the_true_end(backbone: Any, model: Path) -> None:
    embedding = an_embedding(backbone, 1)
    ids = stack_prompts([encode_prompt(text, {"<c>": [0]}, backbone.vocabularies) for text in (PROMPT, "a cat")])
    ours = backbone.encode_prompts(ids, embedding.vectors).pooled
    for mended in (True, False):
        pipe = diffusers_pipeline(model, embedding, mended=mended)
        with torch.no_grad():
            pooled = pipe.encode_prompt([PROMPT, "a cat"], do_classifier_free_guidance=False)[2]
        torch.testing.assert_close(ours[1], pooled[1])
        assert torch.allclose(ours[0], pooled[0], atol=1e-5) == mended


def test_moments_and_pixels_are_the_pipelines(backbone: Any, model: Path) -> None:
    vae = diffusers_pipeline(model).vae
    pixels = torch.rand(2, 3, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        decoded = vae.decode(posterior.mean).sample.clamp(-1, 1)
    moments = backbone.encode_images(pixels)
    torch.testing.assert_close(moments[:, 0], posterior.mean * 0.13025)
    torch.testing.assert_close(moments[:, 1], posterior.std * 0.13025)
    torch.testing.assert_close(backbone.decode(moments[:, 0]), decoded)


def test_what_the_checkpoint_says(backbone: Any, a_copy: Path) -> None:
    assert {key: table.dim for key, table in backbone.token_tables.items()} == WIDTHS
    for key, vocabulary in backbone.vocabularies.items():
        assert vocabulary.size == backbone.token_tables[key].vocab_size
        assert len(vocabulary.assemble([])) == MAX_LENGTH
    assert backbone.vocabularies["clip_l"].assemble([])[-1] != backbone.vocabularies["clip_g"].assemble([])[-1]
    assert (backbone.latent_shape, backbone.resolution) == (LATENT_SHAPE, RESOLUTION)
    assert {"cat", "photo"} <= set(backbone.single_token_words())
    adapted = {name.partition(".")[0] for name in backbone.adapter_layers}
    assert adapted == {"clip_l", "clip_g", "unet"}
    scheduler = a_copy / "scheduler/scheduler_config.json"
    for settings, scale in (
        ({}, 5),
        ({"timestep_spacing": "trailing"}, 1),
        ({"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, 5),
        ({"_class_name": "LCMScheduler"}, 1),
        ({"_class_name": "LCMScheduler", "_guidance_scale": 1.5}, 1.5),
    ):
        original = scheduler.read_text()
        edit(scheduler, **settings)
        assert load_backbone(str(a_copy), device="cpu").guidance_scale == scale
        scheduler.write_text(original)


@pytest.mark.parametrize("force_upcast", [True, False])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_precision_of_the_parts(tmp_path: Path, precision: str, force_upcast: bool) -> None:
    model = tiny_stable_diffusion_xl(tmp_path / "model", force_upcast=force_upcast)
    backbone: Any = load_backbone(str(model), device="cpu", precision=precision)
    assert backbone.dtype == getattr(torch, precision)
    upcast = precision == "float16" and force_upcast
    assert backbone._vae.dtype == (torch.float32 if upcast else backbone.dtype)
    assert {table.weight.dtype for table in backbone.token_tables.values()} == {torch.float32}
    rows = {key: row.requires_grad_() for key, row in some_rows(backbone, 1).items()}
    ids = stack_prompts([encode_prompt(PROMPT, {"<c>": [0]}, backbone.vocabularies)])
    text = backbone.encode_prompts(ids, rows)
    assert {text.hidden.dtype, text.pooled.dtype} == {backbone.dtype}
    output = backbone.predict(torch.randn(1, *LATENT_SHAPE), torch.tensor([500]), text)
    assert output.dtype == torch.float32
    output.square().mean().backward()
    assert all(row.grad is not None and row.grad.any() for row in rows.values())
    assert backbone.decode(torch.randn(1, *LATENT_SHAPE)).dtype == torch.float32


def test_a_photos_size_and_crop_reach_the_denoiser(backbone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The photo of concept 2 is 46 x 32 px: seven pixels are cut off on each side."""
    heard: list[torch.Tensor] = []

    def listen(*args: Any, **kwargs: Any) -> Any:
        heard.append(kwargs["added_cond_kwargs"]["time_ids"])
        return backbone._network(*args, **kwargs)

    monkeypatch.setattr(backbone, "_denoiser", listen)
    run(backbone, config(1), assignment(backbone, concept(2), config()))
    size = [RESOLUTION, RESOLUTION]
    assert {tuple(row) for row in heard[-1].tolist()} == {(32, 46, 0, 7, *size)}
    heard.clear()
    generate(backbone, [ImageRequest("a photo of a cat", 0)], SAMPLING)
    assert {tuple(row) for each in heard for row in each.tolist()} == {(*size, 0, 0, *size)}


def test_framings_of_views(backbone: Any) -> None:
    settings = AugmentConfig(flip=True, crops=3, min_crop_scale=0.5, max_crop_scale=0.5)
    views = encode_views(backbone, [photo(0, 96, 64)], settings, "c", 0)
    assert views.framings is not None
    assert views.framings.shape == (len(views), 4)
    assert views.framings[:2].tolist() == [[64, 96, 0, 8]] * 2  # half the photo's size; the mirror image likewise
    crops = views.framings[2:]
    assert crops[:, :2].tolist() == [[64, 96]] * 3
    assert crops[:, 2].min() >= 0
    assert crops[:, 2].max() <= 32  # at the crops' scale of 1 the photo is 64 px high
    assert crops[:, 3].max() <= 64
    assert len({tuple(crop) for crop in crops.tolist()}) == 3


CAUSAL = replace(LORA, kind="causal")
METHODS: dict[str, dict[str, Any]] = {
    "rows": {},
    "textboost": {
        "adapter": LORA, "penalties": PenaltyConfig(knowledge=0.1), "timesteps": TimestepConfig(sampler="snr"),
    },
    "causal": {"adapter": CAUSAL, "per_image_tokens": True},
    "textboost++": {"adapter": replace(CAUSAL, targets=("fc2", "cross_attention"))},
    "on the sphere": {"optimizer": "riemannian", "norm_control": "sphere"},
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_concepts_learn_together_what_they_learn_alone(backbone: Any, method: str) -> None:
    concepts = [concept(0), concept(1, 2), concept(2)]
    learned = learned_alone_as_together(backbone, config(**METHODS[method]), *concepts)
    for each, ours in zip(concepts, learned, strict=True):
        start = initial_rows(each, backbone, noise=0.0, seed=1)
        assert list(ours.vectors) == list(WIDTHS)
        assert all((rows != start[key]).any(1).all() for key, rows in ours.vectors.items())
        if ours.adapter:
            adapted = {name.partition(".")[0] for name, (_, up) in ours.adapter.tensors.items() if up.any()}
            assert adapted == {*WIDTHS, *(["unet"] if method == "textboost++" else [])}


def test_rows_may_start_from_the_encoders_output(backbone: Any) -> None:
    rows = encoder_output(concept(0, 2), backbone)
    prompt = encode_prompt("a photo of a red cat", {}, backbone.vocabularies)
    states = backbone.encoder_states(stack_prompts([prompt]))
    assert {key: tuple(row.shape) for key, row in rows.items()} == {key: (2, width) for key, width in WIDTHS.items()}
    assert {key: state.shape[-1] for key, state in states.items()} == WIDTHS


def test_a_checkpoint_is_resumed_to_the_bit(backbone: Any) -> None:
    assert_resumes(backbone, config(6, adapter=LORA), concept(1))


@pytest.mark.parametrize("adapter", [LORA, METHODS["textboost++"]["adapter"]], ids=["lora", "textboost++"])
def test_pictures_of_learned_concepts_depend_on_no_company_and_survive_files(
    backbone: Any, adapter: AdapterConfig
) -> None:
    assert_pictures_depend_on_no_company_and_survive_files(backbone, adapter)


def test_the_vocabularies_alone_are_the_models(backbone: Any, model: Path) -> None:
    assert_vocabularies_alone_are_the_models(backbone, model)


@pytest.mark.parametrize(
    ("component", "entry", "message"),
    [
        ("text_encoder", None, "names nothing as 'text_encoder'"),  # a refiner
        ("text_encoder_2", "CLIPTextModel", "names CLIPTextModel as 'text_encoder_2'"),
        ("tokenizer_2", None, "no 'tokenizer_2' in model_index.json"),
        ("unet", "UNet3DConditionModel", "names UNet3DConditionModel as 'unet'"),
    ],
)
def test_a_broken_index_is_refused_without_torch(a_copy: Path, component: str, entry: str | None, message: str) -> None:
    edit(a_copy / "model_index.json", **{component: [entry and "transformers", entry]})
    with pytest.raises(ValueError, match=message):
        load_vocabularies(str(a_copy))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("unet/config.json", {"in_channels": 9}, "takes 9 channels but the autoencoder has 4"),
        ("unet/config.json", {"addition_embed_type": None}, "addition_embed_type is None where 'text_time' is needed"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "reads the guidance scale .* draw with the result in both"),
        ("text_encoder_2/config.json", {"projection_dim": 7}, "reads 68 values besides .* make 55"),
        ("text_encoder_2/config.json", {"hidden_size": 7}, "width 40 but the text encoder makes 16 and 7"),
        ("text_encoder/config.json", {"vocab_size": 9}, "'text_encoder' has shape"),
        ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler scales"),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "rectified flow"),
    ],
)
def test_folders_that_do_not_fit_are_refused_without_torch(
    a_copy: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    edit(a_copy / file, **changes)
    with pytest.raises(ValueError, match=message):
        check_model(str(a_copy))


LOSSES = [1.19257, 1.08904, 1.12682, 1.3795, 1.19706, 1.21397, 1.19014, 1.35056, 1.10292, 1.09439]
"""Losses of ten steps. `python -m tests.textual_inversion.families.test_sdxl` renews them."""


def test_golden_losses(backbone: Any) -> None:
    assert golden_losses(backbone, 1) == pytest.approx(LOSSES, rel=1e-4)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print(golden_losses(load_backbone(str(tiny_stable_diffusion_xl(folder)), device="cpu"), 1))  # noqa: T201
