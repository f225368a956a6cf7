"""The settings of the method: frozen dataclasses, each field with its unit and effect (augmentation: `augment_config`).

Standard library only. Values are checked once, on construction; the rest of the code relies on that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from textual_inversion.adapter_config import CROSS_ATTENTION, AdapterShape
from textual_inversion.augment_config import AugmentConfig
from textual_inversion.config_checks import require, require_choice

NormControl = Literal["none", "clamp", "sphere"]
InitMethod = Literal["words", "encoder_output", "auto", "amortised", "earlier", "encoder"]
TimestepSampler = Literal["uniform", "range", "snr", "logit_normal"]
TemplateSet = Literal["textual_inversion", "textboost"]
RateSchedule = Literal["constant", "linear"]
RowOptimizer = Literal["adamw", "riemannian"]
GradientPath = Literal["whole", "up_path"]
StopMethod = Literal["budget", "dvar"]
Solver = Literal["ddim", "dpm++"]
Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class InitConfig:
    """Initial values of the rows."""

    method: InitMethod = "words"
    """Method that sets the rows before the first step. `words`: the mean of the initializer's vectors, or of the whole
    vocabulary's if there is no initializer. `encoder_output`: the text encoder's output for the initializer, for each
    row at its own token (Cross-Initialization, Pang et al. 2024), which is many times longer. `auto`: the vectors of
    the word whose text features lie nearest to the photos' features; the word becomes the initializer. `amortised`: the
    initializer's vectors moved towards the photos by a regression fitted on known words; `words` where the regression
    is unreliable. `earlier`: the rows that the concept of the same id has in `earlier_run`; `words` where that run has
    none. `encoder`: the rows that the trained network `encoder` makes from the photos; `words`, and `unsure_steps`
    steps, where it is unsure. A row of the manifest with an embedding to start from (`start_from`) goes before all of
    them."""

    words: tuple[str, ...] = ()
    """Words and phrases that `auto` chooses from and that `amortised` is fitted on. Empty: all single-token words of
    the model's vocabulary, among them ends of longer words that mean nothing by themselves."""

    earlier_run: str = ""
    """Output folder of a finished run of the same model, whose concepts `amortised` is fitted on as well and `earlier`
    starts from."""

    encoder: str = ""
    """Address of the file of an encoder that `python -m pipeline.train_encoder` trained through the same model, with
    the same extractor. A job that names one and no `method` has the method `encoder`."""

    extractor: str = ""
    """Directory or hub id of the CLIP, SigLIP, DINO or DINOv2 that `encoder` was trained with; empty is the run's own
    extractor, which scores pictures and must know texts."""

    unsure_steps: int = 500
    """Optimizer steps, in place of `steps`, of a concept that `encoder` is unsure of, because it is unlike those that
    the encoder was trained on."""

    noise: float = 0.0
    """Standard deviation of the noise added to the initial rows, in units of the vocabulary's deviation per coordinate.
    Of several rows, those after the first always get at least 0.1: equal rows would stay equal."""

    def __post_init__(self) -> None:
        require_choice("init.method", self.method, InitMethod)
        require(all(word.strip() for word in self.words), "init.words", self.words, "words or phrases, none empty")
        is_used = self.method in ("amortised", "earlier") or not self.earlier_run
        require(is_used, "init.earlier_run", self.earlier_run, "empty unless init.method is 'amortised' or 'earlier'")
        has_run = self.method != "earlier" or bool(self.earlier_run)
        require(has_run, "init.earlier_run", "", "the output of a run, which init.method 'earlier' starts from")
        has_encoder = self.method != "encoder" or bool(self.encoder)
        require(has_encoder, "init.encoder", "", "the file of an encoder, which init.method 'encoder' starts from")
        require(self.unsure_steps >= 1, "init.unsure_steps", self.unsure_steps, "1 or more")
        require(self.noise >= 0, "init.noise", self.noise, "0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class TimestepConfig:
    """Distribution of the training timesteps, and the weights of their losses."""

    sampler: TimestepSampler = "uniform"
    """Distribution that timesteps are drawn from. `uniform`: over the whole schedule (Gal et al. 2022). `range`:
    uniform in [low, high). `snr`: p(t) proportional to max log SNR - log SNR(t) (TextBoost v1), which favours noisy
    timesteps. `logit_normal`: the place in the schedule, before a rectified flow's shift, is sigmoid(n) with n ~ N(0,
    1), which favours its middle: the distribution that Stable Diffusion 3 was trained with (Esser et al. 2024)."""

    low: int = 0
    """First timestep of `range`, in timesteps of the model's schedule."""

    high: int = 1000
    """End of `range`, exclusive, in timesteps of the model's schedule."""

    min_snr_gamma: float = 0.0
    """Gamma of the loss weight min(SNR, gamma) / SNR, for v-prediction min(SNR, gamma) / (SNR + 1) (Hang et al. 2023),
    for a rectified flow of noise level sigma min(SNR, gamma) sigma^2; 0 gives all timesteps the weight 1."""

    def __post_init__(self) -> None:
        bounds = (self.low, self.high)
        require_choice("timesteps.sampler", self.sampler, TimestepSampler)
        require(0 <= self.low < self.high, "timesteps.low, high", bounds, "0 <= low < high")
        is_used = self.sampler == "range" or bounds == (0, 1000)
        require(is_used, "timesteps.low, high", bounds, "left alone unless timesteps.sampler is 'range'")
        require(self.min_snr_gamma >= 0, "timesteps.min_snr_gamma", self.min_snr_gamma, "0 (off) or positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig(AdapterShape):
    """TextBoost: a low-rank change of the text encoder, and of what cross-attention takes from it, one for each
    concept, learned with the concept's rows."""

    learning_rate: float = 5e-5
    """Learning rate of the adapter, constant. AdamW trains it under either `optimizer`, without norm control."""

    weight_decay: float = 0.0
    """Decoupled decay of the adapter toward zero; the rows have their own."""

    max_grad_norm: float = 0.0
    """Norm that the gradient of a concept's adapter alone is clipped to, as in TextBoost's code; 0 turns it off."""

    def __post_init__(self) -> None:
        AdapterShape.__post_init__(self)
        require(self.learning_rate > 0, "adapter.learning_rate", self.learning_rate, "positive")
        require(self.weight_decay >= 0, "adapter.weight_decay", self.weight_decay, "0 or more")
        require(self.max_grad_norm >= 0, "adapter.max_grad_norm", self.max_grad_norm, "0 (off) or positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class PenaltyConfig:
    """Weights of the terms added to the denoising loss; 0 leaves a term out, at no cost."""

    class_distance: float = 0.0
    """Weight of each row's squared distance to the mean of the initializer's vectors, averaged over rows (Gal et al.
    2022, "regularised")."""

    start_distance: float = 0.0
    """Weight of each row's distance to its initial value, averaged over rows (Cross-Initialization: 1e-5)."""

    clip: float = 0.0
    """Weight of 1 - cosine between the extractor's features of the decoded prediction of x_0 and of the photo. Makes a
    step several times slower, and optimises the quantity that CLIP-I measures."""

    knowledge: float = 0.0
    """Weight of the mean over tokens of 1 - cosine between the adapted and the frozen text states of unrelated captions
    (TextBoost: 0.1)."""

    captions: str = ""
    """Path of the file with those captions, one a line, on a disk that every machine sees. Empty: `captions.txt` in the
    model's directory if there is one, else the package's general captions. (TextBoost: InstructPix2Pix's 1,400.)"""

    def __post_init__(self) -> None:
        for name in ("class_distance", "start_distance", "clip", "knowledge"):
            value = getattr(self, name)
            require(value >= 0, f"penalties.{name}", value, "0 (off) or positive")
        is_used = self.knowledge > 0 or not self.captions
        require(is_used, "penalties.captions", self.captions, "empty unless penalties.knowledge is positive")
        require("://" not in self.captions, "penalties.captions", self.captions, "the path of a file on a disk")


@dataclass(frozen=True, kw_only=True, slots=True)
class StopConfig:
    """Rule that ends a concept before its budget of steps, and choice of the rows that are returned."""

    method: StopMethod = "budget"
    """Rule that ends a concept. `budget`: after `steps` steps, never before. `dvar` (Voronov et al. 2023): when the
    loss on the evaluation batch has settled, that is, when the variance of its last values is less than a fraction of
    the variance of all its values."""

    check_every_steps: int = 10
    """Steps between two evaluations of the loss on the evaluation batch; each costs a forward pass of `batch_size`
    samples."""

    window: int = 15
    """Number of last values whose variance is compared (the paper: 310, with an evaluation at every step)."""

    variance_ratio: float = 0.15
    """Fraction below which `dvar` ends the concept, in (0, 1)."""

    keep_best: bool = False
    """Return the rows with the lowest loss on the evaluation batch, not the last ones. Causes evaluations under
    `budget`, too."""

    @property
    def needs_eval(self) -> bool:
        """True if a setting needs the loss on the evaluation batch."""
        return self.method == "dvar" or self.keep_best

    def __post_init__(self) -> None:
        require_choice("stop.method", self.method, StopMethod)
        require(self.check_every_steps >= 1, "stop.check_every_steps", self.check_every_steps, "1 or more")
        require(self.window >= 2, "stop.window", self.window, "2 or more")
        require(0 < self.variance_ratio < 1, "stop.variance_ratio", self.variance_ratio, "in (0, 1)")


@dataclass(frozen=True, kw_only=True, slots=True)
class InversionConfig:
    """Settings of the inversion of one concept. All of them enter the concept's fingerprint."""

    steps: int = 500
    """Largest number of optimizer steps per concept. 0, with `init.method` 'encoder' alone, keeps the encoder's rows as
    they are."""

    batch_size: int = 4
    """Samples of one concept in one step; the concept's loss is their mean."""

    learning_rate: float = 5e-3
    """Learning rate of the rows. Not scaled by batch size or device count."""

    learning_rate_schedule: RateSchedule = "constant"
    """Course of the rows' learning rate over `steps`. `linear`: it falls to zero (TextBoost's release of September
    2024). The adapter's stays constant."""

    optimizer: RowOptimizer = "adamw"
    """Optimizer of the rows. `riemannian` moves rows along the sphere (DTI, Kim et al. 2026) and needs `norm_control`
    'sphere'."""

    adam_beta1: float = 0.9
    """Decay per step of Adam's mean of the gradients, in [0, 1)."""

    adam_beta2: float = 0.999
    """Decay per step of Adam's mean of the squared gradients, in [0, 1)."""

    adam_epsilon: float = 1e-8
    """Number added to Adam's denominator."""

    weight_decay: float = 0.0
    """Decoupled decay of the rows toward zero: the fraction lost per step is this times the learning rate."""

    direction_prior: float = 0.0
    """DTI's kappa: strength of the pull toward the initializer's direction (von Mises-Fisher prior), 1e-4 in the paper.
    Only with `optimizer` 'riemannian'."""

    max_grad_norm: float = 0.0
    """Norm that each concept's own gradient, of rows and adapter together, is clipped to; 0 turns clipping off."""

    norm_control: NormControl = "clamp"
    """Control of the rows' norms after each step. `none`: there is none. `clamp`: norms are at most `norm_cap` times
    the vocabulary's mean norm (TextBoost). `sphere`: every norm is exactly that."""

    norm_cap: float = 0.0
    """Norm of `norm_control`, in units of the vocabulary's mean norm. 0 stands for 4 under `clamp`, which stops only
    runaways (measured: see benchmarks/), and for 1 under `sphere`. TextBoost clamps at 1."""

    templates: TemplateSet = "textual_inversion"
    """Training templates of concepts without captions. `textual_inversion`: the paper's 27, for styles its code's 19.
    `textboost`: the four of TextBoost's release ("photo of a {} with background"), for styles the same 19."""

    class_cue: bool = False
    """Name the initializer behind the placeholder ("a photo of a <cat-toy> toy"), in training prompts and wherever the
    concept is drawn."""

    progressive: bool = False
    """Gal et al. 2022, "progressive": train the i-th of k vectors only after (i - 1) / k of the steps."""

    per_image_tokens: bool = False
    """Gal et al. 2022, "per-image tokens": give each photo a row of its own, too, which a quarter of the prompts name
    ("a photo of S* with S_i") and which can learn what is particular to the photo. These rows are not kept."""

    text_encoders: tuple[str, ...] = ()
    """Keys of the text encoders in which rows are learned (`clip_l`, `clip_g`, `t5xxl`); in the others, a placeholder's
    rows keep their initial values, the mean of the initializer's vectors. Empty: all but T5."""

    gradient_path: GradientPath = "whole"
    """Part of the denoiser that gradients pass through on their way to the text. `whole`: all of it. `up_path`: of a
    U-Net, the blocks behind its middle; the down path and the middle are taken as constant. Costs 0.82 of the FLOPs on
    Stable Diffusion 1.5, and keeps less for the backward pass; the gradient is another one, of nearly the same
    direction on the demo model. Needs a model with a U-Net."""

    init: InitConfig = field(default_factory=InitConfig)
    timesteps: TimestepConfig = field(default_factory=TimestepConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    penalties: PenaltyConfig = field(default_factory=PenaltyConfig)
    stop: StopConfig = field(default_factory=StopConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        least = 0 if self.init.method == "encoder" else 1
        require(self.steps >= least, "inversion.steps", self.steps, "1 or more; 0 with init.method 'encoder' alone")
        require(self.batch_size >= 1, "inversion.batch_size", self.batch_size, "1 or more")
        require(self.learning_rate > 0, "inversion.learning_rate", self.learning_rate, "positive")
        require_choice("inversion.learning_rate_schedule", self.learning_rate_schedule, RateSchedule)
        require_choice("inversion.optimizer", self.optimizer, RowOptimizer)
        require(0 <= self.adam_beta1 < 1, "inversion.adam_beta1", self.adam_beta1, "in [0, 1)")
        require(0 <= self.adam_beta2 < 1, "inversion.adam_beta2", self.adam_beta2, "in [0, 1)")
        require(self.adam_epsilon > 0, "inversion.adam_epsilon", self.adam_epsilon, "positive")
        require(self.weight_decay >= 0, "inversion.weight_decay", self.weight_decay, "0 or more")
        require(self.direction_prior >= 0, "inversion.direction_prior", self.direction_prior, "0 or more")
        require(self.max_grad_norm >= 0, "inversion.max_grad_norm", self.max_grad_norm, "0 (off) or positive")
        require_choice("inversion.norm_control", self.norm_control, NormControl)
        require_choice("inversion.templates", self.templates, TemplateSet)
        require_choice("inversion.gradient_path", self.gradient_path, GradientPath)
        require(self.norm_cap >= 0, "inversion.norm_cap", self.norm_cap, "positive, or 0 for the control's default")
        self._check_combinations()

    @property
    def norm_limit(self) -> float:
        """Norm that `norm_cap` stands for, in units of the vocabulary's mean norm."""
        return self.norm_cap or (4.0 if self.norm_control == "clamp" else 1.0)

    def _check_combinations(self) -> None:
        """Raise ValueError for settings that make no sense together."""
        is_riemannian = self.optimizer == "riemannian"
        forbidden = [
            (is_riemannian and self.norm_control != "sphere", "norm_control", "'sphere' with optimizer 'riemannian'"),
            (bool(self.direction_prior) and not is_riemannian, "direction_prior", "0 unless optimizer is 'riemannian'"),
            (
                is_riemannian and self.weight_decay > 0,
                "weight_decay",
                "0 with optimizer 'riemannian', which keeps norms",
            ),
            (
                bool(self.max_grad_norm and self.adapter.max_grad_norm),
                "max_grad_norm",
                "0 with adapter.max_grad_norm: a gradient is clipped once",
            ),
            (
                self.progressive and self.stop.needs_eval,
                "progressive",
                "false with stop.method 'dvar' or stop.keep_best: they may end before the last vector has joined",
            ),
            (
                self.init.method == "encoder_output" and self.norm_control != "none",
                "norm_control",
                "'none' with init.method 'encoder_output', whose large norm any control would undo",
            ),
            (
                self.init.method == "encoder_output" and bool(self.text_encoders),
                "text_encoders",
                "empty with init.method 'encoder_output', whose rows are a start for learning alone",
            ),
            (
                self.per_image_tokens and self.augment.paired > 0,
                "per_image_tokens",
                "false with augment.paired: a prompt names either its photo or its transforms",
            ),
            (
                self.gradient_path == "up_path"
                and self.adapter.kind != "none"
                and CROSS_ATTENTION in self.adapter.targets,
                "gradient_path",
                f"'whole' with {CROSS_ATTENTION!r} among adapter.targets: the down path's layers would never learn",
            ),
        ]
        for clashes, name, rule in forbidden:
            require(not clashes, f"inversion.{name}", getattr(self, name), rule)
        require(
            self.adapter.kind == "lora" or not self.penalties.knowledge,
            "inversion.penalties.knowledge",
            self.penalties.knowledge,
            "0 unless adapter.kind is 'lora': without one, prompts without the concept do not change",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """Settings for drawing a picture from a prompt."""

    solver: Solver = "dpm++"
    """Solver of the reverse process. `dpm++`: DPM-Solver++(2M). `ddim`: deterministic DDIM (eta 0), the papers'
    sampler; on a rectified flow, Euler's method, which is the same step there."""

    steps: int = 0
    """Denoising steps per picture. 0 takes the model's own number: `_num_inference_steps` in its scheduler's config;
    where the config has none, 4 if it is that of a distilled model, else 20."""

    guidance_scale: float = 0.0
    """Scale of classifier-free guidance; 1 turns guidance off and halves the cost. A denoiser that reads the scale
    (FLUX.1 dev) is told it and costs the same at any. 0 takes the model's own scale: `_guidance_scale` in its
    scheduler's config; where the config has none, 1 if it is that of a distilled model, else the family's, 5 with a
    U-Net (as Gal et al. 2022 drew), 7 for Stable Diffusion 3 and 3.5 for FLUX.1 dev."""

    batch_size: int = 16
    """Pictures in one forward pass. Batches are padded to this size, so that a picture never depends on the others in
    its batch."""

    def __post_init__(self) -> None:
        require_choice("sampling.solver", self.solver, Solver)
        require(self.steps >= 0, "sampling.steps", self.steps, "1 or more, or 0 for the model's own")
        is_scale = self.guidance_scale == 0 or self.guidance_scale >= 1
        require(is_scale, "sampling.guidance_scale", self.guidance_scale, "1 or more, or 0 for the model's own")
        require(self.batch_size >= 1, "sampling.batch_size", self.batch_size, "1 or more")
