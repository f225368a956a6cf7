from __future__ import annotations

from pathlib import Path

import pytest

from textual_inversion.families.base import Backbone
from textual_inversion.prompts import OBJECT_TEMPLATES
from textual_inversion.tokenizer import load_tokenizer


def test_alone_it_is_what_the_model_uses(tiny_model: Path, tiny_backbone: Backbone) -> None:
    alone = load_tokenizer(tiny_model)
    for text in (*OBJECT_TEMPLATES, "xqz", "日本 🐈", "", " "):
        ids = alone.tokenize(text)
        assert ids == tiny_backbone.tokenize(text)
    assert (alone.max_length, alone.end_of_text) == (tiny_backbone.max_length, tiny_backbone.end_of_text)
    assert alone.words() == tiny_backbone.words()
    assert alone.assemble([5]) == tiny_backbone.assemble([5])
    with pytest.raises(ValueError, match="23 tokens are 1 more than the 22 that fit"):
        alone.assemble([5] * 23)


def test_one_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the tokenizer of the model in .* cannot be read"):
        load_tokenizer(tmp_path)
