"""A learner whose concepts start at an encoder's rows, with no optimizer step or a few."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load

from pipeline.actor.learner import Learner
from pipeline.inputs.models import extractor_hash
from pipeline.ledger.plan import ConceptTask
from pipeline.ledger.records import ConceptRecord
from pipeline.report.page import PATH, RunFigures, build_report
from pipeline.store.parquet import read_table
from pipeline.store.storage import RunStore
from tests.pipeline.runs import task, tiny_config, write_photo
from tests.tiny_models import tiny_extractor
from textual_inversion.adapter_config import AdapterShape
from textual_inversion.adapter_formats import parse_adapter
from textual_inversion.encoder import ConceptEncoder, EncoderConfig, PhotoFeatures, canonical_order
from textual_inversion.encoder_file import Doubt, TrainedEncoder, dump_encoder
from textual_inversion.extractors import ClipExtractor, load_extractor
from textual_inversion.families.base import Backbone
from textual_inversion.initialise import class_vectors

CONFIG = EncoderConfig(hidden=16, patch_dim=3, grid_side=2, latent_side=2)
ADAPTER = {"kind": "causal", "rank": 2, "alpha": 2.0, "targets": ["fc2"]}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("photos")
    return tuple(write_photo(folder / f"{number}.png", number) for number in range(3))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_extractor("clip", tmp_path_factory.mktemp("clip")))


def untrained(tiny_backbone: Backbone, extractor: str) -> TrainedEncoder:
    """An encoder of random weights that doubts nothing."""
    torch.manual_seed(0)
    sizes = PhotoFeatures(tiny_backbone, load_extractor(extractor, "cpu"), CONFIG).sizes()
    network = ConceptEncoder(CONFIG, sizes, tiny_backbone)
    torch.nn.init.normal_(network.offsets["clip_l"].weight, std=0.3)
    return TrainedEncoder(
        network=network,
        doubt=Doubt(mean=torch.zeros(sizes.pooled), whitening=torch.eye(sizes.pooled), max_distance=1e6),
        model_hash=tiny_backbone.model_hash(),
        extractor_hash=extractor_hash(extractor),
        categories=("object",),
    )


@pytest.fixture(scope="module")
def encoder(tiny_backbone: Backbone, clip: str) -> TrainedEncoder:
    return untrained(tiny_backbone, clip)


@pytest.fixture(scope="module")
def with_adapter(tiny_backbone: Backbone, encoder: TrainedEncoder) -> TrainedEncoder:
    """An encoder of random weights that makes adapters, too."""
    torch.manual_seed(0)
    shape = AdapterShape(kind="causal", rank=2, alpha=2.0, targets=("fc2",))
    network = ConceptEncoder(CONFIG, encoder.network.sizes, tiny_backbone, shape)
    torch.nn.init.normal_(network.offsets["clip_l"].weight, std=0.3)
    torch.nn.init.normal_(network.adapter_change.weight, std=30.0)
    return replace(encoder, network=network)


def learner_of(tiny_model: Path, clip: str, output: Path, encoder: TrainedEncoder, **changes: Any) -> Learner:
    """A learner that starts from the encoder, by default without a step."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "encoder.safetensors").write_bytes(dump_encoder(encoder))
    inversion = {"steps": 0, **changes.pop("inversion", {})}
    init = {"method": "encoder", "encoder": str(output / "encoder.safetensors"), "unsure_steps": 3}
    inversion["init"] = {**init, **inversion.get("init", {})}
    return Learner(tiny_config(tiny_model, output, extractor=clip, inversion=inversion, **changes))


def together(learner: Learner, tasks: list[ConceptTask]) -> list[ConceptRecord]:
    """Learn the tasks at the same time and close the learner."""

    async def learn_all() -> list[ConceptRecord]:
        return await asyncio.gather(*(learner.learn(one) for one in tasks))

    records = asyncio.run(learn_all())
    learner.close()
    return records


