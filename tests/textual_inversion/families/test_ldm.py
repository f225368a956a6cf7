"""BERT latent diffusion against diffusers' LDMTextToImagePipeline, and through what is nobody's family."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LDMTextToImagePipeline, LMSDiscreteScheduler, PNDMScheduler
from safetensors.torch import load_file, save_file
from transformers import BertTokenizer

from pipeline.exit_codes import OK
from pipeline.validate import main as validate
from tests.pipeline.runs import tiny_toml, write_manifest
from tests.tiny_models import DIM, RESOLUTION, tiny_latent_diffusion
from tests.toy_backbone import plain_views
from textual_inversion.adapter_formats import dump_adapter, with_adapter
from textual_inversion.batch_invariance import choose_slots_per_pass
from textual_inversion.concept import Concept, LearnedEmbedding
from textual_inversion.config import AdapterConfig, InversionConfig, PenaltyConfig, SamplingConfig
from textual_inversion.engine import Assignment, Engine, Outcome
from textual_inversion.errors import BadInput
from textual_inversion.families import load_backbone, load_vocabularies
from textual_inversion.families.base import Backbone, stack_prompts
from textual_inversion.formats import dump_diffusers, parse_diffusers
from textual_inversion.generate import ImageRequest, generate, initial_noise
from textual_inversion.lora import merged_state_dict
from textual_inversion.prompts import OBJECT_TEMPLATES, STYLE_TEMPLATES, encode_prompt
from textual_inversion.slot_state import SlotState

KEY, LATENT_SHAPE = "bert", (4, 4, 4)
LORA = AdapterConfig(kind="lora", rank=2, learning_rate=0.05)
GOLDEN = {
    "vq": [0.996894, 1.134436, 1.268395, 1.104669, 1.001331, 1.04838, 1.150251, 1.24169, 1.007013, 1.013631],
    "kl": [0.988193, 1.121456, 1.272122, 1.092376, 1.029063, 1.061737, 1.159094, 1.235818, 1.002015, 1.015979],
}
SAMPLING = SamplingConfig(solver="ddim", steps=4, batch_size=1, guidance_scale=4.0)


@pytest.fixture(scope="module", params=["vq", "kl"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_latent_diffusion(tmp_path_factory.mktemp("ldm") / request.param, request.param)


@pytest.fixture(scope="module")
def vq_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_latent_diffusion(tmp_path_factory.mktemp("ldm") / "vq", "vq")


@pytest.fixture(scope="module")
def backbone(model: Path) -> Any:
    torch.set_num_threads(1)
    return load_backbone(str(model), device="cpu", precision="float32")


@pytest.fixture(scope="module")
def pipeline(model: Path) -> Any:
    return quiet(LDMTextToImagePipeline.from_pretrained(model))


@pytest.fixture
def a_copy(vq_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(vq_model, tmp_path / "copy"))


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def with_rows(pipeline: Any, embedding: LearnedEmbedding) -> str:
    """Put learned rows into the pipeline's tokenizer and text encoder; returns the words that stand for them."""
    words = [f"<learned{i}>" for i in range(embedding.num_vectors)]
    pipeline.tokenizer.add_tokens(words)
    encoder, table = pipeline.bert.model, pipeline.bert.model.embed_tokens.weight.data
    encoder.embed_tokens = torch.nn.Embedding.from_pretrained(torch.cat([table, embedding.vectors[KEY]]))
    return " ".join(words)


def assignment(number: int, state: SlotState | None = None) -> Assignment:
    concept = Concept(concept_id=f"c{number}", placeholder_token=f"<C{number}>", images=("x",), initializer="Red cat",
                      num_vectors=1 + number % 2)  # fmt: skip
    moments = torch.rand(4, 2, *LATENT_SHAPE, generator=torch.Generator().manual_seed(number))
    return Assignment(concept, plain_views(moments), state)


