"""The file of a trained encoder: its weights, what it was trained for, and how far its doubt reaches.

A safetensors file whose header names the model and the extractor by the digests of their files. Matrices are stored as
8-bit integers with one scale for each row, all else as float16.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from textual_inversion.adapter_config import AdapterShape
from textual_inversion.concept import Concept, LearnedEmbedding
from textual_inversion.encoder import ConceptEncoder, FeatureSizes
from textual_inversion.encoder_config import EncoderConfig
from textual_inversion.encoder_header import FORMAT, check_encoder_header
from textual_inversion.families.base import Backbone
from textual_inversion.formats import from_bytes, to_bytes
from textual_inversion.parameters import ADAPTER
from textual_inversion.transfer import to_device

_SCALE = ".scale"
"""End of the name of a matrix's scales."""
_QUANTILE = 0.99
"""Share of concepts that took no part in the training whose photos count as near enough."""
_SHRINKAGE = 0.1
"""Weight of a multiple of the identity in the covariance of features."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Doubt:
    """Bound on the distance of photos from those that an encoder was trained on.

    The distance is that of Mahalanobis, on the extractor's feature of a whole photo (Lee et al. 2018, arXiv 1807.03888,
    Eq. 2, with one class), in units of its root mean square over the training.
    """

    mean: Tensor
    """Mean feature, [pooled]."""
    whitening: Tensor
    """Matrix that gives differences from the mean unit covariance, [pooled, pooled]."""
    max_distance: float
    """Largest mean distance of a concept's photos at which its rows are relied on."""

    @classmethod
    def fit(cls, features: Tensor, held_out: list[Tensor]) -> Doubt:
        """Fit the doubt.

        features: [photos, pooled] of the training.
        held_out: [photos, pooled] of each concept that took no part in it, to which the largest distance is calibrated.
        """
        features = features.double()
        mean = features.mean(0)
        covariance = (features - mean).T @ (features - mean) / len(features)
        average = covariance.diagonal().mean()
        covariance = (1 - _SHRINKAGE) * covariance + _SHRINKAGE * average * torch.eye(len(covariance)).double()
        values, vectors = torch.linalg.eigh(covariance)
        whitening = (vectors / values.sqrt()).T / len(values) ** 0.5
        doubt = cls(mean=mean.float(), whitening=whitening.float(), max_distance=0.0)
        distances = torch.tensor([doubt.distance(each) for each in held_out])
        return dataclasses.replace(doubt, max_distance=float(distances.quantile(_QUANTILE)))

    def distance(self, features: Tensor) -> float:
        """Return the mean distance of a concept's photos, features [photos, pooled]."""
        return float(((features.float() - self.mean) @ self.whitening.T).norm(dim=1).mean())


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedEncoder:
    """An encoder with what is needed to use it."""

    network: ConceptEncoder
    doubt: Doubt
    model_hash: str
    """Digest of the model it was trained through (`Backbone.model_hash`)."""
    extractor_hash: str
    """Digest of the extractor whose features it reads."""
    categories: tuple[str, ...]
    """Categories of the concepts it was trained on."""
    record: Mapping[str, str] = field(default_factory=dict)
    """Facts of the training, for people."""

    def embedding(
        self, placeholder_token: str, features: Tensor, class_vectors: Mapping[str, Tensor]
    ) -> LearnedEmbedding:
        """Return the rows of one concept, and its adapter if the network makes one, on the CPU.

        features: [photos, width] of its photos, in `canonical_order`.
        class_vectors: text encoder key -> [dim] that the offsets are added to (`initialise.class_vectors`).
        """
        device = next(self.network.parameters()).device
        is_present = torch.ones(1, len(features), dtype=torch.bool, device=device)
        classes = {key: to_device(vector[None], device) for key, vector in class_vectors.items()}
        with torch.no_grad():
            values = self.network(to_device(features[None], device), is_present, classes)
        rows = {key: value[0].cpu() for key, value in values.items()}
        layout = self.network.adapter_layout
        adapter = None if layout is None else layout.learned(rows.pop(ADAPTER))
        return LearnedEmbedding(placeholder_token=placeholder_token, vectors=rows, adapter=adapter)

    def why_unreliable(self, concept: Concept, features: Tensor) -> str:
        """Return the reason not to rely on the rows of a concept; empty if there is none.

        features: [photos, width] of its photos.
        """
        num_vectors = self.network.config.num_vectors
        if concept.num_vectors != num_vectors:
            return f"it makes {num_vectors} vectors, not {concept.num_vectors}"
        if concept.category not in self.categories:
            return f"it was trained on concepts of category {', '.join(self.categories)}, not {concept.category}"
        distance = self.doubt.distance(features[:, : self.network.sizes.pooled])
        if distance > self.doubt.max_distance:
            return (
                f"the photos lie {distance:.2f} from those it was trained on, usual is up to "
                f"{self.doubt.max_distance:.2f}"
            )
        return ""


