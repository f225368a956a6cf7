"""Everything a run can be told: where, when and how much, around the method's own knobs.

A run is a TOML recipe plus `--set a.b=c` overrides; the resolved configuration goes to `run.json` before any work.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pydantic import ConfigDict

from textual_inversion.config import InversionConfig, Precision, SamplingConfig, require

Device = Literal["auto", "cpu", "cuda"]
LogFormat = Literal["text", "json"]

SCHEMES = ("file", "memory", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "http", "https")
"""What an address may begin with; anything else (ssh, github, chained URLs) is refused."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ActorConfig:
    """How the work is spread over the cluster. Nothing here changes a result beyond rounding."""

    count: int = 0
    """Actors at most; 0 is one for every GPU the cluster has, or, without any, one for every `cpus` cores."""

    slots: int = 0
    """Concepts one actor learns side by side in a batch; 0 lets it choose: on a GPU by trying which number of them its
    memory holds and gets most done, on a CPU so that a batch has 8 samples. Another number is equal to rounding."""

    compile: Literal["auto", "on", "graphs", "off"] = "auto"
    """Run the denoiser through torch.compile, with `graphs` as CUDA graphs too; equal to rounding. `auto`, on a GPU: as
    is fastest. An actor starts minutes later, or seconds if torch's cache on its disk has it."""

    cpus: float = 1.0
    """CPU cores Ray reserves for each actor."""

    gpus: float = 1.0
    """GPUs Ray reserves for each actor when the device is a GPU; below 1 several actors share one."""

    calls_ahead: int = 2
    """Concepts sent to an actor beyond its slots, so that their photos are fetched while it learns others."""

    max_attempts: int = 3
    """Calls lost to a dying actor or to storage before a concept counts as failed."""

    checkpoint_steps: int = 100
    """Steps between checkpoints of a concept being learned; 0 writes none."""

    drain_s: float = 20.0
    """When the run is stopped: seconds that running concepts get to write a checkpoint."""

    stall_s: float = 3600.0
    """Seconds a concept may take in its slot, photos and sample pictures included, before it counts as hung: its actor
    is replaced, and it is tried again alone. 0 waits for ever. Make it several times what a concept takes."""

    def __post_init__(self) -> None:
        require(self.count >= 0, "actors.count", self.count, "0 (automatic) or more")
        require(self.slots >= 0, "actors.slots", self.slots, "0 (automatic) or more")
        require(self.cpus > 0, "actors.cpus", self.cpus, "positive")
        require(self.gpus >= 0, "actors.gpus", self.gpus, "0 or more")
        require(self.calls_ahead >= 0, "actors.calls_ahead", self.calls_ahead, "0 or more")
        require(self.max_attempts >= 1, "actors.max_attempts", self.max_attempts, "1 or more")
        require(self.checkpoint_steps >= 0, "actors.checkpoint_steps", self.checkpoint_steps, "0 (none) or more")
        require(self.drain_s >= 0, "actors.drain_s", self.drain_s, "0 or more seconds")
        require(self.stall_s >= 0, "actors.stall_s", self.stall_s, "0 (never) or more seconds")


