"""Check whether what a batch gives for a sample depends on the sample's place in the batch or on its neighbours.

No operation of the method mixes samples, but a library may choose another order of sums for the last samples of a batch
than for the first. Whether it does depends on the library, the processor and every shape: with MKL and oneDNN held to
AVX2, passes of the demo model depend on places for 2 and 8 learned samples and for 4 and 16 pictures, and not for 3
samples or 8 pictures. So it is measured where the passes run, by the code that makes them: a made-up sample fills all
places of one pass and has made-up neighbours in another, and everything computed for it is compared to the bit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from textual_inversion.concept import Concept, LearnedEmbedding
from textual_inversion.config import AdapterConfig, InitConfig, InversionConfig, SamplingConfig, StopConfig
from textual_inversion.engine import Assignment, Engine, SlotState
from textual_inversion.families.base import Backbone
from textual_inversion.generate import EncodedRequest, ImageRequest, draw_pixels, encode_request
from textual_inversion.latents import EncodedViews
from textual_inversion.lora import made_up_adapter
from textual_inversion.paired_augment import Augmentation
from textual_inversion.prompt_encoder import PROMPTS_PER_PASS, PromptEncoder
from textual_inversion.training_data import ImageFeatures

log = logging.getLogger(__name__)

_ROW_STD = 0.02
"""Standard deviation of made-up rows, about that of a CLIP token table."""


def learning_is_invariant(
    backbone: Backbone, config: InversionConfig, slots: int, image_features: ImageFeatures | None = None
) -> bool:
    """Tell whether passes of `slots` concepts give a concept the same in every slot and beside any others.

    Compared after the first step: parameters, Adam's moments, which hold the gradient, loss and norm. False also if
    the step fails on made-up concepts. Raises torch.OutOfMemoryError if the passes do not fit in the device's memory.
    """
    config = replace(config, steps=2, progressive=False, init=InitConfig(), stop=StopConfig())

    def learn(numbers: Sequence[int]) -> list[list[Tensor]]:
        assignments = [_made_up_assignment(backbone, number) for number in numbers]
        states = _states_after_first_step(backbone, config, assignments, image_features)
        return [_tensors(state) for state in states]

    return slots == 1 or _is_invariant(learn, slots)


def drawing_is_invariant(
    backbone: Backbone,
    sampling: SamplingConfig,
    adapter: AdapterConfig | None = None,
    size_px: tuple[int, int] | None = None,
) -> bool:
    """Tell whether batches of `sampling.batch_size` pictures give a picture the same in every place and beside any
    others.

    Compared after one denoising step: the pixels before they are rounded; and of prompts, the text encoder's states.
    `adapter`: settings of the adapters that concepts are learned with. `size_px`: width and height, None for the
    model's own. Raises torch.OutOfMemoryError if the batch does not fit in the device's memory.
    """
    one_step = replace(sampling, steps=1)

    def encode(numbers: Sequence[int]) -> list[list[Tensor]]:
        prompts = [_made_up_request(backbone, number, adapter).prompt for number in numbers]
        conditioning = PromptEncoder(backbone)(prompts)
        return [conditioning[place : place + 1].tensors() for place in range(len(prompts))]

    def draw(numbers: Sequence[int]) -> list[list[Tensor]]:
        requests = [_made_up_request(backbone, number, adapter, size_px) for number in numbers]
        return [[pixels] for pixels in draw_pixels(PromptEncoder(backbone), requests, one_step)]

    if sampling.batch_size == 1:
        return True
    return _is_invariant(encode, PROMPTS_PER_PASS) and _is_invariant(draw, sampling.batch_size)


def choose_slots_per_pass(
    backbone: Backbone, config: InversionConfig, slots: int, image_features: ImageFeatures | None = None
) -> tuple[int, bool]:
    """Return how many concepts may share a pass, and whether a concept's bytes are then those it has alone.

    All may, unless passes of `slots` concepts depend on places: then a CPU gives each concept passes of its own, in
    which the order of samples is fixed, and an accelerator, where that would be slow, promises equality to rounding.
    """
    if learning_is_invariant(backbone, config, slots, image_features):
        return slots, True
    is_cpu = backbone.device.type == "cpu"
    log.info("learning depends on a sample's place in passes of %d concepts; %s", slots, _consequence(is_cpu))
    return (1, True) if is_cpu else (slots, False)


def choose_sampling(
    backbone: Backbone,
    sampling: SamplingConfig,
    adapter: AdapterConfig | None = None,
    size_px: tuple[int, int] | None = None,
) -> tuple[SamplingConfig, bool]:
    """Return the settings to draw with, and whether a picture's bytes are then those it has alone: batches of one
    picture where larger ones depend on places and the device is a CPU, and unchanged settings otherwise."""
    if drawing_is_invariant(backbone, sampling, adapter, size_px):
        return sampling, True
    is_cpu = backbone.device.type == "cpu"
    log.info("drawing depends on a picture's place in batches of %d; %s", sampling.batch_size, _consequence(is_cpu))
    return (replace(sampling, batch_size=1), True) if is_cpu else (sampling, False)


def _consequence(is_cpu: bool) -> str:
    return "each gets passes of its own" if is_cpu else "results are equal to rounding"


def _is_invariant(compute: Callable[[Sequence[int]], list[list[Tensor]]], size: int) -> bool:
    """Tell whether sample 0 gives equal tensors in every place of a pass that it fills and in the first place of a pass
    of `size` different samples. `compute` returns each sample's tensors; too few mean that the pass failed."""
    alone = compute([0] * size)
    mixed = compute(range(size))
    return len(alone) == len(mixed) == size and all(
        torch.equal(one, other) for tensors in alone for one, other in zip(tensors, mixed[0], strict=True)
    )


