"""FLUX.1 against diffusers' own pipeline, with a guidance scale that the transformer reads (dev) and without (schnell),
and through the engine."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

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
from tests.tiny_flux import LATENT_SHAPE, SCALE, SHIFT, WIDTHS, tiny_flux
from tests.tiny_models import MAX_LENGTH, RESOLUTION
from textual_inversion.adapter_dialects import check_plain
from textual_inversion.adapter_formats import dump_adapter
from textual_inversion.concept import LearnedEmbedding
from textual_inversion.conditioning import GUIDANCE
from textual_inversion.config import AdapterConfig, PenaltyConfig, SamplingConfig, TimestepConfig
from textual_inversion.dialects import diffusers_files, parse_embedding
from textual_inversion.errors import BadInput
from textual_inversion.families import check_model, load_backbone
from textual_inversion.families.base import stack_prompts
from textual_inversion.generate import ImageRequest, generate, initial_noise
from textual_inversion.initialise import initial_rows
from textual_inversion.prompts import encode_prompt

PROMPT = "a photo of a <c>"
LORA = AdapterConfig(kind="lora", rank=2, learning_rate=0.05)
OF_T5 = replace(LORA, targets=("q", "v", "wo"))
OF_BOTH = replace(LORA, targets=("q_proj", "fc2", "q", "wo"))
SAMPLING = SamplingConfig(solver="ddim", steps=4, batch_size=1)
LENGTHS = {True: 512, False: 256}
"""Ids of T5's prompts, by whether the transformer reads a guidance scale."""


@pytest.fixture(scope="module", params=["dev", "schnell"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux(tmp_path_factory.mktemp("flux"), guidance=request.param == "dev")


@pytest.fixture(scope="module")
def backbone(model: Path) -> Any:
    torch.set_num_threads(1)
    return load_backbone(str(model), device="cpu")


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux(tmp_path_factory.mktemp("dev"))


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A backbone whose prompts for T5 are half as long as dev's."""
    return load_backbone(str(tiny_flux(tmp_path_factory.mktemp("schnell"), guidance=False)), device="cpu")


@pytest.fixture
def a_copy(dev: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dev, tmp_path / "copy"))


def pipeline_with(model: Path, embedding: LearnedEmbedding, folder: Path) -> Any:
    """The pipeline of diffusers with an embedding's files loaded into both encoders by its own loader."""
    pipe = FluxPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    encoders = {"clip_l": ("tokenizer", "text_encoder"), "t5xxl": ("tokenizer_2", "text_encoder_2")}
    for key, (name, content) in diffusers_files(embedding).items():
        (folder / name).write_bytes(content)
        tokenizer, encoder = (getattr(pipe, part) for part in encoders[key])
        pipe.load_textual_inversion(folder / name, tokenizer=tokenizer, text_encoder=encoder)
    inner = getattr(pipe.text_encoder, "text_model", pipe.text_encoder)  # an inner module up to transformers 4
    inner.eos_token_id = pipe.tokenizer.eos_token_id  # 2 pools at the new tokens
    return pipe


def picture_of(pipe: Any, backbone: Any, prompt: str, **options: Any) -> Image.Image:
    """Draw a picture with the pipeline, from the noise of seed 5."""
    noise = initial_noise(backbone, 5)[None]
    packed = pipe._pack_latents(noise, 1, *LATENT_SHAPE)
    found = pipe(prompt, latents=packed, num_inference_steps=4, height=RESOLUTION, width=RESOLUTION,
                 max_sequence_length=LENGTHS[backbone.embeds_guidance], **options)  # fmt: skip
    return found.images[0]  # type: ignore[no-any-return]


def difference(ours: Image.Image, theirs: Image.Image) -> int:
    """Return the largest difference of two pictures of one size, in levels."""
    assert ours.size == theirs.size == (RESOLUTION, RESOLUTION)
    return int(abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)).max())


