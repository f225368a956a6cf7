"""Every knob of the method on one page: frozen dataclasses, each field with its unit and effect.

Standard library only. Values are checked once, here, on construction; the rest of the code trusts them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

NormControl = Literal["none", "clamp", "sphere"]
InitMethod = Literal["words", "encoder_output", "auto", "amortised"]
TimestepSampler = Literal["uniform", "range", "snr"]
RowOptimizer = Literal["adamw", "riemannian"]
AdapterKind = Literal["none", "lora", "causal"]
StopMethod = Literal["budget", "dvar"]
Solver = Literal["ddim", "dpm++"]
Precision = Literal["float32", "bfloat16", "float16"]


def check(holds: bool, name: str, value: object, rule: str) -> None:
    """Raise ValueError, naming the field, its value and the rule, unless the rule holds."""
    if not holds:
        raise ValueError(f"{name} = {value!r}: must be {rule}")


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """Which views of a photo are encoded once and learned from (the moments of each view are cached)."""

    flip: bool = True
    """Also learn the mirror image. Turn off for concepts with text or a handed shape."""

    crops: int = 0
    """Random crops added per photo. More views, more encoding before the first step."""

    min_crop_scale: float = 0.75
    """Smallest crop, as a fraction of the photo's side."""

    colours: int = 0
    """Views with changed brightness, contrast and saturation added per photo."""

    colour_strength: float = 0.2
    """How far those three may move, as a fraction of their own value."""

    paired: int = 0
    """TextBoost: views added per photo whose transforms are named in the prompt by augmentation tokens, which are
    learned with the concept and left out when drawing ("a A* photo of V*")."""

    paired_probability: float = 0.8
    """With which each of the three groups of transforms (geometry, colour, other) acts on such a view."""

    def __post_init__(self) -> None:
        check(self.crops >= 0, "augment.crops", self.crops, "0 or more")
        check(0 < self.min_crop_scale <= 1, "augment.min_crop_scale", self.min_crop_scale, "in (0, 1]")
        check(self.colours >= 0, "augment.colours", self.colours, "0 or more")
        check(0 < self.colour_strength < 1, "augment.colour_strength", self.colour_strength, "in (0, 1)")
        check(self.paired >= 0, "augment.paired", self.paired, "0 or more")
        check(0 < self.paired_probability <= 1, "augment.paired_probability", self.paired_probability, "in (0, 1]")


