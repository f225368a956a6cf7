"""The first worker's part without Ray: a training of a tiny model from photos to the encoder's file and pictures."""

from __future__ import annotations

import io
import logging
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from PIL import Image

from pipeline.actor.model_loading import load_model
from pipeline.config import RunConfig
from pipeline.encoder_training.examples import PLAN_SCHEMA, ExampleMaker, parse_example, plan_examples
from pipeline.encoder_training.loop import TrainingLoop
from pipeline.encoder_training.publish import check_start, new_network, publish
from pipeline.encoder_training.schedule import Split
from pipeline.inputs.manifest import read_manifest
from pipeline.inputs.models import extractor_hash
from pipeline.ledger.encoder_record import ENCODER
from pipeline.store.storage import RunStore
from tests.pipeline.runs import tiny_config, write_manifest
from tests.tiny_models import tiny_extractor
from textual_inversion.adapter_config import AdapterShape
from textual_inversion.encoder_file import load_encoder
from textual_inversion.encoder_training import ConceptExample, EncoderTrainer
from textual_inversion.families.base import Backbone

NAMES = ("a", "b", "c", "d")
SETTINGS = {
    "network": {"hidden": 16, "patch_dim": 4, "grid_side": 2, "latent_side": 2},
    "training": {"steps": 4, "concepts_per_step": 2, "samples_per_concept": 1, "warmup_steps": 0},
    "checkpoint_steps": 2,
    "shown": 1,
}


@pytest.fixture(scope="module")
def config(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("training")
    clip = str(tiny_extractor("clip", folder / "clip"))
    manifest = str(write_manifest(folder, [*NAMES]))
    return tiny_config(tiny_model, folder / "out", manifest=manifest, extractor=clip, encoder=SETTINGS)


@pytest.fixture(scope="module")
def examples(config: RunConfig) -> dict[str, ConceptExample]:
    plan = list(plan_examples(read_manifest(config.manifest), config, []))
    made = ExampleMaker(config)(pa.Table.from_pylist(plan, PLAN_SCHEMA)).to_pylist()
    return {row["concept_id"]: parse_example(row) for row in made}


@pytest.fixture(scope="module")
def backbone(config: RunConfig) -> Backbone:
    return load_model(config)


@pytest.fixture(scope="module")
def loop(config: RunConfig, examples: dict[str, ConceptExample], backbone: Backbone) -> TrainingLoop:
    return TrainingLoop(
        trainer=EncoderTrainer(new_network(config, backbone, b""), backbone, config.encoder.training, seed=config.seed),
        read=lambda names: [examples[name] for name in names],
        split=Split(("a", "b", "c"), ("d",)),
        config=config.encoder,
        seed=config.seed,
        store=RunStore(config.output),
        fingerprint="f",
    )


def test_a_trained_encoder_is_written_with_pictures(config: RunConfig, loop: TrainingLoop, backbone: Backbone) -> None:
    assert loop.run() == "all steps"
    published = publish(loop, backbone, config)
    data = loop.store.get(ENCODER)
    assert published.file.bytes == len(data)
    encoder = load_encoder(data, backbone, extractor_hash(config.extractor))
    assert encoder.categories == ("object",)
    known = loop.state.best["offsets.clip_l.weight"]
    assert float(known.norm()) > 0
    torch.testing.assert_close(encoder.network.state_dict()["offsets.clip_l.weight"], known, rtol=0.02, atol=1e-4)
    assert published.pictures == ("held_out/d.png",)
    Image.open(io.BytesIO(loop.store.get(published.pictures[0]))).verify()


def test_a_held_out_concept_that_cannot_be_drawn_has_no_picture(
    config: RunConfig,
    loop: TrainingLoop,
    examples: dict[str, ConceptExample],
    backbone: Backbone,
    caplog: pytest.LogCaptureFixture,
) -> None:
    loop.run()
    example = examples["d"]
    long = replace(example, concept=replace(example.concept, initializer="cat " * 100))
    read = {**examples, "d": long}
    with caplog.at_level(logging.WARNING):
        published = publish(replace(loop, read=lambda names: [read[name] for name in names]), backbone, config)
    assert published.pictures == ()
    assert "no picture of d: prompt 'a photo of a cat cat" in caplog.text
    assert load_encoder(loop.store.get(ENCODER), backbone, extractor_hash(config.extractor)).categories == ("object",)


def test_a_training_starts_from_a_file(config: RunConfig, loop: TrainingLoop, backbone: Backbone) -> None:
    """The next training begins with the weights of the file, which must be of its model and shape."""
    loop.run()
    publish(loop, backbone, config)
    data = loop.store.get(ENCODER)
    check_start(data, config)
    network = new_network(config, backbone, data)
    stored = load_encoder(data, backbone, extractor_hash(config.extractor)).network.state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())
    wider = replace(config, encoder=replace(config.encoder, network=replace(config.encoder.network, hidden=32)))
    with pytest.raises(ValueError, match=r"encoder\.init_from = .* has the shape .*hidden=16"):
        check_start(data, wider)
    shape = AdapterShape(kind="causal", rank=1, targets=("fc2",))
    adapted = replace(config, encoder=replace(config.encoder, adapter=shape))
    with pytest.raises(ValueError, match=r"encoder\.adapter AdapterShape\(kind='causal'"):
        check_start(data, adapted)
    assert new_network(adapted, backbone, b"").adapter == shape
    with pytest.raises(ValueError, match="trained for another extractor"):
        check_start(data, replace(config, extractor="owner/another"))


def test_a_seed_decides_the_first_weights(config: RunConfig, backbone: Backbone) -> None:
    first, again, other = (
        new_network(each, backbone, b"").photo[0].weight for each in (config, config, replace(config, seed=1))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
