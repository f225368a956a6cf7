from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPTokenizerFast

from textual_inversion.families.base import Backbone
from textual_inversion.prompts import OBJECT_TEMPLATES, STYLE_TEMPLATES
from textual_inversion.tokenizer import PlainClip, Tokenizer, load_vocabularies, read_tokenizer

ROOT = Path(__file__).resolve().parents[2]

ODD_TEXTS = [
    "", " ", "xqz", "it's they'RE we'Ve I'm you'LL he'd 'S", "o'clock ''''", "a-b_c/d\\e", "(very:1.3) [[cat]], dog!!!",
    "\t a \n b \r\n c \x0b d \x85 e \xa0 f \u2003 g \u3000 h \u200b i \ufeff j \x00 k \x7f",  # kinds of nothing
    "ÀÉÎÕÜ ß ẞ İstanbul IJ ĳ ŉ ŒUVRE æ ΑΣ ΣΑΣ ς Ж ё ДОМ Ա ა Ა",  # capitals and their small letters
    "cafe\u0301 café \u212b Å \u2126 \u1e9b\u0323 \u0344 q\u0307\u0323 가 \u1100\u1161\u11a8",  # composed or not
    "ﬁ ﬃ ① ⅷ ½ ² ㌔ \uff21\uff22 \uff11\uff12 ٣ ४ \U0001d7dc Ⅻ 3.14 1,000 0x1F 10²",  # numbers, ligatures
    "日本語の猫 中文 한국어 ไทย العربية עברית हिन्दी ქართული Ελληνικά Русский tiếng Việt",
    "🐈 \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308 👍🏽 🇰🇷 ☺\ufe0f 1\ufe0f\u20e3",
    "\U0001f9ff \U000e0041 a\u0300\u0301\u0302\u0303\u0304 \u202eabc\u202c \U0001d49c \U00010400 \U00010428",
    "<cat> <cat-toy> <|cat|> <|endoftext|> <|startoftext|> <|EndOfText|> a <| b |> c",
    "\uff1c\uff5cendoftext\uff5c\uff1e",
    "$5 €5 £ ¥ © ™ … \u2013 — “ ” \u2018 \u2019 « » ¿ ¡ § ° ± \xd7 ÷ µ ¶ ·", "\ud7ff \ue000 \uffff \U0010ffff",
    "word " * 200, "x" * 2000,
]  # fmt: skip


def random_texts(count: int) -> list[str]:
    """Of letters from anywhere in Unicode, mixed with spaces and plain words."""
    draw = random.Random(0)
    ranges = [(0x20, 0x7E), (0x80, 0x24F), (0x300, 0x36F), (0x370, 0x5FF), (0x600, 0x1FFF), (0x2000, 0x2BFF),
              (0x3000, 0x9FFF), (0xAC00, 0xD7A3), (0xF900, 0xFFFF), (0x10000, 0x1FFFF), (0x0, 0x1F)]  # fmt: skip
    texts = []
    for _ in range(count):
        parts = []
        for _ in range(draw.randrange(1, 12)):
            low, high = draw.choice(ranges)
            parts.append(
                draw.choice(["cat", " ", "'s", "", chr(draw.randint(low, high)), chr(draw.randint(low, high))])
            )
        texts.append("".join(parts))
    return texts


