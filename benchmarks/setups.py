"""Setups that `benchmarks.methods` compares: those of Gal et al. 2022, section 5, and of later methods.

A setup is a recipe of `pipeline/recipes`, further settings, a change of the concept, or several of these. Besides the
names below, every recipe is a setup under its own.

Scale: the papers' budgets are for large models; here all setups see the same number of samples, `--steps` times the
default batch of 4, or fewer where a recipe asks for fewer. `200x1` is a name too: the default with 200 steps of one
sample; with `-one-photo` behind it, from the first photo. Learning rates are the recipes': the paper's 2e-2 and 1e-4
("High-LR" and "Low-LR") keep their ratio to its 5e-3, all times its 2 GPUs x batch 4. Like all the paper's setups these
have no norm control: under a clamp the learning rate could not move an embedding along the curve.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, replace

from pipeline.config_file import RECIPES, load_config
from textual_inversion.concept import Concept
from textual_inversion.config import InversionConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """Way to get pictures of a concept."""

    what: str
    """Description in the table."""
    settings: tuple[str, ...] = ()
    """Settings that the setup changes, as `a.b=c`."""
    recipe: str = ""
    """Name of a recipe whose `[inversion]` section is applied before the settings."""
    num_vectors: int = 0
    """Number of vectors; 0 keeps the manifest's."""
    num_photos: int = 0
    """Number of photos to learn from, the first ones; 0 is all."""
    initializer: str | None = None
    """Initializer in place of the manifest's; empty starts from the vocabulary's mean."""
    drawn: str = "learned"
    """Text in the prompt: the word as `learned`, the word `learned_without_noun` or `learned_with_noun` behind it,
    whichever way the recipe learns it; or, with nothing to learn, the `initializer`, a person's `short_captions`
    or `long_captions` in turn (`benchmarks/captions.toml`), or none (`prompt`). `photos` draws nothing and scores the
    photos."""
    steps: int | None = None
    """Number of steps whatever the budget; None takes as many as the budget allows."""
    uses_masks: bool = True
    """False learns from whole photos where the manifest has masks."""
    full_budget: str = ""
    """Name of the setup that differs only in its end: it takes all steps and keeps the last rows."""

    def concept(self, concept: Concept) -> Concept:
        """Return the concept as this setup learns it."""
        count = self.num_photos or len(concept.images)
        return replace(
            concept,
            num_vectors=self.num_vectors or concept.num_vectors,
            initializer=concept.initializer if self.initializer is None else self.initializer,
            images=concept.images[:count],
            masks=concept.masks[:count] if self.uses_masks else (),
            captions=concept.captions[:count],
        )

    def inversion(self, steps: int, overrides: Iterable[str]) -> InversionConfig:
        """Return the settings of learning: the recipe's, then `overrides`, then the setup's own, with as many samples
        as `steps` of the default batch have unless the setup has a number of its own."""
        toml = (RECIPES / f"{self.recipe}.toml").read_text() if self.recipe else ""
        config = load_config(toml, [*overrides, *self.settings]).inversion
        affordable = max(1, round(steps * InversionConfig().batch_size / config.batch_size))
        asked_for = tomllib.loads(toml).get("inversion", {}).get("steps", affordable)
        return replace(config, steps=min(asked_for, affordable) if self.steps is None else self.steps)


def settings_of(*pairs: str) -> tuple[str, ...]:
    """Return settings of the section `inversion`."""
    return tuple(f"inversion.{pair}" for pair in pairs)


