"""Load a model, learn a word from photos, draw with the word: for scripts and notebooks.

    import textual_inversion as ti

    model = ti.load("demo/model")
    word = ti.learn(model, "demo/images/tiger", initializer="cat")
    pictures = ti.draw(model, "a {} on the beach", word, count=4)

`learning.learn` learns many words at once, and `generate.generate` draws any prompts with any words in one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from PIL import Image

from textual_inversion.concept import Category, Concept, LearnedEmbedding
from textual_inversion.config import InversionConfig, SamplingConfig
from textual_inversion.errors import BadInput
from textual_inversion.families import load_backbone
from textual_inversion.families.base import Backbone
from textual_inversion.generate import ImageRequest, generate
from textual_inversion.learning import learn_outcomes
from textual_inversion.photo_files import Photos, read_photos
from textual_inversion.prompts import HOLE, name_in_prompt

if TYPE_CHECKING:
    from textual_inversion.extractors import ClipExtractor

OnStep = Callable[[int, float], None]
"""Function that is told the number of a step, from 1, and its loss."""

OnPreview = Callable[[int, LearnedEmbedding], None]
"""Function that is given the number of steps taken and the word as it is then."""


def load(model: str, *, device: str = "auto", precision: str = "auto") -> Backbone:
    """Load a frozen text-to-image model: a directory in diffusers layout, a `.safetensors` file or a hub id.

    device: a torch device; `auto` is CUDA where there is one.
    precision: `float32`, `bfloat16` or `float16` of the denoiser; `auto` is bfloat16 on CUDA and float32 elsewhere.

    Raises ValueError for a model that cannot be served.
    """
    return load_backbone(model, device=device, precision=precision)


def learn(
    model: Backbone,
    photos: Photos,
    *,
    initializer: str = "",
    placeholder: str = "<concept>",
    category: Category = "object",
    captions: Sequence[str] = (),
    config: InversionConfig | None = None,
    seed: int = 0,
    extractor: ClipExtractor | None = None,
    on_step: OnStep | None = None,
    on_preview: OnPreview | None = None,
    preview_steps: int = 50,
) -> LearnedEmbedding:
    """Learn a word for what the photos show (Textual Inversion, Gal et al. 2022, Eq. 2).

    photos: a folder, or paths, or pictures of PIL; 3 to 5 are usual.
    initializer: word or phrase of the vocabulary that the word starts from; empty for the vocabulary's mean.
    placeholder: the word as it stands in prompts, e.g. `<my-cat>`; it also seeds the random draws.
    category: `object` or `style`.
    captions: a description of each photo with `{}` for the word, or none for the paper's templates.
    config: settings of the method; None takes the defaults.
    extractor: feature extractor for the settings that need one (`learning.learn`).
    on_step: called after each step, on a GPU some steps later, and not at all in a step whose loss is not finite.
    on_preview: called every `preview_steps` steps; it may draw with the word.

    Raises ValueError if the photos cannot be read, or the word cannot be learned.
    """
    pictures = read_photos(photos)
    if captions and len(captions) != len(pictures):
        raise BadInput(f"{len(captions)} captions for {len(pictures)} photos; give one for each, or none")
    concept = Concept(
        concept_id=placeholder,
        placeholder_token=placeholder,
        initializer=initializer,
        category=category,
        captions=tuple(captions),
    )
    [outcome] = learn_outcomes(
        model,
        [(concept, pictures)],
        config or InversionConfig(),
        slots=1,
        seed=seed,
        extractor=extractor,
        on_step=on_step and (lambda _, point: on_step(point.step, point.loss)),
        on_preview=on_preview and (lambda _, step, word: on_preview(step, word)),
        preview_steps=preview_steps,
    )
    assert outcome.embedding is not None, "learn_outcomes raises for a concept without"
    return outcome.embedding


def draw(
    model: Backbone,
    prompt: str,
    *words: LearnedEmbedding,
    count: int = 1,
    seed: int = 0,
    negative_prompt: str = "",
    sampling: SamplingConfig | None = None,
) -> list[Image.Image]:
    """Draw `count` pictures of a prompt, with the seeds `seed`, `seed + 1`, ...

    prompt: text with a `{}` for each of the words, in their order; or with their placeholder tokens written out.
    sampling: solver, steps and guidance scale; None takes the model's own.

    Raises ValueError for a prompt that does not hold the words, and for a word of another model.
    """
    text = _filled(prompt, words)
    requests = [
        ImageRequest(text, seed + number, embeddings=words, negative_prompt=negative_prompt) for number in range(count)
    ]
    return generate(model, requests, sampling or SamplingConfig(batch_size=min(count, 16)))


def _filled(prompt: str, words: Sequence[LearnedEmbedding]) -> str:
    """Return a prompt with each `{}` replaced by the word in its place, as it was named when it was learned."""
    holes = prompt.count(HOLE)
    if not holes:
        return prompt
    if holes != len(words):
        raise BadInput(f"prompt {prompt!r} has {holes} places {HOLE} for {len(words)} words")
    parts = prompt.split(HOLE)
    names = [name_in_prompt(word.placeholder_token, word.class_noun) for word in words]
    return "".join(part + name for part, name in zip(parts, [*names, ""], strict=True))
