"""Settings of a run: where, when and how much is learned, around the settings of the method.

A run is a TOML recipe plus `--set a.b=c` overrides; the resolved configuration goes to `run.json` before any work.
"""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pydantic import ConfigDict

from pipeline.encoder_config import EncoderJobConfig
from pipeline.report_config import ReportConfig, ToleranceConfig
from pipeline.sample_config import GateConfig, GridConfig, PreviewConfig
from textual_inversion.config import InversionConfig, Precision, SamplingConfig
from textual_inversion.config_checks import require

Device = Literal["auto", "cpu", "cuda"]
LogFormat = Literal["text", "json"]
Switch = Literal["auto", "on", "off"]
Tracking = Literal["none", "tensorboard", "wandb", "mlflow"]

SCHEMES = ("file", "memory", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "http", "https")
"""Schemes of addresses; any other (ssh, github, chained URLs) is refused."""


MIN_LEASE_S = 1.0
MAX_LEASE_S = 86_400.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ActorConfig:
    """Settings that spread the work over the cluster. None changes a result beyond rounding, but for `vae_tiling`."""

    count: int = 0
    """Largest number of actors; 0 is as many as the nodes hold: by `gpus` and `cpus` where there are GPUs, else by
    `cpus` alone."""

    slots: int = 0
    """Concepts that one actor learns at the same time in a batch; 0 is automatic: on a GPU the number, found by trial,
    that fits its memory and is fastest; on a CPU the number that gives a batch 8 samples. Results with different
    numbers are equal to rounding."""

    compile: Literal["auto", "on", "graphs", "off"] = "auto"
    """Use of torch.compile for the denoiser; `graphs` adds CUDA graphs. Results are equal to rounding. `auto` takes the
    fastest way on a GPU, and none on a CPU. Compiling delays an actor's start by minutes, or by seconds if torch's
    cache on its disk holds the result."""

    compile_cache: str = ""
    """Folder, as a URI or an absolute path, where actors keep what torch.compile made for those that start later; empty
    keeps nothing. What is there is code that actors run: nobody may write to it who may not change the image, too."""

    gradient_checkpointing: Switch = "auto"
    """Use of gradient checkpointing in the denoiser: learning keeps less in memory and computes the forward pass twice.
    Results are equal to rounding. `auto` uses it only where passes of `slots` concepts (of one, on a GPU with automatic
    slots) do not fit the device's free memory without, by an estimate that an actor makes at its start."""

    vae_slicing: Switch = "auto"
    """Use of the autoencoder on one picture of a batch after the other. Results are equal to rounding. `auto` does so
    only where a batch of sample pictures, by an estimate, does not fit beside learning."""

    vae_tiling: Switch = "auto"
    """Use of the autoencoder on overlapping tiles of half a picture's side. Photos are encoded and pictures decoded a
    little differently, so results change, and the record says so. `auto` does so only where a single picture, by an
    estimate, does not fit the device's free memory."""

    cpus: float = 1.0
    """CPU cores that Ray reserves for each actor; a little less on nodes that actors would fill, where pictures are
    drawn in bulk: Ray Data needs a core beside them."""

    gpus: float = 1.0
    """GPUs that Ray reserves for each actor when the device is a GPU; below 1, several actors share one."""

    calls_ahead: int = 2
    """Concepts sent to an actor beyond its slots, so that it fetches their photos and draws their pictures while it
    learns others."""

    max_attempts: int = 3
    """Calls lost with a dead actor or to storage after which a concept counts as failed."""

    checkpoint_steps: int = 100
    """Steps between checkpoints of a concept being learned; 0 writes none."""

    drain_s: float = 20.0
    """Seconds that running concepts get to write a checkpoint when the run is stopped."""

    stall_s: float = 3600.0
    """Seconds that a concept may take in its slot, photos and sample pictures included, before it counts as hung: its
    actor is replaced, and it is tried again alone. 0 waits for ever. Set it to several times the usual duration."""

    start_s: float = 3600.0
    """Seconds without a ready actor after which the run is given up, to be continued by the same command. 0 waits for
    ever, as for GPUs that a queue or an autoscaler brings hours later. Without a living node it is given up after two
    minutes in any case."""

    def __post_init__(self) -> None:
        require(self.count >= 0, "actors.count", self.count, "0 (automatic) or more")
        is_one_place = not self.compile_cache or "://" in self.compile_cache or self.compile_cache.startswith("/")
        rule = "a URI or an absolute path, the same place for all nodes, or empty"
        require(is_one_place, "actors.compile_cache", self.compile_cache, rule)
        require(self.slots >= 0, "actors.slots", self.slots, "0 (automatic) or more")
        require(0 < self.cpus < math.inf, "actors.cpus", self.cpus, "positive")
        require(0 <= self.gpus < math.inf, "actors.gpus", self.gpus, "0 or more")
        require(self.calls_ahead >= 0, "actors.calls_ahead", self.calls_ahead, "0 or more")
        require(self.max_attempts >= 1, "actors.max_attempts", self.max_attempts, "1 or more")
        require(self.checkpoint_steps >= 0, "actors.checkpoint_steps", self.checkpoint_steps, "0 (none) or more")
        require(0 <= self.drain_s < math.inf, "actors.drain_s", self.drain_s, "0 or more seconds")
        require(0 <= self.start_s < math.inf, "actors.start_s", self.start_s, "0 (for ever) or more seconds")
        require(0 <= self.stall_s < math.inf, "actors.stall_s", self.stall_s, "0 (never) or more seconds")


