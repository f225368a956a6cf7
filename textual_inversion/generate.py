"""Prompts with learned concepts -> pictures. Any concepts may share a batch.

A picture depends on (model, embeddings, prompt, settings, seed) and on nothing else: not on its place in the batch, on
its neighbours or on how many were asked for. See `generate` for what holds to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from textual_inversion.concept import LearnedAdapter, LearnedEmbedding
from textual_inversion.config import SamplingConfig
from textual_inversion.families.base import Backbone, Conditioning
from textual_inversion.lora import join, positions
from textual_inversion.prompts import encode_prompt


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """One picture to draw."""

    prompt: str
    seed: int
    """Of the initial noise, 0 or more; nothing else about sampling is random."""
    embeddings: tuple[LearnedEmbedding, ...] = ()
    """The concepts whose placeholder tokens stand in the prompt. Another request may give another embedding to the
    same placeholder token."""


@dataclass(frozen=True, slots=True)
class EncodedRequest:
    """A request found good, as token ids, the rows they read and the adapters they are encoded with."""

    ids: tuple[int, ...]
    """[max_length]; id `vocab_size + i` means `rows[...][i]`."""
    rows: dict[str, Tensor]
    """Text encoder key -> [num_rows, dim] float32, this request's embeddings one after the other."""
    seed: int
    adapters: tuple[tuple[LearnedAdapter, range], ...] = ()
    """Those of its embeddings, each with the ids of its concept; their changes are added."""


def encode_request(backbone: Backbone, request: ImageRequest) -> EncodedRequest:
    """Check one request and turn its prompt into ids, without drawing.

    Raises ValueError, naming the prompt, if it does not fit the text encoder, lacks the placeholder token of one of
    its embeddings, names one twice, or if an embedding or its adapter was learned for another model.
    """
    words = [embedding.placeholder_token for embedding in request.embeddings]
    if len(set(words)) < len(words):
        raise ValueError(f"prompt {request.prompt!r}: two of its embeddings have the same placeholder token, {words}")
    if not 0 <= request.seed < 2**63:
        raise ValueError(f"prompt {request.prompt!r}: seed {request.seed} must be at least 0 and below 2**63")
    for embedding in request.embeddings:
        check_fits(embedding, backbone)
    placeholders: dict[str, range] = {}
    num_rows = 0
    for embedding in request.embeddings:
        num_vectors = len(next(iter(embedding.vectors.values())))
        first = backbone.vocab_size + num_rows
        placeholders[embedding.placeholder_token] = range(first, first + num_vectors)
        num_rows += num_vectors
    ids = encode_prompt(request.prompt, placeholders, backbone)
    for word, rows in placeholders.items():
        if not set(rows) <= set(ids):
            raise ValueError(f"prompt {request.prompt!r} does not contain the placeholder token {word!r} as a word")
    return EncodedRequest(
        ids=tuple(ids),
        rows={
            key: torch.cat([e.vectors[key].float() for e in request.embeddings])
            for key in backbone.token_tables
            if request.embeddings
        },
        seed=request.seed,
        adapters=tuple((e.adapter, placeholders[e.placeholder_token]) for e in request.embeddings if e.adapter),
    )


def check_fits(embedding: LearnedEmbedding, backbone: Backbone) -> None:
    """Raises ValueError unless the embedding has rows of the right width for every text encoder of the model, and its
    adapter, if any, changes layers that the model has."""
    wanted = {key: table.dim for key, table in backbone.token_tables.items()}
    found = {key: rows.shape[-1] for key, rows in embedding.vectors.items()}
    if found != wanted:
        raise ValueError(
            f"embedding {embedding.placeholder_token!r} has widths {found} but the model's text encoders {wanted}; it "
            "was learned for another model"
        )
    for name, (down, up) in embedding.adapter.tensors.items() if embedding.adapter else ():
        if backbone.adapter_layers.get(name) != (down.shape[1], up.shape[0]):
            raise ValueError(
                f"the adapter of embedding {embedding.placeholder_token!r} changes a layer {name!r} with "
                f"{down.shape[1]} inputs and {up.shape[0]} outputs, which the model's text encoder does not have; it "
                "was learned for another model"
            )


def generate(backbone: Backbone, requests: Sequence[ImageRequest], config: SamplingConfig) -> list[Image.Image]:
    """Draw the pictures, in the order asked for. Every request is checked (`encode_request`) before any is drawn.

    Batches always have `config.batch_size` rows, and no operation mixes rows, so a picture can depend on its place or
    company only through a kernel that sums differently for different rows of one shape. On the CPU with one thread
    there is none: every batch size tried (1 to 5, 7, 8 and 16, torch 2.13) gave the same bits in any order and company.
    On a GPU, libraries make no such promise. Another batch size, device or library version changes rounding, no more.
    """
    encoded = [encode_request(backbone, request) for request in requests]
    return [picture for batch in batches(encoded, config.batch_size) for picture in draw(backbone, batch, config)]


