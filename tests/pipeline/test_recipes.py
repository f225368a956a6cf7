from __future__ import annotations

import re
from operator import attrgetter
from pathlib import Path

import pytest

from pipeline.config import RunConfig
from pipeline.config_file import RECIPES, load_config, recipe, to_tree
from pipeline.run import configure, parse
from textual_inversion.adapter_config import ADAPTER_TARGETS

MANUAL = Path(__file__).resolve().parents[2] / "docs" / "OPERATIONS.md"
NAMES = sorted(path.stem for path in RECIPES.glob("*.toml"))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_a_valid_configuration_other_than_the_default(name: str) -> None:
    text = (RECIPES / f"{name}.toml").read_text()
    assert text.startswith("# "), "its paper"
    assert max(len(line) for line in text.splitlines()) <= 120
    assert to_tree(load_config(text)) != to_tree(RunConfig())


# nahyeonkaty/textboost 9a00c9c; crops of 1 / 1.2 of the side, of an area of 0.8 to 1
TEXTBOOST_V2: dict[str, object] = {
    "steps": 100, "batch_size": 8, "learning_rate": 1e-3, "learning_rate_schedule": "constant",
    "weight_decay": 0.01, "max_grad_norm": 0.0, "norm_control": "clamp", "norm_cap": 1.0,
    "templates": "textual_inversion", "class_cue": True, "timesteps.sampler": "uniform",
    "penalties.knowledge": 0.0, "augment.flip": True, "augment.paired": 0,
    "augment.min_crop_scale": pytest.approx(0.8**0.5 / 1.2, abs=1e-3),
    "augment.max_crop_scale": pytest.approx(1 / 1.2, abs=1e-3),
    "adapter.kind": "causal", "adapter.rank": 1, "adapter.alpha": 1.0, "adapter.learning_rate": 1e-4,
    "adapter.weight_decay": 0.01, "adapter.max_grad_norm": 1.0, "adapter.targets": ("fc2",),
}  # fmt: skip

PINNED: dict[str, dict[str, object]] = {
    # JMaiGC/textboost a806fda
    "textboost-v1": {
        "steps": 250, "batch_size": 8, "learning_rate": 1e-3, "learning_rate_schedule": "linear", "weight_decay": 0.01,
        "max_grad_norm": 0.0, "norm_control": "none", "templates": "textboost", "class_cue": True,
        "timesteps.sampler": "uniform", "penalties.knowledge": 0.1,
        "augment.flip": False, "augment.crops": 0, "augment.paired_set": "release", "augment.paired_probability": 0.8,
        "adapter.kind": "lora", "adapter.rank": 4, "adapter.alpha": 4.0, "adapter.learning_rate": 5e-5,
        "adapter.weight_decay": 0.01, "adapter.max_grad_norm": 1.0, "adapter.targets": ADAPTER_TARGETS,
    },
    # nahyeonkaty/textboost 0390854, run_textboost_db.py
    "textboost-v1-late": {
        "steps": 250, "batch_size": 8, "learning_rate": 1e-3, "learning_rate_schedule": "constant",
        "weight_decay": 0.01, "max_grad_norm": 0.0, "norm_control": "clamp", "norm_cap": 1.0,
        "templates": "textual_inversion", "class_cue": False, "timesteps.sampler": "uniform",
        "penalties.knowledge": 0.1, "augment.flip": False, "augment.crops": 0, "augment.paired_set": "late",
        "augment.paired_probability": 0.5, "adapter.kind": "lora", "adapter.rank": 4, "adapter.alpha": 4.0,
        "adapter.learning_rate": 1e-4, "adapter.weight_decay": 0.01, "adapter.max_grad_norm": 1.0,
        "adapter.targets": ("q_proj", "k_proj", "v_proj"),
    },
    "textboost-v2": TEXTBOOST_V2,
    # nahyeonkaty/textboost 9a00c9c with --expand; the paper's steps
    "textboost-plusplus": {**TEXTBOOST_V2, "steps": 80, "adapter.targets": ("fc2", "cross_attention")},
    # lyuPang/CrossInitialization 0b1e39a
    "cross-init": {
        "steps": 320, "batch_size": 8, "learning_rate": 6.25e-4 * 8, "weight_decay": 0.01, "norm_control": "none",
        "init.method": "encoder_output", "penalties.start_distance": 1e-5, "augment.flip": True,
    },
    # yandex-research/DVAR ab2b765
    "dvar": {
        "steps": 6100, "batch_size": 2, "learning_rate": 5e-3 * 2, "weight_decay": 0.01, "norm_control": "none",
        "augment.flip": True, "stop.method": "dvar", "stop.variance_ratio": 0.15,
    },
    # rinongal/textual_inversion 424192d and the paper
    "ti-paper": {
        "steps": 5000, "batch_size": 8, "learning_rate": 0.005 * 2 * 4, "weight_decay": 0.01, "max_grad_norm": 0.0,
        "norm_control": "none", "augment.flip": True, "templates": "textual_inversion",
    },
    # kunheek/dti 96a77a3
    "dti": {
        "steps": 400, "batch_size": 4, "optimizer": "riemannian", "learning_rate": 0.04, "direction_prior": 1e-4,
        "norm_control": "sphere", "norm_limit": 1.0, "augment.flip": False, "templates": "textual_inversion",
    },
}  # fmt: skip
# benchmarks/budgets_cpu_20261127.md and benchmarks/mirrored_photos_cpu_20261127.md
PINNED["demo"] = {
    "steps": 200, "batch_size": 1, "learning_rate": 5e-3, "augment.flip": False, "gradient_path": "up_path",
}  # fmt: skip
PINNED["high-lr"] = PINNED["ti-paper"] | {"learning_rate": 2e-2 * 2 * 4}
PINNED["low-lr"] = PINNED["ti-paper"] | {"learning_rate": 1e-4 * 2 * 4}
PINNED["regularised"] = PINNED["ti-paper"] | {"penalties.class_distance": 0.1}
PINNED["per-image"] = PINNED["ti-paper"] | {"per_image_tokens": True}
PINNED["progressive"] = PINNED["ti-paper"] | {"progressive": True, "steps": 6000}
PINNED["textboost-v1-paper"] = PINNED["textboost-v1"] | {"timesteps.sampler": "snr"}


