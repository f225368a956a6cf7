"""The engine against Textual Inversion as diffusers' example does it: a resized vocabulary, the whole table in
`torch.optim.AdamW`, whole pipelines of transformers and diffusers, one concept after the other. And against TextBoost
done so, with peft's LoRA."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from tests.tiny_models import LATENT_SHAPE, tiny_stable_diffusion
from tests.toy_backbone import plain_views
from textual_inversion.concept import Concept
from textual_inversion.config import AdapterConfig, InversionConfig, PenaltyConfig, TimestepConfig
from textual_inversion.engine import Assignment, Engine, Outcome
from textual_inversion.families import load_backbone
from textual_inversion.families.base import Backbone
from textual_inversion.initialise import initial_rows
from textual_inversion.knowledge import KnowledgePreservation, read_captions
from textual_inversion.lora import initial_adapter
from textual_inversion.prompts import OBJECT_TEMPLATES, TEXTBOOST_TEMPLATES
from textual_inversion.rng import generator_for

STEPS, BATCH, SEED = 3, 2, 11


def concept(num_vectors: int) -> Concept:
    return Concept(
        concept_id=f"k{num_vectors}", placeholder_token="<k>", images=("x",), initializer="cat", num_vectors=num_vectors
    )


def moments() -> Tensor:
    return torch.rand(3, 2, *LATENT_SHAPE, generator=torch.Generator().manual_seed(4))


def reference(model: Path, num_vectors: int, start: Tensor) -> tuple[Tensor, list[float]]:
    """The learned rows and the loss of each step; `start` [num_vectors, dim] is where they begin."""
    torch.manual_seed(0)
    pipeline, table, word_ids, words = with_words(model, num_vectors, start)
    frozen = table.detach().clone()
    optimizer = torch.optim.AdamW([table], lr=0.01, weight_decay=0.0)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)

    losses = []
    for step in range(STEPS):
        generator = generator_for(SEED, concept(num_vectors).concept_id, "step", step)
        view = torch.randint(3, (BATCH,), generator=generator)
        eps = torch.randn(BATCH, *LATENT_SHAPE, generator=generator)
        noise = torch.randn(BATCH, *LATENT_SHAPE, generator=generator)
        t = torch.randint(1000, (BATCH,), generator=generator)
        template = torch.randint(27, (BATCH,), generator=generator)

        latents = moments()[view, 0] + moments()[view, 1] * eps
        prompts = [OBJECT_TEMPLATES[i].format(words) for i in template]
        ids = pipeline.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        hidden = pipeline.text_encoder(ids)[0]
        prediction = pipeline.unet(scheduler.add_noise(latents, noise, t), t, hidden).sample
        is_epsilon = scheduler.config.prediction_type == "epsilon"
        loss = F.mse_loss(prediction, noise if is_epsilon else scheduler.get_velocity(latents, noise, t))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        others = [i for i in range(len(table)) if i not in word_ids]
        table.data[others] = frozen[others]
    return table.detach()[word_ids], losses


def with_words(model: Path, num_vectors: int, start: Tensor) -> tuple[Any, Tensor, list[int], str]:
    """A frozen pipeline that knows new words, whose vectors begin at `start` -> (it, its table, their ids, a text of
    them)."""
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    words = [f"<k_{j}>" for j in range(num_vectors)]
    pipeline.tokenizer.add_tokens(words)
    word_ids = pipeline.tokenizer.convert_tokens_to_ids(words)
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer))
    for module in (pipeline.text_encoder, pipeline.unet):
        module.requires_grad_(False).eval()
    table = pipeline.text_encoder.get_input_embeddings().weight.requires_grad_()
    table.data[word_ids] = start
    return pipeline, table, word_ids, " ".join(words)


PLAIN = InversionConfig(steps=STEPS, batch_size=BATCH, learning_rate=0.01, norm_control="none")


def engines_own(model: Path, num_vectors: int, *, slots_per_pass: int, config: InversionConfig = PLAIN) -> Outcome:
    """The same concept in the engine, with another beside it."""
    backbone = load_backbone(str(model), device="cpu", precision="float32")
    work = iter(
        [
            Assignment(concept(num_vectors + 1), plain_views(moments())),
            Assignment(concept(num_vectors), plain_views(moments())),
        ]
    )
    outcomes: dict[str, Outcome] = {}
    engine = Engine(backbone, config, slots=2, seed=SEED, slots_per_pass=slots_per_pass)
    engine.run(lambda _: next(work, None), lambda outcome: outcomes.update({outcome.concept.concept_id: outcome}))
    return outcomes[f"k{num_vectors}"]


@pytest.mark.parametrize(("num_vectors", "prediction_type"), [(1, "epsilon"), (3, "epsilon"), (2, "v_prediction")])
def test_steps_equal_a_plain_reference(tmp_path: Path, num_vectors: int, prediction_type: str) -> None:
    model = tiny_stable_diffusion(tmp_path / "model", prediction_type)
    backbone = load_backbone(str(model), device="cpu", precision="float32")
    start = initial_rows(concept(num_vectors), backbone, noise=0.0, seed=SEED)["clip_l"]
    expected, losses = reference(model, num_vectors, start)

    for slots_per_pass in (1, 2):
        outcome = engines_own(model, num_vectors, slots_per_pass=slots_per_pass)
        assert outcome.embedding is not None
        torch.testing.assert_close(outcome.curve[:, 1], torch.tensor(losses), rtol=1e-5, atol=0)
        learned = outcome.embedding.vectors["clip_l"]
        assert (learned - start).abs().max() > 0.02  # it did move: three steps of 0.01
        torch.testing.assert_close(learned, expected, rtol=0, atol=2e-5)


CLIPPED_AT = 1e-4  # far below the gradients' norm
TEXTBOOST = InversionConfig(
    steps=STEPS, batch_size=BATCH, learning_rate=0.01, learning_rate_schedule="linear", weight_decay=0.1,
    templates="textboost", class_cue=True, norm_control="none",
    adapter=AdapterConfig(
        kind="lora", rank=2, alpha=3.0, learning_rate=5e-3, weight_decay=0.1, max_grad_norm=CLIPPED_AT
    ),
    penalties=PenaltyConfig(knowledge=0.1), timesteps=TimestepConfig(sampler="snr"),
)  # fmt: skip


def textboost(
    model: Path, backbone: Backbone, start: Tensor
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]], list[float]]:
    """TextBoost v1 of a concept of one vector, as released: its row, its low-rank tensors and the losses.

    The release's ways (JMaiGC/textboost a806fda): AdamW decays rows and adapter, the rows' rate falls linearly, the
    adapter's gradient alone is clipped, and prompts are its four templates; and the paper's timesteps.
    """
    pipeline, table, word_ids, word = with_words(model, 1, start)
    frozen_encoder = copy.deepcopy(pipeline.text_encoder)
    settings = LoraConfig(r=2, lora_alpha=3, target_modules=list(TEXTBOOST.adapter.targets))
    encoder = inject_adapter_in_model(settings, pipeline.text_encoder)
    table.requires_grad_()  # peft has frozen it
    generator = generator_for(SEED, "k1", "adapter")
    low_rank = {}
    for name, (down, _) in initial_adapter(backbone.adapter_layers, TEXTBOOST.adapter.targets, 2, generator).items():
        layer = next(module for path, module in encoder.named_modules() if path.endswith(name))
        layer.lora_A["default"].weight.data.copy_(down)
        low_rank[name] = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    halves = [half for pair in low_rank.values() for half in pair]
    groups = [{"params": [table], "lr": 0.01}, {"params": halves, "lr": 5e-3}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    log_snr = (scheduler.alphas_cumprod.double() / (1 - scheduler.alphas_cumprod.double())).log()
    cumulative = (log_snr.max() - log_snr).cumsum(0)
    knowledge = KnowledgePreservation(backbone, read_captions(""))
    of_class, losses = knowledge.class_prompts(concept(1), "textboost"), []

    for step in range(STEPS):
        generator = generator_for(SEED, "k1", "step", step)
        view = torch.randint(3, (BATCH,), generator=generator)
        eps = torch.randn(BATCH, *LATENT_SHAPE, generator=generator)
        noise = torch.randn(BATCH, *LATENT_SHAPE, generator=generator)
        u = torch.rand(BATCH, generator=generator, dtype=torch.float64)
        t = torch.searchsorted(cumulative / cumulative[-1], u, right=True)
        template = torch.randint(4, (BATCH,), generator=generator)
        others = knowledge.draw(BATCH, of_class, generator).ids["clip_l"]

        latents = moments()[view, 0] + moments()[view, 1] * eps
        prompts = [TEXTBOOST_TEMPLATES[i].format(f"{word} cat") for i in template]
        ids = pipeline.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        prediction = pipeline.unet(scheduler.add_noise(latents, noise, t), t, encoder(ids)[0]).sample
        loss = F.mse_loss(prediction, noise)
        loss = loss + 0.1 * (1 - F.cosine_similarity(encoder(others)[0], frozen_encoder(others)[0], dim=-1)).mean()
        optimizer.zero_grad()
        loss.backward()
        known = [i for i in range(len(table)) if i not in word_ids]
        table.grad[known] = 0
        assert torch.nn.utils.clip_grad_norm_(halves, CLIPPED_AT) > 10 * CLIPPED_AT
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / STEPS)
        before = table.detach().clone()
        optimizer.step()
        table.data[known] = before[known]  # which the weight decay has touched
        losses.append(loss.item())
    return table.detach()[word_ids], low_rank, losses


PLUS_PLUS = InversionConfig(
    steps=STEPS, batch_size=BATCH, learning_rate=0.01, max_grad_norm=1.0, class_cue=True, norm_control="none",
    adapter=AdapterConfig(
        kind="causal", rank=1, alpha=1.0, targets=("fc2", "cross_attention"), learning_rate=5e-3
    ),
)  # fmt: skip


def from_first_word(ids: Tensor, word_id: int) -> Tensor:
    """1 from the word on, up to the first of the tokens that pad the prompt (it ends the text); [batch, length, 1]."""
    masks = torch.zeros(*ids.shape, 1)
    for prompt, mask in zip(ids.tolist(), masks, strict=True):
        mask[prompt.index(word_id) : prompt.index(max(x for x in prompt if x != word_id)) + 1] = 1
    return masks


def textboost_plus_plus(
    model: Path, backbone: Backbone, start: Tensor
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]], list[float]]:
    """TextBoost++ of a concept of one vector, by hooks in diffusers' modules: its row, low-rank tensors and losses."""
    pipeline, table, word_ids, word = with_words(model, 1, start)
    generator = generator_for(SEED, "k1", "adapter")
    first = initial_adapter(backbone.adapter_layers, PLUS_PLUS.adapter.targets, 1, generator)
    low_rank = {name: (down.requires_grad_(), up.requires_grad_()) for name, (down, up) in first.items()}
    masks = [torch.empty(0)]

    def change(inputs: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return masks[-1] * (inputs @ down.T) @ up.T

    for name, (down, up) in low_rank.items():
        if name.endswith("fc2"):
            layer = next(m for path, m in pipeline.text_encoder.named_modules() if path.endswith(name))
            layer.register_forward_hook(lambda _, args, out, d=down, u=up: out + change(args[0], d, u))
        else:
            attention = pipeline.unet.get_submodule(name.removeprefix("unet.").replace("cross_attention", "attn2"))
            for projection in (attention.to_k, attention.to_v):
                projection.register_forward_pre_hook(lambda _, args, d=down, u=up: args[0] + change(args[0], d, u))
    halves = [half for pair in low_rank.values() for half in pair]
    groups = [{"params": [table], "lr": 0.01}, {"params": halves, "lr": 5e-3}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    losses = []
    for step in range(STEPS):
        generator = generator_for(SEED, "k1", "step", step)
        view = torch.randint(3, (BATCH,), generator=generator)
        eps = torch.randn(BATCH, *LATENT_SHAPE, generator=generator)
        noise = torch.randn(BATCH, *LATENT_SHAPE, generator=generator)
        t = torch.randint(1000, (BATCH,), generator=generator)
        template = torch.randint(27, (BATCH,), generator=generator)

        latents = moments()[view, 0] + moments()[view, 1] * eps
        prompts = [OBJECT_TEMPLATES[i].format(f"{word} cat") for i in template]
        ids = pipeline.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        masks.append(from_first_word(ids, word_ids[0]))
        hidden = pipeline.text_encoder(ids)[0]
        loss = F.mse_loss(pipeline.unet(scheduler.add_noise(latents, noise, t), t, hidden).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        table.grad[[i for i in range(len(table)) if i not in word_ids]] = 0
        torch.nn.utils.clip_grad_norm_([table, *halves], 1.0)
        optimizer.step()
        losses.append(loss.item())
    return table.detach()[word_ids], low_rank, losses


def assert_engine_steps_equal(
    model: Path,
    config: InversionConfig,
    row: Tensor,
    low_rank: Mapping[str, tuple[Tensor, Tensor]],
    losses: list[float],
) -> None:
    for slots_per_pass in (1, 2):
        outcome = engines_own(model, 1, slots_per_pass=slots_per_pass, config=config)
        assert outcome.embedding is not None
        assert outcome.embedding.adapter is not None
        torch.testing.assert_close(outcome.curve[:, 1], torch.tensor(losses), rtol=1e-5, atol=0)
        torch.testing.assert_close(outcome.embedding.vectors["clip_l"], row, rtol=0, atol=5e-5)
        assert outcome.embedding.adapter.tensors.keys() == low_rank.keys()
        for name, (down, up) in outcome.embedding.adapter.tensors.items():
            assert up.abs().max() > 0.005  # it did move: three steps of 5e-3
            torch.testing.assert_close(down, low_rank[name][0].detach(), rtol=0, atol=5e-5)
            torch.testing.assert_close(up, low_rank[name][1].detach(), rtol=0, atol=5e-5)


def test_textboost_plus_plus_steps_equal_plain_hooks(tmp_path: Path) -> None:
    model = tiny_stable_diffusion(tmp_path / "model")
    backbone = load_backbone(str(model), device="cpu", precision="float32")
    start = initial_rows(concept(1), backbone, noise=0.0, seed=SEED)["clip_l"]
    row, low_rank, losses = textboost_plus_plus(model, backbone, start)
    assert sum(name.endswith("cross_attention") for name in low_rank) == 4
    assert_engine_steps_equal(model, PLUS_PLUS, row, low_rank, losses)


def test_textboost_steps_equal_pefts(tmp_path: Path) -> None:
    model = tiny_stable_diffusion(tmp_path / "model")
    backbone = load_backbone(str(model), device="cpu", precision="float32")
    start = initial_rows(concept(1), backbone, noise=0.0, seed=SEED)["clip_l"]
    row, low_rank, losses = textboost(model, backbone, start)
    assert_engine_steps_equal(model, TEXTBOOST, row, low_rank, losses)
