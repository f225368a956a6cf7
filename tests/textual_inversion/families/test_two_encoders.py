"""A family with two text encoders, a pooled vector, extras and flow, through everything that is nobody's family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.toy_family import END, LENGTHS, PIPELINE_CLASS, ROW, VOCAB_SIZES, WIDTHS, ToyFamily, load, write_model
from textual_inversion import families
from textual_inversion.adapter_formats import dump_adapter, with_adapter
from textual_inversion.augment_config import AugmentConfig
from textual_inversion.batch_invariance import choose_sampling, choose_slots_per_pass
from textual_inversion.compile_trial import Pass, compile_checked
from textual_inversion.concept import Concept, LearnedEmbedding
from textual_inversion.conditioning import Conditioning
from textual_inversion.config import AdapterConfig, InversionConfig, PenaltyConfig, SamplingConfig, TimestepConfig
from textual_inversion.edit import edit
from textual_inversion.engine import Assignment, Engine, Outcome
from textual_inversion.families import load_backbone
from textual_inversion.families.base import stack_prompts
from textual_inversion.formats import dump_diffusers, parse_diffusers
from textual_inversion.generate import ImageRequest, encode_request, generate, initial_noise, to_pictures
from textual_inversion.initialise import encoder_output
from textual_inversion.latents import encode_views
from textual_inversion.model_files import find_model_files
from textual_inversion.prompt_encoder import PromptEncoder
from textual_inversion.prompts import OBJECT_TEMPLATES, encode_prompt
from textual_inversion.rng import generator_for

SAMPLING = SamplingConfig(steps=3, batch_size=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def backbone(model: Path) -> Any:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.FAMILIES, PIPELINE_CLASS, ROW)
        return load_backbone(str(model), device="cpu")


def photo(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8))


def concept(number: int, num_vectors: int = 1) -> Concept:
    return Concept(concept_id=f"c{number}", placeholder_token=f"<c{number}>", images=("x", "y"), initializer="red cat",
                   num_vectors=num_vectors)  # fmt: skip


def learn(backbone: Any, config: InversionConfig, *concepts: Concept, slots: int = 3) -> dict[str, Outcome]:
    waiting = [
        Assignment(each, encode_views(backbone, [photo(i), photo(9 + i)], config.augment, each.concept_id, 0))
        for i, each in enumerate(concepts)
    ]
    outcomes: dict[str, Outcome] = {}
    slots_per_pass, _ = choose_slots_per_pass(backbone, config, slots=3)
    engine = Engine(backbone, config, slots=slots, seed=1, slots_per_pass=slots_per_pass)
    engine.run(lambda _: waiting.pop(0) if waiting else None, lambda o: outcomes.update({o.concept.concept_id: o}))
    assert [outcome.error for outcome in outcomes.values()] == [None] * len(concepts)
    return outcomes


LORA = AdapterConfig(kind="lora", rank=2, learning_rate=0.05, targets=("fc1", "fc2"))
METHODS: dict[str, dict[str, Any]] = {
    "rows": {},
    "textboost": {
        "adapter": LORA,
        "penalties": PenaltyConfig(knowledge=0.1),
        "timesteps": TimestepConfig(sampler="snr", min_snr_gamma=5.0),
        "augment": AugmentConfig(paired=2),
    },
    "causal, photo by photo": {
        "adapter": replace(LORA, kind="causal"),
        "per_image_tokens": True,
        "timesteps": TimestepConfig(sampler="range", low=300, high=900),
    },
    "progressive": {"progressive": True, "penalties": PenaltyConfig(class_distance=0.1, start_distance=0.1)},
    "on the sphere": {"optimizer": "riemannian", "norm_control": "sphere"},
}


def config(method: str, steps: int = 6) -> InversionConfig:
    return InversionConfig(steps=steps, batch_size=2, learning_rate=0.05, **METHODS[method])


@pytest.mark.parametrize("method", METHODS)
def test_concepts_learn_together_what_they_learn_alone(backbone: Any, method: str) -> None:
    concepts = [concept(0), concept(1, 2), concept(2, 3)]
    together = learn(backbone, config(method), *concepts)
    for number, each in enumerate(concepts):
        views = encode_views(backbone, [photo(number), photo(9 + number)], config(method).augment, each.concept_id, 0)
        alone: list[Outcome] = []
        waiting = [Assignment(each, views)]
        slots_per_pass, _ = choose_slots_per_pass(backbone, config(method), slots=3)
        engine = Engine(backbone, config(method), slots=3, seed=1, slots_per_pass=slots_per_pass)
        engine.run(lambda _, waiting=waiting: waiting.pop() if waiting else None, alone.append)
        ours, company = alone[0].embedding, together[each.concept_id].embedding
        assert ours is not None
        assert company is not None
        assert {key: tuple(rows.shape) for key, rows in ours.vectors.items()} == {
            key: (each.num_vectors, width) for key, width in WIDTHS.items()
        }
        for key in WIDTHS:
            assert torch.equal(ours.vectors[key], company.vectors[key])
        if ours.adapter:
            assert company.adapter is not None
            for name, (down, up) in ours.adapter.tensors.items():
                assert torch.equal(down, company.adapter.tensors[name][0])
                assert torch.equal(up, company.adapter.tensors[name][1])
                assert up.any(), "layers of both text encoders are adapted"


def test_the_first_loss_is_the_flows(backbone: Any) -> None:
    """Against the definition: x_t = (1 - sigma) x_0 + sigma eps, target eps - x_0, the model told 1000 sigma."""
    outcome = learn(backbone, config("rows", steps=1), concept(0))["c0"]
    views = encode_views(backbone, [photo(0), photo(9)], config("rows").augment, "c0", 0)
    generator = generator_for(1, "c0", "step", 0)
    view = torch.randint(len(views), (2,), generator=generator)
    eps, noise = (torch.randn(2, *backbone.latent_shape, generator=generator) for _ in range(2))
    t = torch.randint(1000, (2,), generator=generator)
    template = torch.randint(27, (2,), generator=generator)
    x_0 = views.moments[view, 0] + views.moments[view, 1] * eps
    u = (t + 1) / 1000
    sigma = (3 * u / (1 + 2 * u))[:, None, None, None]
    ids = stack_prompts(
        [encode_prompt(OBJECT_TEMPLATES[i], {"{}": [0]}, backbone.vocabularies) for i in template.tolist()]
    )
    rows = {key: table.weight[backbone.vocabularies[key].tokenize("red cat")].mean(0, keepdim=True)
            for key, table in backbone.token_tables.items()}  # fmt: skip
    text = backbone.encode_prompts(ids, rows)
    prediction = backbone.predict((1 - sigma) * x_0 + sigma * noise, 1000 * sigma.flatten(), text)
    expected = (prediction - (noise - x_0)).square().mean()
    assert float(outcome.curve[0, 1]) == pytest.approx(float(expected), rel=1e-5)


def test_only_the_placeholders_rows_have_gradients_in_either_encoder(backbone: Any) -> None:
    """Ids of one vocabulary are rows of the other: 40 letters are fewer than 97 words."""
    ids = stack_prompts([encode_prompt("a photo of my red cat <c>", {"<c>": [1]}, backbone.vocabularies)])
    assert (ids["words"][ids["words"] < VOCAB_SIZES["words"]] >= VOCAB_SIZES["letters"]).any()
    rows = {key: torch.ones(60, width, requires_grad=True) for key, width in WIDTHS.items()}
    text = backbone.encode_prompts(ids, rows)
    loss = backbone.predict(torch.ones(1, *backbone.latent_shape), torch.tensor([500.0]), text).square().sum()
    for gradient in torch.autograd.grad(loss, list(rows.values())):
        assert gradient[1].any()
        assert not gradient[[0, *range(2, 60)]].any()


def test_the_pooled_vector_is_taken_at_the_true_end(backbone: Any) -> None:
    prompt = encode_prompt("a <c> here", {"<c>": [0]}, backbone.vocabularies)
    rows = {key: torch.ones(1, width) for key, width in WIDTHS.items()}
    text = backbone.encode_prompts(stack_prompts([prompt]), rows)
    end = prompt["words"].index(END)
    states = backbone._network.text["words"]
    with backbone.token_tables["words"].reading(rows["words"]):
        assert torch.equal(text.pooled[0], states(torch.tensor([prompt["words"]]))[0, end])


def learned(backbone: Any, kind: Any = "lora") -> list[LearnedEmbedding]:
    adapted = replace(config("textboost", steps=4), adapter=replace(LORA, kind=kind), penalties=PenaltyConfig())
    outcomes = learn(backbone, adapted, concept(0), concept(1, 2))
    return [outcome.embedding for _, outcome in sorted(outcomes.items()) if outcome.embedding]


def requests(embeddings: list[LearnedEmbedding]) -> list[ImageRequest]:
    return [
        ImageRequest("a photo of a <c0>", 0, (embeddings[0],)),
        ImageRequest("a <c1> and a <c0>", 1, tuple(embeddings)),
        ImageRequest("a photo of a cat", 2),
    ]


def test_prompts_come_from_the_cache_whole(backbone: Any) -> None:
    """States, pooled vectors and extras, alike in any company."""
    is_shared = choose_sampling(backbone, SAMPLING)[0].batch_size > 1
    encoder = PromptEncoder(backbone, kept=2, shares_passes=is_shared)
    prompts = [encode_request(backbone, request).prompt for request in requests(learned(backbone))]
    prompts += [prompt.empty(backbone.vocabularies) for prompt in prompts]
    together = encoder(prompts)
    assert together.pooled is not None
    assert together.hidden.shape == (6, sum(LENGTHS.values()), 12)
    assert together.pooled.shape == (6, WIDTHS["words"])
    assert together.extras["time_ids"].shape == (6, 2)
    for i, prompt in enumerate(prompts):
        for ours, theirs in zip(encoder([prompt]).tensors(), together[i : i + 1].tensors(), strict=True):
            assert torch.equal(ours, theirs)
    plain = stack_prompts([encode_prompt("a photo of a cat", {}, backbone.vocabularies)])
    for ours, theirs in zip(together[2:3].tensors(), backbone.encode_prompts(plain, {}).tensors(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("solver", ["ddim", "dpm++"])
@pytest.mark.parametrize("kind", ["lora", "causal"])
def test_pictures_depend_on_neither_place_nor_company(backbone: Any, solver: Any, kind: Any) -> None:
    asked = requests(learned(backbone, kind))
    sampling, _ = choose_sampling(backbone, replace(SAMPLING, solver=solver), AdapterConfig(kind=kind))
    together = generate(backbone, asked, sampling)
    alone = [generate(backbone, [request], sampling)[0] for request in asked]
    assert [one.tobytes() for one in together] == [one.tobytes() for one in alone]
    assert len({one.tobytes() for one in together}) == 3


def test_guided_pictures_equal_a_plain_euler_loop(backbone: Any) -> None:
    request, sampling = ImageRequest("a photo of a cat", 7), SamplingConfig(solver="ddim", steps=4, batch_size=1)
    (drawn,) = generate(backbone, [request], sampling)
    prompts = [encode_prompt(text, {}, backbone.vocabularies) for text in ("", request.prompt)]
    empty, text = (backbone.encode_prompts(stack_prompts([prompt]), {}) for prompt in prompts)
    u = torch.linspace(
        1, 3 * 0.001 / (1 + 2 * 0.001), 4
    )  # down to the lowest level, which is shifted twice (diffusers)
    sigmas = [*(3 * u / (1 + 2 * u)).tolist(), 0.0]
    latents = initial_noise(backbone, 7)[None]
    for sigma, following in pairwise(sigmas):
        told = torch.tensor([1000 * sigma])
        without, with_text = (backbone.predict(latents, told, each) for each in (empty, text))
        latents = latents + (following - sigma) * (without + 3 * (with_text - without))
    expected = to_pictures(backbone.decode(latents))[0]
    assert abs(np.asarray(drawn).astype(int) - np.asarray(expected)).max() <= 1


def test_an_edit_keeps_what_is_outside_the_mask(backbone: Any) -> None:
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 255
    (drawn,) = edit(backbone, photo(1), Image.fromarray(mask), [ImageRequest("a cat", 0)], SAMPLING, strength=0.7)
    assert (np.asarray(drawn)[:, :4] == np.asarray(photo(1))[:, :4]).all()
    assert (np.asarray(drawn)[:, 4:] != np.asarray(photo(1))[:, 4:]).any()


def test_knowledge_is_compared_in_states_and_pooled_vectors(backbone: Any) -> None:
    one, other = (
        backbone.encode_prompts(stack_prompts([encode_prompt(text, {}, backbone.vocabularies)]), {})
        for text in ("a cat", "a dog")
    )
    both = one.cosine_distance(other)
    states_alone = Conditioning(hidden=one.hidden).cosine_distance(Conditioning(hidden=other.hidden))
    pooled = 1 - torch.cosine_similarity(one.pooled, other.pooled)
    torch.testing.assert_close(both, states_alone + pooled)
    torch.testing.assert_close(one.cosine_distance(one), torch.zeros(1), rtol=0, atol=1e-6)


def test_a_denoiser_is_compiled_and_checked_with_all_it_reads(backbone: Any) -> None:
    passes = [Pass(2, gradients=True), Pass(3, gradients=False)]
    try:
        assert compile_checked(backbone, passes, backend="eager")

        def forgetful(module: Any, _inputs: list[Tensor]) -> Callable[..., Any]:
            """A compiler that loses the gradient to the pooled vector."""
            return lambda *inputs: module(*(x.detach() if x.shape[-1:] == (WIDTHS["words"],) else x for x in inputs))

        assert not compile_checked(backbone, passes, backend=forgetful, or_plain=True)  # type: ignore[arg-type]
    finally:
        backbone.uncompile()


def test_cross_attention_that_the_denoiser_does_not_have_is_refused(backbone: Any) -> None:
    adapter = AdapterConfig(kind="causal", targets=("fc2", "cross_attention"))
    with pytest.raises(
        ValueError, match=r"this model's denoiser has no cross-attention layers .* leave 'cross_attention'"
    ):
        Engine(backbone, InversionConfig(adapter=adapter), slots=1, seed=0)


def test_embedding_and_adapter_survive_their_files(backbone: Any) -> None:
    for embedding in learned(backbone, "causal"):
        files = {"adapter.safetensors": dump_adapter(embedding)}
        read = with_adapter(parse_diffusers(dump_diffusers(embedding)), files.__getitem__)
        before, after = (
            generate(backbone, [ImageRequest(f"a {each.placeholder_token}", 0, (each,))], SAMPLING)[0]
            for each in (embedding, read)
        )
        assert before.tobytes() == after.tobytes()
        assert read.vectors.keys() == WIDTHS.keys()


def test_an_embedding_of_one_encoder_is_refused(backbone: Any) -> None:
    (embedding, _) = learned(backbone)
    half = replace(embedding, vectors={"words": embedding.vectors["words"]}, adapter=None)
    with pytest.raises(ValueError, match=r"has widths \{'words': 24\} but the model's text encoders"):
        encode_request(backbone, ImageRequest("a <c0>", 0, (half,)))
    uneven = replace(half, vectors={**embedding.vectors, "letters": torch.ones(3, WIDTHS["letters"])})
    with pytest.raises(ValueError, match=r"has \{'words': 1, 'letters': 3\} rows; each text encoder needs equally"):
        encode_request(backbone, ImageRequest("a <c0>", 0, (uneven,)))


def test_a_start_can_be_each_encoders_own_output(backbone: Any) -> None:
    vectors = encoder_output(concept(0), backbone)
    assert {key: rows.shape[1] for key, rows in vectors.items()} == WIDTHS
    states = backbone.encoder_states(stack_prompts([encode_prompt("red cat", {}, backbone.vocabularies)]))
    torch.testing.assert_close(vectors["words"], states["words"][0, 1:3].mean(0, keepdim=True))
    torch.testing.assert_close(vectors["letters"], states["letters"][0, :6].mean(0, keepdim=True))


def test_a_family_that_is_not_in_the_table_is_told_with_those_that_are(model: Path) -> None:
    with pytest.raises(ValueError, match=r"TwoEncoderToyPipeline; families known here: StableDiffusionPipeline \(Stab"):
        load_backbone(str(model), device="cpu")


def test_a_flow_that_is_not_supported_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use_dynamic_shifting = True"):
        _loaded(write_model(tmp_path, use_dynamic_shifting=True))


def _loaded(directory: Path) -> ToyFamily:
    return load(find_model_files(str(directory)), device="cpu", precision="float32")
