"""A network that maps a concept's photos to its rows: an encoder trained through the frozen model.

Gal et al. 2023 ("Encoder-based Domain Tuning", arXiv 2302.12228, section 4.1) train an encoder by the denoising loss to
predict the offset of a concept's embedding from that of a coarse class word, and penalise the offset's square; Arar et
al. 2023 (arXiv 2307.06925) do it for any class. Differences here: the encoder reads features of frozen networks of a
*set* of photos (Zaheer et al. 2017, "Deep Sets": a network for each photo, the mean, a network for the set), not of one
photo and of the noisy latents; the denoiser stays frozen; and the offset's norm is bounded.

With an adapter, the network makes its low-rank factors as well (Park et al. 2024, arXiv 2409.08248).

The files of a trained encoder are in `encoder_file`, its training in `encoder_training`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from textual_inversion.adapter_config import AdapterShape
from textual_inversion.augment_config import AugmentConfig
from textual_inversion.encoder_config import EncoderConfig
from textual_inversion.families.base import Backbone, stack_prompts
from textual_inversion.initialise import learning_encoders
from textual_inversion.latents import AUTOENCODER_BATCH_SIZE, encode_views
from textual_inversion.lora import initial_adapter
from textual_inversion.model_checks import NO_MIDDLE_BLOCK
from textual_inversion.parameters import ADAPTER, AdapterLayout
from textual_inversion.prompts import encode_prompt
from textual_inversion.rng import generator_for
from textual_inversion.transfer import to_device

if TYPE_CHECKING:
    from textual_inversion.extractors import ImageExtractor

_PLAIN = AugmentConfig(flip=False)
NO_ADAPTER = AdapterShape()

_NOISED_AT = 0.25
"""Timestep, as a share of all, of the noised latents whose features the denoiser gives. Tang et al. 2023 ("Emergent
Correspondence from Image Diffusion", arXiv 2306.03881) find features of objects best there, at 261 of 1,000."""

_ADAPTER_UNIT = 1e-3
"""Change of an adapter by one unit of the network's output: a step of training then changes an adapter about as much as
a step of TextBoost (1e-4) does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureSizes:
    """Numbers of features of one photo, in the order in which they follow each other."""

    pooled: int
    """Width of the extractor's feature of the whole photo."""
    patch: int
    """Width of one of its patch tokens."""
    cells: int
    """Number of cells that the patch tokens are averaged to."""
    latents: int
    """Number of coarse latents."""
    denoiser: int = 0
    """Width of one of the denoiser's features."""
    denoiser_cells: int = 0
    """Number of cells that they are averaged to."""

    @property
    def width(self) -> int:
        """Number of all features of a photo."""
        return sum(self.parts)

    @property
    def parts(self) -> list[int]:
        """Numbers of the features of each kind."""
        return [self.pooled, self.cells * self.patch, self.latents, self.denoiser_cells * self.denoiser]


class PhotoFeatures:
    """Features of photos for an encoder: the extractor's, the model's own latents at a coarse resolution, and what the
    denoiser makes of them.

    The latents show colours and places that an extractor may ignore, in the terms of the model itself.
    """

    def __init__(self, backbone: Backbone, extractor: ImageExtractor, config: EncoderConfig) -> None:
        """Prepare the features. Raises ValueError if the denoiser's are asked for and it is no U-Net."""
        if config.denoiser_side and not backbone.has_up_path:
            raise ValueError(NO_MIDDLE_BLOCK)
        self._backbone = backbone
        self._extractor = extractor
        self.config = config
        if config.denoiser_side:
            self._noise = torch.randn(backbone.latent_shape, generator=generator_for(0, "", "encoder-features"))
            prompt = encode_prompt("", {}, backbone.vocabularies)
            ids = {key: value.to(backbone.device) for key, value in stack_prompts([prompt]).items()}
            with torch.no_grad():
                self._no_prompt = backbone.encode_prompts(ids, {})

    def __call__(self, photos: Sequence[Image.Image]) -> Tensor:
        """Return the photos' features, [photos, width] float32 on the CPU.

        A photo's features may depend, to rounding, on the number of photos and on its place: pass photos in
        `canonical_order`.
        """
        config = self.config
        pooled, patches = self._extractor.images_and_patches(photos)
        cells = F.adaptive_avg_pool2d(patches, config.grid_side).permute(0, 2, 3, 1)
        parts = [_normalised(pooled), _normalised(cells).flatten(1)]
        if config.latent_side or config.denoiser_side:
            latents = encode_views(self._backbone, photos, _PLAIN, concept_id="", seed=0).moments[:, 0]
        if config.latent_side:
            parts.append(F.adaptive_avg_pool2d(latents.cpu(), config.latent_side).flatten(1))
        if config.denoiser_side:
            parts.append(_normalised(self._denoiser_cells(latents)).flatten(1))
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def _denoiser_cells(self, latents: Tensor) -> Tensor:
        """Return the denoiser's features at noised latents [photos, *latent_shape], averaged to cells, [photos, cells,
        channels] on the CPU. The noise is the same for every photo."""
        backbone = self._backbone
        timestep = round(_NOISED_AT * backbone.noise.num_timesteps)
        cells = []
        for few in torch.split(latents, AUTOENCODER_BATCH_SIZE):
            timesteps = torch.full((len(few),), timestep, device=few.device)
            noise = to_device(self._noise, few.device).expand_as(few)
            x_t, _ = backbone.noise.corrupt(few, noise, timesteps)
            features = backbone.middle_features(
                x_t, backbone.noise.model_timesteps(timesteps), self._no_prompt.repeat(len(few))
            )
            cells.append(F.adaptive_avg_pool2d(features, self.config.denoiser_side).flatten(2).mT.cpu())
        return torch.cat(cells)

    def sizes(self) -> FeatureSizes:
        """Return how many features of each kind a photo has."""
        pooled, patches = self._extractor.images_and_patches([Image.new("RGB", (64, 64))])
        config = self.config
        channels = 0
        if config.denoiser_side:
            zeros = torch.zeros(1, *self._backbone.latent_shape, device=self._backbone.device)
            channels = self._denoiser_cells(zeros).shape[2]
        return FeatureSizes(
            pooled=pooled.shape[1],
            patch=patches.shape[1],
            cells=config.grid_side**2,
            latents=self._backbone.latent_shape[0] * config.latent_side**2,
            denoiser=channels,
            denoiser_cells=config.denoiser_side**2,
        )


def canonical_order(photos: Sequence[Image.Image]) -> list[Image.Image]:
    """Return the photos in an order that depends on their pixels alone, so that a set has one order."""
    return sorted(photos, key=lambda photo: (photo.size, photo.tobytes()))


class ConceptEncoder(nn.Module):
    """Network from the features of a set of photos to rows of every text encoder that learns rows, and to an adapter.

    A new network's rows are the class vectors, and its adapter changes nothing: its last layers start at zero.
    """

    def __init__(
        self, config: EncoderConfig, sizes: FeatureSizes, backbone: Backbone, adapter: AdapterShape = NO_ADAPTER
    ) -> None:
        """Make the layers for a model's text encoders and for adapters of this shape; kind 'none' makes none.

        torch's global generator draws the initial weights. Raises ValueError if the model lacks the adapter's layers.
        """
        super().__init__()
        self.config = config
        self.sizes = sizes
        self.adapter = adapter
        self.adapter_layout = None if adapter.kind == "none" else AdapterLayout(backbone, adapter)
        tables = {key: backbone.token_tables[key] for key in learning_encoders(backbone)}
        self.patches = nn.Linear(sizes.patch, config.patch_dim)
        width = sizes.pooled + (sizes.cells + sizes.denoiser_cells) * config.patch_dim + sizes.latents
        if sizes.denoiser_cells:
            self.denoiser_cells = nn.Linear(sizes.denoiser, config.patch_dim)
        self.photo = nn.Sequential(nn.Linear(width, config.hidden), nn.GELU())
        known = sum(table.dim for table in tables.values())
        self.set = nn.Sequential(nn.Linear(config.hidden + known, config.hidden), nn.GELU())
        self.offsets = nn.ModuleDict()
        for key, table in tables.items():
            self.offsets[key] = _zero_layer(config.hidden, config.num_vectors * table.dim)
            # constants of the model, which are not part of an encoder's file
            self.register_buffer(f"mean_{key}", table.mean, persistent=False)
            self.register_buffer(f"deviation_{key}", table.deviation, persistent=False)
        if self.adapter_layout is not None:
            first = initial_adapter(backbone.adapter_layers, adapter.targets, adapter.rank, torch.default_generator)
            start = self.adapter_layout.flatten(first)
            self.register_buffer("adapter_start", start)
            self.adapter_change = _zero_layer(config.hidden, start.numel())

    def forward(self, features: Tensor, is_present: Tensor, class_vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the parameters of concepts, float32, by the names of `parameters.Layout`: rows of each text encoder
        [concepts, num_vectors, dim] and, with an adapter, its block [concepts, pieces, 1024].

        features: [concepts, photos, width] features of each concept's photos.
        is_present: [concepts, photos] True for a photo, False for padding.
        class_vectors: text encoder key -> [concepts, dim] that the offsets are added to: those of the initializer, or
            the mean of the vocabulary. A text encoder that learns no rows keeps them as its rows.
        """
        sizes = self.sizes
        pooled, cells, latents, denoiser_cells = torch.split(features, sizes.parts, dim=2)
        cells = self.patches(cells.reshape(*cells.shape[:2], sizes.cells, sizes.patch)).flatten(2)
        parts = [pooled, cells, latents]
        if sizes.denoiser_cells:
            shape = (*cells.shape[:2], sizes.denoiser_cells, sizes.denoiser)
            parts.append(self.denoiser_cells(denoiser_cells.reshape(shape)).flatten(2))
        hidden = self.photo(torch.cat(parts, dim=2))
        weights = is_present.to(hidden.dtype)[..., None]
        mean = (hidden * weights).sum(1) / weights.sum(1)
        classes = [self._standardised(key, class_vectors[key]) for key in self.offsets]
        hidden = self.set(torch.cat([mean, *classes], dim=1))
        values: dict[str, Tensor] = {}
        for key, vector in class_vectors.items():
            start = vector[:, None].expand(-1, self.config.num_vectors, -1)
            values[key] = start + self._offset(key, hidden) if key in self.offsets else start
        if self.adapter_layout is not None:
            change = _ADAPTER_UNIT * self.adapter_change(hidden)
            values[ADAPTER] = self.get_buffer("adapter_start") + change.reshape(-1, *self.adapter_layout.shape)
        return values

    def _standardised(self, key: str, vectors: Tensor) -> Tensor:
        """Return vectors [..., dim] with the vocabulary's mean at zero and its deviation at one."""
        mean, deviation = self.get_buffer(f"mean_{key}"), self.get_buffer(f"deviation_{key}")
        return (vectors - mean) / deviation

    def _offset(self, key: str, hidden: Tensor) -> Tensor:
        """Return the offsets of a text encoder's rows, [concepts, num_vectors, dim].

        An offset o is bounded smoothly, as o / sqrt(1 + |o|^2 / limit^2), whose norm stays below the limit.
        """
        deviation = self.get_buffer(f"deviation_{key}")
        units: Tensor = self.offsets[key](hidden)
        offset = units.reshape(len(hidden), self.config.num_vectors, -1) * deviation
        limit = self.config.max_offset * deviation.norm()
        bounded: Tensor = offset / (1 + (offset.norm(dim=-1, keepdim=True) / limit).square()).sqrt()
        return bounded


def _zero_layer(inputs: int, outputs: int) -> nn.Linear:
    """Make a linear layer whose outputs are zero."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _normalised(features: Tensor) -> Tensor:
    """Return features [..., dim] with mean 0 and deviation 1 over their last axis."""
    return F.layer_norm(features, features.shape[-1:])
