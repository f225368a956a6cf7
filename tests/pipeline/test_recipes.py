from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.config import RunConfig
from pipeline.config_file import RECIPES, load_config, recipe, to_tree
from pipeline.run import configure, parse

MANUAL = Path(__file__).resolve().parents[2] / "docs" / "OPERATIONS.md"
NAMES = sorted(path.stem for path in RECIPES.glob("*.toml"))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_a_valid_configuration_other_than_the_default(name: str) -> None:
    text = (RECIPES / f"{name}.toml").read_text()
    assert text.startswith("# "), "its paper"
    assert to_tree(load_config(text)) != to_tree(RunConfig())


def test_there_are_recipes_for_the_papers_setups() -> None:
    assert {"ti-paper", "progressive", "regularised", "per-image", "high-lr", "low-lr", "cross-init", "dti"} <= {*NAMES}
    assert {"textboost-v1", "textboost-v2", "dvar", "range-500-900", "min-snr"} <= {*NAMES}


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