def learn(
    tiny_model: Path, clip: str, output: Path, encoder: TrainedEncoder, tasks: list[ConceptTask], **changes: Any
) -> list[tuple[ConceptRecord, bytes]]:
    """Learn the tasks with one learner; return each record with the bytes of its embedding."""
    records = together(learner_of(tiny_model, clip, output, encoder, **changes), tasks)
    assert [record.error for record in records] == [""] * len(records)
    return [(record, (output / record.folder.embedding).read_bytes()) for record in records]


def tiles(store: RunStore) -> set[tuple[str, ...]]:
    """Return the figures at the head of the report, each with its name."""
    return set(re.findall(r'<div class="tile [^"]*"><b>([^<]*)</b><span>([^<]*)</span>', store.get(PATH).decode()))


def test_without_steps_the_encoders_rows_are_published(
    tiny_model: Path,
    tiny_backbone: Backbone,
    clip: str,
    photos: tuple[str, ...],
    tmp_path: Path,
    encoder: TrainedEncoder,
) -> None:
    one = task("toy", photos)
    ((record, data),) = learn(tiny_model, clip, tmp_path, encoder, [one])
    assert (record.status, record.start, record.steps) == ("done", "encoder", 0)
    assert read_table(tmp_path / record.folder.curve).num_rows == 0
    store = RunStore(str(tmp_path))
    build_report(store, tiny_config(tiny_model, tmp_path), RunFigures())
    assert "toy" in store.get(PATH).decode()
    assert tiles(store) >= {("1 of 1", "started from the encoder"), ("500", "steps saved by that")}
    features = PhotoFeatures(tiny_backbone, ClipExtractor(clip, "cpu"), CONFIG)
    pictures = canonical_order([Image.open(path).convert("RGB") for path in photos])
    rows = encoder.embedding("<toy>", features(pictures), class_vectors(one.concept, tiny_backbone)).vectors["clip_l"]
    (published,) = load(data).values()
    word = class_vectors(one.concept, tiny_backbone)["clip_l"]
    assert float((published - rows).norm() / (rows - word).norm()) < 0.05, "but for the file's rounding"


def test_bytes_depend_on_no_company_and_on_no_order_of_the_photos(
    tiny_model: Path, clip: str, photos: tuple[str, ...], tmp_path: Path, encoder: TrainedEncoder
) -> None:
    one = task("toy", photos)
    ((_, alone),) = learn(tiny_model, clip, tmp_path / "a", encoder, [one], actors={"slots": 1})
    others = [task("cat", photos[:1]), one, task("dog", photos[1:])]
    found = learn(tiny_model, clip, tmp_path / "b", encoder, others, actors={"slots": 2})
    assert found[1][1] == alone
    turned = replace(one, concept=replace(one.concept, images=photos[::-1]))
    ((_, other),) = learn(tiny_model, clip, tmp_path / "c", encoder, [turned])
    assert other == alone


def test_a_concept_that_the_encoder_is_unsure_of_is_learned_from_its_word(
    tiny_model: Path, clip: str, photos: tuple[str, ...], tmp_path: Path, encoder: TrainedEncoder
) -> None:
    strict = replace(encoder, doubt=replace(encoder.doubt, max_distance=0.0))
    style = task("pencil", photos)
    style = replace(style, concept=replace(style.concept, category="style"))
    (far, _), (other, _) = learn(tiny_model, clip, tmp_path, strict, [task("toy", photos), style])
    assert far.start.startswith("words, the encoder was unsure: the photos lie ")
    assert other.start == "words, the encoder was unsure: it was trained on concepts of category object, not style"
    assert (far.steps, other.steps) == (3, 3)
    store, config = RunStore(str(tmp_path)), tiny_config(tiny_model, tmp_path, inversion={"init": {"unsure_steps": 3}})
    build_report(store, config, RunFigures())
    assert tiles(store) >= {("0 of 2", "started from the encoder")}