def test_conditioning_and_output_equal_the_pipelines(backbone: Any, model: Path, tmp_path: Path) -> None:
    embedding = LearnedEmbedding(placeholder_token="<c>", vectors=some_rows(backbone))
    texts = [PROMPT, "", "the red photo of <c> cat"]
    ids = stack_prompts([encode_prompt(text, {"<c>": [0, 1]}, backbone.vocabularies) for text in texts])
    ours = backbone.encode_prompts(ids, embedding.vectors).guided(3.5)
    pipe = pipeline_with(model, embedding, tmp_path)
    with torch.no_grad():
        hidden, pooled, text_ids = pipe.encode_prompt(texts, max_sequence_length=LENGTHS[backbone.embeds_guidance])
        torch.testing.assert_close(ours.hidden, hidden)
        torch.testing.assert_close(ours.pooled, pooled)
        latents = torch.randn(3, *LATENT_SHAPE, generator=torch.Generator().manual_seed(0))
        t = torch.tensor([900.0, 500.5, 20.0])
        packed = pipe._pack_latents(latents, 3, *LATENT_SHAPE)
        picture_ids = pipe._prepare_latent_image_ids(
            3, LATENT_SHAPE[1] // 2, LATENT_SHAPE[2] // 2, "cpu", torch.float32
        )
        theirs = pipe.transformer(
            packed, hidden, pooled, t / 1000, picture_ids, text_ids,
            guidance=torch.full([3], 3.5) if backbone.embeds_guidance else None, return_dict=False,
        )[0]  # fmt: skip
    theirs = pipe._unpack_latents(theirs, RESOLUTION, RESOLUTION, pipe.vae_scale_factor)
    torch.testing.assert_close(backbone.predict(latents, t, ours), theirs)
    assert (ours.hidden[0] - ours.hidden[1]).abs().max() > 0.1
    assert (ours.pooled[0] - ours.pooled[1]).abs().max() > 0.1


def test_a_picture_equals_the_pipelines(backbone: Any, model: Path, tmp_path: Path) -> None:
    """Euler's steps with the pipeline's default guidance, the rows loaded by its own loader."""
    embedding = LearnedEmbedding(placeholder_token="<c>", vectors=some_rows(backbone, 1))
    (ours,) = generate(backbone, [ImageRequest(PROMPT, 5, (embedding,))], SAMPLING)
    pipe = pipeline_with(model, embedding, tmp_path)
    assert difference(ours, picture_of(pipe, backbone, PROMPT)) <= 1
    (plain,) = generate(backbone, [ImageRequest("a photo of a cat", 5)], SAMPLING)
    assert plain.tobytes() != ours.tobytes()
    (guided,) = generate(backbone, [ImageRequest(PROMPT, 5, (embedding,))], replace(SAMPLING, guidance_scale=9.0))
    options = {"guidance_scale": 9.0} if backbone.embeds_guidance else {"true_cfg_scale": 9.0, "negative_prompt": ""}
    assert difference(guided, picture_of(pipe, backbone, PROMPT, **options)) <= 1
    assert difference(guided, ours) > 1


def test_a_picture_with_an_adapter_equals_the_pipelines(backbone: Any, model: Path, tmp_path: Path) -> None:
    """A LoRA of the CLIP, by the pipeline's own loader."""
    embedding = embedding_of(learn(backbone, config(adapter=LORA), concept(0))["c0"])
    (ours,) = generate(backbone, [ImageRequest("a photo of a <c0>", 5, (embedding,))], SAMPLING)
    pipe = pipeline_with(model, embedding, tmp_path)
    plain = picture_of(pipe, backbone, "a photo of a <c0>")
    (tmp_path / "adapter.safetensors").write_bytes(dump_adapter(embedding))
    pipe.load_lora_weights(tmp_path, weight_name="adapter.safetensors")
    assert difference(ours, picture_of(pipe, backbone, "a photo of a <c0>")) <= 1
    assert difference(ours, plain) > 1


