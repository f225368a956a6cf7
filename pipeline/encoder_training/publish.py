"""Make the network that a training begins with, and what it publishes: the encoder's file, pictures of concepts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from pipeline.actor.publish import to_png
from pipeline.config import RunConfig
from pipeline.encoder_training.loop import TrainingLoop
from pipeline.encoder_training.schedule import spread
from pipeline.inputs.models import extractor_hash, locate, model_hash
from pipeline.inputs.photos import open_pictures
from pipeline.ledger.encoder_record import ENCODER
from pipeline.ledger.records import StoredFile
from pipeline.store.redact import redact
from textual_inversion.concept import LearnedEmbedding
from textual_inversion.encoder import ConceptEncoder, PhotoFeatures
from textual_inversion.encoder_file import (
    Doubt,
    TrainedEncoder,
    dump_encoder,
    load_encoder,
    shape_of_encoder,
)
from textual_inversion.encoder_header import check_encoder
from textual_inversion.encoder_training import ConceptExample
from textual_inversion.errors import ConceptError
from textual_inversion.extractors import load_extractor
from textual_inversion.families.base import Backbone
from textual_inversion.generate import ImageRequest, generate
from textual_inversion.grids import grid
from textual_inversion.initialise import class_vectors
from textual_inversion.rng import seed_for

log = logging.getLogger(__name__)

_DOUBT_CONCEPTS = 4096
"""Largest number of concepts whose features the encoder's doubt is fitted on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """Objects that a training wrote besides its record."""

    file: StoredFile
    """The encoder's file."""
    pictures: tuple[str, ...]
    """Paths of the pictures of held-out concepts."""


def check_start(data: bytes, config: RunConfig) -> None:
    """Raise ValueError unless the bytes are an encoder's file for the configured model and extractor, of the configured
    shape."""
    place = redact(config.encoder.init_from)
    try:
        check_encoder(data, model_hash(config.model), extractor_hash(config.extractor))
    except ValueError as error:
        raise ValueError(f"encoder.init_from = {place!r}: {error}") from error
    network, adapter = shape_of_encoder(data)
    if (network, adapter) != (config.encoder.network, config.encoder.adapter):
        raise ValueError(
            f"encoder.init_from = {place!r} has the shape {network}, {adapter}, but encoder.network is "
            f"{config.encoder.network} and encoder.adapter {config.encoder.adapter}; set them to the former"
        )


def new_network(config: RunConfig, backbone: Backbone, start: bytes) -> ConceptEncoder:
    """Return the network to train: that of the encoder file `start`, or a new one with weights by the run's seed."""
    if start:
        return load_encoder(start, backbone, extractor_hash(config.extractor)).network.requires_grad_(True)
    extractor = load_extractor(locate(config.extractor), config.device)
    sizes = PhotoFeatures(backbone, extractor, config.encoder.network).sizes()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = ConceptEncoder(config.encoder.network, sizes, backbone, config.encoder.adapter)
    return network.to(backbone.device)


def publish(loop: TrainingLoop, backbone: Backbone, config: RunConfig) -> Published:
    """Write the encoder with the lowest held-out loss, and pictures of held-out concepts drawn with its rows. A concept
    that cannot be drawn has none."""
    network = loop.trainer.averaged
    network.load_state_dict(loop.state.best)
    examples = loop.read(spread(loop.split.trained, _DOUBT_CONCEPTS))
    held_out = loop.read(spread(loop.split.held_out, _DOUBT_CONCEPTS))
    pooled = network.sizes.pooled
    encoder = TrainedEncoder(
        network=network,
        doubt=Doubt.fit(
            torch.cat([example.features[:, :pooled] for example in examples]),
            [example.features[:, :pooled] for example in held_out],
        ),
        model_hash=backbone.model_hash(),
        extractor_hash=extractor_hash(config.extractor),
        categories=tuple(sorted({example.concept.category for example in examples})),
    )
    data = dump_encoder(encoder)
    sha256 = loop.store.put_checked(ENCODER, data)
    stored = load_encoder(data, backbone, encoder.extractor_hash)
    paths = []
    for example in held_out[: config.encoder.shown]:
        path = f"held_out/{example.concept.concept_id}.png"
        try:
            picture = _draw(example, stored, backbone, config)
        except ConceptError as error:  # such as a sample prompt that does not fit with this concept's initializer
            log.warning("no picture of %s: %s", example.concept.concept_id, error)
            continue
        loop.store.put(path, to_png(picture))
        paths.append(path)
    return Published(file=StoredFile(bytes=len(data), sha256=sha256), pictures=tuple(paths))


def _draw(example: ConceptExample, encoder: TrainedEncoder, backbone: Backbone, config: RunConfig) -> Image.Image:
    """Draw a concept's photos, the pictures of its initializer, and those of the encoder's rows without a step."""
    concept = example.concept
    classes = class_vectors(concept, backbone)
    embedding = encoder.embedding(concept.placeholder_token, example.features.float(), classes)
    prompts = config.grid.prompts_for(concept.category)
    labels: dict[str, tuple[LearnedEmbedding, ...]]
    labels = {prompt.format(concept.placeholder_token): (embedding,) for prompt in prompts}
    if concept.initializer:
        labels = {prompts[0].format(concept.initializer): (), **labels}
    seeds = [seed_for(config.seed, concept.concept_id, "held out", i) for i in range(config.grid.images_per_prompt)]
    requests = [ImageRequest(prompt, seed, used) for prompt, used in labels.items() for seed in seeds]
    pictures = generate(backbone, requests, config.grid.sampling)
    drawn = [pictures[first : first + len(seeds)] for first in range(0, len(pictures), len(seeds))]
    return grid(_photos(example, config), list(zip(labels, drawn, strict=True)))


def _photos(example: ConceptExample, config: RunConfig) -> Sequence[Image.Image]:
    """Return the concept's photos for its picture, or none if they cannot be read any more."""
    try:
        return open_pictures(example.concept, config.photos)[0]
    except (ConceptError, OSError) as error:
        log.warning("the picture of %s is without photos: %s", example.concept.concept_id, error)
        return ()
