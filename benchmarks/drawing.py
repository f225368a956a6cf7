"""Learn concepts by the pipeline and draw with them, for questions about pictures that no single score answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from pipeline import run
from pipeline.actor.library import LearnedConcept, Library, open_library
from pipeline.config import PhotoConfig
from pipeline.exit_codes import OK
from pipeline.inputs.photos import fetch
from textual_inversion.config import SamplingConfig
from textual_inversion.families.base import Backbone
from textual_inversion.generate import ImageRequest, generate
from textual_inversion.photos import open_photo
from textual_inversion.rng import seed_for


def learn_manifest(manifest: str, output: str, seed: int, settings: Sequence[str], *, jobs: int) -> Library:
    """Learn the concepts of a manifest with one seed, or take those that an earlier call learned, and return them.

    `settings`: `a.b=c`. Each concept is learned once, whatever the gate says. Raises ValueError if one failed.
    """
    fixed = ["gate.ladder=[]", f"seed={seed}", f"actors.count={jobs}"]
    arguments = [manifest, "--output", output, *(f"--set={setting}" for setting in (*settings, *fixed))]
    if run.main(arguments) != OK:
        raise ValueError(f"not all concepts of {manifest} were learned; see above")
    return open_library([output])


@dataclass(frozen=True, slots=True)
class Subject:
    """Word that may stand in a prompt: a learned concept's, or one that the model knows."""

    name: str
    word: str
    """Text that stands in the prompt."""
    concept: LearnedConcept | None = None

    @classmethod
    def of_concept(cls, concept: LearnedConcept) -> Subject:
        return cls(concept.name, concept.name_in_prompts, concept)

    @classmethod
    def of_word(cls, word: str) -> Subject:
        return cls(word, word)


@dataclass(frozen=True, slots=True)
class Artist:
    """A model with the settings that all pictures are drawn with."""

    backbone: Backbone
    sampling: SamplingConfig

    def draw(self, prompt: str, subjects: Sequence[Subject], count: int, seed: int) -> list[Image.Image]:
        """Draw `count` pictures of a prompt with a hole for each subject.

        The noise depends on the prompt before it is filled, on the seed and on the picture's number alone.
        """
        text = prompt.format(*(subject.word for subject in subjects))
        embeddings = tuple(subject.concept.read() for subject in subjects if subject.concept)
        seeds = [seed_for(seed, "", f"claims\x1f{prompt}", i) for i in range(count)]
        return generate(self.backbone, [ImageRequest(text, each, embeddings) for each in seeds], self.sampling)


def read_images(concept: LearnedConcept) -> list[Image.Image]:
    """Read and decode the photos that a concept was learned from."""
    return [open_photo(fetch(uri, PhotoConfig())) for uri in concept.images]
