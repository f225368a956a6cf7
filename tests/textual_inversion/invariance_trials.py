"""Learn and draw the same in every place of a batch: run by `test_batch_invariance` under several instruction sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from textual_inversion.batch_invariance import (
    choose_sampling,
    choose_slots_per_pass,
    drawing_is_invariant,
    learning_is_invariant,
)
from textual_inversion.concept import Concept, LearnedEmbedding
from textual_inversion.config import InversionConfig, SamplingConfig
from textual_inversion.engine import Assignment, Engine, SlotState
from textual_inversion.families import load_backbone
from textual_inversion.families.base import Backbone
from textual_inversion.generate import ImageRequest, draw_pixels, encode_request, generate
from textual_inversion.latents import EncodedViews
from textual_inversion.paired_augment import Augmentation
from textual_inversion.prompt_encoder import PromptEncoder

STEPS = 2


def trial(model: str, learned: Sequence[tuple[int, int]], drawn: Sequence[int]) -> list[dict[str, Any]]:
    """Answers for passes of each (batch size, slots), and for batches of each number of pictures."""
    backbone = load_backbone(model, device="cpu", precision="float32")
    answers = [{"learned": size} | try_learning(backbone, *size) for size in learned]
    return answers + [{"drawn": size} | try_drawing(backbone, size) for size in drawn]


def try_learning(backbone: Backbone, batch_size: int, slots: int) -> dict[str, Any]:
    config = InversionConfig(steps=STEPS + 1, batch_size=batch_size)
    slots_per_pass, is_exact = choose_slots_per_pass(backbone, config, slots)
    company = list(range(1, slots))
    places = [[*company[:place], 0, *company[place:]] for place in range(slots)]
    shared = [learn(backbone, config, numbers, slots, slots)[0] for numbers in places]
    chosen = [learn(backbone, config, numbers, slots, slots_per_pass)[0] for numbers in ([0], places[0], places[-1])]
    return {
        "check": learning_is_invariant(backbone, config, slots),
        "direct": all_equal(shared),
        "equal as chosen": is_exact and all_equal(chosen),
    }


def learn(
    backbone: Backbone, config: InversionConfig, numbers: Sequence[int], slots: int, slots_per_pass: int
) -> dict[int, list[Tensor]]:
    """Concept number -> what it is after `STEPS` steps."""
    engine = Engine(backbone, config, slots=slots, seed=3, slots_per_pass=slots_per_pass)
    waiting, states = iter([assignment(backbone, number) for number in numbers]), dict[int, SlotState]()
    engine.run(
        lambda _wait: next(waiting, None),
        lambda _outcome: None,
        lambda concept, state: states.update({int(concept.concept_id): state}),
        checkpoint_steps=STEPS,
    )
    return {
        number: [
            state.curve,
            *(t for part in (state.parameters, state.exp_avg, state.exp_avg_sq) for t in part.values()),
        ]
        for number, state in states.items()
    }


def assignment(backbone: Backbone, number: int) -> Assignment:
    generator = torch.Generator().manual_seed(100 + number)
    concept = Concept(concept_id=str(number), placeholder_token="<c>", images=("x",), num_vectors=1 + number % 3)
    moments = torch.rand(2, 2, *backbone.latent_shape, generator=generator)
    return Assignment(concept, EncodedViews(moments=moments, photo_indices=(0, 1), augmentations=(Augmentation(),) * 2))


def try_drawing(backbone: Backbone, batch_size: int) -> dict[str, Any]:
    sampling = SamplingConfig(steps=2, batch_size=batch_size)
    chosen, is_exact = choose_sampling(backbone, sampling)
    others = [request(backbone, number) for number in range(1, batch_size)]
    places = [[*others[:place], request(backbone, 0), *others[place:]] for place in range(batch_size)]
    drawn = [
        draw_pixels(PromptEncoder(backbone), [encode_request(backbone, each) for each in requests], sampling)[place]
        for place, requests in enumerate(places)
    ]
    alone, first, last = (generate(backbone, requests, chosen) for requests in ([places[0][0]], places[0], places[-1]))
    return {
        "check": drawing_is_invariant(backbone, sampling),
        "direct": all_equal([[pixels] for pixels in drawn]),
        "equal as chosen": is_exact and alone[0].tobytes() == first[0].tobytes() == last[-1].tobytes(),
    }


def request(backbone: Backbone, number: int) -> ImageRequest:
    generator = torch.Generator().manual_seed(100 + number)
    rows = {key: 0.1 * torch.randn(1, table.dim, generator=generator) for key, table in backbone.token_tables.items()}
    return ImageRequest("a photo of a <c>", number, (LearnedEmbedding(placeholder_token="<c>", vectors=rows),))


def all_equal(results: Sequence[Sequence[Tensor]]) -> bool:
    return all(torch.equal(one, other) for tensors in results for one, other in zip(results[0], tensors, strict=True))