def config(steps: int = 6, **changes: Any) -> InversionConfig:
    return InversionConfig(**{"steps": steps, "batch_size": 2, "learning_rate": 0.05, **changes})


def learn(backbone: Any, config: InversionConfig, *work: Assignment, **options: Any) -> dict[str, Outcome]:
    waiting, outcomes = list(work), {}
    slots_per_pass, _ = choose_slots_per_pass(backbone, config, slots=3)
    engine = Engine(backbone, config, slots=3, seed=1, slots_per_pass=slots_per_pass)
    engine.run(
        lambda _: waiting.pop(0) if waiting else None,
        lambda o: outcomes.update({o.concept.concept_id: o}),
        **options,
    )
    assert [outcome.error for outcome in outcomes.values()] == [None] * len(work)
    return outcomes


def learned(backbone: Any, number: int = 1, **changes: Any) -> LearnedEmbedding:
    embedding = learn(backbone, config(**changes), assignment(number))[f"c{number}"].embedding
    assert embedding is not None
    return embedding


def same(one: LearnedEmbedding | None, other: LearnedEmbedding | None) -> bool:
    assert one is not None
    assert other is not None
    pairs = [(one.vectors[KEY], other.vectors[KEY])]
    if one.adapter and other.adapter:
        pairs += [(a, b) for name in one.adapter.tensors
                  for a, b in zip(one.adapter.tensors[name], other.adapter.tensors[name], strict=True)]  # fmt: skip
    return all(torch.equal(a, b) for a, b in pairs)


def test_shapes_come_from_the_checkpoint(backbone: Backbone) -> None:
    assert (backbone.resolution, backbone.latent_shape) == (RESOLUTION, LATENT_SHAPE)
    assert backbone.token_tables[KEY].dim == DIM
    assert backbone.guidance_scale == 5
    layers = {name.rpartition(".")[2] for name in backbone.adapter_layers}
    assert layers == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "cross_attention"}