def test_a_few_steps_refine_the_rows(
    tiny_model: Path, clip: str, photos: tuple[str, ...], tmp_path: Path, encoder: TrainedEncoder
) -> None:
    ((_, before),) = learn(tiny_model, clip, tmp_path / "a", encoder, [task("toy", photos)])
    ((record, after),) = learn(
        tiny_model, clip, tmp_path / "b", encoder, [task("toy", photos)], inversion={"steps": 2, "learning_rate": 1e-4}
    )
    assert (record.start, record.steps) == ("encoder", 2)
    (start,), (moved,) = load(before).values(), load(after).values()
    assert 0 < float((moved - start).abs().max()) < 1e-3


def test_a_concept_whose_features_are_not_finite_costs_itself(
    tiny_model: Path,
    clip: str,
    photos: tuple[str, ...],
    tmp_path: Path,
    encoder: TrainedEncoder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ((_, alone),) = learn(tiny_model, clip, tmp_path / "a", encoder, [task("toy", photos[:1])])
    features_of = ClipExtractor.images_and_patches

    def broken(extractor: ClipExtractor, pictures: Sequence[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
        pooled, patches = features_of(extractor, pictures)
        return pooled * torch.nan if len(pictures) == 2 else pooled, patches

    monkeypatch.setattr(ClipExtractor, "images_and_patches", broken)
    learner = learner_of(tiny_model, clip, tmp_path / "b", encoder)
    good, bad = together(learner, [task("toy", photos[:1]), task("poison", photos[1:])])
    assert (bad.status, bad.error_kind) == ("failed", "numerics")
    assert "features of the photos are not finite" in bad.error
    assert (tmp_path / "b" / good.folder.embedding).read_bytes() == alone


def test_dvar_ends_the_refinement_of_the_rows(
    tiny_model: Path, clip: str, photos: tuple[str, ...], tmp_path: Path, encoder: TrainedEncoder
) -> None:
    stop = {"method": "dvar", "check_every_steps": 1, "window": 2, "variance_ratio": 0.9}
    ((_, before),) = learn(tiny_model, clip, tmp_path / "a", encoder, [task("toy", photos)])
    inversion = {"steps": 40, "learning_rate": 1e-4, "stop": stop}
    ((record, after),) = learn(tiny_model, clip, tmp_path / "b", encoder, [task("toy", photos)], inversion=inversion)
    assert record.start == "encoder"
    assert 2 <= record.steps < 40
    (start,), (moved,) = load(before).values(), load(after).values()
    assert 0 < float((moved - start).abs().max()) < 0.02


@pytest.mark.parametrize("has_scores", [True, False])
def test_an_encoder_may_read_another_extractor_than_the_scores(
    tiny_model: Path, tiny_backbone: Backbone, clip: str, photos: tuple[str, ...], tmp_path: Path, has_scores: bool
) -> None:
    """A DINO knows no texts and cannot score pictures."""
    dino = str(tiny_extractor("dinov2", tmp_path / "dino"))
    trained = untrained(tiny_backbone, dino)
    tasks, scored = [task("toy", photos)], clip if has_scores else ""
    inversion = {"init": {"extractor": dino}}
    ((record, data),) = learn(tiny_model, scored, tmp_path / "a", trained, tasks, inversion=inversion)
    assert record.start == "encoder"
    assert bool(record.scores) == has_scores
    features = PhotoFeatures(tiny_backbone, load_extractor(dino, "cpu"), CONFIG)
    pictures = canonical_order([Image.open(path).convert("RGB") for path in photos])
    word = class_vectors(tasks[0].concept, tiny_backbone)
    rows = trained.embedding("<toy>", features(pictures), word).vectors["clip_l"]
    (published,) = load(data).values()
    assert float((published - rows).norm() / (rows - word["clip_l"]).norm()) < 0.05, "but for the file's rounding"
    with pytest.raises(ValueError, match=r"inversion\.init\.encoder = .* trained for another extractor"):
        learn(tiny_model, clip, tmp_path / "b", trained, tasks)


def test_an_encoder_of_another_model_ends_the_run_before_it_learns(
    tiny_model: Path, clip: str, photos: tuple[str, ...], tmp_path: Path, encoder: TrainedEncoder
) -> None:
    with pytest.raises(ValueError, match=r"inversion\.init\.encoder = .* trained for another model"):
        learn(tiny_model, clip, tmp_path, replace(encoder, model_hash="0" * 32), [task("toy", photos)])


def test_without_steps_the_encoders_adapter_is_published_with_the_rows(
    tiny_model: Path,
    tiny_backbone: Backbone,
    clip: str,
    photos: tuple[str, ...],
    tmp_path: Path,
    with_adapter: TrainedEncoder,
) -> None:
    one = task("toy", photos)
    settings = {"inversion": {"adapter": ADAPTER}}
    ((record, _),) = learn(tiny_model, clip, tmp_path / "a", with_adapter, [one], **settings)
    assert (record.start, record.steps) == ("encoder", 0)
    data = (tmp_path / "a" / record.folder.adapter).read_bytes()
    assert len(data) == record.files["adapter.safetensors"].bytes
    features = PhotoFeatures(tiny_backbone, ClipExtractor(clip, "cpu"), CONFIG)
    pictures = canonical_order([Image.open(path).convert("RGB") for path in photos])
    made = with_adapter.embedding("<toy>", features(pictures), class_vectors(one.concept, tiny_backbone)).adapter
    assert made is not None
    published = parse_adapter(data)
    assert (published.kind, published.scale) == ("causal", 1.0)
    for name, (_, up) in published.tensors.items():
        known = made.tensors[name][1]
        assert float((up - known).norm() / known.norm()) < 0.05, "but for the file's rounding"
    others = [task("cat", photos[:1]), one, task("dog", photos[1:])]
    found = learn(tiny_model, clip, tmp_path / "b", with_adapter, others, actors={"slots": 2}, **settings)
    assert (tmp_path / "b" / found[1][0].folder.adapter).read_bytes() == data


def test_steps_refine_the_encoders_adapter(
    tiny_model: Path, clip: str, photos: tuple[str, ...], tmp_path: Path, with_adapter: TrainedEncoder
) -> None:
    ups = []
    for steps in (0, 2):
        output = tmp_path / str(steps)
        inversion = {"steps": steps, "adapter": ADAPTER | {"learning_rate": 1e-4}}
        ((record, _),) = learn(tiny_model, clip, output, with_adapter, [task("toy", photos)], inversion=inversion)
        adapter = parse_adapter((output / record.folder.adapter).read_bytes())
        ups.append(torch.cat([adapter.tensors[name][1].flatten() for name in sorted(adapter.tensors)]))
    assert 0 < float((ups[1] - ups[0]).abs().max()) < 1e-3


def test_encoder_and_run_must_have_equal_adapters(
    tiny_model: Path,
    clip: str,
    photos: tuple[str, ...],
    tmp_path: Path,
    encoder: TrainedEncoder,
    with_adapter: TrainedEncoder,
) -> None:
    tasks = [task("toy", photos)]
    of_none = r"inversion\.init\.encoder = .*encoder\.adapter\.kind = 'none', but inversion\.adapter\.kind is 'causal'"
    with pytest.raises(ValueError, match=of_none):
        learn(tiny_model, clip, tmp_path / "a", encoder, tasks, inversion={"adapter": ADAPTER})
    with pytest.raises(ValueError, match=r"encoder\.adapter\.kind = 'causal', but inversion\.adapter\.kind is 'none'"):
        learn(tiny_model, clip, tmp_path / "b", with_adapter, tasks)
