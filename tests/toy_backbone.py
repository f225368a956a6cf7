"""A `Backbone` of some thousand weights in plain torch, with two text encoders of different width: a step takes a
millisecond, so loops can be tested without a diffusion model."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from textual_inversion.errors import BadInput
from textual_inversion.families.base import Conditioning
from textual_inversion.latents import Views
from textual_inversion.lora import AdapterBatch
from textual_inversion.tokens import TokenTable

START, END = 0, 1
VOCAB_SIZE = 97
DIMS = {"long": 24, "short": 16}


class ToyBackbone:
    """Random but fixed. Words are hashed to ids; the denoiser is one layer that sees the picture, t and the text."""

    def __init__(self, prediction_type: str = "epsilon", seed: int = 0, device: str = "cpu") -> None:
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> Tensor:
            return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(device)

        self.device = torch.device(device)
        self.dtype = torch.float32
        self.resolution = 8
        self.latent_shape = (2, 4, 4)
        self.max_length = 24
        self.vocab_size = VOCAB_SIZE
        self.end_of_text = END
        self.prediction_type = prediction_type
        self.guidance_scale = 5.0
        self.alphas_cumprod = (1 - torch.linspace(0.001, 0.02, 100)).cumprod(0).to(device)
        self.token_tables: Mapping[str, TokenTable] = {
            key: TokenTable(weight(VOCAB_SIZE, dim)) for key, dim in DIMS.items()
        }
        self.adapter_layers: Mapping[str, tuple[int, int]] = {f"{key}.fc2": (dim, 32) for key, dim in DIMS.items()}
        self._position = weight(self.max_length, 1)
        self._mix = {key: weight(32, dim) for key, dim in DIMS.items()}
        self._see = weight(32, 32)
        self._encoder = weight(64, 192)

    def tokenize(self, text: str) -> list[int]:
        return [2 + zlib.crc32(word.encode()) % (VOCAB_SIZE - 2) for word in text.split()]

    def words(self) -> list[str]:
        return ["animal", "cat", "clock", "dog", "toy", "tree"]

    def assemble(self, ids: Sequence[int]) -> list[int]:
        if len(ids) + 2 > self.max_length:
            raise BadInput(f"{len(ids)} tokens do not fit in {self.max_length - 2}")
        return [START, *ids, *[END] * (self.max_length - 1 - len(ids))]

    def encode_prompts(
        self, ids: Tensor, rows: Mapping[str, Tensor], adapters: Sequence[AdapterBatch] = ()
    ) -> Conditioning:
        hidden = torch.zeros(*ids.shape, 32, device=self.device)
        for key, table in self.token_tables.items():
            with table.reading(rows.get(key)):
                words = table(ids) + self._position
            mixed = words @ self._mix[key].T
            for batch in adapters:
                mixed = batch.change(f"{key}.fc2", words, mixed)
            hidden = hidden + mixed
        return Conditioning(hidden=hidden.tanh())

    def encode_images(self, pixels: Tensor) -> Tensor:
        mean, log_std = (pixels.flatten(1) @ self._encoder.T).unflatten(1, (2, *self.latent_shape)).unbind(1)
        return torch.stack([mean, (0.1 * log_std).exp()], dim=1)

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        seen = noisy_latents.flatten(1) @ self._see.T + timesteps[:, None] / 100
        text = (conditioning.hidden * self._position.cumsum(0)).sum(1)
        return (seen + text).view_as(noisy_latents)

    def compile(self, *, backend: str = "inductor", or_plain: bool = False, graphs: bool = False) -> None:
        raise NotImplementedError(f"the toy is not worth it ({backend}, {or_plain}, {graphs})")

    def uncompile(self) -> None: ...

    def decode(self, latents: Tensor) -> Tensor:
        return (latents.flatten(1) @ self._encoder[:32]).unflatten(1, (3, 8, 8)).tanh()

    def scheduler(self, solver: str) -> object:
        raise NotImplementedError(f"the toy draws no pictures (solver {solver!r})")

    def model_hash(self) -> str:
        return "toy"


def plain_views(moments: Tensor) -> Views:
    """Views of one photo, none of them transformed in a way that its prompt would name."""
    return Views(moments=moments, photo=(0,) * len(moments), augmentation=((),) * len(moments))
