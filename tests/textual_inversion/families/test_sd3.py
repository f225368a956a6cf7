"""Stable Diffusion 3 against diffusers' own pipeline, with and without T5, and through the engine."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from torch import nn

from tests.textual_inversion.families.learning import (
    assert_pictures_depend_on_no_company_and_survive_files,
    assert_resumes,
    assert_vocabularies_alone_are_the_models,
    concept,
    config,
    edit,
    embedding_of,
    golden_losses,
    learn,
    learned_alone_as_together,
    some_rows,
)
from tests.tiny_models import MAX_LENGTH, RESOLUTION
from tests.tiny_sd3 import LATENT_SHAPE, VOCAB_SIZE_T5, WIDTHS, tiny_stable_diffusion_3
from textual_inversion.adapter_formats import dump_adapter
from textual_inversion.concept import LearnedEmbedding
from textual_inversion.config import AdapterConfig, PenaltyConfig, SamplingConfig, TimestepConfig
from textual_inversion.families import check_model, load_backbone, load_vocabularies
from textual_inversion.families.base import stack_prompts
from textual_inversion.generate import ImageRequest, generate, initial_noise
from textual_inversion.initialise import encoder_output, initial_rows
from textual_inversion.prompts import encode_prompt

PROMPT = "a photo of a <c>"
LORA = AdapterConfig(kind="lora", rank=2, learning_rate=0.05)


@pytest.fixture(scope="module", params=["with T5", "without T5"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_stable_diffusion_3(tmp_path_factory.mktemp("sd3"), t5=request.param == "with T5")


@pytest.fixture(scope="module")
def backbone(model: Path) -> Any:
    torch.set_num_threads(1)
    return load_backbone(str(model), device="cpu")


@pytest.fixture
def a_copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def diffusers_pipeline(model: Path) -> Any:
    """The pipeline of diffusers, which wants to be told that there is no T5."""
    without = {} if (model / "text_encoder_3").exists() else {"text_encoder_3": None, "tokenizer_3": None}
    return StableDiffusion3Pipeline.from_pretrained(model, **without)


def pipeline_with(model: Path, rows: dict[str, torch.Tensor]) -> Any:
    """The pipeline of diffusers with each row as a new token <row0>, <row1>, ... of every tokenizer."""
    pipe = diffusers_pipeline(model)
    # diffusers has no loader of embeddings for this pipeline
    pairs = {"clip_l": ("tokenizer", "text_encoder"), "clip_g": ("tokenizer_2", "text_encoder_2"),
             "t5xxl": ("tokenizer_3", "text_encoder_3")}  # fmt: skip
    for key, values in rows.items():
        tokenizer, encoder = (getattr(pipe, name) for name in pairs[key])
        tokenizer.add_tokens([f"<row{i}>" for i in range(len(values))])
        weight = encoder.get_input_embeddings().weight
        ids = tokenizer.convert_tokens_to_ids([f"<row{i}>" for i in range(len(values))])
        table = nn.Embedding(max(len(weight), max(ids) + 1), weight.shape[1])
        table.weight.data[: len(weight)] = weight.data
        table.weight.data[ids] = values
        encoder.set_input_embeddings(table)
    pipe.text_encoder.text_model.eos_token_id = pipe.tokenizer.eos_token_id  # 2 pools at the new tokens
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_conditioning_and_output_equal_the_pipelines(backbone: Any, model: Path) -> None:
    rows = some_rows(backbone)
    texts = ["a photo of a <c>", "", "the red photo of <c> cat"]
    ids = stack_prompts([encode_prompt(text, {"<c>": [0, 1]}, backbone.vocabularies) for text in texts])
    ours = backbone.encode_prompts(ids, rows)
    pipe = pipeline_with(model, rows)
    with torch.no_grad():
        hidden, _, pooled, _ = pipe.encode_prompt(
            [text.replace("<c>", "<row0> <row1>") for text in texts], None, None, do_classifier_free_guidance=False
        )
        padding = hidden.shape[1] - ours.hidden.shape[1]
        assert padding == (0 if "t5xxl" in rows else 256)
        torch.testing.assert_close(F.pad(ours.hidden, (0, 0, 0, padding)), hidden)
        torch.testing.assert_close(ours.pooled, pooled)
        latents = torch.randn(3, *LATENT_SHAPE, generator=torch.Generator().manual_seed(0))
        t = torch.tensor([900.0, 500.5, 20.0])
        theirs = pipe.transformer(latents, hidden, pooled, t, return_dict=False)[0]
    torch.testing.assert_close(backbone.predict(latents, t, ours), theirs)
    assert (ours.hidden[0] - ours.hidden[1]).abs().max() > 0.1


def test_a_picture_equals_the_pipelines(backbone: Any, model: Path) -> None:
    """Euler's steps with the pipeline's default guidance, the rows put into its encoders."""
    rows = some_rows(backbone, 1)
    embedding = LearnedEmbedding(placeholder_token="<c>", vectors=rows)
    (ours,) = generate(
        backbone, [ImageRequest(PROMPT, 5, (embedding,))], SamplingConfig(solver="ddim", steps=4, batch_size=1)
    )
    pipe = pipeline_with(model, rows)
    (theirs,) = pipe("a photo of a <row0>", latents=initial_noise(backbone, 5)[None], num_inference_steps=4).images
    assert ours.size == (RESOLUTION, RESOLUTION)
    difference = np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)
    assert abs(difference).max() <= 1
    wide = ImageRequest(PROMPT, 5, (embedding,), size_px=(2 * RESOLUTION, RESOLUTION))
    (ours_wide,) = generate(backbone, [wide], SamplingConfig(solver="ddim", steps=4, batch_size=1))
    noise = initial_noise(backbone, 5, backbone.latent_shape_for(2 * RESOLUTION, RESOLUTION))[None]
    (theirs_wide,) = pipe(
        "a photo of a <row0>", latents=noise, num_inference_steps=4, width=2 * RESOLUTION, height=RESOLUTION
    ).images
    assert abs(np.asarray(ours_wide).astype(int) - np.asarray(theirs_wide).astype(int)).max() <= 1
    (plain,) = generate(backbone, [ImageRequest("a photo of a cat", 5)], SamplingConfig(solver="ddim", steps=4))
    assert plain.tobytes() != ours.tobytes()


def test_moments_and_pixels_are_the_pipelines(backbone: Any, model: Path) -> None:
    vae = diffusers_pipeline(model).vae
    pixels = torch.rand(2, 3, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        mean = (posterior.mean - 0.0609) * 1.5305
        decoded = vae.decode(mean / 1.5305 + 0.0609).sample.clamp(-1, 1)
    moments = backbone.encode_images(pixels)
    torch.testing.assert_close(moments[:, 0], mean)
    torch.testing.assert_close(moments[:, 1], posterior.std * 1.5305)
    torch.testing.assert_close(backbone.decode(moments[:, 0]), decoded)


def test_what_the_checkpoint_says(backbone: Any, model: Path, a_copy: Path) -> None:
    with_t5 = (model / "text_encoder_3").exists()
    widths = WIDTHS if with_t5 else {key: WIDTHS[key] for key in ("clip_l", "clip_g")}
    assert {key: table.dim for key, table in backbone.token_tables.items()} == widths
    assert [key for key, table in backbone.token_tables.items() if table.learns_rows] == ["clip_l", "clip_g"]
    for key, vocabulary in backbone.vocabularies.items():
        assert vocabulary.size == backbone.token_tables[key].vocab_size
        assert len(vocabulary.assemble([])) == (256 if key == "t5xxl" else MAX_LENGTH)
    assert not with_t5 or backbone.vocabularies["t5xxl"].size == VOCAB_SIZE_T5
    assert (backbone.latent_shape, backbone.resolution) == (LATENT_SHAPE, RESOLUTION)
    assert backbone.guidance_scale == 7
    edit(a_copy / "scheduler/scheduler_config.json", _guidance_scale=1.0)
    assert load_backbone(str(a_copy), device="cpu").guidance_scale == 1
    assert {"cat", "photo"} <= set(backbone.single_token_words())


def test_the_pooled_vector_is_taken_at_the_true_end(backbone: Any) -> None:
    """The first CLIP's config has the id 2, with which transformers pools at the largest id, the row's."""
    ids = stack_prompts([encode_prompt("a <c> here", {"<c>": [0]}, backbone.vocabularies)])
    rows = {key: row.requires_grad_() for key, row in some_rows(backbone, 1).items()}
    pooled = backbone.encode_prompts(ids, rows).pooled
    encoder = backbone._clips._encoders["clip_l"]
    assert encoder.config.eos_token_id == 2
    end = ids["clip_l"][0].tolist().index(backbone.vocabularies["clip_l"].end_of_text)
    with backbone.token_tables["clip_l"].reading(rows["clip_l"]):
        output = encoder(ids["clip_l"])
        expected = encoder.text_projection(output.last_hidden_state[0, end])
    torch.testing.assert_close(pooled[0, : WIDTHS["clip_l"]], expected)
    assert (output.text_embeds[0] - expected).abs().max() > 1e-3


@pytest.mark.parametrize(("precision", "t5"), [("bfloat16", torch.bfloat16), ("float16", torch.bfloat16)])
def test_precision_of_the_parts(model: Path, precision: str, t5: torch.dtype) -> None:
    backbone: Any = load_backbone(str(model), device="cpu", precision=precision)
    assert backbone.dtype == getattr(torch, precision)
    assert {encoder.dtype for encoder in backbone._clips._encoders.values()} == {torch.float32}
    assert backbone._t5 is None or backbone._t5.token_table.weight.dtype == t5
    rows = {key: row.requires_grad_(key != "t5xxl") for key, row in some_rows(backbone, 1).items()}
    ids = stack_prompts([encode_prompt(PROMPT, {"<c>": [0]}, backbone.vocabularies)])
    text = backbone.encode_prompts(ids, rows)
    assert {text.hidden.dtype, text.pooled.dtype} == {backbone.dtype}
    output = backbone.predict(torch.randn(1, *LATENT_SHAPE), torch.tensor([500.0]), text)
    assert output.dtype == torch.float32
    output.square().mean().backward()
    assert all(rows[key].grad.any() for key in ("clip_l", "clip_g"))
    assert backbone.decode(torch.randn(1, *LATENT_SHAPE)).dtype == torch.float32


METHODS: dict[str, dict[str, Any]] = {
    "rows": {},
    "textboost": {
        "adapter": LORA, "penalties": PenaltyConfig(knowledge=0.1), "timesteps": TimestepConfig(sampler="snr"),
    },
    "causal": {"adapter": replace(LORA, kind="causal"), "per_image_tokens": True},
    "on the sphere": {"optimizer": "riemannian", "norm_control": "sphere"},
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_concepts_learn_together_what_they_learn_alone(backbone: Any, method: str) -> None:
    """And T5's row is the initializer's, before and after."""
    concepts = [concept(0), concept(1, 2), concept(2)]
    learned = learned_alone_as_together(backbone, config(**METHODS[method]), *concepts)
    for each, ours in zip(concepts, learned, strict=True):
        start = initial_rows(each, backbone, noise=0.0, seed=1)
        assert list(ours.vectors) == list(backbone.token_tables)
        for key, rows in ours.vectors.items():
            assert torch.equal(rows, start[key]) == (key == "t5xxl")
        if ours.adapter:
            adapted = {name.partition(".")[0] for name, (_, up) in ours.adapter.tensors.items() if up.any()}
            assert adapted == {"clip_l", "clip_g"}


def test_t5s_rows_are_the_mean_of_the_initializers_vectors(backbone: Any) -> None:
    if "t5xxl" not in backbone.token_tables:
        pytest.skip("a model without T5")
    table = backbone.token_tables["t5xxl"]
    expected = table.weight[backbone.vocabularies["t5xxl"].tokenize("red cat")].mean(0).expand(2, -1)
    for rows in (initial_rows(concept(0, 2), backbone, noise=1.0, seed=0), encoder_output(concept(0, 2), backbone)):
        assert torch.equal(rows["t5xxl"], expected)
        assert not torch.equal(rows["clip_l"][0], rows["clip_l"][1])


@pytest.mark.parametrize("keys", [("t5xxl",), ("clip_g",), ("clip_l", "clip_g", "t5xxl")])
def test_rows_are_learned_in_the_encoders_that_the_settings_name(backbone: Any, keys: tuple[str, ...]) -> None:
    if not set(keys) <= backbone.token_tables.keys():
        with pytest.raises(ValueError, match="names 't5xxl', but this model's text encoders are clip_l, clip_g"):
            learn(backbone, config(text_encoders=keys), concept(0))
        return
    settings = config(text_encoders=keys, timesteps=TimestepConfig(sampler="logit_normal"))
    concepts = [concept(0), concept(1, 2)]
    for each, ours in zip(concepts, learned_alone_as_together(backbone, settings, *concepts), strict=True):
        start = initial_rows(each, backbone, noise=0.0, seed=1, learning=keys)
        assert {key for key, rows in ours.vectors.items() if not torch.equal(rows, start[key])} == set(keys)


def test_a_picture_with_an_adapter_equals_the_pipelines(backbone: Any, model: Path, tmp_path: Path) -> None:
    """A LoRA of both CLIPs, by the pipeline's own loader."""
    embedding = embedding_of(learn(backbone, config(adapter=LORA), concept(0))["c0"])
    request = ImageRequest("a photo of a <c0>", 5, (embedding,))
    (ours,) = generate(backbone, [request], SamplingConfig(solver="ddim", steps=4, batch_size=1))
    pipe = pipeline_with(model, embedding.vectors)
    (plain,) = pipe("a photo of a <row0>", latents=initial_noise(backbone, 5)[None], num_inference_steps=4).images
    (tmp_path / "adapter.safetensors").write_bytes(dump_adapter(embedding))
    pipe.load_lora_weights(tmp_path, weight_name="adapter.safetensors")
    (theirs,) = pipe("a photo of a <row0>", latents=initial_noise(backbone, 5)[None], num_inference_steps=4).images
    assert abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)).max() <= 1
    assert abs(np.asarray(ours).astype(int) - np.asarray(plain).astype(int)).max() > 1