def _states_after_first_step(
    backbone: Backbone, config: InversionConfig, assignments: list[Assignment], image_features: ImageFeatures | None
) -> list[SlotState]:
    """Learn concepts for one step in one pass and return their states, in the order of slots; fewer if any fails."""
    engine = Engine(backbone, config, slots=len(assignments), seed=0, image_features=image_features)
    waiting = iter(assignments)
    states = list[SlotState]()

    def next_assignment(_wait: bool) -> Assignment | None:
        assignment = next(waiting, None)
        if assignment is assignments[-1]:
            engine.stop()  # after the step that follows, with a checkpoint of every slot
        return assignment

    engine.run(next_assignment, lambda _outcome: None, lambda _concept, state: states.append(state))
    return states


def _tensors(state: SlotState) -> list[Tensor]:
    named = (state.parameters, state.exp_avg, state.exp_avg_sq)
    return [state.curve, *(tensors[name] for tensors in named for name in sorted(tensors))]


def _made_up_assignment(backbone: Backbone, number: int) -> Assignment:
    generator = torch.Generator().manual_seed(number)
    mean, deviation = torch.randn(2, *backbone.latent_shape, generator=generator)
    concept = Concept(concept_id=f"{number}", placeholder_token=f"<{number}>", images=("none",))
    moments = torch.stack([mean, deviation.abs() / 10])[None]
    return Assignment(concept, EncodedViews(moments=moments, photo_indices=(0,), augmentations=(Augmentation(),)))


def _made_up_request(
    backbone: Backbone, number: int, adapter: AdapterConfig | None, size_px: tuple[int, int] | None = None
) -> EncodedRequest:
    generator = torch.Generator().manual_seed(number)
    embedding = LearnedEmbedding(
        placeholder_token="<a>",
        vectors={
            key: _ROW_STD * torch.randn(1, table.dim, generator=generator)
            for key, table in backbone.token_tables.items()
        },
        adapter=(
            made_up_adapter(backbone.adapter_layers, adapter, generator) if adapter and adapter.kind != "none" else None
        ),
    )
    return encode_request(backbone, ImageRequest("a photo of a <a>", number, (embedding,), size_px=size_px))
