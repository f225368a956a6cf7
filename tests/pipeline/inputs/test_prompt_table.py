"""Prompts from text and from Parquet."""

from __future__ import annotations

import json
import math
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.inputs.prompt_table import Prompt, prompt_notes, read_prompts, unknown_concepts


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


FULL = {
    "prompt": "a {}", "negative_prompt": "dark {token}", "concept_id": "007", "category": "object", "seed": 3,
    "guidance_scale": 7.5, "steps": 30, "width": 64, "height": 32, "scene": "hall",
}  # fmt: skip
FULL_PROMPT = Prompt("a {}", "007", "object", 3, "dark {token}", 7.5, 30, (64, 32), '{"scene": "hall"}')


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.csv", ",".join(FULL) + "\n" + ",".join(map(str, FULL.values())) + '\n"{}, at night",,,,,,,,,\n'),
        ("p.tsv", "\t".join(FULL) + "\r\n" + "\t".join(map(str, FULL.values())) + "\r\n{}, at night" + "\t" * 9),
        ("p.json", json.dumps([FULL, "{}, at night"])),
        ("p.JSONL", json.dumps(FULL) + "\n\n" + json.dumps({"prompt": "{}, at night", "seed": None}) + "\n"),
        ("p.ndjson", "\ufeff" + json.dumps(FULL) + '\n"{}, at night"'),
    ],
)
def test_a_structured_text_file_is_read_as_what_it_is(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, newline="")
    full, other = read_prompts(str(tmp_path / name))
    assert full == FULL_PROMPT
    assert (other.text, other.seed, other.steps, other.concept_id) == ("{}, at night", None, None, None)


def test_the_same_columns_in_parquet(tmp_path: Path) -> None:
    other = {**dict.fromkeys(FULL), "prompt": "{}, at night"}
    pq.write_table(pa.Table.from_pylist([FULL, other]), tmp_path / "p.parquet")
    assert read_prompts(str(tmp_path / "p.parquet"))[0] == FULL_PROMPT
    assert read_prompts(str(tmp_path)) == read_prompts(str(tmp_path / "*.parquet"))


def test_partition_folders_are_columns(tmp_path: Path) -> None:
    for category, steps in (("object", 4), ("style", 5)):
        folder = tmp_path / f"category={category}" / f"steps={steps}"
        folder.mkdir(parents=True)
        pq.write_table(pa.table({"prompt": ["a {}"]}), folder / "p.parquet")
    prompts = read_prompts(str(tmp_path))
    assert [(prompt.category, prompt.steps) for prompt in prompts] == [("object", 4), ("style", 5)]


