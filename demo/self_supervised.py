"""Train a small ResNet of the demo world without captions: a feature extractor that sees what the CLIP is blind to.

Training is momentum contrast (MoCo, He et al. 2020; without a queue and with a deeper head as in MoCo v3, Chen et al.
2021) with small crops beside the large one (multi-crop, Caron et al. 2020). A view of a picture must be told from the
views of all other pictures in the batch. No view is blurred, and all views of a picture face the same way. A picture's
mirror image and its copy with a part erased count as other pictures (Tack et al. 2020 contrast with shifted instances),
so that the features keep what tells them apart. White grounds are replaced in most views (Ryali et al. 2021): otherwise
the background would be the easiest thing to tell pictures by.

The loss and the network were chosen after 150 steps of 64 pictures of an earlier world at temperature 0.2 without
erased parts, 70 to 100 CPU seconds each, by the share of fresh scenes of 35 held-out objects on white that were nearest
to their own photos: 98 % for this ResNet, 75 % for it with DINO's loss (Caron et al. 2021), 54 % for a vision
transformer of the same size, 29 % for that with DINO's loss.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn
from transformers import ConvNextImageProcessor, ResNetConfig, ResNetModel

from demo.autoencoder import to_tensor
from demo.backgrounds import draw_background
from demo.captions import COLOURS, PLACE_PHRASES
from demo.clip_model import declare_float32
from demo.loop import Budget, Randomness, Training, optimise
from demo.muon import Muon, parameter_groups
from demo.world import PICTURE_PX

_BATCH = 64
_TEMPERATURE = 0.1
_MATRIX_RATE, _VECTOR_RATE = 4e-3, 1e-3
_MOMENTUM = 0.97
"""Part of the teacher that each step keeps at the start; it rises to 1 along a cosine."""
_LARGE_PX, _LARGE_AREA = 48, (0.5, 1.0)
_SMALL_PX, _SMALL_AREA, _NUM_SMALL = 32, (0.15, 0.5), 2
_TEACHER_AREA = (0.6, 1.0)
"""Shares of the picture's area that the crops show; the teacher's crop has the size of the student's large one."""
_ASPECT = 4 / 3
_JITTER = 0.15
"""Largest change of a view's brightness and contrast, as a share of the range of levels."""
_NEW_GROUND_SHARE = 0.7
_WHITE = 250
_PART_PX = 12


class Network(nn.Module):
    """ResNet with the projection head that training alone needs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = ResNetModel(
            ResNetConfig(embedding_size=48, hidden_sizes=[48, 96, 160], depths=[2, 2, 2], layer_type="basic")
        )
        self.head = nn.Sequential(nn.Linear(160, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 64))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return projections of unit length, [batch, 64]."""
        return F.normalize(self.head(self.encoder(pixels).pooler_output.flatten(1)), dim=1)


class Views:
    """Random views of pictures."""

    def __init__(self, generator: torch.Generator, device: torch.device) -> None:
        self.generator = generator
        rng = np.random.default_rng(0)
        colours = [name for name in COLOURS if name != "white"]
        grounds = [draw_background(name, PICTURE_PX, rng) for name in [*3 * colours, *16 * list(PLACE_PHRASES)]]
        self.grounds = to_tensor(np.stack(grounds).clip(0, 255).astype(np.uint8), device)

    def crop(self, pictures: Tensor, is_ground: Tensor, area: tuple[float, float], side_px: int) -> Tensor:
        """Return a crop of each picture on a random ground, [batch, 3, side_px, side_px] in [-1, 1].

        `is_ground`: [batch, height, width], True where a new ground may show. The crop's share of the picture's area is
        uniform in `area`.
        """
        grounded = self._new_grounds(pictures, is_ground)
        count = len(pictures)
        share = area[0] + (area[1] - area[0]) * self._uniform(count)
        aspect = _ASPECT ** (2 * self._uniform(count) - 1)
        width, height = ((share * factor).sqrt().clamp(max=1) for factor in (aspect, 1 / aspect))
        frames = torch.zeros(count, 2, 3, device=pictures.device)
        frames[:, 0, 0], frames[:, 1, 1] = width, height
        frames[:, 0, 2] = (1 - width) * (2 * self._uniform(count) - 1)
        frames[:, 1, 2] = (1 - height) * (2 * self._uniform(count) - 1)
        places = F.affine_grid(frames, [count, 3, side_px, side_px], align_corners=False)
        cut = F.grid_sample(grounded, places, padding_mode="reflection", align_corners=False)
        brightness, contrast = (_JITTER * (2 * self._uniform(count, 1, 1, 1) - 1) for _ in range(2))
        return ((cut + 1) * (1 + contrast) - 1 + 2 * brightness).clamp(-1, 1)

    def erase_part(self, pictures: Tensor) -> Tensor:
        """Return copies with a square of the corner's colour somewhere in the middle half or near it."""
        erased = pictures.clone()
        first, end = PICTURE_PX // 6, PICTURE_PX - PICTURE_PX // 6 - _PART_PX
        tops, lefts = torch.randint(first, end, (2, len(pictures)), generator=self.generator, device=pictures.device)
        for picture, top, left in zip(erased, tops.tolist(), lefts.tolist(), strict=True):
            picture[:, top : top + _PART_PX, left : left + _PART_PX] = picture[:, :1, :1]
        return erased

    def _new_grounds(self, pictures: Tensor, is_ground: Tensor) -> Tensor:
        chosen = torch.randint(len(self.grounds), (len(pictures),), generator=self.generator, device=pictures.device)
        is_new = (self._uniform(len(pictures)) < _NEW_GROUND_SHARE)[:, None, None] & is_ground
        return torch.where(is_new[:, None], self.grounds[chosen], pictures)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.generator.device)


