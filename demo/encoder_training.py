"""Train the demo's encoder in this process: `python -m demo.encoder_training`.

Takes the concepts that `python -m demo.encoder_concepts` drew, and the parts of a training that `python -m
pipeline.train_encoder` spreads over a cluster; writes `demo/encoder/encoder.safetensors`. A training that was stopped
continues from its checkpoint in the work folder. Every twentieth taught object is held out: its concepts take no part,
show the loss on objects that the encoder does not know, and calibrate its doubt.

    python -m demo.encoder_training --model demo/flow --work work/flow-encoder --output work/flow.safetensors
    python -m demo.encoder_training --set encoder.adapter.kind=causal --set encoder.adapter.rank=1 ...  # with adapters
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from demo.encoder_concepts import is_held_out
from pipeline.config_file import load_config
from pipeline.inputs.models import extractor_hash
from pipeline.store.parquet import read_table
from textual_inversion.concept import Concept
from textual_inversion.encoder import ConceptEncoder, PhotoFeatures
from textual_inversion.encoder_config import EncoderTrainingConfig
from textual_inversion.encoder_file import Doubt, TrainedEncoder, dump_encoder, load_encoder
from textual_inversion.encoder_training import ConceptExample, EncoderTrainer, encode_example
from textual_inversion.errors import BadInput
from textual_inversion.extractors import ClipExtractor
from textual_inversion.families import load_backbone
from textual_inversion.families.base import Backbone

HERE = Path(__file__).parent
_EVALUATED = 96
"""Concepts of held-out objects whose loss is reported."""
_REPORT_EVERY = 50
_EVALUATE_EVERY = 500
_SAVE_EVERY_S = 150.0
BATCHES = ("encoder.training.concepts_per_step=64", "encoder.training.samples_per_concept=1")
_DENOISER_SIDE = 4
"""Side of the grid of the U-Net's features (`EncoderConfig.denoiser_side`)."""


def read_examples(folder: Path, backbone: Backbone, features: PhotoFeatures) -> list[ConceptExample | None]:
    """Encode the concepts of the folder's manifest, or read them as an earlier call encoded them. None is in the place
    of one that the model cannot be trained on, because a caption is too long for it. Raises ValueError if the earlier
    call read other features."""
    path = folder / "encoded.pt"
    concepts = [_concept(row) for row in read_table(folder / "manifest.parquet").to_pylist()]
    if not path.exists():
        encoded = []
        for concept in concepts:
            photos = [Image.open(folder / name).convert("RGB") for name in concept.images]
            try:
                example = encode_example(concept, photos, backbone, features)
            except BadInput as error:
                print(f"{concept.concept_id} is left out: {error}", flush=True)
                encoded.append(None)
            else:
                encoded.append((example.features.half(), example.moments.half()))
        _save(encoded, path)
    stored = torch.load(path, mmap=True)
    width = features.sizes().width
    if any(tensors is not None and tensors[0].shape[1] != width for tensors in stored):
        raise ValueError(f"{path} holds features of other settings; delete it, and they are made again")
    return [
        tensors and ConceptExample(concept=concept, features=tensors[0], moments=tensors[1])
        for concept, tensors in zip(concepts, stored, strict=True)
    ]


def split(examples: Sequence[ConceptExample | None]) -> tuple[list[ConceptExample], list[ConceptExample]]:
    """Return the concepts of the objects to train on, and those of the held-out objects."""
    pairs = [(each, is_held_out(index)) for index, each in enumerate(examples) if each is not None]
    return [each for each, is_held in pairs if not is_held], [each for each, is_held in pairs if is_held]


def copy_known(network: ConceptEncoder, other: ConceptEncoder) -> None:
    """Set a network's weights to those of another one, which may lack the denoiser's features. These come last among
    the inputs, and the weights that read them become zero: rows stay the same."""
    values = network.state_dict()
    for name, known in other.state_dict().items():
        if values[name].shape == known.shape:
            values[name] = known
        else:
            values[name] = torch.zeros_like(values[name])
            values[name][:, : known.shape[1]] = known
    network.load_state_dict(values)