def test_numbers_of_pandas_and_ids_of_other_kinds(tmp_path: Path) -> None:
    product = uuid.UUID(int=5)
    table = {
        "prompt": ["a {}", "b {}"],
        "seed": [12.0, math.nan],
        "concept_id": pa.array([product.bytes] * 2, pa.uuid()),
    }
    pq.write_table(pa.table(table), tmp_path / "p.parquet")
    assert [(prompt.seed, prompt.concept_id) for prompt in read_prompts(str(tmp_path / "p.parquet"))] == [
        (12, str(product)),
        (None, str(product)),
    ]
    pq.write_table(pa.table({"prompt": ["a {}", "b {}"], "concept_id": [math.nan, math.nan]}), tmp_path / "p.parquet")
    assert read_prompts(str(tmp_path / "p.parquet"))[0].concept_id is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"concept_id": 12.0}, "row 1: concept_id 12.0 is a broken number, as pandas makes"),
        ({"concept_id": " "}, "row 1: concept_id ' ' must be a concept's id; null stands for every concept"),
        ({"concept_id": ""}, "row 1: concept_id '' must be"),
        ({"concept_id": True}, "concept_id True must be"),
        ({"category": "person"}, "category 'person' must be 'object' or 'style'"),
        ({"negative_prompt": 3}, "negative_prompt 3 must be text"),
        ({"guidance_scale": 0.5}, r"guidance_scale 0.5 must be a number, 1 \(no guidance\) or more"),
        ({"guidance_scale": "high"}, "guidance_scale 'high' must be"),
        ({"steps": 0}, "steps 0 must be a whole number, 1 or more"),
        ({"steps": 2.5}, "steps is 2.5; it must be a whole number"),
        ({"steps": 10**6}, "steps is 1000000; it must be at most 1000"),
        ({"seed": 2**63 - 1}, "seed is .* at most"),
        ({"width": 64}, "width 64 and height None: give both"),
        ({"width": 10**9, "height": 64}, "width is 1000000000; it must be at most"),
        ({"note": "x" * 70_000}, "its other columns hold more than 65,536 bytes"),
        ({"negativ_prompt": "dark"}, r"p.json: column 'negativ_prompt' is not known; did you mean 'negative_prompt'\?"),
        ({"cfg_scale": 7}, "column 'cfg_scale' is not known; did you mean 'guidance_scale'"),
        ({"num_inference_steps": 7}, "did you mean 'steps'"),
    ],
)
def test_a_bad_cell_is_refused_by_its_row_and_column(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "p.json").write_text(json.dumps([{"prompt": "a {}", **change}]))
    with pytest.raises(ValueError, match=message):
        read_prompts(str(tmp_path / "p.json"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", '{"prompt": "a {}"}\n', "line 1: .* is JSON; name the file .jsonl"),
        ("p.txt", '["a {}"]', "line 1: .* is JSON"),
        ("p.csv", "text\na {}\n", "it has no column 'prompt'; it has text"),
        ("p.csv", "prompt;seed\na {};1\n", "it has no column 'prompt'; it has prompt;seed"),
        ("p.csv", "prompt,seed\na {}, dark,1\n", "row 1: it does not have 2 cells"),
        ("p.csv", "prompt,seed\na {}\n", "row 1: it does not have 2 cells"),
        ("p.csv", "prompt,prompt\na {},b {}\n", "two columns of the name 'prompt'"),
        ("p.csv", 'prompt\n"a {}\n', "cannot be read: unexpected end of data"),
        ("p.csv", "prompt,seed\na {},-1\n", "row 1: seed -1 must be"),
        ("p.csv", "", "no column 'prompt'"),
        ("p.json", '{"prompt": "a {}"}', "it must be a list of objects"),
        ("p.json", "[3]", "row 1: 3 is neither an object nor a text"),
        ("p.json", "[{", "cannot be read"),
        ("p.jsonl", '{"prompt": "a {}"}\n{"prompt": ', "line 2: .* is no JSON object"),
        ("p.jsonl", '{"prompt": "a {}", "seed": 1, "seed": 2}', "an object has 'seed' twice"),
        ("p.json", '[{"prompt": "a {}", "seed": 1, "seed": 2}]', "an object has 'seed' twice"),
        ("p.jsonl", "", "there are none in it"),
        ("p.jsonl", '{"prompt": "a {} \\ud83d"}', "line 1: .* holds half of a surrogate pair"),
        ("p.json", '[{"prompt": "a {}", "note": "\\ud83d"}]', "row 1: .* holds half of a surrogate pair"),
        (
            "p.jsonl",
            '{"prompt": "a {}", "x": 1}\n{"prompt": "a {}", "x": 2}',
            "line 2: it asks for the pictures of .* line 1",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_and_never_one_literal_prompt(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(str(tmp_path / name))


def test_ids_that_no_concept_has_are_named() -> None:
    prompts = [Prompt("a {}", "tigr"), Prompt("b {}", "tigr"), Prompt("c {}", "boar"), Prompt("d {}")]
    assert unknown_concepts(prompts, ["tiger", "boar"]) == [
        "no concept has the concept_id 'tigr' of a prompt; did you mean 'tiger'?"
    ]
    assert unknown_concepts(prompts, ["tigr", "boar"]) == unknown_concepts([Prompt("d {}")], []) == []


def test_weights_are_named() -> None:
    assert prompt_notes(["a {}", "a (red:1.2) {}", "(dark:2)"]) == [
        "2 prompts have weights such as '(red:1.2)'; weights are not interpreted, but plain text"
    ]
    assert prompt_notes(["a {}"]) == []


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
