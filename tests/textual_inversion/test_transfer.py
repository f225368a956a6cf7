"""In a step the host never waits for the device. Shown on torch's `meta` device, which has no values to give: whoever
asks for one is noticed, and so is whoever hands something over in a way that waits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests import toy_family
from tests.tiny_models import DIM, tiny_extractor
from tests.toy_backbone import DIMS, ToyBackbone, plain_views
from tests.toy_family import write_model
from textual_inversion import engine as engine_module
from textual_inversion.augment_config import AugmentConfig
from textual_inversion.concept import Concept, LearnedEmbedding
from textual_inversion.conditioning import Conditioning
from textual_inversion.config import AdapterConfig, InversionConfig, PenaltyConfig, SamplingConfig, StopConfig
from textual_inversion.engine import Assignment, Engine
from textual_inversion.extractors import ClipExtractor, load_extractor
from textual_inversion.families import load_backbone
from textual_inversion.families.base import Backbone
from textual_inversion.generate import ImageRequest, draw, encode_request
from textual_inversion.latents import encode_views
from textual_inversion.lora import made_up_adapter
from textual_inversion.model_files import find_model_files
from textual_inversion.prompt_encoder import PromptEncoder
from textual_inversion.transfer import start_readback, to_device

READS: Mapping[Any, Callable[[Tensor], object]] = {
    Tensor.tolist: lambda tensor: torch.ones(tensor.shape).tolist(),
    Tensor.item: lambda _tensor: 1,
    Tensor.cpu: lambda tensor: torch.ones(tensor.shape, dtype=tensor.dtype),
    Tensor.__float__: lambda _tensor: 1.0,
    Tensor.__int__: lambda _tensor: 1,
    Tensor.__bool__: lambda _tensor: True,
}


class Watch(TorchFunctionMode):
    """Notes what the host waits for, and answers in the device's place."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in READS and args[0].is_meta:
            self.events.append(f"read by {func.__name__}")
            return READS[func](args[0])
        to_device = any(isinstance(arg, torch.device) and arg.type == "meta" for arg in (*args[1:], *kwargs.values()))
        if func is Tensor.to and to_device and not args[0].is_meta and not kwargs.get("non_blocking"):
            self.events.append("a copy that waits")
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == "meta":
            self.events.append("a tensor made on the device from the host's numbers")
        if func in (Tensor.__getitem__, Tensor.__setitem__) and args[0].is_meta:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(part, list) or (isinstance(part, Tensor) and not part.is_meta) for part in index):
                self.events.append("an index from the host")
        if func is Tensor.__setitem__ and args[0].is_meta and isinstance(args[2], Tensor) and not args[2].is_meta:
            self.events.append("a copy that waits")
        return func(*args, **kwargs)