def older_layout(model: Path, target: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
    """The same tokenizer as Stable Diffusion's own repositories have it: vocab.json, merges.txt and two JSON files."""
    shutil.copytree(model / "text_encoder", target / "text_encoder", ignore=lambda *_: ["model.safetensors"])
    folder = target / "tokenizer"
    folder.mkdir()
    stored = json.loads((model / "tokenizer" / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(stored["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in stored["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    token = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    tokens = {"bos_token": {"content": "<|startoftext|>", **token}, "eos_token": {"content": "<|endoftext|>", **token},
              "unk_token": {"content": "<|endoftext|>", **token}}  # fmt: skip
    config = {name: {"__type": "AddedToken", **value} for name, value in tokens.items()}
    config |= {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>",
               "do_lower_case": True, "errors": "replace", "add_prefix_space": False}  # fmt: skip
    special: dict[str, Any] = {**tokens, "pad_token": "<|endoftext|>"}
    change(config, special)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return target


@pytest.fixture(scope="module")
def directories(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models whose tokenizers are CLIP's, in every layout that is about."""
    folder, demo = tmp_path_factory.mktemp("tokenizers"), ROOT / "demo/model"
    return {
        "tiny": tiny_model,
        "demo": demo,
        "sd15": older_layout(demo, folder / "sd15", lambda _config, _special: None),
        "sd2": older_layout(demo, folder / "sd2", lambda _, special: special.update(pad_token="!")),
    }


@pytest.mark.parametrize("name", ["tiny", "demo", "sd15", "sd2"])
def test_ids_are_those_of_transformers(name: str, directories: dict[str, Path]) -> None:
    plain = Tokenizer(PlainClip(directories[name]), 77, 100)
    theirs = Tokenizer(read_tokenizer(directories[name]), 77, 100)
    for text in (*OBJECT_TEMPLATES, *STYLE_TEMPLATES, *ODD_TEXTS, *random_texts(3000)):
        assert plain.tokenize(text) == theirs.tokenize(text), ascii(text)
    assert (plain.max_length, plain.end_of_text) == (theirs.max_length, theirs.end_of_text)
    assert plain.single_token_words() == theirs.single_token_words()
    assert plain.assemble([5, 6]) == theirs.assemble([5, 6])


def test_alone_it_is_what_the_model_uses(tiny_model: Path, tiny_backbone: Backbone) -> None:
    alone, loaded = load_vocabularies(tiny_model)["clip_l"], tiny_backbone.vocabularies["clip_l"]
    for text in (*OBJECT_TEMPLATES, *ODD_TEXTS):
        assert alone.tokenize(text) == loaded.tokenize(text)
    assert (alone.size, alone.max_tokens, alone.end_of_text) == (loaded.size, loaded.max_tokens, loaded.end_of_text)
    assert alone.single_token_words() == tiny_backbone.single_token_words()
    assert alone.assemble([5]) == loaded.assemble([5])
    with pytest.raises(ValueError, match="23 tokens are 1 more than the 22 that fit"):
        alone.assemble([5] * 23)


def own_token(config: dict[str, Any], _special: dict[str, Any]) -> None:
    config["added_tokens_decoder"] = {"1379": {"content": "<cat>", "special": False, "lstrip": False, "rstrip": False,
                                               "normalized": False, "single_word": False}}  # fmt: skip


def other_class(config: dict[str, Any], _special: dict[str, Any]) -> None:
    config["tokenizer_class"] = "PreTrainedTokenizerFast"


@pytest.mark.parametrize("change", [own_token, other_class])
def test_what_is_not_plainly_clips_is_left_to_transformers(
    change: Callable[[dict[str, Any], dict[str, Any]], None], tmp_path: Path
) -> None:
    directory = older_layout(ROOT / "demo/model", tmp_path / "model", change)
    with pytest.raises(ValueError, match=r"tokens of its own|is no CLIP tokenizer"):
        PlainClip(directory)
    texts = ["a photo of a <cat>", "a dog"]
    theirs = CLIPTokenizerFast.from_pretrained(directory, subfolder="tokenizer")
    alone = load_vocabularies(directory)["clip_l"]
    assert [alone.tokenize(text) for text in texts] == [
        theirs(text, add_special_tokens=False).input_ids for text in texts
    ]


def test_another_way_of_splitting_is_left_to_transformers(tiny_model: Path, tmp_path: Path) -> None:
    for part in ("tokenizer", "text_encoder"):
        shutil.copytree(tiny_model / part, tmp_path / part, ignore=lambda *_: ["model.safetensors"])
    path = tmp_path / "tokenizer" / "tokenizer.json"
    stored = json.loads(path.read_text())
    stored["normalizer"] = {"type": "NFKC"}
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="in a way of its own"):
        PlainClip(tmp_path)
    ours, theirs = (load_vocabularies(directory)["clip_l"] for directory in (tmp_path, tiny_model))
    assert ours.tokenize("a photo") == theirs.tokenize("a photo")


def test_a_plain_one_needs_no_transformers(tiny_model: Path) -> None:
    code = "import sys; from pathlib import Path; from textual_inversion.tokenizer import load_vocabularies\n"
    code += (
        "load_vocabularies(Path(sys.argv[1]))['clip_l'].tokenize('a photo'); assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tiny_model)], cwd=ROOT, check=True)


def test_an_id_beyond_the_text_encoders_table_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """Libraries would fill gigabytes up to it, and it would stand for a learned row."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    path = model / "tokenizer/tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["u"] = 10**9
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"it has the id 1000000000, but the text encoder has vectors for \d+"):
        load_vocabularies(model)


def test_one_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the tokenizer of the model in .* cannot be read"):
        load_vocabularies(tmp_path)
