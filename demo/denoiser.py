"""Train text encoder and U-Net jointly with the latent diffusion loss, and save a plain `StableDiffusionPipeline`.

The model predicts v (Salimans & Ho 2022); 10 % of captions are empty, for guidance. A caption is encoded once and used
for two draws of noise and timestep. Some captions hold a word that is made from a picture (`demo.unnamed`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from demo.autoencoder import LATENT_CHANNELS
from demo.clip_model import WIDTH, declare_float32, text_encoder_of
from demo.folders import replaced_folder
from demo.latent_pool import LatentPool
from demo.loop import Average, Budget, Randomness, Training, optimise
from demo.muon import Muon, parameter_groups
from demo.tokenizer import encode, load_tokenizer
from demo.unnamed import WordsFromPictures, open_vocabulary
from demo.warm_start import grow_unet, transfer_text_encoder
from textual_inversion.noise import from_scheduler_config
from textual_inversion.weights import load_pretrained

_CAPTIONS_PER_BATCH = 48
_DRAWS_PER_CAPTION = 2
_MATRIX_LR = 4e-3
_VECTOR_LR = 1.5e-3
_TEXT_ENCODER_LR = 2e-4
_TABLE_LR = 1e-3
"""Learning rate of the token table and of the network that makes words: a row is touched by few samples of a step."""
_EMPTY_CAPTION_FRACTION = 0.1
NUM_TRAIN_TIMESTEPS = 1000
GUIDANCE_SCALE = 2.0
"""Guidance scale with the best pictures, measured by `demo.evaluate`; stored in the scheduler's config."""


def new_scheduler() -> DDIMScheduler:
    """Make a scheduler with Stable Diffusion's betas; "trailing" starts sampling at the last, noisiest timestep."""
    scheduler = DDIMScheduler(
        num_train_timesteps=NUM_TRAIN_TIMESTEPS,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    scheduler.register_to_config(_guidance_scale=GUIDANCE_SCALE)
    return scheduler


def new_unet() -> UNet2DConditionModel:
    """Make an untrained U-Net of 9.6 million parameters whose residual branches and output start at zero."""
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(96, 192),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # diffusers' name; it is the number of heads
        norm_num_groups=16,
    )
    zeroed: list[nn.Module] = [unet.conv_out]
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            zeroed.append(module.conv2)
        elif isinstance(module, Transformer2DModel):
            zeroed.append(module.proj_out)
        elif isinstance(module, BasicTransformerBlock):
            zeroed += [module.attn1.to_out[0], module.ff.net[-1]]
    for module in zeroed:
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
    return unet


def stratified_quantiles(batch: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Draw one number from each of `batch` equal slices of [0, 1), in random order, fp32 (batch,)."""
    slices = torch.randperm(batch, generator=generator, device=device)
    within = torch.rand(batch, generator=generator, device=device)
    return (slices + within) / batch


def stratified_timesteps(batch: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Draw one timestep from each of `batch` equally likely slices, in random order, int64 (batch,).

    The density grows linearly with t, because the prompt decides at the noisy end: measured after 1,000 steps, a wrong
    prompt raised the error of the predicted picture by half at t = 900, and by nothing at t = 100.
    """
    quantiles = stratified_quantiles(batch, generator, device)
    return (NUM_TRAIN_TIMESTEPS * quantiles.sqrt()).long().clamp(max=NUM_TRAIN_TIMESTEPS - 1)


def velocity_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the squared error of the velocity (`noise.VPrediction`), per sample: (batch,).

    The error is not weighted: min-SNR weights (Hang et al. 2023) all but silence the noisy end of the schedule, where
    the prompt decides what the object is. With them 750 steps gave the right colours and places but no shapes.
    """
    return (prediction.float() - target).pow(2).mean((1, 2, 3))


@contextmanager
def mixed_precision(device: torch.device) -> Iterator[None]:
    """Use bf16 autocast on a GPU and on a CPU with AMX; elsewhere fp32 is faster.

    One step of the U-Net took 1.4 times as long in bf16 as in fp32 on a CPU with AVX512-bf16 and without AMX, and 12 to
    25 times as long on one that emulates bf16. In bf16 on a CPU, attention is spelled out in matrix products: the fused
    kernel's backward pass took six times as long.
    """
    is_cpu = device.type == "cpu"
    is_native = not is_cpu or bool(torch.cpu.get_capabilities().get("amx_bf16"))
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=is_native))
        if is_cpu and is_native:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


class DenoiserTraining:
    """Modules of one training, and the loss of one step."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        pool: LatentPool,
        empty_ids: Tensor,
        randomness: Randomness,
    ) -> None:
        self.unet = unet
        self.text_encoder = text_encoder
        self.vocabulary = open_vocabulary(text_encoder)
        self.words = WordsFromPictures(pool.features.shape[1], self.vocabulary.table.weight.detach())
        self.words.to(randomness.device)
        self.pool = pool
        self.empty_ids = empty_ids
        self.randomness = randomness
        self.device = randomness.device
        self.noise = from_scheduler_config(new_scheduler().config, self.device)
        scale = 1 if self.device.type == "cpu" else 8
        self.captions = scale * _CAPTIONS_PER_BATCH

    def loss(self, fraction_done: float) -> tuple[Tensor, dict[str, float]]:
        """Return the mean loss of one batch, and figures to log."""
        rows = self.pool.sample(self.captions, self.randomness.numpy)
        latents = self.pool.latents[rows].to(self.device).float().repeat_interleave(_DRAWS_PER_CAPTION, 0)
        ids = self.pool.input_ids[rows].clone()
        ids[self.randomness.numpy.random(self.captions) < _EMPTY_CAPTION_FRACTION] = self.empty_ids
        features = self.pool.features[self.pool.objects[rows].clamp(min=0)].to(self.device)
        noise = torch.randn(latents.shape, generator=self.randomness.torch, device=self.device)
        timesteps = stratified_timesteps(len(latents), self.randomness.torch, self.device)
        noisy, target = self.noise.corrupt(latents, noise, timesteps)
        with mixed_precision(self.device):
            self.vocabulary.rows = self.words(features, self.randomness.torch).float()
            hidden = self.text_encoder(ids.to(self.device)).last_hidden_state
            prediction = self.unet(noisy, timesteps, hidden.repeat_interleave(_DRAWS_PER_CAPTION, 0)).sample
        losses = velocity_loss(prediction, target)
        figures = {"loss": losses.mean().item()}
        is_unnamed = (self.pool.objects[rows] >= 0).repeat_interleave(_DRAWS_PER_CAPTION).to(self.device)
        if is_unnamed.any():
            figures["unnamed"] = losses[is_unnamed].mean().item()
        return losses.mean(), figures


