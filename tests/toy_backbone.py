"""A `Backbone` of some thousand weights in plain torch, with two text encoders of different width: a step takes a
millisecond, so loops can be tested without a diffusion model."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from textual_inversion.conditioning import Conditioning
from textual_inversion.cross_attention import layer_changes
from textual_inversion.errors import BadInput
from textual_inversion.families.base import MemorySaving, sized_latents
from textual_inversion.latents import EncodedViews
from textual_inversion.lora import AdapterBatch
from textual_inversion.noise import Epsilon, Noise, VPrediction
from textual_inversion.paired_augment import Augmentation
from textual_inversion.prompts import Vocabularies
from textual_inversion.tokens import TokenTable

START, END = 0, 1
VOCAB_SIZE = 97
MAX_LENGTH = 24
DIMS = {"long": 24, "short": 16}
CROSS_LAYERS = ("denoiser.0.cross_attention", "denoiser.1.cross_attention")
ALPHAS_CUMPROD = (1 - torch.linspace(0.001, 0.02, 100)).cumprod(0)


class HashedWords:
    """A vocabulary of hashed words."""

    def __init__(self, size: int = VOCAB_SIZE, max_length: int = MAX_LENGTH) -> None:
        self.size, self.max_length = size, max_length
        self.end_of_text = self.unknown = END
        self.max_tokens = max_length - 2

    def tokenize(self, text: str) -> list[int]:
        return [2 + zlib.crc32(word.encode()) % (self.size - 2) for word in text.split()]

    def assemble(self, ids: Sequence[int]) -> list[int]:
        if len(ids) > self.max_tokens:
            raise BadInput(f"{len(ids)} tokens do not fit in {self.max_tokens}")
        return [START, *ids, *[END] * (self.max_length - 1 - len(ids))]


VOCABULARY = HashedWords()
"""Vocabulary of both text encoders."""


def toy_ids(prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Return the same ids for both text encoders, [prompts, length] each."""
    return {key: torch.tensor(prompts) for key in DIMS}


class ToyBackbone:
    """A backbone with fixed random weights. Words are hashed to ids; the denoiser is one layer of picture, t and the
    text, which it reads twice."""

    def __init__(self, prediction_type: str = "epsilon", seed: int = 0, device: str = "cpu") -> None:
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> Tensor:
            return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(device)

        self.device = torch.device(device)
        self.dtype = torch.float32
        self.resolution = 8
        self.latent_shape = (2, 4, 4)
        processes: dict[str, type[Epsilon] | type[VPrediction]] = {"epsilon": Epsilon, "v_prediction": VPrediction}
        self.noise: Noise = processes[prediction_type](ALPHAS_CUMPROD.to(device), {"steps_offset": 1})
        self.guidance_scale = 5.0
        self.embeds_guidance = False
        self.has_up_path = False
        self.sampling_steps = 20
        self.guides_by_zeros = False
        self.vocabularies: Vocabularies = dict.fromkeys(DIMS, VOCABULARY)
        self.token_tables: Mapping[str, TokenTable] = {
            key: TokenTable(weight(VOCAB_SIZE, dim)) for key, dim in DIMS.items()
        }
        linear_layers = {f"{key}.fc2": (dim, 32) for key, dim in DIMS.items()}
        self.adapter_layers: Mapping[str, tuple[int, int]] = {**linear_layers, **dict.fromkeys(CROSS_LAYERS, (32, 32))}
        self._position = weight(MAX_LENGTH, 1)
        self._mix = {key: weight(32, dim) for key, dim in DIMS.items()}
        self._see = weight(32, 32)
        self._encoder = weight(64, 192)

    def latent_shape_for(self, width: int, height: int) -> tuple[int, int, int]:
        return sized_latents(self, width, height, multiple_px=self.resolution, most_px=self.resolution)

    def single_token_words(self) -> list[str]:
        return ["animal", "cat", "clock", "dog", "toy", "tree"]

    def encode_prompts(
        self, ids: Mapping[str, Tensor], rows: Mapping[str, Tensor], adapters: Sequence[AdapterBatch] = ()
    ) -> Conditioning:
        hidden = sum(self._states(ids, rows, adapters).values(), torch.zeros((), device=self.device)).tanh()
        return Conditioning(hidden=hidden, changes=layer_changes(CROSS_LAYERS, hidden, adapters, "long"))

    def encoder_states(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._states(ids, {}, ())

    def _states(
        self, ids: Mapping[str, Tensor], rows: Mapping[str, Tensor], adapters: Sequence[AdapterBatch]
    ) -> dict[str, Tensor]:
        states = {}
        for key, table in self.token_tables.items():
            with table.reading(rows.get(key)):
                words = table(ids[key]) + self._position
            states[key] = words @ self._mix[key].T
            for batch in adapters:
                states[key] = batch.change(key, f"{key}.fc2", words, states[key])
        return states

    def encode_images(self, pixels: Tensor) -> Tensor:
        mean, log_std = (pixels.flatten(1) @ self._encoder.T).unflatten(1, (2, *self.latent_shape)).unbind(1)
        return torch.stack([mean, (0.1 * log_std).exp()], dim=1)

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        seen = noisy_latents.flatten(1) @ self._see.T + timesteps[:, None] / 100
        text = torch.zeros((), device=self.device)
        for layer, weights in enumerate((self._position.cumsum(0), self._position)):
            changes = conditioning.changes
            states = changes.states(conditioning.hidden, layer) if changes else conditioning.hidden
            text = text + (states * weights).sum(1)
        return (seen + text).view_as(noisy_latents)

    def middle_features(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        raise NotImplementedError(f"the toy has no middle ({noisy_latents.shape}, {timesteps}, {conditioning})")

    def compile(self, *, backend: str = "inductor", or_plain: bool = False, graphs: bool = False) -> None:
        raise NotImplementedError(f"the toy is not worth it ({backend}, {or_plain}, {graphs})")

    def uncompile(self) -> None: ...

    def save_memory(self, saving: MemorySaving) -> None:
        """Do nothing: the toy has no blocks and no tiles."""

    def decode(self, latents: Tensor) -> Tensor:
        return (latents.flatten(1) @ self._encoder[:32]).unflatten(1, (3, 8, 8)).tanh()

    def model_hash(self) -> str:
        return "toy"


def plain_views(moments: Tensor) -> EncodedViews:
    """Return moments as the encoded views of one photo, without transforms that a prompt would name."""
    return EncodedViews(
        moments=moments, photo_indices=(0,) * len(moments), augmentations=(Augmentation(),) * len(moments)
    )
