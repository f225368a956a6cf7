"""Settings that make no sense together are refused before any model is loaded."""

from __future__ import annotations

import pytest

from textual_inversion.augment_config import AugmentConfig
from textual_inversion.config import (
    AdapterConfig,
    InitConfig,
    InversionConfig,
    PenaltyConfig,
    StopConfig,
    TimestepConfig,
)

SPHERE = {"optimizer": "riemannian", "norm_control": "sphere"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "riemannian"}, "inversion.norm_control = 'clamp'"),
        ({"direction_prior": 1e-4}, "inversion.direction_prior = 0.0001"),
        ({**SPHERE, "weight_decay": 0.01}, "inversion.weight_decay = 0.01"),
        ({"penalties": PenaltyConfig(knowledge=0.1)}, "inversion.penalties.knowledge = 0.1"),
        (
            {"penalties": PenaltyConfig(knowledge=0.1), "adapter": AdapterConfig(kind="causal")},
            "inversion.penalties.knowledge = 0.1",
        ),
        ({"per_image_tokens": True, "augment": AugmentConfig(paired=1)}, "inversion.per_image_tokens = True"),
        ({"progressive": True, "stop": StopConfig(method="dvar")}, "inversion.progressive = True"),
        ({"progressive": True, "stop": StopConfig(keep_best=True)}, "inversion.progressive = True"),
        ({"init": InitConfig(method="encoder_output")}, "inversion.norm_control = 'clamp'"),
        (
            {"init": InitConfig(method="encoder_output"), "norm_control": "none", "text_encoders": ("clip_l",)},
            "inversion.text_encoders",
        ),
        (
            {
                "gradient_path": "up_path",
                "adapter": AdapterConfig(kind="causal", targets=("fc2", "cross_attention")),
            },
            "inversion.gradient_path = 'up_path': must be 'whole' with 'cross_attention' among adapter.targets",
        ),
        ({"gradient_path": "down_path"}, "inversion.gradient_path = 'down_path'"),
    ],
)
def test_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InversionConfig(**settings)


def test_cross_attention_goes_with_a_causal_adapter_or_none() -> None:
    targets = ("fc2", "cross_attention")
    with pytest.raises(ValueError, match=r"adapter.kind = 'lora': must be 'causal' with 'cross_attention' among"):
        AdapterConfig(kind="lora", targets=targets)
    with pytest.raises(
        ValueError, match=r"adapter.targets = \('attn2',\): must be some of q_proj, .*, cross_attention"
    ):
        AdapterConfig(kind="causal", targets=("attn2",))
    assert [AdapterConfig(kind=kind, targets=targets).kind for kind in ("causal", "none")] == ["causal", "none"]


def test_refused_within_a_section() -> None:
    with pytest.raises(ValueError, match=r"timesteps.low, high = \(500, 900\): must be left alone unless"):
        TimestepConfig(low=500, high=900)
    with pytest.raises(ValueError, match=r"penalties.captions = 'list.txt'"):
        PenaltyConfig(captions="list.txt")


@pytest.mark.parametrize(
    "settings",
    [
        {**SPHERE, "direction_prior": 1e-4, "norm_cap": 2.0},
        {**SPHERE, "progressive": True, "adapter": AdapterConfig(kind="causal")},
        {"per_image_tokens": True, "progressive": True, "stop": StopConfig(check_every_steps=5)},
        {"gradient_path": "up_path", "adapter": AdapterConfig(kind="causal")},
        {"gradient_path": "up_path", "adapter": AdapterConfig(kind="none", targets=("cross_attention",))},
        {"adapter": AdapterConfig(kind="lora"), "penalties": PenaltyConfig(knowledge=0.1, captions="list.txt")},
        {"stop": StopConfig(method="dvar", keep_best=True), "penalties": PenaltyConfig(clip=0.1, class_distance=1.0)},
    ],
)
def test_allowed(settings: dict[str, object]) -> None:
    InversionConfig(**settings)