@pytest.mark.parametrize("prompt", ["", "a photo of a cat", "The Statue, a MOON - on the Beach!", "zebra's café"])
def test_conditioning_is_the_pipelines_to_the_bit(backbone: Backbone, pipeline: Any, prompt: str) -> None:
    """77 ids with no attention mask; the empty prompt goes through the same encoder."""
    theirs = pipeline.tokenizer([prompt], padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    ids = stack_prompts([encode_prompt(prompt, {}, backbone.vocabularies)])
    assert torch.equal(ids[KEY], theirs.input_ids)
    with torch.no_grad():
        assert torch.equal(backbone.encode_prompts(ids, {}).hidden, pipeline.bert(theirs.input_ids)[0])


def test_the_denoisers_output_is_the_pipelines_to_the_bit(backbone: Backbone, pipeline: Any) -> None:
    ids = stack_prompts([encode_prompt("a photo of a cat", {}, backbone.vocabularies)])
    latents, t = torch.randn(1, *LATENT_SHAPE, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    with torch.no_grad():
        ours = backbone.predict(latents, t, backbone.encode_prompts(ids, {}))
        assert torch.equal(ours, pipeline.unet(latents, 500, encoder_hidden_states=pipeline.bert(ids[KEY])[0]).sample)


def test_photos_are_encoded_as_the_autoencoder_does_it(backbone: Backbone, pipeline: Any) -> None:
    """A VQ model's latents are those before quantisation, and have no deviation."""
    pixels = torch.rand(2, 3, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moments = backbone.encode_images(pixels)
    with torch.no_grad():
        encoded = pipeline.vqvae.encode(pixels)
    if hasattr(encoded, "latent_dist"):
        expected = [encoded.latent_dist.mean, encoded.latent_dist.std]
    else:
        expected = [encoded.latents, torch.zeros_like(encoded.latents)]
    torch.testing.assert_close(moments, torch.stack(expected, 1) * 0.18215)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_pictures_equal_the_pipelines_with_the_rows_in_its_encoder(
    backbone: Backbone, model: Path, guidance_scale: float
) -> None:
    """Two rows; two pictures that may differ by the rounding to 256 levels."""
    embedding = learned(backbone)
    sampling = replace(SAMPLING, guidance_scale=guidance_scale)
    (ours,) = generate(backbone, [ImageRequest("a photo of a <C1> on the beach", 3, (embedding,))], sampling)
    theirs = quiet(LDMTextToImagePipeline.from_pretrained(model))
    prompt = f"a photo of a {with_rows(theirs, embedding)} on the beach"
    latents = initial_noise(backbone, 3)[None]
    expected = theirs(prompt, num_inference_steps=4, guidance_scale=guidance_scale, latents=latents).images[0]
    assert abs(np.asarray(ours).astype(int) - np.asarray(expected)).max() <= 1


def test_a_lora_merged_into_the_pipelines_encoder_draws_the_same(backbone: Backbone, model: Path) -> None:
    embedding = learned(backbone, adapter=LORA)
    assert embedding.adapter is not None
    (ours,) = generate(backbone, [ImageRequest("a <C1>", 3, (embedding,))], SAMPLING)
    theirs = quiet(LDMTextToImagePipeline.from_pretrained(model))
    theirs.bert.load_state_dict(merged_state_dict(theirs.bert.state_dict(), embedding.adapter))
    prompt = f"a {with_rows(theirs, embedding)}"
    expected = theirs(prompt, num_inference_steps=4, guidance_scale=4.0, latents=initial_noise(backbone, 3)[None])
    assert abs(np.asarray(ours).astype(int) - np.asarray(expected.images[0])).max() <= 1


def test_golden_losses(backbone: Backbone, model: Path) -> None:
    """Ten steps of one concept, its photo encoded by the model."""
    pixels = torch.rand(1, 3, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(0)) * 2 - 1
    work = replace(assignment(1), views=plain_views(backbone.encode_images(pixels)))
    losses = learn(backbone, config(10, learning_rate=0.02), work)["c1"].curve[:, 1].tolist()
    assert losses == pytest.approx(GOLDEN[model.name], rel=1e-4)


METHODS: dict[str, dict[str, Any]] = {
    "rows": {},
    "lora": {"adapter": LORA, "penalties": PenaltyConfig(knowledge=0.1), "class_cue": True},
    "causal": {"adapter": replace(LORA, kind="causal", targets=("fc2", "cross_attention"))},
}


@pytest.mark.parametrize("method", METHODS)
def test_concepts_learn_together_and_resumed_what_they_learn_alone(backbone: Backbone, method: str) -> None:
    settings, saved = config(**METHODS[method]), {}
    together = learn(
        backbone, settings, *map(assignment, range(3)),
        on_checkpoint=lambda concept, state: saved.setdefault(concept.concept_id, state.to_bytes()), checkpoint_steps=2,
    )  # fmt: skip
    alone = learn(backbone, settings, assignment(1))["c1"]
    resumed = learn(backbone, settings, assignment(1, SlotState.from_bytes(saved["c1"])))["c1"]
    assert same(alone.embedding, together["c1"].embedding)
    assert same(alone.embedding, resumed.embedding)
    assert alone.embedding is not None
    if alone.embedding.adapter:
        assert all(up.any() for _, up in alone.embedding.adapter.tensors.values())


def test_a_causal_adapter_changes_its_concepts_picture(backbone: Backbone) -> None:
    embedding = learned(backbone, **METHODS["causal"])
    plain = replace(embedding, adapter=None)
    pictures = [generate(backbone, [ImageRequest("a <C1>", 0, (each,))], SAMPLING)[0] for each in (embedding, plain)]
    assert pictures[0].tobytes() != pictures[1].tobytes()
    ids = encode_prompt("a <C1>", {"<C1>": [0, 1]}, backbone.vocabularies)[KEY]
    assert ids[:5] == [2, ids[1], backbone.vocabularies[KEY].size, backbone.vocabularies[KEY].size + 1, 3]


def test_embedding_and_adapter_survive_their_files(backbone: Backbone) -> None:
    embedding = learned(backbone, adapter=LORA)
    files = {"adapter.safetensors": dump_adapter(embedding)}
    read = with_adapter(parse_diffusers(dump_diffusers(embedding)), files.__getitem__)
    assert read.metadata["text_encoder"] == KEY
    assert same(read, embedding)


def test_gradients_reach_the_rows_and_nothing_else(backbone: Any) -> None:
    rows = torch.randn(3, DIM, requires_grad=True)
    ids = stack_prompts([encode_prompt("a <c>", {"<c>": [1]}, backbone.vocabularies)])
    text = backbone.encode_prompts(ids, {KEY: rows})
    backbone.predict(torch.randn(1, *LATENT_SHAPE), torch.tensor([500]), text).pow(2).sum().backward()
    assert rows.grad is not None
    assert rows.grad[1].any()
    assert not rows.grad[[0, 2]].any()
    for module in (backbone._text_encoder, backbone._network, backbone._vae):
        assert not module.training
        assert not any(p.requires_grad or p.grad is not None for p in module.parameters())


def test_rows_start_at_the_lower_cased_words(backbone: Backbone) -> None:
    vocabulary = backbone.vocabularies[KEY]
    assert vocabulary.tokenize("Red CAT") == vocabulary.tokenize("red cat")
    assert len(vocabulary.tokenize("red cat")) == 2
    words = backbone.single_token_words()
    assert {"cat", "photo", "style"} <= set(words)
    assert all(len(vocabulary.tokenize(word)) == 1 for word in words)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, PNDMScheduler, LMSDiscreteScheduler])
def test_samplers_take_over_the_folders_schedule(a_copy: Path, scheduler: Any) -> None:
    """With the defaults of the folder's own class: PNDM's last step ends at the first alpha, LMS spaces by linspace."""
    scheduler(beta_start=0.001, beta_end=0.01).save_pretrained(a_copy / "scheduler")
    noise = load_backbone(str(a_copy), device="cpu", precision="float32").noise
    whole = scheduler(beta_start=0.001, beta_end=0.01).config
    shared = {name: whole[name] for name in whole if name in DDIMScheduler().config and not name.startswith("_")}
    theirs = DDIMScheduler(**{**shared, "clip_sample": False})
    theirs.set_timesteps(4)
    run = noise.begin("ddim", 4)
    assert torch.equal(run.timesteps, theirs.timesteps)
    ours = expected = torch.randn(1, *LATENT_SHAPE, generator=torch.Generator().manual_seed(0))
    for step, timestep in enumerate(theirs.timesteps):
        ours = run.step(0.1 * ours, step, ours)
        expected = theirs.step(0.1 * expected, timestep, expected, eta=0.0).prev_sample
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("layout", ["tokenizer.json", "vocab.txt"])
def test_ids_are_those_of_transformers(a_copy: Path, layout: str) -> None:
    theirs = BertTokenizer.from_pretrained(a_copy, subfolder="tokenizer")
    if layout == "vocab.txt":
        words = sorted(theirs.get_vocab().items(), key=lambda item: item[1])
        (a_copy / "tokenizer/vocab.txt").write_text("".join(f"{word}\n" for word, _ in words))
        (a_copy / "tokenizer/tokenizer.json").unlink()
    ours = load_vocabularies(str(a_copy))[KEY]
    assert (ours.size, ours.end_of_text, ours.unknown, ours.max_tokens) == (len(theirs), 3, 1, 75)
    odd = ("Naïve CAFÉ", "[SEP] a [CLS]", "cat[MASK]s", "☃ 日本 cat", "a\tb\u200bc", "x" * 101, "", "  ", "#cat ##cat")
    for text in (*OBJECT_TEMPLATES, *STYLE_TEMPLATES, *odd):
        assert ours.tokenize(text) == theirs(text, add_special_tokens=False).input_ids, ascii(text)


def test_a_vocabulary_of_another_shape_is_refused_in_one_line(a_copy: Path) -> None:
    """The library's own text has a line for each shape that it tried."""
    path = a_copy / "tokenizer/tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["cat"] = []
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"\Athe tokenizer of the model in .* cannot be read: [^\n]+\Z"):
        load_vocabularies(str(a_copy))


