"""Local editing: what is outside the mask stays, at every step and to the bit; Avrahami et al. 2023, algorithm 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from PIL import Image

from tests.tiny_models import DIM, LATENT_SHAPE, RESOLUTION
from textual_inversion.augment import to_pixels
from textual_inversion.batch_invariance import choose_sampling
from textual_inversion.concept import LearnedEmbedding
from textual_inversion.config import SamplingConfig, Solver
from textual_inversion.edit import edit, encode_picture, latent_mask
from textual_inversion.families.base import Backbone, stack_prompts
from textual_inversion.generate import ImageRequest, generate, initial_noise, to_pictures
from textual_inversion.prompts import encode_prompt

SOLVERS: tuple[Solver, ...] = ("ddim", "dpm++")
CELL = RESOLUTION // LATENT_SHAPE[1]


def diffusers_scheduler(model: Path, solver: Solver) -> Any:
    """The scheduler that a pipeline of this model would sample with."""
    config = DDPMScheduler.load_config(model, subfolder="scheduler")
    return {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler}[solver].from_config(config)


def a_picture(seed: int = 0) -> Image.Image:
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((RESOLUTION, RESOLUTION), Image.Resampling.BICUBIC)


def a_mask(left: int = 0, right: int = 0) -> Image.Image:
    """White from column `left` to `right`."""
    mask = np.zeros((RESOLUTION, RESOLUTION), np.uint8)
    mask[:, left:right] = 255
    return Image.fromarray(mask)


def requests() -> list[ImageRequest]:
    rows = torch.randn(2, DIM, generator=torch.Generator().manual_seed(0)) * 0.3
    learned = LearnedEmbedding(placeholder_token="<c>", vectors={"clip_l": rows})
    return [ImageRequest("a photo of a <c>", 0, (learned,)), ImageRequest("a cat", 1), ImageRequest("a cat", 2)]


def settings(solver: Solver, steps: int = 4) -> SamplingConfig:
    return SamplingConfig(solver=solver, steps=steps, batch_size=4, guidance_scale=3.0)


def arrays(pictures: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(picture) for picture in pictures])


@pytest.mark.parametrize("solver", SOLVERS)
def test_with_an_all_black_mask_nothing_changes(tiny_backbone: Backbone, solver: Solver) -> None:
    """The autoencoder's reconstruction to the bit; with its own pixels kept, the picture itself."""
    picture, config = a_picture(), settings(solver)
    latents = tiny_backbone.encode_images(to_pixels(picture)[None])[:, 0]
    reconstruction = to_pictures(tiny_backbone.decode(latents.expand(config.batch_size, -1, -1, -1)))[:3]
    drawn = edit(tiny_backbone, picture, a_mask(), requests(), config, keep_pixels=False)
    assert (arrays(drawn) == arrays(reconstruction)).all()
    kept = edit(tiny_backbone, picture, a_mask(), requests(), config)
    assert (arrays(kept) == np.asarray(picture)).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_only_what_is_masked_changes(tiny_backbone: Backbone, solver: Solver) -> None:
    picture, mask = a_picture(), a_mask(8, 24)
    drawn = arrays(edit(tiny_backbone, picture, mask, requests(), settings(solver)))
    outside = np.asarray(mask) == 0
    assert (drawn[:, outside] == np.asarray(picture)[outside]).all()
    inside = drawn[:, ~outside].astype(int)
    assert abs(inside - np.asarray(picture)[~outside]).mean() > 10
    assert abs(inside[1] - inside[2]).mean() > 1, "another seed, another result"


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_an_all_white_mask_is_plain_sampling_from_the_noised_picture(
    tiny_backbone: Backbone, tiny_model: Path, solver: Solver, strength: float
) -> None:
    """Against a loop over diffusers' own scheduler, begun at the picture's latents with the first timestep's noise."""
    config, request = SamplingConfig(solver=solver, steps=4, batch_size=1, guidance_scale=1.0), requests()[1]
    drawn = edit(tiny_backbone, a_picture(), a_mask(0, RESOLUTION), [request], config, strength=strength)[0]

    scheduler = diffusers_scheduler(tiny_model, solver)
    scheduler.set_timesteps(4)
    timesteps = scheduler.timesteps[4 - round(4 * strength) :]
    share = scheduler.alphas_cumprod[timesteps[0]]
    source, noise = encode_picture(tiny_backbone, a_picture()), initial_noise(tiny_backbone, request.seed)[None]
    latents = share.sqrt() * source + (1 - share).sqrt() * noise
    text = tiny_backbone.encode_prompts(stack_prompts([encode_prompt("a cat", {}, tiny_backbone.vocabularies)]), {})
    for timestep in timesteps:
        with torch.no_grad():
            output = tiny_backbone.predict(latents, timestep[None], text)
        latents = scheduler.step(output, timestep, latents).prev_sample
    expected = to_pictures(tiny_backbone.decode(latents))[0]
    assert abs(arrays([drawn]).astype(int) - arrays([expected])).max() <= 1


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_background_has_the_noise_of_the_step_it_is_blended_into(
    tiny_backbone: Backbone, tiny_model: Path, solver: Solver
) -> None:
    """DDPM, Eq. 4: sqrt(alpha_bar) z_init + sqrt(1 - alpha_bar) eps at the timestep the next pass is told; at the end
    z_init itself."""
    run, schedule = tiny_backbone.noise.begin(solver, 5), diffusers_scheduler(tiny_model, solver).alphas_cumprod
    generator = torch.Generator().manual_seed(0)
    source, noise = (torch.randn(2, *LATENT_SHAPE, generator=generator) for _ in range(2))
    for step, timestep in enumerate(run.timesteps):
        share = schedule[timestep]
        expected = share.sqrt() * source + (1 - share).sqrt() * noise
        torch.testing.assert_close(run.noised(source, noise, step), expected)
        run.step(noise, step, source)  # the scheduler's own counter must not matter
    assert run.noised(source, noise, 5) is source


