from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import RunConfig
from pipeline.inputs.models import load_model_vocabularies
from pipeline.inputs.prompt_table import Prompt
from pipeline.ledger.plan import ConceptTask
from pipeline.ledger.preflight import Finding, examine
from pipeline.validate import main
from tests.pipeline.runs import tiny_config, tiny_toml, write_manifest, write_photo
from tests.toy_family import PIPELINE_CLASS, ROW, write_model
from textual_inversion import families
from textual_inversion.concept import Concept


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> RunConfig:
    return tiny_config(tiny_model, tmp_path / "out")


def findings(
    config: RunConfig, prompts: list[Prompt] | None = None, *, photos: bool = False, **row: Any
) -> list[Finding]:
    row = {"concept_id": "it", "placeholder_token": "<it>", "images": ("unused",), "initializer": "cat", **row}
    task = ConceptTask(concept=Concept(**row), fingerprint="f")
    return list(examine([task], config, prompts or [], load_model_vocabularies(config), photos=photos))


def test_nothing_is_said_of_what_is_fine(config: RunConfig) -> None:
    assert findings(config, [Prompt("a photo of {} on the beach")]) == []
    assert findings(config, initializer="", category="style", num_vectors=4) == []


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"num_vectors": 20}, "more than the 22 that fit; shorten the prompt or use fewer vectors"),
        ({"captions": ("a {} " + "on the beach " * 9,)}, "prompt 'a {} on the beach"),
        ({"captions": ("a {} <|endoftext|> cat",)}, "no token for something in '<|endoftext|> cat'"),
        ({"initializer": "<|endoftext|>"}, "initializer: the model's tokenizer has no token for something in"),
        ({"initializer": "cat dog toy tree " * 6}, "prompt 'a photo of a cat"),
        (
            {"placeholder_token": "cat"},
            "placeholder 'cat' is a word of the model's own vocabulary, which prompts would",
        ),
        ({"placeholder_token": "cat"}, "take one that is none, such as '<cat>'"),
    ],
)
def test_texts_that_do_not_fit_would_fail(config: RunConfig, row: dict[str, Any], text: str) -> None:
    (finding,) = findings(config, **row)
    assert finding.is_fatal
    assert text in finding.text
    assert str(finding).startswith("would fail: it: ")


def test_what_is_odd_is_noted(config: RunConfig) -> None:
    (finding,) = findings(config, initializer="xqzvbnmk")
    assert not finding.is_fatal
    assert "'xqzvbnmk' is not in the model's vocabulary: it is spelled out in" in finding.text


def test_bulk_prompts_are_tried_with_every_concept(config: RunConfig) -> None:
    texts = ("a photo of {}", "a photo of {}s", "a very " * 9 + "{}")
    prompts = [*map(Prompt, texts), Prompt("not {}", concept_id="other")]
    (finding,) = findings(config, prompts)
    assert finding.is_fatal
    assert finding.text.startswith("2 of its 3 prompts cannot be drawn: prompt 'a photo of <it>s' does not have the")
    twice = findings(config, [Prompt("a photo of a catty and a {}")], placeholder_token="catty")
    assert twice == [Finding("it", "1 prompts also have its placeholder 'catty' outside the hole", is_fatal=False)]


def test_negative_prompts_are_tried_too(tiny_model: Path, tmp_path: Path) -> None:
    def said(negative: str, scale: float | None = None, **generation: Any) -> list[str]:
        config = tiny_config(tiny_model, tmp_path / "out", generation=generation)
        prompts = [Prompt("a {}", negative=negative, guidance_scale=scale)]
        return [finding.text for finding in findings(config, prompts)]

    assert said("dark {}") == said("dark <bad>", learned=["bad.safetensors"]) == said("", negative_prompt="dark") == []
    assert "has no effect without guidance" in said("dark", 1.0)[0]
    assert (
        "negative prompt 'a <bad>': <bad> is no learned concept's placeholder" in said("", negative_prompt="a <bad>")[0]
    )
    assert "more than the 22 that fit" in said("a very " * 12 + "{}")[0]