def white_ground(pictures: np.ndarray) -> np.ndarray:
    """Return True for white pixels that are connected with the border, (batch, height, width), of pictures with three
    white corners or more; False for all other pixels. `pictures`: uint8 (batch, height, width, 3)."""
    found = np.zeros(pictures.shape[:3], bool)
    for ground, is_white in zip(found, pictures.min(3) >= _WHITE, strict=True):
        if is_white[[0, 0, -1, -1], [0, -1, 0, -1]].sum() >= 3:
            labels, _ = ndimage.label(is_white)
            border = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
            ground[:] = np.isin(labels, border[border > 0])
    return found


def contrastive_loss(student: Tensor, teacher: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return InfoNCE (van den Oord et al. 2018) over the student's views, and the share of them that are nearest to the
    teacher's view of their own picture.

    `student`: [views * batch, dim], all first views before all second ones. `teacher`: [batch, dim] of the same
    pictures. `others`: [n, dim] of altered copies, which count as other pictures. All of unit length.
    """
    logits = student @ torch.cat([teacher, others]).T / _TEMPERATURE
    labels = torch.arange(len(teacher), device=teacher.device).repeat(len(student) // len(teacher))
    return F.cross_entropy(logits, labels), (logits.argmax(1) == labels).float().mean()


def train_self_supervised(
    pictures: np.ndarray, folder: Path, checkpoint: Path, *, budget: Budget, device: torch.device, seed: int
) -> None:
    """Train on `pictures`, uint8 (scene, height, width, 3), and save the teacher's ResNet into `folder`."""
    torch.manual_seed(seed)
    student = Network().to(device).train()
    teacher = copy.deepcopy(student).requires_grad_(False)
    randomness = Randomness(seed=seed, device=device)
    views = Views(randomness.torch, device)
    batch = _BATCH if device.type == "cpu" else 4 * _BATCH
    fraction = 0.0

    def loss(fraction_done: float) -> tuple[Tensor, dict[str, float]]:
        nonlocal fraction
        fraction = fraction_done
        drawn = pictures[np.sort(randomness.numpy.integers(0, len(pictures), batch))]
        is_ground = torch.from_numpy(white_ground(drawn)).to(device)
        scenes = to_tensor(drawn, device)
        is_mirrored = torch.rand(len(scenes), generator=randomness.torch, device=device) < 0.5
        scenes = torch.where(is_mirrored[:, None, None, None], scenes.flip(3), scenes)
        is_ground = torch.where(is_mirrored[:, None, None], is_ground.flip(2), is_ground)
        mirrored, erased = scenes.flip(3), views.erase_part(scenes)
        known = [(scenes, is_ground), (mirrored, is_ground.flip(2)), (erased, is_ground)]
        with torch.no_grad():
            keys = teacher(torch.cat([views.crop(*each, _TEACHER_AREA, _LARGE_PX) for each in known]))
        large = student(views.crop(scenes, is_ground, _LARGE_AREA, _LARGE_PX))
        small = [views.crop(scenes, is_ground, _SMALL_AREA, _SMALL_PX) for _ in range(_NUM_SMALL)]
        projections = torch.cat([large, student(torch.cat(small))])
        total, accuracy = contrastive_loss(projections, keys[:batch], keys[batch:])
        return total, {"loss": total.item(), "top1": accuracy.item()}

    @torch.no_grad()
    def follow(step: int) -> None:
        weight = (1 - _MOMENTUM) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * fraction)))
        torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), weight)

    optimise(
        Training(
            name="self-supervised",
            loss=loss,
            optimizer=Muon(parameter_groups(student, matrix_lr=_MATRIX_RATE, vector_lr=_VECTOR_RATE)),
            budget=budget,
            checkpoint=checkpoint,
            stateful={"student": student, "teacher": teacher, "randomness": randomness},
            after_step=follow,
            on_save=lambda step: save_encoder(teacher.encoder, folder),
            save_every_s=120,
            log_every_steps=20,
            warmup_steps=40,
        )
    )


def save_encoder(encoder: ResNetModel, folder: Path) -> None:
    """Write the directory that `ResNetModel.from_pretrained` loads, in fp16, with its image processor's settings."""
    copy.deepcopy(encoder).half().save_pretrained(folder)
    declare_float32(folder)
    half = [0.5] * 3
    ConvNextImageProcessor(
        size={"shortest_edge": PICTURE_PX}, crop_pct=1.0, resample=3, image_mean=half, image_std=half
    ).save_pretrained(folder)