def test_a_checkpoint_is_resumed_to_the_bit(backbone: Any) -> None:
    assert_resumes(backbone, config(6, adapter=LORA), concept(0))


def test_pictures_of_learned_concepts_depend_on_no_company_and_survive_files(backbone: Any) -> None:
    assert_pictures_depend_on_no_company_and_survive_files(backbone, LORA)


def test_the_vocabularies_alone_are_the_models(backbone: Any, model: Path) -> None:
    assert_vocabularies_alone_are_the_models(backbone, model)


@pytest.mark.parametrize(
    ("component", "entry", "message"),
    [
        ("text_encoder_2", None, "names nothing as 'text_encoder_2'; CLIPTextModelWithProjection is needed"),
        ("text_encoder", "CLIPTextModel", "names CLIPTextModel as 'text_encoder'"),
        ("tokenizer_2", "BertTokenizer", "names BertTokenizer as 'tokenizer_2'; CLIPTokenizer or"),
        ("tokenizer_2", None, "names nothing as 'tokenizer_2'; CLIPTokenizer or"),
        ("transformer", "FluxTransformer2DModel", "names FluxTransformer2DModel as 'transformer'"),
        ("scheduler", "DDIMScheduler", "names DDIMScheduler as 'scheduler'"),
    ],
)
def test_a_broken_index_is_refused_without_torch(a_copy: Path, component: str, entry: str | None, message: str) -> None:
    edit(a_copy / "model_index.json", **{component: [entry and "transformers", entry]})
    with pytest.raises(ValueError, match=message):
        load_vocabularies(str(a_copy))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("transformer/config.json", {"in_channels": 32}, "in_channels is 32, but the other folders make 16"),
        ("text_encoder_2/config.json", {"projection_dim": 7}, "pooled_projection_dim is 40, but .* make 23"),
        ("text_encoder/config.json", {"vocab_size": 9}, "'text_encoder' has shape"),
        ("scheduler/scheduler_config.json", {"use_dynamic_shifting": True}, "use_dynamic_shifting = True .* supported"),
    ],
)
def test_folders_that_do_not_fit_are_refused_without_torch(
    a_copy: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    edit(a_copy / file, **changes)
    with pytest.raises(ValueError, match=message):
        check_model(str(a_copy))


def test_a_file_that_was_cut_short_and_an_absent_folder_are_refused(a_copy: Path) -> None:
    weights = a_copy / "transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match="was cut short"):
        check_model(str(a_copy))
    shutil.rmtree(a_copy / "text_encoder_2")
    with pytest.raises(ValueError, match="names 'text_encoder_2', but it has no such folder"):
        check_model(str(a_copy))


LOSSES: dict[bool, list[float]] = {
    True: [5.5645, 5.78738, 5.73847, 5.67927, 5.32408, 5.56871, 5.44204, 5.67834, 5.16672, 5.60381],
    False: [5.5339, 5.86842, 5.51786, 5.96893, 5.40249, 5.49284, 5.53577, 5.61154, 5.21549, 5.62291],
}
"""Losses of ten steps, with T5 and without. `python -m tests.textual_inversion.families.test_sd3` renews them."""


def test_golden_losses(backbone: Any) -> None:
    assert golden_losses(backbone) == pytest.approx(LOSSES["t5xxl" in backbone.token_tables], rel=1e-4)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for with_t5 in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            directory = tiny_stable_diffusion_3(folder, t5=with_t5)
            print(with_t5, golden_losses(load_backbone(str(directory), device="cpu")))  # noqa: T201