def test_a_dry_run_names_prompts_for_nobody_and_weights(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_manifest(tmp_path, ["cat", "dog"])
    (tmp_path / "run.toml").write_text(tiny_toml(tiny_model))
    prompts = tmp_path / "prompts.csv"
    options = [
        str(manifest),
        f"--config={tmp_path / 'run.toml'}",
        f"--output={tmp_path / 'out'}",
        f"--prompts={prompts}",
    ]
    prompts.write_text("prompt,concept_id\na (red:1.2) {},\n{},catt\n{},cat\n")
    assert main(options) == 1
    stray, weights, *_ = capsys.readouterr().out.splitlines()
    assert stray == "would fail: no concept has the concept_id 'catt' of a prompt; did you mean 'cat'?"
    assert weights.startswith("note: 1 prompts have weights such as '(red:1.2)'")
    prompts.write_text("prompt,concept_id\n{},dog\n")
    assert main(options) == 0
    (tmp_path / "out/concepts/catt/f").mkdir(parents=True)
    (tmp_path / "out/concepts/catt/f/record.json").write_text("{}")
    prompts.write_text("prompt,concept_id\n{},catt\n")
    assert main(options) == 0, "an earlier run's concept"


def test_prompts_are_tried_with_the_class_noun(tiny_model: Path, tmp_path: Path) -> None:
    cued = tiny_config(tiny_model, tmp_path / "out", inversion={"class_cue": True})
    fits = "a {}" + " the" * 20
    for config, count in ((tiny_config(tiny_model, tmp_path / "out"), 0), (cued, 1)):
        found = findings(config, [Prompt(fits)], initializer="cat cat cat")
        assert [finding.is_fatal for finding in found] == [True] * count
    assert "prompt 'a <it> cat cat cat the the" in found[0].text
    assert findings(cued, [Prompt(fits.replace("{}", "{token}"))], initializer="cat cat cat") == []
    twice = findings(cued, [Prompt("a photo of a {}")], placeholder_token="catty", initializer="catty")
    said = "1 prompts also have its placeholder 'catty' outside the hole"
    assert twice[-1].text == said, "the noun is the placeholder"


def test_every_text_encoder_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(families.FAMILIES, PIPELINE_CLASS, ROW)
    config = tiny_config(write_model(tmp_path / "model"), tmp_path / "out")

    def said(caption: str) -> str:
        found = findings(config, captions=(caption,))
        return " ".join(finding.text for finding in found if finding.is_fatal)

    assert not said("a {}")
    assert "text encoder 'letters': 72 letters are more than 55" in said("a {} " + "w" * 70)
    assert "text encoder 'words': 20 words are more than 18" in said("a {} " + "w " * 18)


def test_photos_are_opened_only_if_asked_for(config: RunConfig, tmp_path: Path) -> None:
    good, bad = write_photo(tmp_path / "a.png", 1), tmp_path / "b.png"
    bad.write_bytes(Path(good).read_bytes()[:60])
    images = (good, str(bad))
    assert findings(config, images=images) == []
    (finding,) = findings(config, images=images, photos=True)
    assert finding.is_fatal
    assert finding.text.startswith(f"photo {bad}: the picture is damaged or cut short (60 bytes)")
    (finding,) = findings(config, images=(str(tmp_path / "absent.png"),), photos=True)
    assert "absent.png: " in finding.text


def test_the_command_needs_neither_torch_nor_ray(tiny_model: Path, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, ["a", "b"], initializer=["<|endoftext|>", "cat"])
    (tmp_path / "photos" / "b-1.png").write_bytes(b"<html>")
    (tmp_path / "job.toml").write_text(tiny_toml(tiny_model))
    program = (
        "import sys; from pipeline.validate import main; code = main(sys.argv[1:]);"
        "print(sorted({'torch', 'ray', 'diffusers'} & sys.modules.keys())); sys.exit(code)"
    )
    options = [str(manifest), "--photos", "--config", str(tmp_path / "job.toml"), "--output", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", program, *options], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 1, done.stderr
    assert lines[0].startswith("would fail: a: initializer: the model's tokenizer has no token")
    assert lines[1].startswith("would fail: b: photo ")
    assert "b-1.png: not a picture but a web page (HTML, 6 bytes): the address may lead to" in lines[1]
    assert lines[2] == "2 of 2 concepts to do would fail, or pictures of them"
    assert lines[3].startswith("estimate: no earlier run to estimate from")
    assert lines[4].startswith("0 done, 2 to do, 0 bad rows")
    assert lines[5] == "[]"
    assert not (tmp_path / "out").exists()


def test_the_command_takes_the_options_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["m.parquet", "--set", "photos.schemas=3"]) == 2
    assert "did you mean photos.schemes?" in capsys.readouterr().err
