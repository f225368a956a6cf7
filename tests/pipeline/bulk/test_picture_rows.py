"""Plan rows of the bulk pictures: one for each picture, named by all that it depends on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.bulk.negatives import check_negative_prompts
from pipeline.bulk.picture_rows import picture_path, plan_rows
from pipeline.config import RunConfig
from pipeline.inputs.prompt_table import Prompt
from pipeline.ledger.records import ConceptRecord
from tests.pipeline.runs import tiny_config
from textual_inversion.concept import LearnedEmbedding
from textual_inversion.formats import dump_diffusers

PROMPTS = [Prompt("a photo of a {}"), Prompt("a rendering of a {}")]


def record(name: str) -> ConceptRecord:
    return ConceptRecord(concept_id=name, fingerprint=f"f-{name}", status="done", placeholder_token=f"<{name}>")


def rows_of(config: RunConfig, names: list[str], prompts: list[Prompt] = PROMPTS) -> list[dict[str, Any]]:
    return list(plan_rows(config, [record(name) for name in names], prompts))


def test_rows_are_the_same_every_time_and_none_is_like_another() -> None:
    config = tiny_config("m", "out", generation={"images_per_prompt": 3})
    rows = rows_of(config, ["a", "b"])
    assert rows == rows_of(config, ["a", "b"])
    assert len(rows) == len({row["row_id"] for row in rows}) == len({row["seed"] for row in rows}) == 12
    assert rows[0]["prompt"] == "a photo of a <a>"
    assert {row["row_id"] for row in rows_of(config, ["a"])} < {row["row_id"] for row in rows}


def test_a_row_changes_with_what_its_picture_depends_on() -> None:
    sampling = {"steps": 2, "guidance_scale": 2.0, "batch_size": 4}
    same = tiny_config("m", "out", generation={"sampling": sampling | {"batch_size": 2}})
    other = tiny_config("m", "out", generation={"sampling": sampling | {"steps": 3}})
    first = rows_of(tiny_config("m", "out"), ["a"])[0]["row_id"]
    assert rows_of(same, ["a"])[0]["row_id"] == first
    assert rows_of(other, ["a"])[0]["row_id"] != first


def test_prompts_of_one_concept_and_seeds_that_are_given() -> None:
    prompts = [Prompt("{} in the snow", concept_id="b"), Prompt("a {}", seed=7)]
    rows = rows_of(tiny_config("m", "out", generation={"images_per_prompt": 2}), ["a", "b"], prompts)
    assert [(row["prompt"], row["seed"]) for row in rows if row["concept_id"] == "a"] == [("a <a>", 7), ("a <a>", 8)]
    assert "<b> in the snow" in {row["prompt"] for row in rows}
    assert "<a> in the snow" not in {row["prompt"] for row in rows}


def test_a_concept_is_drawn_by_the_name_in_its_record() -> None:
    def rows(named: ConceptRecord, *texts: str) -> list[dict[str, Any]]:
        return list(plan_rows(tiny_config("m", "out"), [named], [Prompt(text) for text in texts]))

    old = record("a")
    cued = replace(old, prompt_as="<a> cat", initializer="cat")
    texts = ("a photo of a {}", "a {} {initializer} in the snow", "a photo of a {token}")
    assert [row["prompt"] for row in rows(cued, *texts)] == [
        "a photo of a <a> cat", "a <a> cat in the snow", "a photo of a <a>",
    ]  # fmt: skip
    (bare,) = rows(old, "a photo of a {}")
    assert rows(replace(old, prompt_as="<a>"), "a photo of a {}") == [bare], "pictures drawn before are not drawn again"
    assert rows(cued, "a photo of a {}")[0]["row_id"] != bare["row_id"]
    assert rows(cued, "a photo of a {token}") == [bare], "the same text is the same picture"


def test_what_a_prompt_sets_is_part_of_its_rows_names() -> None:
    config = tiny_config("m", "out")
    bare = Prompt("a {}", seed=1)
    changed = [
        bare,
        replace(bare, negative="dark"),
        replace(bare, negative="dark {}"),
        replace(bare, guidance_scale=4.0),
        replace(bare, steps=9),
        replace(bare, size_px=(64, 32)),
    ]
    rows = rows_of(config, ["a"], changed)
    assert len({row["row_id"] for row in rows}) == len(changed)
    assert [row.get("negative_prompt") for row in rows[:3]] == [None, "dark", "dark <a>"]
    assert (rows[5]["width"], rows[5]["height"]) == (64, 32)
    sampling = config.generation.sampling
    own = replace(bare, guidance_scale=sampling.guidance_scale, steps=sampling.steps, carried='{"x": 1}')
    (same,) = rows_of(config, ["a"], [own])
    assert same["row_id"] == rows[0]["row_id"], "the settings' own values, and what is carried, are the same picture"
    everywhere = replace(config, generation=replace(config.generation, negative_prompt="dark"))
    assert rows_of(everywhere, ["a"], [bare])[0]["row_id"] == rows[1]["row_id"]
    assert rows_of(everywhere, ["a"], [changed[2]])[0]["row_id"] == rows[2]["row_id"], "a prompt's own goes first"


def test_the_content_of_a_negative_prompts_concepts_is_part_of_its_rows_names(tmp_path: Path) -> None:
    file = tmp_path / "bad.safetensors"

    def planned(seed: int) -> dict[str, Any]:
        vector = torch.randn(1, 8, generator=torch.Generator().manual_seed(seed))
        file.write_bytes(dump_diffusers(LearnedEmbedding(placeholder_token="<bad>", vectors={"clip_l": vector})))
        config = tiny_config("m", "out", generation={"learned": [str(file)], "negative_prompt": "a <bad> {}"})
        check_negative_prompts(config, PROMPTS)
        return rows_of(config, ["a"], PROMPTS[:1])[0]

    first, other, again = planned(1), planned(2), planned(1)
    assert first == again
    assert first["row_id"] != other["row_id"]
    assert first["negative_prompt"] == "a <bad> <a>"


def test_a_negative_prompt_with_an_unknown_concept_is_refused_before_anything_is_learned(tmp_path: Path) -> None:
    prompts = [Prompt("a {}", negative="dark {token}, <bad>")]
    with pytest.raises(ValueError, match=r"<bad> is no learned .* \(generation.learned names the concepts"):
        check_negative_prompts(tiny_config("m", "out"), prompts)
    with pytest.raises(ValueError, match=r"absent\.safetensors cannot be used"):
        check_negative_prompts(
            tiny_config("m", "out", generation={"learned": [str(tmp_path / "absent.safetensors")]}), prompts
        )
    check_negative_prompts(tiny_config("m", "out"), [Prompt("a {}", negative="dark {token}")])


def test_a_picture_is_named_by_its_prompt_and_seed() -> None:
    row = {
        "row_id": "0123456789abcdef",
        "concept_id": "duck",
        "prompt": "A photo of <duck>, on/../the beach!",
        "seed": 7,
    }
    assert picture_path(row) == "images/duck/a-photo-of-duck-on-the-beach-7-01234567.png"
    assert picture_path({**row, "prompt": "鴨"}) == "images/duck/7-01234567.png", "no word of it is ASCII"
    assert len(picture_path({**row, "prompt": "word " * 500})) < 100
    paths = {picture_path(each) for each in rows_of(tiny_config("m", "out"), ["a", "b"])}
    assert len(paths) == 4