def test_the_mask_reaches_every_latent_it_touches(tiny_backbone: Backbone) -> None:
    thin = latent_mask(a_mask(CELL + 1, CELL + 2), tiny_backbone)
    assert thin.shape == (1, 1, *LATENT_SHAPE[1:])
    assert thin[0, 0].all(0).tolist() == [False, True, *[False] * 6]
    assert not latent_mask(a_mask().point(lambda _: 127), tiny_backbone).any()


def test_an_edit_depends_on_neither_place_nor_neighbours(tiny_backbone: Backbone) -> None:
    picture, mask = a_picture(), a_mask(8, 24)
    config, _ = choose_sampling(tiny_backbone, settings("dpm++"))
    together = edit(tiny_backbone, picture, mask, requests(), config)
    alone = [edit(tiny_backbone, picture, mask, [request], config)[0] for request in requests()]
    assert (arrays(together) == arrays(alone)).all()


def test_little_strength_stays_nearer_to_the_picture(tiny_backbone: Backbone) -> None:
    mask = a_mask(0, RESOLUTION)
    picture = edit(tiny_backbone, a_picture(), a_mask(), requests()[:1], settings("ddim"), keep_pixels=False)[0]
    little, much = (
        edit(tiny_backbone, a_picture(), mask, requests()[:1], settings("ddim", 10), strength=strength)[0]
        for strength in (0.1, 1.0)
    )
    away = [abs(arrays([one]).astype(int) - arrays([picture])).mean() for one in (little, much)]
    assert away[0] < away[1] / 2


def test_bad_input_is_named_before_anything_is_drawn(tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_backbone, "predict", None)
    config, small = settings("ddim"), Image.new("L", (16, 8))
    with pytest.raises(ValueError, match="the mask is 16 x 8 px but the model draws 32 x 32"):
        edit(tiny_backbone, a_picture(), small, requests(), config)
    with pytest.raises(ValueError, match="the picture is 16 x 8 px"):
        edit(tiny_backbone, small.convert("RGB"), a_mask(), requests(), config)
    for strength in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"strength = {strength}"):
            edit(tiny_backbone, a_picture(), a_mask(), requests(), config, strength=strength)
    with pytest.raises(ValueError, match="does not contain the placeholder token '<c>'"):
        edit(tiny_backbone, a_picture(), a_mask(), [ImageRequest("a cat", 0, requests()[0].embeddings)], config)


def test_plain_drawing_is_as_before(tiny_backbone: Backbone) -> None:
    """A picture that was edited leaves no trace in the model."""
    before = generate(tiny_backbone, requests(), settings("ddim"))
    edit(tiny_backbone, a_picture(), a_mask(8, 24), requests(), settings("ddim"))
    assert (arrays(before) == arrays(generate(tiny_backbone, requests(), settings("ddim")))).all()