def dump_encoder(encoder: TrainedEncoder) -> bytes:
    """Return the bytes of an encoder's file."""
    network = encoder.network
    header = {
        "format": FORMAT,
        "config": json.dumps(dataclasses.asdict(network.config)),
        "sizes": json.dumps(dataclasses.asdict(network.sizes)),
        "model_hash": encoder.model_hash,
        "extractor_hash": encoder.extractor_hash,
        "categories": json.dumps(encoder.categories),
        "max_distance": repr(encoder.doubt.max_distance),
        "record": json.dumps(dict(encoder.record)),
    }
    if network.adapter.kind != "none":
        header["adapter"] = json.dumps(dataclasses.asdict(network.adapter))
    tensors = {name: value.detach().cpu() for name, value in network.state_dict().items()}
    tensors |= {"doubt.mean": encoder.doubt.mean, "doubt.whitening": encoder.doubt.whitening}
    return to_bytes(_packed(tensors), header)


def load_encoder(data: bytes, backbone: Backbone, extractor_hash: str) -> TrainedEncoder:
    """Read an encoder's file, for a model and an extractor; the network is on the model's device.

    Raises ValueError for other content, and for an encoder of another model or extractor.
    """
    packed, header = from_bytes(data)
    check_encoder_header(header, backbone.model_hash(), extractor_hash)
    tensors = _unpacked(packed)
    doubt = Doubt(
        mean=tensors.pop("doubt.mean"),
        whitening=tensors.pop("doubt.whitening"),
        max_distance=float(header["max_distance"]),
    )
    config, sizes = EncoderConfig(**json.loads(header["config"])), FeatureSizes(**json.loads(header["sizes"]))
    network = ConceptEncoder(config, sizes, backbone, _adapter_of(header))
    network.load_state_dict(tensors)
    return TrainedEncoder(
        network=network.requires_grad_(False).eval().to(backbone.device),
        doubt=doubt,
        model_hash=header["model_hash"],
        extractor_hash=header["extractor_hash"],
        categories=tuple(json.loads(header["categories"])),
        record=json.loads(header["record"]),
    )


def shape_of_encoder(data: bytes) -> tuple[EncoderConfig, AdapterShape]:
    """Return the shape of the network in an encoder's file, and of the adapters that it makes."""
    _, header = from_bytes(data)
    return EncoderConfig(**json.loads(header["config"])), _adapter_of(header)


def check_adapter(found: AdapterShape, wanted: AdapterShape) -> None:
    """Raise ValueError unless an encoder makes adapters of the shape that a run learns, none where it learns none."""
    if found.kind == wanted.kind == "none":
        return
    for name in (each.name for each in dataclasses.fields(AdapterShape)):
        trained, set_here = getattr(found, name), getattr(wanted, name)
        if trained != set_here:
            raise ValueError(
                f"the encoder was trained with encoder.adapter.{name} = {trained!r}, but inversion.adapter.{name} is "
                f"{set_here!r}; set the latter to the former, or train an encoder with it"
            )


def _adapter_of(header: Mapping[str, str]) -> AdapterShape:
    """Return the shape of an encoder's adapters; files without one have none."""
    values = json.loads(header.get("adapter", "{}"))
    return AdapterShape(**values | {"targets": tuple(values["targets"])}) if values else AdapterShape()


def _packed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return matrices as 8-bit integers with the scale of each row, and all else as float16."""
    packed = {}
    for name, tensor in tensors.items():
        if tensor.ndim < 2:
            packed[name] = tensor.half()
            continue
        scale = (tensor.abs().amax(1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float16).tiny).half()
        packed[name] = (tensor / scale.float()).round().clamp(-127, 127).to(torch.int8)
        packed[name + _SCALE] = scale
    return packed


def _unpacked(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Invert `_packed`, to float32."""
    return {
        name: tensor.float() * packed[name + _SCALE].float() if name + _SCALE in packed else tensor.float()
        for name, tensor in packed.items()
        if not name.endswith(_SCALE)
    }