@dataclass(frozen=True, kw_only=True, slots=True)
class PhotoConfig:
    """What the photos and masks that a manifest names may be, and where they may come from. Nothing here changes a
    result."""

    schemes: tuple[str, ...] = SCHEMES
    """How their addresses may begin, redirects included; a plain path is `file`. ["s3"] keeps a manifest of others off
    this machine's disks and the web."""

    private_networks: tuple[str, ...] = ()
    """Networks (CIDR, e.g. "10.1.0.0/16") that http and https may reach besides public addresses."""

    max_bytes: int = 64 * 2**20
    """Of one photo's file; it is not read further."""

    max_pixels: int = 100_000_000
    """Of one photo; told from its header, before it is decoded. Decoding takes some 8 bytes a pixel for a moment, and 3
    from then on."""

    max_concept_pixels: int = 500_000_000
    """Of all photos of one concept; an actor holds them decoded, for its slots and `actors.calls_ahead` more."""

    def __post_init__(self) -> None:
        for scheme in self.schemes:
            require(scheme in SCHEMES, "photos.schemes", scheme, f"among {', '.join(SCHEMES)}")
        for network in self.private_networks:
            try:
                ipaddress.ip_network(network)
            except ValueError:
                require(False, "photos.private_networks", network, "a network in CIDR form, for example 10.1.0.0/16")
        for name in ("max_bytes", "max_pixels", "max_concept_pixels"):
            require(getattr(self, name) >= 1, f"photos.{name}", getattr(self, name), "1 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class GridConfig:
    """The sample pictures drawn of each concept as soon as it is learned; the quality scores are taken from them."""

    prompts: tuple[str, ...] = (
        "a photo of a {}",
        "a photo of a {} on the beach",
        "a photo of a {} on a red background",
        "a pencil sketch of a {}",
    )
    """For objects, one grid row each; `{}` is the placeholder token's place. The first is compared with the photos."""

    style_prompts: tuple[str, ...] = (
        "a picture in the style of {}",
        "a picture of a cat in the style of {}",
        "a picture of a house in the style of {}",
    )
    """The same for styles."""

    images_per_prompt: int = 2
    """Pictures per prompt."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def of(self, category: str) -> tuple[str, ...]:
        """The prompts for concepts of a category."""
        return self.style_prompts if category == "style" else self.prompts

    def __post_init__(self) -> None:
        for name, prompts in (("grid.prompts", self.prompts), ("grid.style_prompts", self.style_prompts)):
            require(len(prompts) > 0, name, prompts, "at least one prompt")
            for prompt in prompts:
                require(prompt.count("{}") == 1, name, prompt, "a text with {} once, where the concept goes")
        require(self.images_per_prompt >= 1, "grid.images_per_prompt", self.images_per_prompt, "1 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class GateConfig:
    """When a learned concept is good enough, and what is tried when it is not. Scores are those of its sample pictures;
    without an extractor nothing is judged. No part of a fingerprint: another gate makes no concept undone."""

    min_clip_i: float | None = None
    """Least likeness to the photos; none for no bound. What is usual depends on the extractor."""

    min_clip_i_gain: float | None = 0.0
    """Least likeness above that of the initializer word drawn alone. The default asks for no worse than not learning,
    which holds for any extractor."""

    min_clip_t: float | None = None
    """Least fit to the sample prompts."""

    min_clip_t_gain: float | None = None
    """The same against the initializer word: -0.1 lets it fall by 0.1."""

    ladder: tuple[str, ...] = ("seed", "seed + steps*2")
    """What a concept below the gate is learned again with, one after the other until one passes; the best is kept. Each
    is a recipe's name, `seed` (another seed), `steps*N`, or a setting (`inversion.init.method=auto`), or several with
    ` + ` between; it changes the run's own settings. Empty: concepts below the gate are only flagged."""

    def __post_init__(self) -> None:
        for rung in self.ladder:
            require(all(part.strip() for part in rung.split(" + ")), "gate.ladder", rung, "settings with ' + ' between")


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationConfig:
    """Prompted pictures of every learned concept, in bulk, after learning."""

    prompts: str = ""
    """URI of the prompts; empty leaves this stage out."""

    images_per_prompt: int = 1
    """Pictures per concept and prompt."""

    packed: bool = False
    """Store the pictures inside the Parquet parts, next to their metadata rows, instead of one PNG object each."""

    rows_per_part: int = 256
    """Pictures one Parquet part describes; a finished part is not made again on the next run."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        require(self.images_per_prompt >= 1, "generation.images_per_prompt", self.images_per_prompt, "1 or more")
        require(self.rows_per_part >= 1, "generation.rows_per_part", self.rows_per_part, "1 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """What `python -m pipeline.evaluate` draws of every learned concept to be scored. Nothing here changes what is
    learned."""

    protocol: Literal["quick", "paper", "dreambench"] = "quick"
    """Pictures, prompts and sampler by name (`bulk/protocols.py`). `quick`: the demo's prompts, 4 pictures each.
    `paper`: 64 a prompt, 50 DDIM steps (Gal et al. 2022, section 5). `dreambench`: 25 prompts, 4 a prompt (Ruiz et
    al. 2023)."""

    prompts: str = ""
    """URI of prompts in place of the protocol's."""

    images_per_prompt: int = 0
    """Pictures per concept and prompt in place of the protocol's number; 0 keeps it."""

    dino: str = ""
    """Directory or hub id of the DINO or DINOv2 behind the DINO score; empty leaves that score out."""

    references: bool = True
    """Also score what a learned word is held against: its photos, the prompt without it, the initializer word."""

    def __post_init__(self) -> None:
        require(self.images_per_prompt >= 0, "evaluation.images_per_prompt", self.images_per_prompt,
              "1 or more, or 0 for the protocol's")  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """What the page that a person reads holds."""

    embedded: int = 200
    """Concepts shown with their pictures inside the page; all others are table rows that link to the objects."""

    hour_price: float = 0.0
    """Price of one GPU for an hour (of one core, where there are no GPUs), for what the run cost; 0 leaves that out."""

    currency: str = ""
    """Written behind it."""

    def __post_init__(self) -> None:
        require(self.embedded >= 0, "report.embedded", self.embedded, "0 or more")
        require(self.hour_price >= 0, "report.hour_price", self.hour_price, "0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One configuration on one manifest."""

    # Unknown keys are errors, here and in every nested dataclass, the core's included; types are not coerced.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    manifest: str = ""
    """Parquet file, folder or glob; any fsspec URI."""

    output: str = "output"
    """Folder or URI that everything is written under."""

    model: str = "demo/model"
    """Directory or hub id of a Stable Diffusion checkpoint in diffusers layout."""

    extractor: str = "demo/clip"
    """Directory or hub id of the CLIP that scores the sample pictures; empty turns scores off."""

    seed: int = 0
    """Seeds every draw, together with the concept's id."""

    device: Device = "auto"
    """`auto` is a GPU where the cluster has one."""

    precision: Literal["auto", Precision] = "auto"
    """Of the frozen networks; learned rows are always float32. `auto` is bfloat16 on a GPU, float32 on a CPU."""

    lease_s: float = 60.0
    """Seconds without a sign of life after which another run may take the output over; 0 lets several runs share it."""

    log_format: LogFormat = "text"
    """Of log and progress lines: for people, or `json`, one object a line for a log store."""

    inversion: InversionConfig = field(default_factory=InversionConfig)
    photos: PhotoConfig = field(default_factory=PhotoConfig)
    grid: GridConfig = field(default_factory=GridConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    actors: ActorConfig = field(default_factory=ActorConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    def __post_init__(self) -> None:
        require(bool(self.output), "output", self.output, "a folder or URI to write to")
        require(bool(self.model), "model", self.model, "a directory or hub id")
        require(bool(self.extractor) or self.inversion.init.method not in ("auto", "amortised"), "extractor",
              self.extractor, f"a CLIP for inversion.init.method {self.inversion.init.method!r}")  # fmt: skip
        require(bool(self.extractor) or not self.inversion.penalties.clip, "extractor", self.extractor,
              "a CLIP for inversion.penalties.clip")  # fmt: skip
        earlier = self.inversion.init.earlier_run
        require(earlier != self.output or not earlier, "inversion.init.earlier_run", earlier,
              "another run than this: what this one starts from may not change while it goes on")  # fmt: skip
        require(self.lease_s >= 0, "lease_s", self.lease_s, "0 (none) or more seconds")
        require(0 <= self.seed < 2**63, "seed", self.seed, "a non-negative 63-bit integer")
