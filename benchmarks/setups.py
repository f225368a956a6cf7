"""The setups that `benchmarks.methods` compares: those of Gal et al. 2022, section 5, and what came after.

A setup changes the settings of learning, the concept, or both. Besides these names, every recipe in `pipeline/recipes`
is a setup under its own (its `[inversion]` section is taken).

Scale. The paper learns for 5,000 steps on LDM; `--steps` (500) is what the demo's small model needs. Its base learning
rate of 5e-3 is the project's default, so its "High-LR" 2e-2 and "Low-LR" 1e-4 are taken as they stand: four times and
a fiftieth of the base. All three are without norm control, which the paper has not: under a clamp the embedding could
not leave the region of real words, and the learning rate could not move it along the curve.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from pipeline.config import load_config
from pipeline.models import ROOT
from textual_inversion.concept import Concept
from textual_inversion.config import InversionConfig

RECIPES = ROOT / "pipeline/recipes"

CAPTIONS = {
    "tiger": "orange cat with black stripes",
    "koala": "grey bear with round ears",
    "hamster": "orange and white mouse",
    "tangerine": "round orange fruit with a green leaf",
    "tomato": "round red fruit with a green stalk",
    "taxi": "yellow car with a sign on its roof",
    "fire-engine": "red truck with a ladder",
    "tulip": "pink flower with a green stem",
    "ladybug": "red beetle with black spots",
    "blue-book": "blue book",
}
"""Of the demo's concepts, as a person might describe them: the paper's "human captions", short form."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """One way to get pictures of a concept."""

    what: str
    """In words, for the table."""
    settings: tuple[str, ...] = ()
    """`a.b=c` overrides."""
    recipe: str = ""
    """Name of a recipe that comes before the settings."""
    steps: float = 1.0
    """Of the budget `--steps`: less where a step has more samples."""
    num_vectors: int = 0
    """0 is the manifest's."""
    num_photos: int = 0
    """The first so many; 0 is all."""
    initializer: str | None = None
    """In the manifest's place; empty starts from the vocabulary's mean."""
    drawn: str = "learned"
    """What stands in the prompt: the `learned` word, or, with nothing to learn, the `initializer`, a person's `caption`
    or nothing (`prompt`). `photos` draws nothing and scores those."""

    def concept(self, concept: Concept) -> Concept:
        """The concept as this setup learns it."""
        count = self.num_photos or len(concept.images)
        return replace(
            concept,
            num_vectors=self.num_vectors or concept.num_vectors,
            initializer=concept.initializer if self.initializer is None else self.initializer,
            images=concept.images[:count],
            masks=concept.masks[:count],
            captions=concept.captions[:count],
        )

    def inversion(self, steps: int, overrides: Iterable[str]) -> InversionConfig:
        """How it learns: its recipe, then `overrides` and the budget, then what it sets itself."""
        toml = (RECIPES / f"{self.recipe}.toml").read_text() if self.recipe else ""
        budget = f"inversion.steps={max(1, round(self.steps * steps))}"
        return load_config(toml, [*overrides, budget, *self.settings]).inversion


def _settings(*pairs: str) -> tuple[str, ...]:
    return tuple(f"inversion.{pair}" for pair in pairs)


_FREE = _settings("norm_control=none")

SETUPS: dict[str, Setup] = {
    # Gal et al. 2022, section 5
    "image-only": Setup(what="the photos among themselves", drawn="photos"),
    "prompt-only": Setup(what="the prompt without the word", drawn="prompt"),
    "initializer": Setup(what="the initializer in the word's place", drawn="initializer"),
    "human-captions": Setup(what="a person's words in the word's place", drawn="caption"),
    "textual-inversion": Setup(what="the project's default: one vector, norm clamped"),
    "paper": Setup(what="one vector, no norm control, as in the paper", settings=_FREE),
    "high-lr": Setup(what="the paper's learning rate 2e-2", settings=_FREE + _settings("learning_rate=2e-2")),
    "low-lr": Setup(what="the paper's learning rate 1e-4", settings=_FREE + _settings("learning_rate=1e-4")),
    "2-word": Setup(what="two vectors", num_vectors=2),
    "3-word": Setup(what="three vectors", num_vectors=3),
    "progressive": Setup(
        what="three vectors, one joining after the other", num_vectors=3, settings=_settings("progressive=true")
    ),
    "regularised": Setup(
        what="held near the initializer's vector", settings=_FREE + _settings("penalties.class_distance=1.0")
    ),
    "per-image-tokens": Setup(what="a further row for every photo", settings=_settings("per_image_tokens=true")),
    # one photo
    "ti-one-photo": Setup(what="textual-inversion from one photo", num_photos=1),
    "textboost-v1": Setup(
        what="one photo; LoRA, paired augmentation, preservation, SNR timesteps", num_photos=1, steps=0.5,
        settings=_settings(
            "batch_size=8", "learning_rate=1e-3", "weight_decay=0.01", "max_grad_norm=1.0", "class_cue=true",
            "adapter.kind=lora", "augment.paired=8", "penalties.knowledge=0.1", "timesteps.sampler=snr",
        ),
    ),
    "textboost-v2": Setup(
        what="one photo; causal rank-1 adapter on fc2", num_photos=1, steps=0.2,
        settings=_settings(
            "batch_size=8", "learning_rate=1e-3", "class_cue=true", "adapter.kind=causal", "adapter.rank=1",
            "adapter.alpha=1.0", "adapter.targets=['fc2']", "adapter.learning_rate=1e-4",
        ),
    ),
    # start, direction, timesteps, end
    "class-cue": Setup(what='"S* cat" in the prompts', settings=_settings("class_cue=true")),
    "sphere": Setup(what="norm fixed at the vocabulary's", settings=_settings("norm_control=sphere")),
    "dti": Setup(
        what="steps along the sphere, pulled toward the initializer",
        settings=_settings("norm_control=sphere", "optimizer=riemannian", "direction_prior=1e-4"),
    ),
    "no-initializer": Setup(what="from the vocabulary's mean", initializer=""),
    "cross-init": Setup(
        what="from the text encoder's output, held there", settings=_FREE + _settings(
            "init.method=encoder_output", "penalties.start_distance=1e-5"
        ),
    ),
    "auto-init": Setup(what="from the word nearest to the photos", settings=_settings("init.method=auto")),
    "amortised": Setup(what="from rows predicted from the photos", settings=_settings("init.method=amortised")),
    "dvar": Setup(what="until the loss on a frozen batch settles", settings=_settings("stop.method=dvar")),
    "keep-best": Setup(what="the rows best on a frozen batch", settings=_settings("stop.keep_best=true")),
    "timesteps-500-900": Setup(
        what="timesteps from 500 to 900",
        settings=_settings("timesteps.sampler=range", "timesteps.low=500", "timesteps.high=900"),
    ),
    "snr-timesteps": Setup(what="noisy timesteps more often", settings=_settings("timesteps.sampler=snr")),
    "min-snr": Setup(what="losses weighted by min-SNR, gamma 5", settings=_settings("timesteps.min_snr_gamma=5.0")),
}  # fmt: skip


def find(name: str) -> Setup:
    """A setup of this page, or a recipe's. Raises ValueError naming what there is."""
    if name in SETUPS:
        return SETUPS[name]
    recipes = sorted(path.stem for path in RECIPES.glob("*.toml"))
    if name in recipes:
        return Setup(what=f"recipe {name}", recipe=name)
    raise ValueError(f"no setup {name!r}; there are {', '.join(SETUPS)}, and the recipes {', '.join(recipes)}")