@dataclass(frozen=True, kw_only=True, slots=True)
class InitConfig:
    """Where the rows start."""

    method: InitMethod = "words"
    """`words`: the mean of the initializer's vectors, of the whole vocabulary if it has none. `encoder_output`: the
    text encoder's output for the initializer (Cross-Initialization, Pang et al. 2024), which is many times longer.
    `auto`: the word whose text the extractor finds nearest to the photos becomes the initializer. `amortised`: the
    initializer's vectors, moved towards the photos by a regression fitted on known words; as `words` where that is
    unsure."""

    words: tuple[str, ...] = ()
    """Words and phrases that `auto` chooses from and `amortised` is fitted on; none takes all single-token words of
    the model's vocabulary, among them ends of longer words that mean nothing by themselves."""

    earlier_run: str = ""
    """Output folder of a finished run of the same model: `amortised` is fitted on its concepts, too."""

    noise: float = 0.0
    """Standard deviation added to the start, in units of the vocabulary's per-coordinate deviation.
    With several vectors, rows after the first always get at least 0.1, else they would stay equal."""

    def __post_init__(self) -> None:
        methods = ("words", "encoder_output", "auto", "amortised")
        check(self.method in methods, "init.method", self.method, f"one of {', '.join(methods)}")
        check(all(word.strip() for word in self.words), "init.words", self.words, "words or phrases, none empty")
        check(self.method == "amortised" or not self.earlier_run, "init.earlier_run", self.earlier_run,
              "empty unless init.method is 'amortised'")  # fmt: skip
        check(self.noise >= 0, "init.noise", self.noise, "0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class TimestepConfig:
    """Which timesteps are trained at, and how their losses weigh."""

    sampler: TimestepSampler = "uniform"
    """`uniform` over the whole schedule (Gal et al. 2022). `range`: uniform in [low, high). `snr`: p(t) proportional
    to max log SNR - log SNR(t) (TextBoost v1), which favours noisy timesteps."""

    low: int = 0
    high: int = 1000
    """Of `range`, in timesteps of the model's schedule."""

    min_snr_gamma: float = 0.0
    """Weigh losses by min(SNR, gamma) / SNR, for v-prediction / (SNR + 1) (Hang et al. 2023); 0 weighs all alike."""

    def __post_init__(self) -> None:
        check(self.sampler in ("uniform", "range", "snr"), "timesteps.sampler", self.sampler,
              "'uniform', 'range' or 'snr'")  # fmt: skip
        check(0 <= self.low < self.high, "timesteps.low, high", (self.low, self.high), "0 <= low < high")
        check(self.sampler == "range" or (self.low, self.high) == (0, 1000), "timesteps.low, high",
              (self.low, self.high), "left alone unless timesteps.sampler is 'range'")  # fmt: skip
        check(self.min_snr_gamma >= 0, "timesteps.min_snr_gamma", self.min_snr_gamma, "0 (off) or positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """TextBoost: a low-rank change of the text encoder, one for each concept, learned with its rows."""

    kind: AdapterKind = "none"
    """`lora`: added at every position (v1). `causal`: added from the concept's first token on, padding excepted, so
    that what stands before it, and prompts without it, are unchanged (v2)."""

    rank: int = 4

    alpha: float = 4.0
    """The change is scaled by alpha / rank."""

    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    """Linear layers of every block of the text encoder that get one."""

    learning_rate: float = 5e-5
    """Of the adapter, with AdamW in any case; no decay, no norm control."""

    def __post_init__(self) -> None:
        check(self.kind in ("none", "lora", "causal"), "adapter.kind", self.kind, "'none', 'lora' or 'causal'")
        check(self.rank >= 1, "adapter.rank", self.rank, "1 or more; for no adapter set adapter.kind to 'none'")
        check(self.alpha > 0, "adapter.alpha", self.alpha, "positive")
        known = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
        check(bool(self.targets) and set(self.targets) <= set(known), "adapter.targets", self.targets,
              f"some of {', '.join(known)}")  # fmt: skip
        check(self.learning_rate > 0, "adapter.learning_rate", self.learning_rate, "positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class PenaltyConfig:
    """Weights of what is added to the denoising loss; 0 leaves a term out, at no cost."""

    class_distance: float = 0.0
    """Squared distance of each row to the mean of the initializer's vectors, averaged over rows (Gal et al. 2022,
    "regularised")."""

    start_distance: float = 0.0
    """Distance of each row to where it started, averaged over rows (Cross-Initialization: 1e-5)."""

    clip: float = 0.0
    """1 - cosine of the extractor's features between the decoded prediction of x_0 and the photo. Several times slower,
    and it optimises what CLIP-I measures."""

    knowledge: float = 0.0
    """Mean over tokens of 1 - cosine between adapted and frozen text states of unrelated captions (TextBoost: 0.1)."""

    captions: str = ""
    """File of those captions, one a line, on a disk that every machine sees; empty takes the list that comes with the
    package."""

    def __post_init__(self) -> None:
        for name in ("class_distance", "start_distance", "clip", "knowledge"):
            value = getattr(self, name)
            check(value >= 0, f"penalties.{name}", value, "0 (off) or positive")
        check(self.knowledge > 0 or not self.captions, "penalties.captions", self.captions,
              "empty unless penalties.knowledge is positive")  # fmt: skip
        check("://" not in self.captions, "penalties.captions", self.captions, "the path of a file on a disk")


@dataclass(frozen=True, kw_only=True, slots=True)
class StopConfig:
    """When a concept ends before its budget of steps."""

    method: StopMethod = "budget"
    """`budget`: never before. `dvar` (Voronov et al. 2023): when the loss on a frozen batch has settled, that is when
    the variance of its last values is less than a share of the variance of all."""

    check_every_steps: int = 10
    """Steps between two looks at the frozen batch; each costs a forward pass of `batch_size` samples."""

    window: int = 15
    """How many of the last values are compared (the paper: 310, at one look a step)."""

    variance_ratio: float = 0.15
    """The share below which it ends."""

    keep_best: bool = False
    """Return the rows that were best on the frozen batch, not the last. Looks at it also under `budget`."""

    @property
    def looks(self) -> bool:
        """Whether anybody asks for the loss on the frozen batch."""
        return self.method == "dvar" or self.keep_best

    def __post_init__(self) -> None:
        check(self.method in ("budget", "dvar"), "stop.method", self.method, "'budget' or 'dvar'")
        check(self.check_every_steps >= 1, "stop.check_every_steps", self.check_every_steps, "1 or more")
        check(self.window >= 2, "stop.window", self.window, "2 or more")
        check(0 < self.variance_ratio < 1, "stop.variance_ratio", self.variance_ratio, "in (0, 1)")


@dataclass(frozen=True, kw_only=True, slots=True)
class InversionConfig:
    """How one concept is learned. Everything here enters the concept's fingerprint."""

    steps: int = 500
    """Optimizer steps per concept, at most."""

    batch_size: int = 4
    """Samples of one concept in one step; its loss is their mean."""

    learning_rate: float = 5e-3
    """Of the embedding rows, constant. Not scaled by batch size or device count."""

    optimizer: RowOptimizer = "adamw"
    """`riemannian` moves rows along the sphere (DTI, Kim et al. 2026): needs `norm_control` 'sphere'."""

    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    """Decoupled decay of the rows toward zero per step, times the learning rate."""

    direction_prior: float = 0.0
    """DTI's kappa: pull toward the initializer's direction (von Mises-Fisher prior), 1e-4 in the paper. Only with
    `optimizer` 'riemannian'."""

    max_grad_norm: float = 0.0
    """Clip each concept's own gradient to this norm; 0 turns clipping off."""

    norm_control: NormControl = "clamp"
    """After each step: `none`; `clamp` rows to at most `norm_cap` times the vocabulary's mean norm (TextBoost);
    `sphere` rescales every row to exactly that norm."""

    norm_cap: float = 0.0
    """In units of the vocabulary's mean norm; 0 is 4 for `clamp`, which stops only runaways (measured: see
    benchmarks/), and 1 for `sphere`. TextBoost clamps at 1."""

    class_cue: bool = False
    """Append the initializer word after the placeholder in training prompts ("a photo of a <cat-toy> toy")."""

    progressive: bool = False
    """Gal et al. 2022, "progressive": of k vectors the i-th joins after (i - 1) / k of the steps."""

    per_image_tokens: bool = False
    """Gal et al. 2022, "per-image tokens": each photo also has a row of its own, that a quarter of the prompts name
    ("a photo of S* with S_i"); what is particular to a photo can go there. They are not kept."""

    init: InitConfig = field(default_factory=InitConfig)
    timesteps: TimestepConfig = field(default_factory=TimestepConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    penalties: PenaltyConfig = field(default_factory=PenaltyConfig)
    stop: StopConfig = field(default_factory=StopConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        check(self.steps >= 1, "inversion.steps", self.steps, "1 or more")
        check(self.batch_size >= 1, "inversion.batch_size", self.batch_size, "1 or more")
        check(self.learning_rate > 0, "inversion.learning_rate", self.learning_rate, "positive")
        check(0 <= self.adam_beta1 < 1, "inversion.adam_beta1", self.adam_beta1, "in [0, 1)")
        check(0 <= self.adam_beta2 < 1, "inversion.adam_beta2", self.adam_beta2, "in [0, 1)")
        check(self.adam_epsilon > 0, "inversion.adam_epsilon", self.adam_epsilon, "positive")
        check(self.weight_decay >= 0, "inversion.weight_decay", self.weight_decay, "0 or more")
        check(self.direction_prior >= 0, "inversion.direction_prior", self.direction_prior, "0 or more")
        check(self.max_grad_norm >= 0, "inversion.max_grad_norm", self.max_grad_norm, "0 (off) or positive")
        check(self.norm_control in ("none", "clamp", "sphere"), "inversion.norm_control", self.norm_control,
               "'none', 'clamp' or 'sphere'")  # fmt: skip
        check(self.norm_cap >= 0, "inversion.norm_cap", self.norm_cap, "positive, or 0 for what suits the control")
        self._check_combinations()

    @property
    def norm_limit(self) -> float:
        """What `norm_cap` comes to, in units of the vocabulary's mean norm."""
        return self.norm_cap or (4.0 if self.norm_control == "clamp" else 1.0)

    def _check_combinations(self) -> None:
        """Settings that make no sense together are refused here, before any model is loaded."""
        riemannian = self.optimizer == "riemannian"
        check(self.optimizer in ("adamw", "riemannian"), "inversion.optimizer", self.optimizer,
              "'adamw' or 'riemannian'")  # fmt: skip
        check(not riemannian or self.norm_control == "sphere", "inversion.norm_control", self.norm_control,
              "'sphere' with optimizer 'riemannian'")  # fmt: skip
        check(riemannian or not self.direction_prior, "inversion.direction_prior", self.direction_prior,
              "0 unless optimizer is 'riemannian'")  # fmt: skip
        check(not (riemannian and self.weight_decay), "inversion.weight_decay", self.weight_decay,
              "0 with optimizer 'riemannian', under which norms stay")  # fmt: skip
        chooses = self.stop.method == "dvar" or self.stop.keep_best
        check(not (self.progressive and chooses), "inversion.progressive", self.progressive,
              "false with stop.method 'dvar' or stop.keep_best: they may end before the last has joined")  # fmt: skip
        check(self.adapter.kind == "lora" or not self.penalties.knowledge, "inversion.penalties.knowledge",
              self.penalties.knowledge, "0 unless adapter.kind is 'lora': else other prompts keep")  # fmt: skip
        check(self.init.method != "encoder_output" or self.norm_control == "none", "inversion.norm_control",
              self.norm_control, "'none' with init.method 'encoder_output', whose length it would undo")  # fmt: skip
        check(not (self.per_image_tokens and self.augment.paired), "inversion.per_image_tokens", self.per_image_tokens,
              "false when augment.paired names each view's transform: a prompt holds one or the other")  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """How a picture is drawn from a prompt."""

    solver: Solver = "dpm++"
    """`dpm++` is DPM-Solver++(2M); `ddim` is deterministic DDIM (eta 0), the papers' sampler."""

    steps: int = 20
    """Denoising steps per picture."""

    guidance_scale: float = 0.0
    """Classifier-free guidance; 1 turns it off and halves the cost. 0 takes the model's own: `_guidance_scale` in its
    scheduler's config, 5 (as Gal et al. 2022 drew) where that says nothing."""

    batch_size: int = 16
    """Pictures in one forward pass. Batches are padded to this size, so a picture never depends on its company."""

    def __post_init__(self) -> None:
        check(self.solver in ("ddim", "dpm++"), "sampling.solver", self.solver, "'ddim' or 'dpm++'")
        check(self.steps >= 1, "sampling.steps", self.steps, "1 or more")
        check(self.guidance_scale == 0 or self.guidance_scale >= 1, "sampling.guidance_scale", self.guidance_scale,
              "1 or more, or 0 for the model's own")  # fmt: skip
        check(self.batch_size >= 1, "sampling.batch_size", self.batch_size, "1 or more")