def draw(backbone: Backbone, requests: Sequence[EncodedRequest], config: SamplingConfig) -> list[Image.Image]:
    """One batch of at most `config.batch_size` pictures; a smaller one is padded with copies of its last request."""
    if not requests:
        return []
    padded = pad(requests, config.batch_size)
    scheduler = backbone.scheduler(config.solver)
    scheduler.set_timesteps(config.steps, device=backbone.device)
    latents = initial_noises(backbone, padded) * scheduler.init_noise_sigma
    with torch.no_grad():
        text = encode(backbone, padded)
        latents = denoise(backbone, latents, text, scheduler, scheduler.timesteps, config.guidance_scale)
        return to_pictures(backbone.decode(latents)[: len(requests)])


def pad(requests: Sequence[EncodedRequest], size: int) -> list[EncodedRequest]:
    """A batch of exactly this size; raises ValueError if they do not fit it."""
    if len(requests) > size:
        raise ValueError(f"{len(requests)} requests do not fit a batch of {size}")
    return [*requests, *[requests[-1]] * (size - len(requests))]


def initial_noise(backbone: Backbone, seed: int) -> Tensor:
    """[*latent_shape] standard normal on the CPU, from the seed alone: the same on every device."""
    return torch.randn(backbone.latent_shape, generator=torch.Generator().manual_seed(seed))


def initial_noises(backbone: Backbone, requests: Sequence[EncodedRequest]) -> Tensor:
    """[batch, *latent_shape] on the backbone's device, each by its own seed."""
    return torch.stack([initial_noise(backbone, request.seed) for request in requests]).to(backbone.device)


def batches(requests: Sequence[EncodedRequest], size: int) -> Iterator[Sequence[EncodedRequest]]:
    for start in range(0, len(requests), size):
        yield requests[start : start + size]


def encode(backbone: Backbone, requests: Sequence[EncodedRequest]) -> Conditioning:
    """[2 * batch]: the empty prompt once for each request, then the prompts, in one pass of the text encoder over the
    batch's rows laid end to end.

    A request's adapters act on its empty prompt too, as in a pipeline that has loaded them: `lora` ones everywhere,
    `causal` ones nowhere, as it names no concept.
    """
    own_ids = torch.tensor([backbone.assemble([])] * len(requests) + [request.ids for request in requests])
    adapters = [
        [
            (adapter, positions(adapter.kind, ids, (ids >= own.start) & (ids < own.stop), backbone.end_of_text))
            for adapter, own in request.adapters
        ]
        for request, ids in zip([*requests, *requests], own_ids, strict=True)
    ]
    num_rows = [max((len(rows) for rows in request.rows.values()), default=0) for request in requests]
    shifts = torch.tensor([0] * len(requests) + [sum(num_rows[:i]) for i in range(len(requests))])
    ids = torch.where(own_ids >= backbone.vocab_size, own_ids + shifts[:, None], own_ids)
    rows = {
        key: torch.cat([request.rows[key] for request in requests if request.rows]).to(backbone.device)
        for key in backbone.token_tables
        if any(num_rows)
    }
    return backbone.encode_prompts(ids.to(backbone.device), rows, join(adapters, backbone.device))


def _unchanged(latents: Tensor, _step: int) -> Tensor:
    return latents


def denoise(
    backbone: Backbone,
    latents: Tensor,
    text: Conditioning,
    scheduler: Any,
    timesteps: Tensor,
    guidance_scale: float,
    after_step: Callable[[Tensor, int], Tensor] = _unchanged,
) -> Tensor:
    """Noisy latents [batch, *latent_shape] at the first of `timesteps` -> latents, by a diffusers scheduler.

    `text`: from `encode`. `timesteps`: the scheduler's own, all or the last ones. `after_step` may change the latents
    after each of them and is told its place, 0 first. Classifier-free guidance (Ho & Salimans 2022, Eq. 6, in
    diffusers' scaling): the output for the empty prompt plus `guidance_scale` times the difference that the prompt
    makes; 0 is the backbone's own.
    """
    guidance_scale = guidance_scale or backbone.guidance_scale
    guided = guidance_scale > 1
    if not guided:
        text = Conditioning(hidden=text.hidden[len(latents) :])
    for step, timestep in enumerate(timesteps):
        model_input = scheduler.scale_model_input(torch.cat([latents, latents]) if guided else latents, timestep)
        output = backbone.predict(model_input, timestep.expand(len(model_input)), text)
        if guided:
            without, with_prompt = output.chunk(2)
            output = without + guidance_scale * (with_prompt - without)
        latents = after_step(scheduler.step(output, timestep, latents, return_dict=False)[0], step)
    return latents


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """[batch, 3, height, width] in [-1, 1] -> RGB pictures, rounded to the nearest of 256 levels."""
    levels = (pixels * 127.5 + 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in levels]
