"""The ablation's setups differ by their parts alone, and its table is of differences known by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.ablation import BARE, PLAIN, WHOLE, make_setups, show_parts, used_parts
from textual_inversion.config import InversionConfig


@pytest.mark.parametrize("recipe", ["textboost-v1", "textboost-v1-paper", "textboost-v2", "textboost-plusplus"])
def test_every_part_is_off_once_and_alone_once(recipe: str) -> None:
    parts = used_parts(recipe)
    setups = make_setups(recipe, parts, 1, [PLAIN])
    configs = {name: setup.inversion(300, ()) for name, setup in setups.items()}
    assert {setup.num_photos for setup in setups.values()} == {1}
    assert set(setups) == {PLAIN, BARE, WHOLE} | {f"{kind}-{name}" for name in parts for kind in ("without", "only")}
    for name in parts:
        assert configs[f"without-{name}"] != configs[WHOLE]
        assert configs[f"only-{name}"] != configs[BARE]
    bare = configs[BARE]
    assert (bare.augment.paired, bare.class_cue, bare.adapter.kind, bare.norm_control) == (0, False, "none", "none")
    budgets = {(config.steps, config.batch_size) for name, config in configs.items() if name != PLAIN}
    assert len(budgets) == 1
    assert configs[PLAIN] == InversionConfig(steps=300)


def test_parts_that_a_recipe_lacks_are_left_out() -> None:
    assert {"paired-augmentation", "knowledge"} <= set(used_parts("textboost-v1"))
    assert not {"paired-augmentation", "knowledge", "snr-timesteps"} & set(used_parts("textboost-v2"))
    assert {"crops", "cross-attention"} <= set(used_parts("textboost-plusplus"))


def test_the_adapter_stays_where_those_of_the_cross_attention_are_off() -> None:
    parts = used_parts("textboost-plusplus")
    setups = make_setups("textboost-plusplus", parts, 1, [])
    targets = {name: setup.inversion(300, ()).adapter.targets for name, setup in setups.items()}
    assert (targets[WHOLE], targets["without-cross-attention"]) == (("fc2", "cross_attention"), ("fc2",))
    assert setups["only-cross-attention"].inversion(300, ()).adapter.kind == "causal"


def test_knowledge_preservation_alone_keeps_its_adapter() -> None:
    parts = used_parts("textboost-v1")
    setups = make_setups("textboost-v1", parts, 1, [])
    config = setups["only-knowledge"].inversion(300, ())
    adapter = setups["only-adapter"].inversion(300, ())
    assert config.adapter.kind == "lora"
    assert replace(config, penalties=adapter.penalties) == adapter


def test_the_table_of_parts() -> None:
    def row(setup: str, clip_i: float) -> dict[str, Any]:
        return {"setup": setup, "concept_id": "a", "seed": 0, "clip_i": clip_i, "clip_i_pictures": [clip_i]}

    parts = {name: part for name, part in used_parts("textboost-v1").items() if name in ("class-cue", "knowledge")}
    values = {WHOLE: 0.5, BARE: 0.3, PLAIN: 0.6, "without-class-cue": 0.4, "only-class-cue": 0.35,
              "without-knowledge": 0.55, "only-knowledge": 0.25, "only-adapter": 0.2}  # fmt: skip
    lines = show_parts([row(name, value) for name, value in values.items()], parts, [PLAIN]).splitlines()
    assert lines[2:] == [
        "| class noun behind the word | in the whole recipe | +0.100 |",
        "| class noun behind the word | alone | +0.050 |",
        "| knowledge preservation | in the whole recipe | -0.050 |",
        "| knowledge preservation | with the adapter alone | +0.050 |",
        "| all parts together |  | +0.200 |",
        "| the whole recipe less textual-inversion |  | -0.100 |",
    ]