@pytest.mark.parametrize("name", PINNED)
def test_a_recipe_has_its_sources_values(name: str) -> None:
    inversion = load_config((RECIPES / f"{name}.toml").read_text()).inversion
    assert {field: attrgetter(field)(inversion) for field in PINNED[name]} == PINNED[name]


def test_the_demos_gate_is_the_one_that_was_measured() -> None:
    assert load_config((RECIPES / "demo.toml").read_text()).gate.min_clip_i_share == 0.75


def test_dvars_window_is_the_papers_310_steps() -> None:
    stop = load_config((RECIPES / "dvar.toml").read_text()).inversion.stop
    assert stop.window * stop.check_every_steps == 310


def test_there_are_recipes_for_the_papers_setups() -> None:
    assert {"ti-paper", "progressive", "regularised", "per-image", "high-lr", "low-lr", "cross-init", "dti"} <= {*NAMES}
    assert {"textboost-v1", "textboost-v2", "textboost-plusplus", "dvar", "range-500-900", "min-snr"} <= {*NAMES}


def test_the_manual_lists_every_recipe() -> None:
    section = MANUAL.read_text().partition("### Recipes")[2].partition("## ")[0]
    listed = [
        name for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for name in re.findall(r"`(.*?)`", row)
    ]
    assert sorted(listed) == NAMES


def test_a_recipe_by_its_name_and_settings_over_it() -> None:
    config = configure(parse(["m.parquet", "--config", "textboost-v2", "--set", "inversion.steps=7"]))
    assert (config.inversion.adapter.kind, config.inversion.adapter.targets) == ("causal", ("fc2",))
    assert (config.inversion.steps, config.inversion.batch_size) == (7, 8)


@pytest.mark.parametrize("address", ["job.toml", "here/job", "s3://bucket/job.toml"])
def test_an_address_stays(address: str) -> None:
    assert recipe(address) == address


def test_a_name_that_is_no_recipe() -> None:
    with pytest.raises(ValueError, match=r"--config 'textboost': no such file, and the recipes are cross-init, "):
        recipe("textboost")
