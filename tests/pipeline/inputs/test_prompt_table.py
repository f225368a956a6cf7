"""Prompts from text and from Parquet."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.inputs.prompt_table import Prompt, read_prompts


def test_text(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("# first\na photo of {}\n\n  {} on the beach \na photo of {}\n")
    assert read_prompts(str(path)) == [Prompt("a photo of {}"), Prompt("{} on the beach")]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "prompts.parquet"
    table = {
        "prompt": ["a {}", "{} in the snow"],
        "concept_id": [None, "cat"],
        "category": ["style", None],
        "seed": [3, None],
    }
    pq.write_table(pa.table(table), path)
    prompts = read_prompts(str(path))
    assert prompts == [Prompt("a {}", None, "style", 3), Prompt("{} in the snow", "cat", None, None)]
    assert [prompt.is_for("cat", "object") for prompt in prompts] == [False, True]
    assert [prompt.is_for("dog", "style") for prompt in prompts] == [True, False]


@pytest.mark.parametrize(
    ("content", "message"),
    [("a photo\n", "line 1: prompt 'a photo' must be text with {}"), ("# nothing\n", "there are none in it")],
)
def test_bad_text_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(str(path))


def test_bad_tables_are_named(tmp_path: Path) -> None:
    path = tmp_path / "prompts.parquet"
    pq.write_table(pa.table({"text": ["a {}"]}), path)
    with pytest.raises(ValueError, match="no column 'prompt'"):
        read_prompts(str(path))
    pq.write_table(pa.table({"prompt": ["a {}", "b {}"], "seed": [1, -1]}), path)
    with pytest.raises(ValueError, match="row 2: seed -1"):
        read_prompts(str(path))
    with pytest.raises(ValueError, match="cannot be read"):
        read_prompts(str(tmp_path / "none.parquet"))


def test_holes_are_filled() -> None:
    assert Prompt("a {} on the  beach").filled("<cat>", "animal") == "a <cat> on the  beach"
    prompt = Prompt("a {} {initializer} in the jungle")
    assert prompt.filled("<cat>", "stuffed animal") == "a <cat> stuffed animal in the jungle"
    assert prompt.filled("<cat>", "") == "a <cat> in the jungle"
    assert prompt.template("cat") == "a {} cat in the jungle"


def test_a_concept_is_named_with_its_class_noun_once() -> None:
    def filled(text: str, prompt_as: str = "<cat> stuffed animal") -> str:
        return Prompt(text).filled("<cat>", "stuffed animal", prompt_as)

    assert filled("a {} on the beach") == "a <cat> stuffed animal on the beach"
    assert filled("a {} on the beach", "") == "a <cat> on the beach"
    assert filled("a {} {initializer} in the jungle") == "a <cat> stuffed animal in the jungle"
    assert filled("a {initializer}, this {}") == "a stuffed animal, this <cat> stuffed animal"
    assert filled("a {token} on the beach") == "a <cat> on the beach"
    assert Prompt("a {token} beside a {}").template("cat") == "a {} beside a {}"
    assert Prompt("a {}").filled("<{token}>", "", "<{token}> cat") == "a <{token}> cat"


def test_a_prompt_may_have_the_token_alone(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a photo of {token}\n")
    assert read_prompts(str(path)) == [Prompt("a photo of {token}")]
