"""Drawing of pictures from prompts with learned concepts. Any concepts may share a batch.

A picture depends on model, embeddings, prompt, settings and seed and on nothing else: not on its place in the batch,
its neighbours or their number. `generate` says what holds to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from textual_inversion.concept import LearnedEmbedding
from textual_inversion.conditioning import Conditioning
from textual_inversion.config import SamplingConfig
from textual_inversion.errors import BadInput
from textual_inversion.families.base import Backbone
from textual_inversion.framing import Framing
from textual_inversion.noise import SolverRun
from textual_inversion.prompt_encoder import PromptEncoder, TokenizedPrompt
from textual_inversion.prompts import encode_prompt, words_in
from textual_inversion.transfer import to_device


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """One picture to draw."""

    prompt: str
    seed: int
    """Seed of the initial noise, 0 or more; nothing else about sampling is random."""
    embeddings: tuple[LearnedEmbedding, ...] = ()
    """Embeddings of the concepts whose placeholder tokens stand in the prompt. Another request may have another
    embedding under the same placeholder token."""
    negative_prompt: str = ""
    """Prompt that guidance leads away from, in place of the empty prompt; it needs guidance (`check_guided`)."""
    negative_embeddings: tuple[LearnedEmbedding, ...] = ()
    """Embeddings of the concepts whose placeholder tokens stand in the negative prompt. Their adapters act on the
    negative prompt alone; `lora` adapters of `embeddings` act on both prompts."""
    size_px: tuple[int, int] | None = None
    """Width and height; None for the square of the model's resolution. `Backbone.latent_shape_for` says which fit."""


@dataclass(frozen=True, slots=True)
class EncodedRequest:
    """A checked request, with its prompts as ids."""

    prompt: TokenizedPrompt
    seed: int
    latent_shape: tuple[int, int, int]
    """[channels, height, width] of the picture's latents; requests of one shape share a batch."""
    negative: TokenizedPrompt | None = None
    """Negative prompt; None stands for the empty prompt."""


def encode_request(backbone: Backbone, request: ImageRequest) -> EncodedRequest:
    """Check one request and turn its prompts into ids, without drawing.

    Raises BadInput, naming the prompt, if it does not fit the text encoder, lacks the placeholder token of one of
    its embeddings, names one twice, or if an embedding or its adapter was learned for another model.
    """
    if not 0 <= request.seed < 2**63:
        raise BadInput(f"prompt {request.prompt!r}: seed {request.seed} must be at least 0 and below 2**63")
    prompt = _tokenized(backbone, request.prompt, request.embeddings)
    shape = backbone.latent_shape_for(*request.size_px) if request.size_px else backbone.latent_shape
    if not request.negative_prompt and not request.negative_embeddings:
        return EncodedRequest(prompt, request.seed, shape)
    negative = _tokenized(backbone, request.negative_prompt, request.negative_embeddings)
    return EncodedRequest(prompt, request.seed, shape, negative.with_acting(prompt.acting_everywhere()))


def _tokenized(backbone: Backbone, prompt: str, embeddings: Sequence[LearnedEmbedding]) -> TokenizedPrompt:
    words = [embedding.placeholder_token for embedding in embeddings]
    if len(set(words)) < len(words):
        raise BadInput(f"prompt {prompt!r}: two of its embeddings have the same placeholder token, {words}")
    for embedding in embeddings:
        check_fits(embedding, backbone)
    placeholders: dict[str, range] = {}
    num_rows = 0
    for embedding in embeddings:
        num_vectors = embedding.num_vectors
        placeholders[embedding.placeholder_token] = range(num_rows, num_rows + num_vectors)
        num_rows += num_vectors
    ids = encode_prompt(prompt, placeholders, backbone.vocabularies)
    for word in sorted(placeholders.keys() - {*words_in(prompt, placeholders)}):
        raise BadInput(f"prompt {prompt!r} does not contain the placeholder token {word!r} as a word")
    concepts = [(embedding, placeholders[embedding.placeholder_token]) for embedding in embeddings]
    return TokenizedPrompt.from_ids(ids, concepts)


def check_guided(backbone: Backbone, request: ImageRequest, config: SamplingConfig) -> None:
    """Raise BadInput for a negative prompt where pictures are drawn without comparing two prompts."""
    if request.negative_prompt and backbone.embeds_guidance:
        raise BadInput(
            f"negative prompt {request.negative_prompt!r} has no effect on this model, which reads the guidance scale "
            "and compares with no other prompt; leave the negative prompt out"
        )
    if request.negative_prompt and guidance_scale(backbone, config) <= 1:
        chosen = "the settings'" if config.guidance_scale else "this model's own, as of one distilled to need none"
        raise BadInput(
            f"negative prompt {request.negative_prompt!r} has no effect without guidance, and the guidance scale is 1, "
            f"{chosen}; set a guidance scale above 1, or leave the negative prompt out"
        )


