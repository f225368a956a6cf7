"""A picture depends on its own request and the settings, to the bit on one CPU thread; bad requests are named."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.textual_inversion.example_requests import adapted_requests, an_embedding
from tests.tiny_models import MAX_LENGTH, RESOLUTION
from textual_inversion.batch_invariance import choose_sampling
from textual_inversion.concept import LearnedAdapter
from textual_inversion.config import AdapterConfig, SamplingConfig
from textual_inversion.families.base import Backbone
from textual_inversion.generate import ImageRequest, draw, encode_request, generate, initial_noise, with_own_defaults
from textual_inversion.prompt_encoder import PromptEncoder

FAST = SamplingConfig(steps=2, batch_size=4)


def requests() -> list[ImageRequest]:
    """Seven pictures: one word with different embeddings, several vectors, two words in a prompt, no word at all."""
    return [
        ImageRequest("a photo of a <c>", 0, (an_embedding(0),)),
        ImageRequest("a photo of a <c>", 0, (an_embedding(1),)),
        ImageRequest("a photo of a <c>", 1, (an_embedding(1),)),
        ImageRequest("a <c> on the moon", 2, (an_embedding(2, num_vectors=3),)),
        ImageRequest("a <c> and a <c>2 toy", 3, (an_embedding(3), an_embedding(4, "<c>2", 2))),
        ImageRequest("a photo of a cat", 4),
        ImageRequest("", 5),
    ]


def negative_requests(backbone: Backbone) -> list[ImageRequest]:
    """Negative prompts of plain words, of concepts with and without adapters, and beside prompts without one."""
    adapted = adapted_requests(backbone)[0].embeddings[0]
    return [
        ImageRequest("a photo of a <c>", 0, (an_embedding(0),), "dark"),
        ImageRequest("a photo of a <c>", 0, (an_embedding(0),)),
        ImageRequest("a photo of a <c>", 0, (an_embedding(0),), "a dark <n>", (an_embedding(5, "<n>", 2),)),
        ImageRequest("a photo of a <c>", 0, (an_embedding(0),), "a dark <c>", (adapted,)),
        ImageRequest("a photo of a <c>", 0, (adapted,), "dark"),
        ImageRequest("a photo of a <c>", 0, (adapted,), "a dark <c>", (adapted,)),
        ImageRequest("a photo of a cat", 1, (), "a dark <c>", (an_embedding(1),)),
    ]


def same(a: Sequence[Image.Image], b: Sequence[Image.Image]) -> list[bool]:
    return [np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(a, b, strict=True)]


def test_pictures_come_in_order_and_in_size(tiny_backbone: Backbone) -> None:
    pictures = generate(tiny_backbone, requests(), FAST)
    assert [p.size for p in pictures] == [(RESOLUTION, RESOLUTION)] * 7
    assert {p.mode for p in pictures} == {"RGB"}
    assert not any(same(pictures[:-1], pictures[1:])), "other embedding, seed or prompt: other picture"
    assert generate(tiny_backbone, [], FAST) == []


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_a_picture_depends_on_neither_place_nor_neighbours(tiny_backbone: Backbone, batch_size: int) -> None:
    """Alone, in company and in other orders: the same bytes, as long as the batch size is the same."""
    config, _ = choose_sampling(tiny_backbone, SamplingConfig(steps=2, batch_size=batch_size))
    together = generate(tiny_backbone, requests(), config)
    alone = [generate(tiny_backbone, [request], config)[0] for request in requests()]
    backwards = generate(tiny_backbone, requests()[::-1], config)[::-1]
    assert all(same(together, alone))
    assert all(same(together, backwards))


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_nor_do_pictures_with_adapters(tiny_backbone: Backbone, batch_size: int) -> None:
    config, _ = choose_sampling(
        tiny_backbone, SamplingConfig(steps=2, batch_size=batch_size), AdapterConfig(kind="lora")
    )
    asked = adapted_requests(tiny_backbone)
    together = generate(tiny_backbone, asked, config)
    assert all(same(together, [generate(tiny_backbone, [request], config)[0] for request in asked]))
    assert all(same(together, generate(tiny_backbone, asked[::-1], config)[::-1]))
    assert not any(same(together[:-1], together[1:])), "other adapters: other pictures"


@pytest.mark.parametrize("batch_size", [1, 4])
def test_nor_do_pictures_with_negative_prompts(tiny_backbone: Backbone, batch_size: int) -> None:
    sampling = SamplingConfig(steps=2, batch_size=batch_size, guidance_scale=3.0)
    config, _ = choose_sampling(tiny_backbone, sampling, AdapterConfig(kind="lora"))
    asked = negative_requests(tiny_backbone)
    together = generate(tiny_backbone, asked, config)
    assert all(same(together, [generate(tiny_backbone, [request], config)[0] for request in asked]))
    assert all(same(together, generate(tiny_backbone, asked[::-1], config)[::-1]))
    assert len({picture.tobytes() for picture in together}) == len(asked)


def test_pictures_of_several_sizes_are_drawn_as_if_alone(tiny_backbone: Backbone) -> None:
    config, _ = choose_sampling(tiny_backbone, FAST, size_px=(2 * RESOLUTION, RESOLUTION))
    sizes = [None, (2 * RESOLUTION, RESOLUTION), (RESOLUTION, 2 * RESOLUTION), None, (2 * RESOLUTION, RESOLUTION)]
    asked = [ImageRequest("a <c>", seed, (an_embedding(0),), size_px=size) for seed, size in enumerate(sizes)]
    together = generate(tiny_backbone, asked, config)
    assert [picture.size for picture in together] == [size or (RESOLUTION, RESOLUTION) for size in sizes]
    assert all(same(together, [generate(tiny_backbone, [request], config)[0] for request in asked]))
    own = [replace(request, size_px=(RESOLUTION, RESOLUTION)) for request in asked[:1]]
    assert all(same(together[:1], generate(tiny_backbone, own, config)))
    for size in ((RESOLUTION + 1, RESOLUTION), (4 * RESOLUTION, RESOLUTION), (0, RESOLUTION)):
        with pytest.raises(ValueError, match=rf"no pictures of {size[0]} x {size[1]} px, but of .* multiples of"):
            generate(tiny_backbone, [replace(asked[0], size_px=size)], config)


def test_a_negative_prompt_needs_guidance(tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    request = ImageRequest("a photo of a <c>", 0, (an_embedding(0),), "dark")
    with pytest.raises(ValueError, match=r"'dark' has no effect without guidance, .* 1, the settings'; set a guidance"):
        generate(tiny_backbone, [request], replace(FAST, guidance_scale=1.0))
    monkeypatch.setattr(tiny_backbone, "guidance_scale", 1.0)
    with pytest.raises(ValueError, match=r"1, this model's own, .*, or leave the negative prompt out"):
        generate(tiny_backbone, [request], FAST)
    assert generate(tiny_backbone, [request], replace(FAST, guidance_scale=2.0))


def test_another_batch_size_changes_rounding_only(tiny_backbone: Backbone) -> None:
    one = generate(tiny_backbone, requests(), SamplingConfig(steps=2, batch_size=1))
    five = generate(tiny_backbone, requests(), SamplingConfig(steps=2, batch_size=5))
    for a, b in zip(one, five, strict=True):
        assert abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max() <= 1


def test_threads_may_share_a_model(tiny_backbone: Backbone) -> None:
    """Each thread has its own rows and adapters in use: one may draw a grid while another draws or learns."""
    config = SamplingConfig(steps=2, batch_size=1)
    asked = [*requests(), *adapted_requests(tiny_backbone)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda request: generate(tiny_backbone, [request], config)[0], asked))
    assert all(same(together, generate(tiny_backbone, asked, config)))


def test_the_noise_comes_from_the_seed_alone(tiny_backbone: Backbone) -> None:
    torch.manual_seed(1)
    first = initial_noise(tiny_backbone, 7)
    torch.manual_seed(2)
    assert torch.equal(first, initial_noise(tiny_backbone, 7))
    assert not torch.equal(first, initial_noise(tiny_backbone, 8))
    state = torch.get_rng_state()
    generate(tiny_backbone, requests()[:1], FAST)
    assert torch.equal(state, torch.get_rng_state()), "drawing must not touch the global generator"


def test_guidance_and_solver_matter(tiny_backbone: Backbone) -> None:
    settings = [{"guidance_scale": 1.0}, {"guidance_scale": 7.0}, {"solver": "ddim", "guidance_scale": 7.0}]
    pictures = [
        generate(tiny_backbone, requests()[:1], SamplingConfig(steps=3, batch_size=1, **s))[0]  # type: ignore[arg-type]
        for s in settings
    ]
    assert not any(same(pictures, [*pictures[1:], pictures[0]]))


def test_the_models_own_guidance_where_none_is_set(tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_backbone, "guidance_scale", 3.0)
    config = SamplingConfig(steps=3, batch_size=1)
    assert config.guidance_scale == 0
    own, named = (
        generate(tiny_backbone, requests()[:1], settings) for settings in (config, replace(config, guidance_scale=3.0))
    )
    assert all(same(own, named))


def test_the_models_own_steps_where_none_are_set(tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_backbone, "sampling_steps", 2)
    config = SamplingConfig(batch_size=1)
    assert config.steps == 0
    chosen = with_own_defaults(config, tiny_backbone)
    assert (chosen.steps, chosen.guidance_scale) == (2, tiny_backbone.guidance_scale)
    assert with_own_defaults(replace(config, steps=7, guidance_scale=1.5), tiny_backbone).steps == 7
    own, named = (generate(tiny_backbone, requests()[:1], settings) for settings in (config, replace(config, steps=2)))
    assert all(same(own, named))


def test_without_guidance_the_denoiser_runs_half_as_wide(
    tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[int] = []
    predict = tiny_backbone.predict

    def counted(latents: torch.Tensor, *rest: Any) -> torch.Tensor:
        widths.append(len(latents))
        return predict(latents, *rest)

    monkeypatch.setattr(tiny_backbone, "predict", counted)
    for scale in (1.0, 2.0):
        generate(tiny_backbone, requests()[:1], SamplingConfig(steps=2, batch_size=3, guidance_scale=scale))
    assert widths == [3, 3, 6, 6]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ImageRequest("a photo of a cat", 0, (an_embedding(0),)), "does not contain the placeholder token '<c>'"),
        (ImageRequest("a photo of <c>s", 0, (an_embedding(0, "c"),)), "does not contain the placeholder token 'c'"),
        (ImageRequest("a <c> " * MAX_LENGTH, 0, (an_embedding(0),)), "more than the 22 that fit"),
        (ImageRequest("a <c>", 0, (an_embedding(0, num_vectors=30),)), "more than the 22 that fit"),
        (ImageRequest("a <c>", 0, (an_embedding(0), an_embedding(1))), "two of its embeddings have the same"),
        (ImageRequest("a <c>", -1, (an_embedding(0),)), "seed -1 must be"),
        (ImageRequest("a cat", 0, (), "dark", (an_embedding(0),)), "prompt 'dark' does not contain the placeholder"),
        (ImageRequest("a cat", 0, (), "a <c> " * MAX_LENGTH, (an_embedding(0),)), "more than the 22 that fit"),
        (
            ImageRequest("a <c>", 0, (an_embedding(0, dim=16),)),
            r"'<c>' has widths \{'clip_l': 16\} but .* \{'clip_l': 32\}",
        ),
        (
            ImageRequest(
                "a <c>",
                0,
                (
                    replace(
                        an_embedding(0),
                        adapter=LearnedAdapter(
                            kind="lora",
                            scale=1.0,
                            tensors={"encoder.layers.0.mlp.fc2": (torch.ones(1, 5), torch.ones(32, 1))},
                        ),
                    ),
                ),
            ),
            "adapter of embedding '<c>' changes a layer 'encoder.layers.0.mlp.fc2' with 5 inputs and 32 outputs",
        ),
    ],
)
def test_a_bad_request_is_refused_before_anything_is_drawn(
    tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch, request_: ImageRequest, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        encode_request(tiny_backbone, request_)
    monkeypatch.setattr(tiny_backbone, "predict", None)
    with pytest.raises(ValueError, match=message):
        generate(tiny_backbone, [*requests(), request_], FAST)


def test_draw_takes_at_most_one_batch(tiny_backbone: Backbone) -> None:
    encoded = [encode_request(tiny_backbone, request) for request in requests()]
    with pytest.raises(ValueError, match="7 requests do not fit a batch of 4"):
        draw(PromptEncoder(tiny_backbone), encoded, FAST)
    assert draw(PromptEncoder(tiny_backbone), [], FAST) == []