def without_origin(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's configuration without the folder it was loaded from, which has no meaning on other machines."""
    return {key: value for key, value in config.items() if key != "_name_or_path"}


def copy_of(vae: AutoencoderKL) -> AutoencoderKL:
    """Return a copy that a writer may change to fp16."""
    copy = AutoencoderKL.from_config(without_origin(vae.config))
    copy.load_state_dict(vae.state_dict())
    return copy


def save_pipeline(
    folder: Path,
    *,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
) -> None:
    """Write an fp16 `StableDiffusionPipeline` directory beside `folder`, then swap it in."""
    pipeline = StableDiffusionPipeline(
        unet=unet,
        text_encoder=text_encoder,
        vae=vae,
        tokenizer=tokenizer,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.float16)
    with replaced_folder(folder) as temporary:
        pipeline.save_pretrained(temporary)
        declare_float32(temporary / "text_encoder")


def start_modules(
    tokenizer: CLIPTokenizer, clip: Path, init_from: Path | None
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Return the U-Net and the text encoder that a training starts from, in fp32.

    With `init_from` they continue the pipeline there, which may have a smaller vocabulary and a shallower U-Net.
    Without it the text encoder is the text tower of the CLIP in `clip`.
    """
    unet = new_unet()
    if init_from is None:
        return unet, text_encoder_of(load_pretrained(CLIPModel, str(clip)).float())
    known = load_pretrained(CLIPTextModel, str(init_from / "text_encoder"))
    text_encoder = transfer_text_encoder(known, load_tokenizer(init_from / "tokenizer"), tokenizer)
    return grow_unet(load_pretrained(UNet2DConditionModel, str(init_from / "unet")), unet), text_encoder


def train_denoiser(
    pool: LatentPool,
    tokenizer: CLIPTokenizer,
    vae: AutoencoderKL,
    folder: Path,
    checkpoint: Path,
    *,
    budget: Budget,
    device: torch.device,
    seed: int,
    clip: Path,
    init_from: Path | None = None,
    decay_from: float = 0.0,
) -> None:
    """Train the modules of `start_modules`, and save their averages as a pipeline into `folder`."""
    torch.manual_seed(seed)
    unet, text_encoder = start_modules(tokenizer, clip, init_from)
    unet = unet.to(device).train()
    text_encoder = text_encoder.to(device).train()
    randomness = Randomness(seed=seed, device=device)
    training = DenoiserTraining(unet, text_encoder, pool, encode(tokenizer, [""])[0], randomness)
    averages = {"unet": Average(unet), "text_encoder": Average(text_encoder)}
    groups = parameter_groups(unet, matrix_lr=_MATRIX_LR, vector_lr=_VECTOR_LR)
    table = training.vocabulary.table.weight
    others = [parameter for parameter in text_encoder.parameters() if parameter is not table]
    groups.append({"params": others, "lr": _TEXT_ENCODER_LR, "is_matrix": False})
    groups.append({"params": [table, *training.words.parameters()], "lr": _TABLE_LR, "is_matrix": False})

    def save(step: int) -> None:
        averaged_unet = UNet2DConditionModel.from_config(without_origin(unet.config))
        averaged_text_encoder = CLIPTextModel(text_encoder.config)
        averages["unet"].copy_to(averaged_unet)
        averages["text_encoder"].copy_to(averaged_text_encoder)
        copy = copy_of(vae)
        save_pipeline(folder, unet=averaged_unet, text_encoder=averaged_text_encoder, vae=copy, tokenizer=tokenizer)

    def average(step: int) -> None:
        for part in averages.values():
            part.update(step)

    stateful = {"unet": unet, "text_encoder": text_encoder, "words": training.words, "randomness": randomness}
    stateful |= {f"average_{key}": part for key, part in averages.items()}
    optimise(
        Training(
            name="denoiser",
            loss=training.loss,
            optimizer=Muon(groups),
            budget=budget,
            checkpoint=checkpoint,
            stateful=stateful,
            after_step=average,
            on_save=save,
            warmup_steps=100,
            decay_from=decay_from,
            log_every_steps=25,
            save_every_s=480,
        )
    )