def check_fits(embedding: LearnedEmbedding, backbone: Backbone) -> None:
    """Check that an embedding fits the model.

    Raises BadInput unless it has rows of the right width, equally many, for every text encoder of the model, and its
    adapter, if any, changes layers that the model has.
    """
    wanted = {key: table.dim for key, table in backbone.token_tables.items()}
    found = {key: rows.shape[-1] for key, rows in embedding.vectors.items()}
    if found != wanted:
        raise BadInput(
            f"embedding {embedding.placeholder_token!r} has widths {found} but the model's text encoders {wanted}; it "
            "was learned for another model"
        )
    if len({len(rows) for rows in embedding.vectors.values()}) > 1:
        numbers = {key: len(rows) for key, rows in embedding.vectors.items()}
        raise BadInput(
            f"embedding {embedding.placeholder_token!r} has {numbers} rows; each text encoder needs equally many"
        )
    for name, (down, up) in embedding.adapter.tensors.items() if embedding.adapter else ():
        if backbone.adapter_layers.get(name) != (down.shape[1], up.shape[0]):
            raise BadInput(
                f"the adapter of embedding {embedding.placeholder_token!r} changes a layer {name!r} with "
                f"{down.shape[1]} inputs and {up.shape[0]} outputs, which the model does not have; it was learned for "
                "another model"
            )


def generate(backbone: Backbone, requests: Sequence[ImageRequest], config: SamplingConfig) -> list[Image.Image]:
    """Draw the pictures, in the order of the requests. Every request is checked (`encode_request`, `check_guided`)
    before any is drawn.

    Batches always have `config.batch_size` samples, and no operation mixes samples, so a picture can depend on its
    place or its neighbours only through a kernel that sums differently for different samples of one shape.
    `batch_invariance` tells whether there is such a kernel, and its `choose_sampling` gives settings with which there
    is none on a CPU. Another batch size, device or library version changes rounding and nothing else.
    """
    for request in requests:
        check_guided(backbone, request, config)
    encoded = [encode_request(backbone, request) for request in requests]
    encoder = PromptEncoder(backbone, shares_passes=config.batch_size > 1)
    pictures: dict[int, Image.Image] = {}
    for shape in dict.fromkeys(each.latent_shape for each in encoded):
        alike = [index for index, each in enumerate(encoded) if each.latent_shape == shape]
        for start in range(0, len(alike), config.batch_size):
            some = alike[start : start + config.batch_size]
            pictures |= zip(some, draw(encoder, [encoded[index] for index in some], config), strict=True)
    return [pictures[index] for index in range(len(encoded))]


def draw(encoder: PromptEncoder, requests: Sequence[EncodedRequest], config: SamplingConfig) -> list[Image.Image]:
    """Draw at most `config.batch_size` pictures of one size; a smaller batch is padded with copies of its last
    request."""
    if not requests:
        return []
    return to_pictures(draw_pixels(encoder, pad(requests, config.batch_size), config)[: len(requests)])


@torch.no_grad()
def draw_pixels(encoder: PromptEncoder, requests: Sequence[EncodedRequest], config: SamplingConfig) -> Tensor:
    """Draw one batch and return its pixels before they are rounded, [requests, 3, height, width] in [-1, 1]."""
    backbone = encoder.backbone
    config = with_own_defaults(config, backbone)
    run = backbone.noise.begin(config.solver, config.steps)
    latents = initial_noises(backbone, requests)
    guidance = Guidance.from_requests(encoder, requests, config)
    return backbone.decode(denoise(backbone, latents, guidance, run))


def pad(requests: Sequence[EncodedRequest], size: int) -> list[EncodedRequest]:
    """Fill requests up to a batch of this size with copies of the last one. Raises ValueError if they do not fit."""
    if len(requests) > size:
        raise ValueError(f"{len(requests)} requests do not fit a batch of {size}")
    return [*requests, *[requests[-1]] * (size - len(requests))]


def initial_noise(backbone: Backbone, seed: int, shape: tuple[int, int, int] | None = None) -> Tensor:
    """Draw standard normal noise [*latent_shape], or of another shape, on the CPU, from the seed alone: the same for
    every device."""
    return torch.randn(shape or backbone.latent_shape, generator=torch.Generator().manual_seed(seed))


def initial_noises(backbone: Backbone, requests: Sequence[EncodedRequest]) -> Tensor:
    """Draw each request's initial noise by its own seed, [batch, *latent_shape] on the backbone's device."""
    noises = [initial_noise(backbone, request.seed, request.latent_shape) for request in requests]
    return to_device(torch.stack(noises), backbone.device)