def test_noise_levels_depend_on_the_pictures_size(dev: Path, tmp_path: Path) -> None:
    """At any size, pictures and noise levels are those of the pipeline, which is told the size in every call."""
    levels = []
    for number, (side, settings) in enumerate([(32, {}), (48, {}), (32, {"time_shift_type": "linear"})]):
        copy = Path(shutil.copytree(dev, tmp_path / str(number)))
        edit(copy / "vae/config.json", sample_size=side)
        edit(copy / "scheduler/scheduler_config.json", **settings)
        backbone = load_backbone(str(copy), device="cpu")
        assert backbone.latent_shape == (LATENT_SHAPE[0], side // 4, side // 4)
        pipe = FluxPipeline.from_pretrained(copy)
        pipe.set_progress_bar_config(disable=True)
        pipe("cat", num_inference_steps=3, height=side, width=side, output_type="latent")
        torch.testing.assert_close(backbone.noise.begin("ddim", 3).timesteps, pipe.scheduler.timesteps)
        levels.append(tuple(pipe.scheduler.timesteps.tolist()))
    assert len(set(levels)) == 3


def test_moments_and_pixels_are_the_pipelines(backbone: Any, model: Path) -> None:
    vae = FluxPipeline.from_pretrained(model).vae
    pixels = torch.rand(2, 3, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        mean = (posterior.mean - SHIFT) * SCALE
        decoded = vae.decode(mean / SCALE + SHIFT).sample.clamp(-1, 1)
    moments = backbone.encode_images(pixels)
    torch.testing.assert_close(moments[:, 0], mean)
    torch.testing.assert_close(moments[:, 1], posterior.std * SCALE)
    torch.testing.assert_close(backbone.decode(moments[:, 0]), decoded)


def test_what_the_checkpoint_says(backbone: Any, model: Path, tmp_path: Path) -> None:
    assert {key: table.dim for key, table in backbone.token_tables.items()} == WIDTHS
    assert [key for key, table in backbone.token_tables.items() if table.learns_rows] == ["clip_l"]
    lengths = {key: len(vocabulary.assemble([])) for key, vocabulary in backbone.vocabularies.items()}
    assert lengths == {"clip_l": MAX_LENGTH, "t5xxl": LENGTHS[backbone.embeds_guidance]}
    assert (backbone.latent_shape, backbone.resolution) == (LATENT_SHAPE, RESOLUTION)
    assert backbone.guidance_scale == (3.5 if backbone.embeds_guidance else 1)
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    edit(copy / "scheduler/scheduler_config.json", _guidance_scale=2.0)
    assert load_backbone(str(copy), device="cpu").guidance_scale == 2
    assert {"cat", "photo"} <= set(backbone.single_token_words())
    assert_vocabularies_alone_are_the_models(backbone, model)


def test_the_guidance_scale_is_1_in_learning_and_the_settings_in_drawing(
    backbone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Any] = []

    def listen(**inputs: Any) -> Any:
        heard.append((len(inputs["hidden_states"]), inputs["guidance"]))
        return backbone._network(**inputs)

    monkeypatch.setattr(backbone, "_denoiser", listen)
    learn(backbone, config(1), concept(0))
    generate(backbone, [ImageRequest("cat", 0)], SAMPLING)
    generate(backbone, [ImageRequest("cat", 0)], replace(SAMPLING, guidance_scale=5.0))
    drawn = [(size, None if scale is None else scale.tolist()) for size, scale in heard[-8:]]
    if backbone.embeds_guidance:
        assert drawn == [(1, [3.5])] * 4 + [(1, [5.0])] * 4
        assert all((scale == 1).all() for _, scale in heard[:-8])
    else:  # guidance is possible, as in the pipeline, by an output for the empty prompt
        assert drawn == [(1, None)] * 4 + [(2, None)] * 4


def test_a_negative_prompt_is_refused_where_nothing_is_compared(dev: Path) -> None:
    request = ImageRequest("cat", 0, negative_prompt="a dog")
    with pytest.raises(BadInput, match="reads the guidance scale and compares with no other prompt"):
        generate(load_backbone(str(dev), device="cpu"), [request], SAMPLING)


@pytest.mark.parametrize(("precision", "t5"), [("bfloat16", torch.bfloat16), ("float16", torch.bfloat16)])
def test_precision_of_the_parts(dev: Path, precision: str, t5: torch.dtype) -> None:
    backbone: Any = load_backbone(str(dev), device="cpu", precision=precision)
    assert backbone.dtype == getattr(torch, precision)
    assert backbone.token_tables["clip_l"].weight.dtype == torch.float32
    assert backbone.token_tables["t5xxl"].weight.dtype == t5
    rows = {key: row.requires_grad_() for key, row in some_rows(backbone, 1).items()}
    ids = stack_prompts([encode_prompt(PROMPT, {"<c>": [0]}, backbone.vocabularies)])
    text = backbone.encode_prompts(ids, rows)
    assert {text.hidden.dtype, text.pooled.dtype} == {backbone.dtype}
    assert text.extras[GUIDANCE].dtype == torch.float32
    output = backbone.predict(torch.randn(1, *LATENT_SHAPE), torch.tensor([500.0]), text)
    assert output.dtype == torch.float32
    output.square().mean().backward()
    assert all(row.grad is not None and row.grad.any() for row in rows.values())
    assert backbone.decode(torch.randn(1, *LATENT_SHAPE)).dtype == torch.float32


METHODS: dict[str, dict[str, Any]] = {
    "rows": {"timesteps": TimestepConfig(sampler="logit_normal")},
    "rows of T5": {"text_encoders": ("t5xxl",)},
    "rows of both": {"text_encoders": ("clip_l", "t5xxl")},
    "textboost": {
        "adapter": LORA, "penalties": PenaltyConfig(knowledge=0.1), "timesteps": TimestepConfig(sampler="snr"),
    },
    "causal": {"adapter": replace(LORA, kind="causal"), "per_image_tokens": True},
    "adapter of T5": {"adapter": OF_T5, "penalties": PenaltyConfig(knowledge=0.1)},
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_concepts_learn_together_what_they_learn_alone(schnell: Any, method: str) -> None:
    """And an encoder that learns no rows keeps the initializer's."""
    settings = config(**METHODS[method])
    learning = settings.text_encoders or ("clip_l",)
    concepts = [concept(0), concept(1, 2)]
    for each, ours in zip(concepts, learned_alone_as_together(schnell, settings, *concepts), strict=True):
        start = initial_rows(each, schnell, noise=0.0, seed=1, learning=learning)
        assert list(ours.vectors) == list(WIDTHS)
        assert {key for key, rows in ours.vectors.items() if not torch.equal(rows, start[key])} == set(learning)
        if ours.adapter:
            adapted = {name.partition(".")[0] for name, (_, up) in ours.adapter.tensors.items() if up.any()}
            assert adapted == ({"t5xxl"} if method == "adapter of T5" else {"clip_l"})


def test_a_checkpoint_is_resumed_to_the_bit(backbone: Any) -> None:
    assert_resumes(backbone, config(6, adapter=LORA), concept(0))


@pytest.mark.parametrize("adapter", [LORA, OF_BOTH, replace(OF_BOTH, kind="causal")], ids=["CLIP", "both", "causal"])
def test_pictures_of_learned_concepts_depend_on_no_company_and_survive_files(
    backbone: Any, adapter: AdapterConfig
) -> None:
    assert_pictures_depend_on_no_company_and_survive_files(backbone, adapter)


def test_no_other_tool_takes_an_adapter_of_t5_for_a_lora(backbone: Any, model: Path, tmp_path: Path) -> None:
    embedding = embedding_of(learn(backbone, config(1, adapter=OF_BOTH), concept(0))["c0"])
    file = tmp_path / "adapter.safetensors"
    file.write_bytes(dump_adapter(embedding))
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        FluxPipeline.from_pretrained(model).load_lora_weights(tmp_path, weight_name=file.name)
    with pytest.raises(ValueError, match="it is the adapter of a concept"):
        parse_embedding(file.read_bytes(), "c0")
    with pytest.raises(ValueError, match="its adapter is one of the text encoder 't5xxl'"):
        check_plain(embedding)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_an_adapter_of_t5_beside_a_denoiser_of_half_precision(dev: Path, precision: str) -> None:
    backbone = load_backbone(str(dev), device="cpu", precision=precision)
    adapter = embedding_of(learn(backbone, config(2, adapter=OF_BOTH), concept(0))["c0"]).adapter
    assert adapter is not None
    assert {name.partition(".")[0] for name, (_, up) in adapter.tensors.items() if up.any()} == {"clip_l", "t5xxl"}


@pytest.mark.parametrize(
    ("component", "entry", "message"),
    [
        ("text_encoder_2", None, "names nothing as 'text_encoder_2'; T5EncoderModel is needed"),
        ("text_encoder", "CLIPTextModelWithProjection", "names CLIPTextModelWithProjection as 'text_encoder'"),
        ("tokenizer_2", "CLIPTokenizer", "names CLIPTokenizer as 'tokenizer_2'; T5Tokenizer or T5TokenizerFast"),
        ("transformer", "SD3Transformer2DModel", "names SD3Transformer2DModel as 'transformer'"),
        ("scheduler", "DDIMScheduler", "names DDIMScheduler as 'scheduler'"),
    ],
)
def test_a_broken_index_is_refused_without_torch(a_copy: Path, component: str, entry: str | None, message: str) -> None:
    edit(a_copy / "model_index.json", **{component: [entry and "transformers", entry]})
    with pytest.raises(ValueError, match=message):
        check_model(str(a_copy))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("transformer/config.json", {"in_channels": 96}, "in_channels is 96, but the other folders make 16"),
        ("transformer/config.json", {"pooled_projection_dim": 7}, "pooled_projection_dim is 7, but .* make 16"),
        ("text_encoder_2/config.json", {"d_model": 9}, "joint_attention_dim is 48, but the other folders make 9"),
        ("vae/config.json", {"sample_size": 36}, "sample_size, .* is 36; it must be a multiple of 8 px"),
        ("scheduler/scheduler_config.json", {"invert_sigmas": True}, "invert_sigmas = True .* is not supported"),
        ("scheduler/scheduler_config.json", {"use_karras_sigmas": True}, "use_karras_sigmas = True .* not supported"),
    ],
)
def test_folders_that_do_not_fit_are_refused_without_torch(
    a_copy: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    edit(a_copy / file, **changes)
    with pytest.raises(ValueError, match=message):
        check_model(str(a_copy))


def test_a_config_of_dev_beside_weights_of_schnell_is_refused(tmp_path: Path) -> None:
    schnell = tiny_flux(tmp_path, guidance=False)
    edit(schnell / "transformer/config.json", guidance_embeds=True)
    with pytest.raises(ValueError, match="'transformer' have no 'guidance_embedder"):
        check_model(str(schnell))


LOSSES: dict[bool, list[float]] = {
    True: [3.01573, 3.15772, 2.83189, 2.87692, 2.79459, 3.01234, 2.48585, 2.78716, 2.66389, 2.86849],
    False: [2.88403, 2.91918, 2.49357, 2.78304, 3.17821, 2.62604, 2.07717, 2.22652, 2.71251, 2.95467],
}
"""Losses of ten steps of dev and schnell. `python -m tests.textual_inversion.families.test_flux` renews them."""


def test_golden_losses(backbone: Any) -> None:
    assert golden_losses(backbone) == pytest.approx(LOSSES[backbone.embeds_guidance], rel=1e-4)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for guidance in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            tiny = tiny_flux(folder, guidance=guidance)
            print(guidance, golden_losses(load_backbone(str(tiny), device="cpu")))  # noqa: T201
