"""KL autoencoder from 64x64x3 pictures to 8x8x16 latents and back.

The model is trained on whole pictures (GroupNorm statistics of crops do not carry over). In a second stage the encoder
is frozen and only the decoder is trained: latents stay valid, so this can run beside the denoiser's training.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from demo.loop import Average, Budget, Randomness, Training, optimise
from demo.muon import Muon, parameter_groups
from demo.world import PICTURE_PX
from textual_inversion.weights import load_pretrained

LATENT_CHANNELS = 16
_BATCH = 8
_LEARNING_RATE = 4e-3
_KL_WEIGHT = 2e-4
_GRADIENT_WEIGHT = 0.5


def new_autoencoder() -> AutoencoderKL:
    """Make an untrained autoencoder of about 2.5 million parameters, whose residual branches start at zero."""
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=PICTURE_PX,
        mid_block_add_attention=False,
    )
    for block in model.modules():
        if isinstance(block, ResnetBlock2D):  # 2 dB more after a hundred steps than with the default start
            nn.init.zeros_(block.conv2.weight)
            nn.init.zeros_(block.conv2.bias)
    return model


def to_tensor(pictures: np.ndarray, device: torch.device) -> Tensor:
    """Convert uint8 (batch, height, width, 3) to float (batch, 3, height, width) in -1..1."""
    batch = torch.from_numpy(np.array(pictures)).to(device).permute(0, 3, 1, 2)
    return batch.float().div(127.5).sub(1).contiguous()


def _differences(pictures: Tensor) -> tuple[Tensor, Tensor]:
    return pictures[..., 1:] - pictures[..., :-1], pictures[..., 1:, :] - pictures[..., :-1, :]


def reconstruction_loss(decoded: Tensor, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Return L1 + MSE + L1 of image gradients (for sharp edges), and the plain MSE, for PSNR."""
    mse = (decoded - pictures).pow(2).mean()
    gradient = sum(
        (ours - theirs).abs().mean() for ours, theirs in zip(_differences(decoded), _differences(pictures), strict=True)
    )
    return (decoded - pictures).abs().mean() + mse + _GRADIENT_WEIGHT * gradient, mse


def psnr(mse: float) -> float:
    """Return the peak signal-to-noise ratio in dB of pictures in -1..1."""
    return float(10 * np.log10(4 / mse))


def train_autoencoder(
    pictures: np.ndarray,
    folder: Path,
    checkpoint: Path,
    *,
    budget: Budget,
    device: torch.device,
    seed: int,
    init_from: Path | None = None,
    is_decoder_only: bool = False,
) -> None:
    """Train all, or with `is_decoder_only` the decoder of `init_from`, and save the averaged weights into `folder`."""
    torch.manual_seed(seed)
    model = load_pretrained(AutoencoderKL, str(init_from)) if init_from else new_autoencoder()
    model = model.float().to(device)
    trained: nn.Module = nn.ModuleList([model.post_quant_conv, model.decoder]) if is_decoder_only else model
    batch = _BATCH if device.type == "cpu" else 16 * _BATCH
    rate = _LEARNING_RATE * (0.5 if is_decoder_only else 1.0)
    optimizer = Muon(parameter_groups(trained, matrix_lr=rate, vector_lr=rate))
    randomness = Randomness(seed=seed, device=device)
    average = Average(trained, decay=0.995)

    def loss(fraction_done: float) -> tuple[Tensor, dict[str, float]]:
        rows = np.sort(randomness.numpy.integers(0, len(pictures), batch))
        batch_pictures = to_tensor(pictures[rows], device)
        with torch.set_grad_enabled(not is_decoder_only):
            posterior = model.encode(batch_pictures).latent_dist
            latents = posterior.sample(randomness.torch)
        decoded = model.decode(latents).sample
        reconstruction, mse = reconstruction_loss(decoded, batch_pictures)
        total = reconstruction
        if not is_decoder_only:
            total = reconstruction + _KL_WEIGHT * posterior.kl().mean() / latents[0].numel()
        return total, {"loss": total.item(), "psnr": psnr(mse.item())}

    def save(step: int) -> None:
        _save_average(model, average, is_decoder_only, folder)

    optimise(
        Training(
            name="decoder" if is_decoder_only else "autoencoder",
            loss=loss,
            optimizer=optimizer,
            budget=budget,
            checkpoint=checkpoint,
            stateful={"model": model, "average": average, "randomness": randomness},
            after_step=average.update,
            on_save=save,
            save_every_s=240,
        )
    )


def _save_average(model: AutoencoderKL, average: Average, is_decoder_only: bool, folder: Path) -> None:
    averaged = AutoencoderKL.from_config(model.config)
    averaged.load_state_dict(model.state_dict())
    target = nn.ModuleList([averaged.post_quant_conv, averaged.decoder]) if is_decoder_only else averaged
    average.copy_to(target)
    averaged.save_pretrained(folder)


@torch.no_grad()
def encode_pool(
    model: AutoencoderKL, pictures: np.ndarray, device: torch.device, report: Callable[[int], None] = lambda row: None
) -> Tensor:
    """Return the posterior means of all pictures, fp16 (scene, channels, 8, 8), not scaled."""
    means = []
    for start in range(0, len(pictures), 250):
        means.append(model.encode(to_tensor(pictures[start : start + 250], device)).latent_dist.mean.half().cpu())
        report(start)
    return torch.cat(means)


@torch.no_grad()
def normalise_latents(model: AutoencoderKL, means: Tensor) -> Tensor:
    """Give every latent channel zero mean and unit deviation by editing the two 1x1 convolutions around the latents.

    Reconstructions do not change, and the scaling factor becomes 1. Returns the posterior means (scene, channels, 8, 8)
    in the new units.
    """
    deviation, centre = torch.std_mean(means.float(), dim=(0, 2, 3))
    into = model.quant_conv
    out_of = model.post_quant_conv
    channels = len(centre)
    out_of.bias += out_of.weight[:, :, 0, 0] @ centre
    out_of.weight *= deviation[None, :, None, None]
    into.weight[:channels] /= deviation[:, None, None, None]
    into.bias[:channels] = (into.bias[:channels] - centre) / deviation
    into.bias[channels:] -= 2 * deviation.log()  # the posterior's log-variance
    model.register_to_config(scaling_factor=1.0)
    return ((means.float() - centre[:, None, None]) / deviation[:, None, None]).half()