def batches(requests: Sequence[EncodedRequest], size: int) -> Iterator[Sequence[EncodedRequest]]:
    """Cut requests into batches of this size; the last may be smaller."""
    for start in range(0, len(requests), size):
        yield requests[start : start + size]


def guidance_scale(backbone: Backbone, config: SamplingConfig) -> float:
    """Return the scale to draw with, 1, which is none, or more. A configured 0 stands for the backbone's own."""
    return max(1.0, config.guidance_scale or backbone.guidance_scale)


def with_own_defaults(config: SamplingConfig, backbone: Backbone) -> SamplingConfig:
    """Return the settings to draw with: the backbone's own steps and guidance scale in place of a configured 0."""
    steps = config.steps or backbone.sampling_steps
    return replace(config, steps=steps, guidance_scale=guidance_scale(backbone, config))


def compares_prompts(backbone: Backbone, config: SamplingConfig) -> bool:
    """Return whether each step also needs the denoiser's output for the empty or negative prompt, which doubles its
    samples."""
    return guidance_scale(backbone, config) > 1 and not backbone.embeds_guidance


@dataclass(frozen=True, slots=True)
class Guidance:
    """Classifier-free guidance (Ho & Salimans 2022, Eq. 6, in diffusers' scaling): the output for the empty prompt, or
    for a negative prompt in its place, plus `scale` times the difference that the prompt makes."""

    conditioning: Conditioning
    """[2 * batch], the empty or negative prompts first; with scale 1 the prompts alone, [batch]."""
    scale: float
    """1, which needs no output for the empty prompt, or more."""

    @classmethod
    def from_requests(
        cls, encoder: PromptEncoder, requests: Sequence[EncodedRequest], config: SamplingConfig
    ) -> Guidance:
        """Encode the prompts of a batch, and where they are needed the negative or empty ones.

        Where a family guides by zeros, these stand for the empty prompt alone, as in its pipeline.
        """
        prompts = [request.prompt for request in requests]
        backbone = encoder.backbone
        scale = guidance_scale(backbone, config)
        if not compares_prompts(backbone, config):
            return cls(_framed(backbone, encoder(prompts).guided(scale), requests[0].latent_shape), 1)
        others = [request.negative or request.prompt.empty(backbone.vocabularies) for request in requests]
        conditioning = encoder([*others, *prompts])
        if backbone.guides_by_zeros:
            is_kept = [*(request.negative is not None for request in requests), *[True] * len(requests)]
            conditioning = conditioning.where(to_device(torch.tensor(is_kept), backbone.device), conditioning.zeroed())
        return cls(_framed(backbone, conditioning, requests[0].latent_shape), scale)


def _framed(backbone: Backbone, conditioning: Conditioning, shape: tuple[int, int, int]) -> Conditioning:
    """Return the conditioning of pictures whose latents have this shape. Those of another size than the model's own are
    whole pictures, too, for families whose denoiser reads the framing."""
    if shape == backbone.latent_shape:
        return conditioning
    height, width = (side * backbone.resolution // backbone.latent_shape[1] for side in shape[1:])
    whole = Framing(height=height, width=width, top=0, left=0, right=0).numbers()
    framing = torch.tensor([whole], dtype=torch.float32).expand(len(conditioning), -1).contiguous()
    return conditioning.framed(to_device(framing, backbone.device))


def _unchanged(latents: Tensor, _step: int) -> Tensor:
    return latents


def denoise(
    backbone: Backbone,
    latents: Tensor,
    guidance: Guidance,
    run: SolverRun,
    first: int = 0,
    after_step: Callable[[Tensor, int], Tensor] = _unchanged,
) -> Tensor:
    """Denoise latents [batch, *latent_shape] by the steps of a solver's run, from step number `first` to the last.

    `after_step(latents, step)` may change the latents after each step.
    """
    is_guided = guidance.scale > 1
    on_device = to_device(run.timesteps, backbone.device)
    for step in range(first, len(run.timesteps)):
        model_input = torch.cat([latents, latents]) if is_guided else latents
        output = backbone.predict(model_input, on_device[step].expand(len(model_input)), guidance.conditioning)
        if is_guided:
            without, with_prompt = output.chunk(2)
            output = without + guidance.scale * (with_prompt - without)
        latents = after_step(run.step(output, step, latents), step)
    return latents


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """Convert pixels [batch, 3, height, width] in [-1, 1] to RGB pictures, rounded to the nearest of 256 levels."""
    levels = (pixels * 127.5 + 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in levels]