def watched(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, steps: int, checkpoint_steps: int = 0, **options: Any
) -> list[str]:
    """What happens while two concepts are learned, `step` where the denoiser is called, or `look` without gradients."""
    watch = Watch()
    predict = backbone.predict

    def predicting(noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        watch.events.append("step" if torch.is_grad_enabled() else "look")
        return predict(noisy, timesteps, conditioning)

    def starting(numbers: Tensor) -> Callable[[], Tensor]:
        """As `transfer.start_readback`: what is read back arrives by itself, without a wait for later work."""
        assert numbers.is_meta
        number = next(numbered)
        return lambda: watch.events.append(f"arrived {number}") or torch.ones(numbers.shape)

    numbered = itertools.count(1)
    monkeypatch.setattr(backbone, "predict", predicting)
    monkeypatch.setattr(engine_module, "start_readback", starting)
    views = plain_views(torch.ones(3, 2, *backbone.latent_shape))
    concepts = [
        Concept(concept_id=f"c{i}", placeholder_token=f"<c{i}>", images=("x",), initializer="cat") for i in range(2)
    ]
    waiting = [Assignment(concept, views) for concept in concepts]
    config = InversionConfig(steps=steps, batch_size=2, **options)
    outcomes: list[Any] = []
    with watch:
        engine = Engine(backbone, config, slots=2, seed=0)
        engine.run(lambda _wait: waiting.pop() if waiting else None, outcomes.append, lambda *_: None, checkpoint_steps)
    assert [outcome.error for outcome in outcomes] == [None, None]
    return watch.events


METHODS: dict[str, dict[str, Any]] = {
    "rows": {},
    "textboost": {"adapter": AdapterConfig(kind="lora"), "penalties": PenaltyConfig(knowledge=0.1)},
    "directions": {"optimizer": "riemannian", "norm_control": "sphere"},
    "the best kept": {"stop": StopConfig(keep_best=True, check_every_steps=5)},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_step_reads_nothing(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    events = watched(ToyBackbone(device="meta"), monkeypatch, 40, **METHODS[method])
    between = [event for event in events[events.index("step") :] if event != "look"]
    ahead = [event for step in range(17, 40) for event in ("step", f"arrived {step - 16}")]
    assert between[: 16 + len(ahead)] == ["step"] * 16 + ahead, "16 steps on their way, and none is waited for"
    # before the last step's end the rest is there, and then what was learned is fetched
    assert between[16 + len(ahead) :][:18] == ["step", *[f"arrived {step}" for step in range(24, 41)]]
    assert set(between[16 + len(ahead) + 18 :]) <= {"read by cpu"}


@pytest.mark.parametrize("method", METHODS)
def test_a_concept_that_begins_is_handed_over_without_a_wait(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "a copy that waits" not in watched(ToyBackbone(device="meta"), monkeypatch, 1, **METHODS[method])


def test_a_step_of_stable_diffusion_reads_nothing(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Watch():
        backbone = load_backbone(str(tiny_model), device="meta", precision="float32")
    events = watched(backbone, monkeypatch, 16)
    first = events.index("step")
    assert events[first : first + 17] == ["step"] * 16 + ["arrived 1"]


@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_two_text_encoders_and_flow_reads_nothing(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = find_model_files(str(write_model(tmp_path)))
    with Watch():
        backbone: Any = toy_family.load(files, device="meta", precision="float32")
    options = dict(METHODS[method])
    if "adapter" in options:
        options["adapter"] = AdapterConfig(kind="lora", targets=("fc1", "fc2"))
    events = [event for event in watched(backbone, monkeypatch, 20, **options) if event != "look"]
    first = events.index("step")
    assert events[first : first + 22] == ["step"] * 16 + [each for i in (1, 2, 3) for each in ("step", f"arrived {i}")]


def test_a_rule_that_may_end_a_concept_gets_its_evaluations_in_one_read(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopConfig(method="dvar", check_every_steps=4)
    events = watched(ToyBackbone(device="meta"), monkeypatch, 8, stop=stop)
    first = events.index("step")
    assert events[first : first + 20] == [
        event
        for start in (1, 5)
        for event in (*["step"] * 4, "look", "look", *[f"arrived {step}" for step in range(start, start + 4)])
    ]


@pytest.mark.parametrize(("checkpoint_steps", "copies"), [(0, 0), (4, 2 * len(DIMS) * 3)])
def test_a_state_to_go_back_to_is_copied_to_the_host_for_a_checkpoint_alone_and_once(
    monkeypatch: pytest.MonkeyPatch, checkpoint_steps: int, copies: int
) -> None:
    """Of two concepts, each parameter and its two moments."""
    monkeypatch.setattr("textual_inversion.engine.LAST_GOOD_EVERY_STEPS", 4)
    events = watched(ToyBackbone(device="meta"), monkeypatch, 8, checkpoint_steps)
    between = [event for event in events[events.index("step") :] if not event.startswith("arrived")]
    assert between[: 8 + copies] == [*["step"] * 4, *["read by cpu"] * copies, *["step"] * 4]


def test_slot_indices_go_to_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Tensor] = []

    def sending(tensor: Tensor, device: torch.device) -> Tensor:
        sent.append(tensor)
        return to_device(tensor, device)

    monkeypatch.setattr("textual_inversion.passes.to_device", sending)
    watched(ToyBackbone(device="meta"), monkeypatch, 1)
    for_one_step = len(sent)
    watched(ToyBackbone(device="meta"), monkeypatch, 20)
    assert len(sent) == 2 * for_one_step


@pytest.mark.parametrize("solver", ["dpm++", "ddim"])
def test_a_batch_of_pictures_reads_nothing_until_it_is_drawn(tiny_model: Path, solver: Any) -> None:
    watch = Watch()
    with watch:
        backbone = load_backbone(str(tiny_model), device="meta", precision="float32")
        layers, adapter = backbone.adapter_layers, AdapterConfig(kind="lora")
        made_up = made_up_adapter(layers, adapter, torch.Generator().manual_seed(0))
        vectors = {"clip_l": torch.ones(1, DIM)}
        embedding = LearnedEmbedding(placeholder_token="<c>", vectors=vectors, adapter=made_up)
        asked = [encode_request(backbone, ImageRequest("a <c>", seed, (embedding,))) for seed in range(2)]
        watch.events.clear()
        draw(PromptEncoder(backbone), asked, SamplingConfig(solver=solver, steps=3, batch_size=2))
    assert watch.events == ["read by cpu"]


def test_photos_are_encoded_without_a_wait(tiny_model: Path) -> None:
    watch = Watch()
    with watch:
        backbone = load_backbone(str(tiny_model), device="meta", precision="float32")
        watch.events.clear()
        views = encode_views(backbone, [Image.new("RGB", (16, 16))] * 5, AugmentConfig(), "c", 0)
    assert watch.events == []
    assert views.moments.is_meta


def test_pictures_and_texts_reach_the_extractor_without_a_wait(tmp_path: Path) -> None:
    watch = Watch()
    with watch:
        extractor = load_extractor(str(tiny_extractor("clip", tmp_path)), device="meta")
        assert isinstance(extractor, ClipExtractor)
        watch.events.clear()
        extractor.images([Image.new("RGB", (16, 16))] * 5)
        assert watch.events == ["read by cpu"]
        extractor.texts(["a cat", "a dog"])
    assert "a copy that waits" not in watch.events


def test_what_is_fetched_arrives() -> None:
    tensor = torch.arange(3)
    assert start_readback(tensor)() is tensor


def test_what_is_put_arrives() -> None:
    tensor = torch.arange(3)
    assert torch.equal(to_device(tensor, torch.device("cpu")), tensor)
    assert to_device(tensor, torch.device("meta")).is_meta
