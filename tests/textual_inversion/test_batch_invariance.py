"""The check asks what kernels do; what is applied after it holds whatever they do."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.toy_backbone import ToyBackbone
from textual_inversion import batch_invariance
from textual_inversion.batch_invariance import (
    choose_sampling,
    choose_slots_per_pass,
    drawing_is_invariant,
    learning_is_invariant,
)
from textual_inversion.config import AdapterConfig, InversionConfig, PenaltyConfig, SamplingConfig
from textual_inversion.families.base import Backbone, Conditioning

ROOT = Path(__file__).resolve().parents[2]
INSTRUCTION_SETS = [
    {},
    {"MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    {"ATEN_CPU_CAPABILITY": "default"},
    {"ATEN_CPU_CAPABILITY": "avx2"},
]


class RoundsLastPlace(ToyBackbone):
    """A library whose kernel sums differently for the last sample of a batch of an even size."""

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        output = super().predict(noisy_latents, timesteps, conditioning)
        factor = torch.ones(len(output), 1, 1, 1)
        if len(output) % 2 == 0:
            factor[-1] += 2**-23
        return output * factor


class LeaksGradient(ToyBackbone):
    """A library whose outputs are right, and whose gradients have a neighbour's share in them."""

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        output = super().predict(noisy_latents, timesteps, conditioning)
        return output + 1e-3 * (conditioning.hidden - conditioning.hidden.detach()).mean() * output.mean().detach()


@pytest.mark.parametrize(
    "config",
    [
        InversionConfig(batch_size=1),
        InversionConfig(batch_size=3, progressive=True, max_grad_norm=1.0),
        InversionConfig(
            batch_size=2,
            adapter=AdapterConfig(kind="lora", targets=("fc2",)),
            penalties=PenaltyConfig(knowledge=0.1),
            per_image_tokens=True,
        ),
    ],
    ids=["rows", "progressive", "textboost"],
)
def test_one_bit_in_one_place_is_seen(config: InversionConfig) -> None:
    assert not learning_is_invariant(RoundsLastPlace(), config, slots=2)


def test_a_gradient_that_neighbours_change_is_seen_though_losses_are_equal() -> None:
    assert not learning_is_invariant(LeaksGradient(), InversionConfig(batch_size=2), slots=3)


def test_a_pass_of_one_concept_has_no_places() -> None:
    assert learning_is_invariant(RoundsLastPlace(), InversionConfig(batch_size=2), slots=1)


def test_a_cpu_takes_passes_of_one_concept_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=batch_invariance.__name__)
    assert choose_slots_per_pass(RoundsLastPlace(), InversionConfig(batch_size=2), 2) == (1, True)
    assert caplog.messages == [
        "learning depends on a sample's place in passes of 2 concepts; each gets passes of its own"
    ]


def test_an_accelerator_keeps_its_passes_and_promises_rounding(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = RoundsLastPlace()
    monkeypatch.setattr(batch_invariance, "learning_is_invariant", lambda *_: False)
    monkeypatch.setattr(batch_invariance, "drawing_is_invariant", lambda *_: False)
    monkeypatch.setattr(backbone, "device", torch.device("cuda"))
    caplog.set_level(logging.INFO, logger=batch_invariance.__name__)
    assert choose_slots_per_pass(backbone, InversionConfig(), 4) == (4, False)
    sampling = SamplingConfig(batch_size=8)
    assert choose_sampling(backbone, sampling) == (sampling, False)
    assert all(message.endswith("results are equal to rounding") for message in caplog.messages)
    assert len(caplog.messages) == 2


def test_a_cpu_draws_one_picture_at_a_time_where_places_differ(
    tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = tiny_backbone.decode

    def decode_unevenly(latents: Tensor) -> Tensor:
        pixels = decode(latents).clone()
        pixels[1:] += 2**-20
        return pixels

    monkeypatch.setattr(tiny_backbone, "decode", decode_unevenly)
    sampling = SamplingConfig(batch_size=3, steps=7)
    assert not drawing_is_invariant(tiny_backbone, sampling)
    chosen, is_exact = choose_sampling(tiny_backbone, sampling)
    assert is_exact
    assert (chosen.batch_size, chosen.steps) == (1, 7)
    assert drawing_is_invariant(tiny_backbone, chosen)


def test_a_text_encoder_that_treats_places_differently_is_seen(
    tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = tiny_backbone.encode_prompts

    def encode_unevenly(ids: object, *rest: object) -> Conditioning:
        hidden = encode(ids, *rest).hidden.clone()
        hidden[5:] *= 1 + 2**-20
        return Conditioning(hidden=hidden)

    monkeypatch.setattr(tiny_backbone, "encode_prompts", encode_unevenly)
    assert not drawing_is_invariant(tiny_backbone, SamplingConfig(batch_size=2))


SCRIPT = """
import json, sys, torch
torch.set_num_threads(1)
from tests.textual_inversion.invariance_trials import trial
print(json.dumps([answer for one in json.loads(sys.argv[1]) for answer in trial(*one)]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("environment", INSTRUCTION_SETS, ids=lambda each: "-".join(each.values()) or "any")
def test_the_check_under_every_instruction_set(environment: dict[str, str], tiny_model: Path) -> None:
    """No answer is expected of any processor; the check finds what a longer comparison finds, and what is chosen by its
    answer gives the same bytes alone and in company. The demo model has its turn under the first two."""
    trials: list[object] = [(str(tiny_model), [(1, 2), (2, 2), (1, 4)], [2, 4])]
    if environment in INSTRUCTION_SETS[:2]:
        trials.append((str(ROOT / "demo" / "model"), [(4, 2)], [4]))
    command = [sys.executable, "-c", SCRIPT, json.dumps(trials)]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    answers = json.loads(run.stdout.splitlines()[-1])
    assert len(answers) == (7 if len(trials) == 2 else 5)
    for answer in answers:
        assert answer["equal as chosen"], answer
        assert answer["check"] == answer["direct"], answer