def test_what_the_vocabulary_has_no_token_for_is_refused(backbone: Backbone) -> None:
    for text in ("a ☃ cat", "a [SEP] cat"):
        with pytest.raises(BadInput, match="has no token for something in"):
            encode_prompt(text, {}, backbone.vocabularies)
    with pytest.raises(BadInput, match="76 tokens are 1 more than the 75 that fit"):
        encode_prompt("cat " * 76, {}, backbone.vocabularies)


def test_a_dry_run_accepts_the_model(vq_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run(vq_model, tmp_path) == OK
    assert "0 done, 2 to do" in capsys.readouterr().out


def dry_run(model: Path, folder: Path) -> int:
    job = folder / "job.toml"
    job.write_text(tiny_toml(model))
    manifest = write_manifest(folder, ["a", "b"])
    return validate([str(manifest), "--config", str(job), "--output", str(folder / "out")])


def another_text_encoder(copy: Path) -> None:
    edit(copy / "model_index.json", bert=["transformers", "BertModel"])


def inpainting(copy: Path) -> None:
    edit(copy / "unet/config.json", in_channels=9)


def another_width(copy: Path) -> None:
    edit(copy / "unet/config.json", cross_attention_dim=64)


def few_positions(copy: Path) -> None:
    edit(copy / "bert/config.json", max_position_embeddings=40)


def samples(copy: Path) -> None:
    edit(copy / "scheduler/scheduler_config.json", prediction_type="sample")


def flow(copy: Path) -> None:
    edit(copy / "scheduler/scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler")


def cut_short(copy: Path) -> None:
    path = copy / "unet/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def renamed_weights(copy: Path) -> None:
    path = copy / "bert/model.safetensors"
    save_file({f"x{name}": tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    save_file({name.replace("embed_tokens", "x"): t for name, t in load_file(path).items()}, path, {"format": "pt"})


def another_vocabulary(copy: Path) -> None:
    edit(copy / "bert/config.json", vocab_size=64)


def pickles(copy: Path) -> None:
    (copy / "vqvae/diffusion_pytorch_model.safetensors").rename(copy / "vqvae/diffusion_pytorch_model.bin")


def no_folder(copy: Path) -> None:
    shutil.rmtree(copy / "unet")


BROKEN: dict[Callable[[Path], None], str] = {
    another_text_encoder: "names BertModel as 'bert'; LDMBertModel is needed",
    inpainting: "the U-Net takes 9 channels but the autoencoder has 4",
    another_width: "reads text states of width 64 but the text encoder makes 32",
    few_positions: "the text encoder has 40 positions; prompts have 77 ids",
    samples: "prediction_type 'sample'",
    flow: "one of rectified flow",
    cut_short: "unet/diffusion_pytorch_model.safetensors was cut short",
    renamed_weights: "the weights in 'bert' have no 'embed_tokens.weight'",
    another_vocabulary: "which is not what its config.json says",
    pickles: "'vqvae' holds only pickled weights",
    no_folder: "names 'unet', but it has no such folder",
}


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__)
def test_a_dry_run_and_loading_refuse_a_broken_model(
    damage: Callable[[Path], None], a_copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    damage(a_copy)
    with pytest.raises(ValueError, match=BROKEN[damage]):
        load_backbone(str(a_copy), device="cpu")
    assert dry_run(a_copy, tmp_path) != OK
    said = capsys.readouterr()
    assert BROKEN[damage] in said.out + said.err + caplog.text