# fmt: skip below: a table reads better with one setup a line
SETUPS: dict[str, Setup] = {
    "image-only": Setup(what="the photos among themselves", drawn="photos"),
    "prompt-only": Setup(what="the prompt without the word", drawn="prompt"),
    "initializer": Setup(what="the initializer in the word's place", drawn="initializer"),
    "short-captions": Setup(what="a person's few words in the word's place", drawn="short_captions"),
    "long-captions": Setup(what="a person's longer description in the word's place", drawn="long_captions"),
    "textual-inversion": Setup(what="the project's default: one vector, norm at most 4 x the vocabulary's"),
    # Gal et al. 2022, section 5
    "ti-paper": Setup(what="one vector, as in the paper", recipe="ti-paper"),
    "high-lr": Setup(what="the paper's High-LR", recipe="high-lr"),
    "low-lr": Setup(what="the paper's Low-LR", recipe="low-lr"),
    "2-word": Setup(what="two vectors", recipe="ti-paper", num_vectors=2),
    "3-word": Setup(what="three vectors", recipe="ti-paper", num_vectors=3),
    "progressive": Setup(what="three vectors, one joining after the other", recipe="progressive", num_vectors=3),
    "regularised": Setup(what="held near the initializer's vector", recipe="regularised"),
    "per-image": Setup(what="a further vector for every photo", recipe="per-image"),
    # one photo
    "ti-one-photo": Setup(what="the default, from one photo", num_photos=1),
    "ti-one-photo-noun": Setup(what='and drawn as "S* cat"', num_photos=1, drawn="learned_with_noun"),
    "textboost-v1": Setup(what="one photo; LoRA, augmentation tokens", recipe="textboost-v1", num_photos=1),
    "textboost-v1-bare": Setup(what='drawn as "S*"', recipe="textboost-v1", num_photos=1,
                               drawn="learned_without_noun"),
    "textboost-v1-paper": Setup(what="and noisy timesteps more often", recipe="textboost-v1-paper", num_photos=1),
    "textboost-v1-late": Setup(what="as its repository had it later", recipe="textboost-v1-late", num_photos=1),
    "textboost-v2": Setup(what="one photo; causal adapter", recipe="textboost-v2", num_photos=1),
    "textboost-v2-bare": Setup(what='drawn as "S*"', recipe="textboost-v2", num_photos=1, drawn="learned_without_noun"),
    "textboost-plusplus": Setup(
        what="one photo; causal adapter, also of cross-attention", recipe="textboost-plusplus", num_photos=1
    ),
    # start, direction, norm
    "no-flip": Setup(what="without mirrored photos", settings=settings_of("augment.flip=false")),
    "class-cue": Setup(what='"S* cat" in the prompts', settings=settings_of("class_cue=true")),
    "no-initializer": Setup(what="from the vocabulary's mean", initializer=""),
    "cross-init": Setup(what="from the text encoder's output", recipe="cross-init"),
    "auto-init": Setup(what="from the word nearest to the photos", settings=settings_of("init.method=auto")),
    "amortised": Setup(what="from rows predicted from the photos", settings=settings_of("init.method=amortised")),
    "clamp-1": Setup(what="norm at most the vocabulary's", settings=settings_of("norm_cap=1.0")),
    "no-norm-control": Setup(what="norm left alone", settings=settings_of("norm_control=none")),
    "sphere": Setup(what="norm fixed at the vocabulary's", settings=settings_of("norm_control=sphere")),
    "dti": Setup(what="direction alone is learned", recipe="dti"),
    # loss terms, timesteps, end of learning
    "clip-term": Setup(what="and 0.1 x (1 - cosine) of the scoring CLIP", settings=settings_of("penalties.clip=0.1")),
    "range-500-900": Setup(what="timesteps from 500 to 900", recipe="range-500-900"),
    "snr-timesteps": Setup(what="noisy timesteps more often", settings=settings_of("timesteps.sampler=snr")),
    "min-snr": Setup(what="losses weighted by min-SNR", recipe="min-snr"),
    "dvar": Setup(what="until the loss on a fixed batch settles", recipe="dvar", full_budget="dvar-budget"),
    "dvar-budget": Setup(what="dvar to the end of the budget", recipe="dvar",
                         settings=settings_of("stop.method=budget")),
    "keep-best": Setup(what="the default; the rows best on a fixed batch", settings=settings_of("stop.keep_best=true"),
                       full_budget="textual-inversion"),
}  # fmt: skip


_SIZE = re.compile(r"([1-9]\d*)x([1-9]\d*)(-one-photo)?")


def find(name: str) -> Setup:
    """Return a setup of this module, of a recipe, or of a size as `200x1`. Raises ValueError naming the known ones."""
    if name in SETUPS:
        return SETUPS[name]
    if size := _SIZE.fullmatch(name):
        steps, batch, one_photo = size.groups()
        what = f"{steps} steps of {batch}{', from one photo' if one_photo else ''}"
        settings = settings_of(f"batch_size={batch}")
        return Setup(what=what, settings=settings, steps=int(steps), num_photos=1 if one_photo else 0)
    recipes = sorted(path.stem for path in RECIPES.glob("*.toml"))
    if name in recipes:
        return Setup(what=f"recipe {name}", recipe=name)
    raise ValueError(f"no setup {name!r}; there are {', '.join(SETUPS)}, and the recipes {', '.join(recipes)}")