@dataclass(frozen=True, kw_only=True, slots=True)
class PhotoConfig:
    """Limits on the photos and masks that a manifest names: their addresses and sizes. None changes a result."""

    schemes: tuple[str, ...] = SCHEMES
    """Schemes that addresses may have, redirects included; a plain path is `file`. With ["s3"], another party's
    manifest reaches neither this machine's disks nor the web."""

    private_networks: tuple[str, ...] = ()
    """Networks (CIDR, e.g. "10.1.0.0/16") that http and https may reach besides public addresses."""

    max_bytes: int = 64 * 2**20
    """Largest size of one photo's file, in bytes; no more is read."""

    max_pixels: int = 100_000_000
    """Largest number of pixels of one photo, read from its header before decoding; half as many for WebP, AVIF and
    HEIC. Decoding takes up to 17 bytes a pixel for a moment (25 for those three); the decoded photo takes 4."""

    max_concept_pixels: int = 500_000_000
    """Largest number of pixels of all photos of one concept; an actor holds the decoded photos of its slots and of
    `actors.calls_ahead` more concepts."""

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
class GenerationConfig:
    """Pictures of every learned concept for a table of prompts, drawn in bulk after learning."""

    prompts: str = ""
    """URI of the prompts; empty skips this stage."""

    negative_prompt: str = ""
    """Prompt that guidance leads away from, in place of the empty prompt, where the table of prompts gives none. It may
    hold `{}`, `{token}` and `{initializer}`, and placeholder tokens of the concepts in `learned`."""

    learned: tuple[str, ...] = ()
    """Concepts that negative prompts may name: output folders of runs, and embedding files of this or another tool.
    `WORD=` before a file gives its concept another placeholder token."""

    images_per_prompt: int = 1
    """Pictures per concept and prompt."""

    packed: bool = False
    """Storage of the pictures: True puts them inside the Parquet parts, next to their metadata rows; False makes each
    an object of its own."""

    rows_per_part: int = 256
    """Pictures that one Parquet part describes; the next run does not draw a finished part again."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Sampler of the pictures."""

    def __post_init__(self) -> None:
        require(self.images_per_prompt >= 1, "generation.images_per_prompt", self.images_per_prompt, "1 or more")
        require(self.rows_per_part >= 1, "generation.rows_per_part", self.rows_per_part, "1 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Pictures that `python -m pipeline.evaluate` draws of every learned concept and scores. None of these settings
    changes what is learned."""

    protocol: Literal["quick", "paper", "dreambench"] = "quick"
    """Name of a set of prompts, pictures per prompt and sampler (`bulk/protocols.py`). `quick`: the demo's prompts, 4
    pictures each. `paper`: 64 a prompt, 50 DDIM steps (Gal et al. 2022, section 5). `dreambench`: 25 prompts, 4 a
    prompt (Ruiz et al. 2023)."""

    prompts: str = ""
    """URI of prompts that replace the protocol's; empty keeps them."""

    images_per_prompt: int = 0
    """Pictures per concept and prompt that replace the protocol's number; 0 keeps it."""

    dino: str = ""
    """Directory or hub id of the second feature extractor, a DINO, a DINOv2 or another, for the DINO score and the
    mirror margin; empty leaves them out."""

    references: bool = True
    """Scores of references to compare a concept with: its photos, the prompt without the word, and the initializer
    word; False leaves them out."""

    def __post_init__(self) -> None:
        allowed = "1 or more, or 0 for the protocol's"
        require(self.images_per_prompt >= 0, "evaluation.images_per_prompt", self.images_per_prompt, allowed)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Settings of one run: what is learned from which manifest, and how."""

    # Unknown keys are errors, here and in every nested dataclass, the core's included; types are not coerced.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    manifest: str = ""
    """Path or URI of the manifest: a folder of photos, a folder with a folder of photos for each concept, a Parquet,
    CSV or JSON lines file, a folder of Parquet files, or a glob."""

    output: str = "output"
    """Folder or URI under which everything is written."""

    model: str = "demo/model"
    """Directory or hub id of a text-to-image checkpoint in diffusers layout. The default is the demo's, which only a
    checkout of the repository has."""

    extractor: str = "demo/clip"
    """Directory or hub id of the CLIP that scores the sample pictures; empty turns scores off."""

    seed: int = 0
    """Seed of every random draw, together with the concept's id."""

    device: Device = "auto"
    """Device of the actors; `auto` is a GPU where the cluster has one as the run begins. Where an autoscaler is yet to
    start nodes with GPUs, `cuda` waits for them."""

    precision: Literal["auto", Precision] = "auto"
    """Data type of the frozen networks; learned rows are always float32. `auto` is bfloat16 on a GPU and float32 on a
    CPU."""

    lease_s: float = 60.0
    """Seconds without renewal after which another run may take the output over; the lease states them, so that other
    runs wait for as long whatever their own setting. 0 lets several runs share the output."""

    log_format: LogFormat = "text"
    """Format of log and progress lines: `text` for people, or `json`, one object a line, for a log store."""

    tracking: Tracking = "none"
    """Tracker that the command logs each concept to when it has ended; it needs the extra of its name.
    `report.tracked` bounds how many concepts have their curve and sample grid there."""

    inversion: InversionConfig = field(default_factory=InversionConfig)
    photos: PhotoConfig = field(default_factory=PhotoConfig)
    grid: GridConfig = field(default_factory=GridConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    actors: ActorConfig = field(default_factory=ActorConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    tolerance: ToleranceConfig = field(default_factory=ToleranceConfig)
    encoder: EncoderJobConfig = field(default_factory=EncoderJobConfig)

    @property
    def encoder_extractor(self) -> str:
        """Directory or hub id of the extractor that the encoder of starts reads."""
        return self.inversion.init.extractor or self.extractor

    def __post_init__(self) -> None:
        require(bool(self.output), "output", self.output, "a folder or URI to write to")
        require(bool(self.model), "model", self.model, "a directory or hub id")
        if not self.extractor:
            method = self.inversion.init.method
            clip_weight = self.inversion.penalties.clip
            reads_photos = method == "encoder" and not self.encoder_extractor
            looks_at_photos = method in ("auto", "amortised") or reads_photos
            require(not looks_at_photos, "extractor", "", f"a CLIP for inversion.init.method {method!r}")
            require(not clip_weight, "extractor", "", "a CLIP for inversion.penalties.clip")
            require(not self.gate.others, "extractor", "", "a CLIP for gate.others")
        earlier = self.inversion.init.earlier_run
        require(
            earlier != self.output or not earlier,
            "inversion.init.earlier_run",
            earlier,
            "the output of another run: a run cannot start from results that it is still writing",
        )
        number, has_gain = self.grid.initializer_prompts, self.gate.min_clip_t_gain is not None
        rule = "0 with gate.min_clip_t_gain, which compares the pictures of all prompts"
        require(not (number and has_gain), "grid.initializer_prompts", number, rule)
        is_lease = self.lease_s == 0 or MIN_LEASE_S <= self.lease_s <= MAX_LEASE_S
        require(is_lease, "lease_s", self.lease_s, f"0 (none), or {MIN_LEASE_S:.0f} to {MAX_LEASE_S:,.0f} seconds")
        require(0 <= self.seed < 2**63, "seed", self.seed, "a non-negative 63-bit integer")
