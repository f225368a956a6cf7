"""Named protocols of evaluation: the prompts, the number of pictures and the sampler."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.config import EvaluationConfig, RunConfig
from pipeline.inputs.prompt_table import TOKEN, Prompt, read_prompts
from textual_inversion.config import SamplingConfig
from textual_inversion.prompts import HOLE

PROMPTS = Path(__file__).resolve().parent / "prompts"
"""Folder of the protocols' files of prompts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """The pictures drawn of every concept, and the prompts that each score of the summary is taken from."""

    prompts: tuple[Prompt, ...] = ()
    prompts_file: str = ""
    """Name of the file in `PROMPTS` that holds the prompts, where `prompts` does not."""
    images_per_prompt: int
    sampling: SamplingConfig
    reconstruction: tuple[str, ...] = ()
    """Prompts that name the concept and nothing else: the summary takes CLIP-I from them and CLIP-T from all others,
    like Gal et al. 2022. With no such prompts it takes both from all prompts, like Ruiz et al. 2023."""

    def is_reconstruction(self, prompt: str) -> bool:
        """Return True for a prompt of `reconstruction`, with `{}` or with `{token}` in it."""
        return prompt.replace(TOKEN, HOLE) in self.reconstruction


PROTOCOLS = {
    "quick": Protocol(
        prompts_file="quick.csv",
        images_per_prompt=4,
        sampling=SamplingConfig(solver="dpm++", steps=20),
        reconstruction=("a photo of a {}", "a painting in the style of {}"),
    ),
    # Gal et al. 2022, section 5, with the guidance of their code. The paper does not print its list of prompts: for
    # objects we take those that its text names, and for styles those of its figure on style transfer.
    "paper": Protocol(
        prompts=(
            Prompt("a photo of {}", category="object"),
            Prompt("a photo of {} on the moon", category="object"),
            Prompt("a photo of {} on the beach", category="object"),
            Prompt("an oil painting of {}", category="object"),
            Prompt("Elmo holding a {}", category="object"),
            Prompt("a painting in the style of {}", category="style"),
            Prompt("the streets of Paris in the style of {}", category="style"),
            Prompt("an adorable corgi in the style of {}", category="style"),
            Prompt("a painting of a black hole in the style of {}", category="style"),
        ),
        images_per_prompt=64,
        sampling=SamplingConfig(solver="ddim", steps=50, guidance_scale=5.0),
        reconstruction=("a photo of {}", "a painting in the style of {}"),
    ),
    # Ruiz et al. 2023, section 4. The paper does not state its sampler; guidance 7.5 is Stable Diffusion's default. The
    # data set has another list for cats and dogs: `benchmarks/dreambench.py` combines the two.
    "dreambench": Protocol(
        prompts_file="dreambench_objects.txt",
        images_per_prompt=4,
        sampling=SamplingConfig(solver="ddim", steps=50, guidance_scale=7.5),
    ),
}


def choose_protocol(config: RunConfig) -> Protocol:
    """Return the protocol that `config.evaluation` names, with the settings there in place of its own.

    Raises ValueError if its file of prompts cannot be read, or has columns that an evaluation does not use.
    """
    settings: EvaluationConfig = config.evaluation
    named = PROTOCOLS[settings.protocol]
    file = settings.prompts or (named.prompts_file and str(PROMPTS / named.prompts_file))
    prompts = tuple(read_prompts(file)) if file else named.prompts
    further = sorted({name for prompt in prompts for name in prompt.further_columns()})
    if further:
        raise ValueError(
            f"prompts {file}: an evaluation draws every prompt with the protocol's settings and carries no columns; "
            f"take out {', '.join(further)}"
        )
    return replace(
        named,
        prompts=prompts,
        images_per_prompt=settings.images_per_prompt or named.images_per_prompt,
        sampling=replace(named.sampling, batch_size=config.generation.sampling.batch_size),
    )
