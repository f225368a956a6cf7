"""Settings of the pictures drawn of a concept while and after it is learned, and of the gate on their scores."""

from __future__ import annotations

from dataclasses import dataclass, field

from textual_inversion.config import SamplingConfig
from textual_inversion.config_checks import require


@dataclass(frozen=True, kw_only=True, slots=True)
class GridConfig:
    """Sample pictures drawn of each concept as soon as it is learned; the quality scores are computed from them."""

    prompts: tuple[str, ...] = (
        "a photo of a {}",
        "a photo of a {} on the beach",
        "a photo of a {} on a red background",
        "a pencil sketch of a {}",
    )
    """Prompts for objects, one grid row each, with `{}` for the concept: its placeholder token, and with
    `inversion.class_cue` its initializer behind it. The pictures of the first are compared with the photos."""

    style_prompts: tuple[str, ...] = (
        "a picture in the style of {}",
        "a picture of a cat in the style of {}",
        "a picture of a house in the style of {}",
    )
    """Prompts for styles, as `prompts`."""

    images_per_prompt: int = 2
    """Pictures per prompt."""

    initializer_prompts: int = 0
    """Prompts, the first ones, whose pictures are drawn of the initializer word, too; 0 is all. CLIP-I needs the first
    alone. With fewer than all, the CLIP-T of the word and the gain over it are left out."""

    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(batch_size=8))
    """Sampler of the sample pictures. A batch is a concept's pictures by default: those of its initializer word are
    another, drawn once for all concepts of an actor that start from it."""

    def prompts_for(self, category: str) -> tuple[str, ...]:
        """Return the prompts for concepts of a category."""
        return self.style_prompts if category == "style" else self.prompts

    def __post_init__(self) -> None:
        for name, prompts in (("grid.prompts", self.prompts), ("grid.style_prompts", self.style_prompts)):
            require(len(prompts) > 0, name, prompts, "at least one prompt")
            for prompt in prompts:
                require(prompt.count("{}") == 1, name, prompt, "a text with {} once, where the concept goes")
        require(self.images_per_prompt >= 1, "grid.images_per_prompt", self.images_per_prompt, "1 or more")
        number = self.initializer_prompts
        require(number >= 0, "grid.initializer_prompts", number, "1 or more, or 0 for all")


@dataclass(frozen=True, kw_only=True, slots=True)
class PreviewConfig:
    """Pictures of each concept while it is learned, kept as a strip. No part of a fingerprint: they change no result,
    and with other previews every concept that was done stays done."""

    steps: int = 0
    """Steps of a concept between two previews, which are drawn of its first sample prompt from the same noise; 0 draws
    none. Learning waits while previews are drawn."""

    sampling_steps: int = 8
    """Denoising steps of a preview; all else is drawn as `grid.sampling` says."""

    def __post_init__(self) -> None:
        require(self.steps >= 0, "preview.steps", self.steps, "0 (none) or more")
        require(self.sampling_steps >= 1, "preview.sampling_steps", self.sampling_steps, "1 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class GateConfig:
    """Bounds on the scores of a learned concept's sample pictures, and retry rules for a concept below them.

    Without an extractor there are no scores and no gate. No part of a fingerprint: with another gate, every concept
    that was done stays done.
    """

    min_clip_i: float | None = None
    """Lower bound of CLIP-I, the cosine similarity to the photos; None for no bound. Usual values depend on the
    extractor."""

    min_clip_i_gain: float | None = 0.0
    """Lower bound of CLIP-I minus the CLIP-I of the initializer word's own pictures; None for no bound. The default
    asks for no worse than not learning, which suits any extractor."""

    min_clip_i_share: float | None = None
    """Lower bound of CLIP-I on the way from the initializer word's own pictures, 0, to the photos among themselves, 1;
    None for no bound. Left out for a concept without an initializer or with one photo."""

    others: str = ""
    """URI of a manifest of other concepts, which may be the run's own; empty for none. Sample pictures are compared
    with the photos of its concepts that have the same category, another id and no photo in common."""

    min_clip_i_margin: float | None = 0.0
    """Lower bound of CLIP-I minus the highest CLIP-I to the photos of one of `others`; None for no bound. The default
    asks that no other concept is nearer."""

    min_clip_t: float | None = None
    """Lower bound of CLIP-T, the cosine similarity to the sample prompts; None for no bound."""

    min_clip_t_gain: float | None = None
    """Lower bound of CLIP-T minus the CLIP-T of the initializer word's own pictures, e.g. -0.1; None for no bound."""

    ladder: tuple[str, ...] = ("seed", "seed + steps*2")
    """Retry rules for a concept below the gate, applied in order until one try passes; the best try is kept. Each rule
    changes the run's own settings: a recipe's name, `seed` (another seed), `steps*N`, a setting
    (`inversion.init.method=auto`), or several with ` + ` between. With none, concepts below the gate are only
    flagged."""

    def __post_init__(self) -> None:
        for rule in self.ladder:
            require(all(part.strip() for part in rule.split(" + ")), "gate.ladder", rule, "settings with ' + ' between")
