"""The engine against Textual Inversion as diffusers' example does it: a resized vocabulary, the whole table in
`torch.optim.AdamW`, whole pipelines of transformers and diffusers, one concept after the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from torch import Tensor

from tests.tiny_models import LATENT_SHAPE, tiny_stable_diffusion
from tests.toy_backbone import plain_views
from textual_inversion.concept import Concept
from textual_inversion.config import InversionConfig
from textual_inversion.engine import Assignment, Engine, Outcome
from textual_inversion.families import load_backbone
from textual_inversion.initialise import initial_rows
from textual_inversion.prompts import OBJECT_TEMPLATES
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
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    words = [f"<k_{j}>" for j in range(num_vectors)]
    pipeline.tokenizer.add_tokens(words)
    word_ids = pipeline.tokenizer.convert_tokens_to_ids(words)
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer))
    for module in (pipeline.text_encoder, pipeline.unet):
        module.requires_grad_(False).eval()
    table = pipeline.text_encoder.get_input_embeddings().weight.requires_grad_()
    table.data[word_ids] = start
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
        prompts = [OBJECT_TEMPLATES[i].format(" ".join(words)) for i in template]
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


def engines_own(model: Path, num_vectors: int, *, slots_per_pass: int) -> Outcome:
    """The same concept in the engine, with another beside it."""
    backbone = load_backbone(str(model), device="cpu", precision="float32")
    config = InversionConfig(steps=STEPS, batch_size=BATCH, learning_rate=0.01, norm_control="none")
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
