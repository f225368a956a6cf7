from __future__ import annotations

from pathlib import Path

from demo.model_captions import FILE, sample_captions
from demo.objects import HELD_OUT
from demo.tokenizer import load_tokenizer
from textual_inversion.knowledge import MAX_CAPTIONS, read_captions

MODEL = Path(__file__).parents[2] / "demo/model"


def test_captions_are_many_different_and_the_seeds_alone() -> None:
    drawn = sample_captions(50, 1)
    assert len(set(drawn)) == 50
    assert drawn == sample_captions(50, 1)
    assert drawn != sample_captions(50, 2)


def test_the_committed_captions_fit_the_model_and_name_no_held_out_object() -> None:
    captions = read_captions(str(FILE))
    assert 300 <= len(set(captions)) == len(captions) <= MAX_CAPTIONS
    tokenizer = load_tokenizer(MODEL / "tokenizer")
    assert max(len(tokenizer(caption).input_ids) for caption in captions) <= tokenizer.model_max_length
    held = {each.object.name for each in HELD_OUT}
    assert not [caption for caption in captions if held & {*caption.split()}]