def train(
    trainer: EncoderTrainer,
    examples: list[ConceptExample],
    held_out: list[ConceptExample],
    config: EncoderTrainingConfig,
    seed: int,
    checkpoint: Path,
) -> None:
    """Take the steps that are left. The concepts of a step depend on the seed and the step alone."""
    if checkpoint.exists():
        trainer.load_state_dict(torch.load(checkpoint))
    saved = time.monotonic()
    while trainer.step_number < config.steps:
        step = trainer.step_number
        if step % _EVALUATE_EVERY == 0:
            print(f"step {step}: loss {evaluated(trainer, held_out):.4f} on held-out objects", flush=True)
        chosen = np.random.default_rng((seed, step)).integers(len(examples), size=config.concepts_per_step)
        result = trainer.step([examples[i] for i in chosen])
        if step % _REPORT_EVERY == 0:
            print(
                f"step {step}: {', '.join(f'{name} {value:.4f}' for name, value in result.losses.items())}", flush=True
            )
        if time.monotonic() - saved > _SAVE_EVERY_S or trainer.step_number == config.steps:
            _save(trainer.state_dict(), checkpoint)
            saved = time.monotonic()


def evaluated(trainer: EncoderTrainer, held_out: list[ConceptExample]) -> float:
    """Return the mean denoising loss on concepts of held-out objects."""
    return trainer.evaluate(held_out[:_EVALUATED])


def finished(
    network: ConceptEncoder,
    backbone: Backbone,
    clip: str,
    examples: list[ConceptExample],
    held_out: list[ConceptExample],
    record: dict[str, str],
) -> TrainedEncoder:
    """Return the encoder with its doubt, calibrated on the concepts of held-out objects."""
    width = network.sizes.pooled
    return TrainedEncoder(
        network=network,
        doubt=Doubt.fit(
            torch.cat([each.features[:, :width].float() for each in examples]),
            [each.features[:, :width].float() for each in held_out],
        ),
        model_hash=backbone.model_hash(),
        extractor_hash=extractor_hash(clip),
        categories=("object",),
        record=record,
    )


def _concept(row: dict[str, Any]) -> Concept:
    return Concept(
        concept_id=row["concept_id"],
        placeholder_token="<concept>",
        images=tuple(row["images"]),
        captions=tuple(row["captions"]),
        initializer=row["initializer"],
    )


def _save(state: Any, path: Path) -> None:
    """Write a state so that a stop leaves the former one or the new one."""
    temporary = path.with_suffix(".new")
    torch.save(state, temporary)
    os.replace(temporary, path)


def main() -> None:
    """Encode the concepts, train, write the encoder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=HERE / ".work" / "encoder", help="drawn concepts; each model needs its own"
    )
    parser.add_argument("--model", default=str(HERE / "model"))
    parser.add_argument("--clip", default=str(HERE / "clip"))
    parser.add_argument("--output", type=Path, default=HERE / "encoder" / "encoder.safetensors")
    parser.add_argument("--init-from", type=Path, help="encoder whose weights the training begins with")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--precision", default="bfloat16", help="of the frozen model while the encoder is trained")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", metavar="A.B=C", action="append", default=[], help="one setting; may be repeated")
    options = parser.parse_args()
    steps = f"encoder.training.steps={options.steps}"
    exact = load_backbone(options.model, device="cpu", precision="float32")
    side = f"encoder.network.denoiser_side={_DENOISER_SIDE if exact.has_up_path else 0}"
    settings = load_config("", [*BATCHES, steps, side, *options.set]).encoder
    config = settings.training
    features = PhotoFeatures(exact, ClipExtractor(options.clip, "cpu"), settings.network)
    examples, held_out = split(read_examples(options.work, exact, features))
    backbone = load_backbone(options.model, device="cpu", precision=options.precision)
    torch.manual_seed(options.seed)
    network = ConceptEncoder(settings.network, features.sizes(), backbone, settings.adapter)
    if options.init_from:
        first = load_encoder(options.init_from.read_bytes(), exact, extractor_hash(options.clip))
        copy_known(network, first.network)
    trainer = EncoderTrainer(network, backbone, config, seed=options.seed)
    train(trainer, examples, held_out, config, options.seed, options.work / "training.pt")
    loss = evaluated(trainer, held_out)
    print(f"step {trainer.step_number}: loss {loss:.4f} on held-out objects")
    record = {"steps": str(trainer.step_number), "concepts": str(len(examples)), "held_out_loss": f"{loss:.4f}"}
    encoder = finished(trainer.averaged, backbone, options.clip, examples, held_out, record)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_bytes(dump_encoder(encoder))


if __name__ == "__main__":
    main()
