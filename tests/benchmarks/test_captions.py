"""People's captions have the paper's form and fit the demo's prompts."""

from __future__ import annotations

from pathlib import Path

from benchmarks.captions import MOST_WORDS, read_captions
from demo.make_manifests import DEMO_CONCEPTS, HERE
from demo.tokenizer import load_tokenizer


def test_five_short_and_five_long_captions_of_every_concept() -> None:
    captions = read_captions()
    assert set(DEMO_CONCEPTS) <= set(captions) <= {folder.name for folder in (HERE / "images").iterdir()}
    for of_concept in captions.values():
        assert {length: len(set(texts)) for length, texts in of_concept.items()} == {"short": 5, "long": 5}
        for length, most in MOST_WORDS.items():
            assert max(len(text.split()) for text in of_concept[length]) <= most
        means = {length: sum(len(text.split()) for text in texts) / 5 for length, texts in of_concept.items()}
        assert means["long"] >= means["short"] + 3


def test_a_caption_does_not_name_its_concept() -> None:
    for concept_id, captions in read_captions().items():
        if concept_id != "blue-book":  # a description of a colour and a thing is its name
            assert not [text for texts in captions.values() for text in texts if concept_id.replace("-", " ") in text]


def test_captions_leave_room_for_the_prompts() -> None:
    tokenizer = load_tokenizer(Path(HERE / "model" / "tokenizer"))
    texts = [text for captions in read_captions().values() for each in captions.values() for text in each]
    longest = max(texts, key=lambda text: len(tokenizer(text).input_ids))
    assert len(tokenizer(f"a 3d render of a {longest} in the snow").input_ids) <= 32
