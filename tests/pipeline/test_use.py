"""The command that draws with learned concepts, on a tiny random model: what it writes, and what it refuses."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import use
from pipeline.inputs.models import model_hash
from pipeline.ledger.records import ConceptRecord, put_record
from pipeline.store.storage import RunStore
from tests.pipeline.runs import write_photo
from tests.tiny_models import DIM, RESOLUTION
from textual_inversion.bias import Proportion
from textual_inversion.concept import LearnedEmbedding
from textual_inversion.formats import dump_diffusers

Command = Callable[..., int]
FAST = [f"--set=generation.sampling.{setting}" for setting in ("steps=2", "batch_size=4", "guidance_scale=2.0")]


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run that learned two objects and a style."""
    folder = tmp_path_factory.mktemp("run")
    store = RunStore(str(folder))
    for seed, (name, category) in enumerate({"tiger": "object", "taxi": "object", "ink": "style"}.items()):
        record = ConceptRecord(
            concept_id=name,
            fingerprint=f"f-{name}",
            status="done",
            placeholder_token=f"<{name}>",
            category=category,
            images=(write_photo(folder / f"{name}.png", seed),),
        )  # type: ignore[arg-type]
        rows = torch.randn(2, DIM, generator=torch.Generator().manual_seed(seed)) * 0.3
        provenance = {"model": str(tiny_model), "model_hash": model_hash(str(tiny_model))}
        embedding = LearnedEmbedding(
            placeholder_token=record.placeholder_token, vectors={"clip_l": rows}, metadata=provenance
        )
        store.put(record.folder.embedding, dump_diffusers(embedding))
        put_record(store, record)
    return folder


@pytest.fixture
def command(run: Path, tmp_path: Path) -> Command:
    """`command("draw", ...)`: two pictures a prompt, from the run's concepts, to `tmp_path / "out"`."""

    def call(name: str, *arguments: str, output: str = str(tmp_path / "out"), count: int = 2) -> int:
        fixed = ["--learned", str(run), "--output", output, f"--count={count}", "--set=device=cpu", *FAST]
        return use.main([name, *fixed, *arguments])

    return call


def drawn(output: Path | str) -> dict[str, Any]:
    """`pictures.json`, after a look at every file that it names."""
    store = RunStore(str(output))
    listed: dict[str, Any] = json.loads(store.get("pictures.json"))
    paths = [picture["path"] for picture in listed["pictures"]]
    assert set(store.list()) == {*paths, "sheet.png", "pictures.json"}
    for path in paths:
        assert Image.open(io.BytesIO(store.get(path))).size == (RESOLUTION, RESOLUTION)
    return listed


def prompts(output: Path | str) -> list[str]:
    return list(dict.fromkeys(picture["prompt"] for picture in drawn(output)["pictures"]))


def test_a_negative_prompt_with_concepts_in_it(
    command: Command, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ink = next(run.glob("concepts/ink/*/learned_embeds.safetensors"))
    weighted = ["draw", "a (big:1.2) <tiger>", "--negative-prompt", "a dark <taxi>, <bad>", "--learned", f"<bad>={ink}"]
    assert command(*weighted, output=str(tmp_path / "away")) == 0
    assert "weights such as '(big:1.2)'; weights are not interpreted" in capsys.readouterr().err
    assert command("draw", "a (big:1.2) <tiger>", output=str(tmp_path / "plain")) == 0
    away, plain = drawn(tmp_path / "away"), drawn(tmp_path / "plain")
    assert (away["negative_prompt"], plain["negative_prompt"]) == ("a dark <taxi>, <bad>", "")
    assert set(away["concepts"]) == {"<tiger>", "<taxi>", "<bad>"}
    pictures = [RunStore(str(tmp_path / name)).get(away["pictures"][0]["path"]) for name in ("away", "plain")]
    assert pictures[0] != pictures[1]
    assert command("draw", "a <tiger>", "--negative-prompt", "<none>", output=str(tmp_path / "x")) == 2
    assert "<none> is no learned concept's placeholder token" in capsys.readouterr().err
    unguided = ["--negative-prompt", "dark", "--set=generation.sampling.guidance_scale=1.0"]
    assert command("draw", "a <tiger>", *unguided, output=str(tmp_path / "x")) == 2
    assert "'dark' has no effect without guidance" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["variations", "tiger"], ["a photo of a <tiger>"]),
        (["variations", "<ink>"], ["a painting in the style of <ink>"]),
        (["draw", "a <tiger> on the moon", "a cat"], ["a <tiger> on the moon", "a cat"]),
        (
            ["style", "ink", "cat", "tiger"],
            [
                "a painting in the style of <ink>",
                "a picture of a cat in the style of <ink>",
                "a picture of a <tiger> in the style of <ink>",
            ],
        ),
        (
            ["compose", "tiger", "taxi"],
            ["a photo of a <tiger> and a <taxi>", "a photo of a <tiger>", "a photo of a <taxi>"],
        ),
        (
            ["compose", "ink", "tiger"],
            [
                "a picture of a <tiger> in the style of <ink>",
                "a photo of a <tiger>",
                "a painting in the style of <ink>",
            ],
        ),
        (["compose", "tiger", "taxi", "--prompt", "a {} by a {}"], ["a <tiger> by a <taxi>"]),
    ],
)
def test_what_each_command_draws(command: Command, tmp_path: Path, arguments: list[str], expected: list[str]) -> None:
    assert command(*arguments) == 0
    assert prompts(tmp_path / "out")[: len(expected)] == expected


def test_a_concept_is_drawn_with_its_class_noun(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By every command that names it; a token in a given prompt stays as it is."""
    cued = tmp_path / "run"
    shutil.copytree(run, cued)
    for path in cued.glob("concepts/*/*/record.json"):
        record = json.loads(path.read_text())
        del record["digest"]  # as earlier releases wrote it, so that it may be edited
        name = f"{record['placeholder_token']} big cat"
        path.write_text(json.dumps(record | {"prompt_as": name}))
    tiger = "<tiger> big cat"
    ink = "<ink> big cat"
    taxi = "<taxi> big cat"
    for arguments, expected in (
        (["variations", "tiger"], [f"a photo of a {tiger}"]),
        (["draw", "a <tiger> on the moon"], ["a <tiger> on the moon"]),
        (
            ["style", "ink", "cat", "tiger"],
            [
                f"a painting in the style of {ink}",
                f"a picture of a cat in the style of {ink}",
                f"a picture of a {tiger} in the style of {ink}",
            ],
        ),
        (["compose", "tiger", "taxi", "--prompt", "a {} by a {}"], [f"a {tiger} by a {taxi}", f"a photo of a {tiger}"]),
    ):
        output = tmp_path / arguments[0]
        fixed = ["--learned", str(cued), "--output", str(output), "--count=1", "--set=device=cpu", *FAST]
        assert use.main([arguments[0], *fixed, *arguments[1:]]) == 0
        assert prompts(output)[: len(expected)] == expected
        bare = "note: 'a <tiger> on the moon': the concept was learned as '<tiger> big cat'\n"
        assert capsys.readouterr().err == (bare if arguments[0] == "draw" else "")


def test_the_list_says_what_was_drawn_with_what(command: Command, run: Path, tiny_model: Path, tmp_path: Path) -> None:
    assert command("draw", "a <tiger>", "a <taxi> in the style of <ink>", "--seed=5") == 0
    listed = drawn(tmp_path / "out")
    assert listed["model"] == str(tiny_model)
    assert listed["model_hash"] == model_hash(str(tiny_model))
    assert listed["sampling"]["steps"] == 2
    assert listed["concepts"]["<ink>"] == str(run / "concepts/ink/f-ink/learned_embeds.safetensors")
    assert [picture["seed"] for picture in listed["pictures"]] == [5, 6, 5, 6]
    assert listed["pictures"][0]["path"] == "01-a-tiger-5.png"


def test_the_list_has_the_models_own_numbers_where_the_settings_leave_them_to_it(run: Path, tmp_path: Path) -> None:
    fixed = [f"--learned={run}", f"--output={tmp_path / 'out'}", "-n1", "--set=device=cpu"]
    assert use.main(["draw", "a <tiger>", *fixed, "--set=generation.sampling.batch_size=1"]) == 0
    sampling = drawn(tmp_path / "out")["sampling"]
    assert sampling == {"solver": "dpm++", "steps": 20, "guidance_scale": 5.0, "batch_size": 1}


def test_a_picture_is_the_same_in_any_company(command: Command, tmp_path: Path) -> None:
    assert command("draw", "a <tiger>", output=str(tmp_path / "alone"), count=1) == 0
    assert command("draw", "a <taxi>", "a <tiger>", output=str(tmp_path / "both"), count=3) == 0
    alone, both = (tmp_path / "alone/01-a-tiger-0.png"), (tmp_path / "both/02-a-tiger-0.png")
    assert alone.read_bytes() == both.read_bytes()


def test_nothing_is_overwritten_silently(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("draw", "a <tiger>") == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert command("draw", "a <taxi>") == 2
    assert "sheet.png is there already (2 of 4 files); give another --output, or --overwrite" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert command("draw", "a <taxi>", "--overwrite") == 0


def test_results_go_to_any_store(command: Command) -> None:
    fsspec.filesystem("memory").store.clear()
    assert command("variations", "tiger", output="memory://made/here") == 0
    assert len(drawn("memory://made/here")["pictures"]) == 2


def test_a_file_under_another_word(tiny_model: Path, run: Path, tmp_path: Path) -> None:
    file = run / "concepts/tiger/f-tiger/learned_embeds.safetensors"
    fixed = [f"--output={tmp_path / 'out'}", "-n1", "--set=device=cpu", *FAST]
    assert use.main(["draw", "a <mine>", f"--learned=<mine>={file}", *fixed]) == 0
    assert drawn(tmp_path / "out")["concepts"] == {"<mine>": str(file)}
    assert use.main(["draw", "a cat", f"--model={tiny_model}", *fixed, "--overwrite"]) == 0


def test_an_edit_keeps_what_is_outside_the_mask(command: Command, tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (RESOLUTION, RESOLUTION, 3), dtype=np.uint8)
    mask = np.zeros((RESOLUTION, RESOLUTION), np.uint8)
    mask[:, 16:] = 255
    Image.fromarray(picture).save(tmp_path / "picture.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    arguments = ["edit", str(tmp_path / "picture.png"), str(tmp_path / "mask.png"), "a <tiger>"]
    assert command(*arguments) == 0
    made = [np.asarray(Image.open(tmp_path / "out" / p["path"])) for p in drawn(tmp_path / "out")["pictures"]]
    for one in made:
        assert (one[:, :16] == picture[:, :16]).all()
        assert (one[:, 16:] != picture[:, 16:]).any()
    assert drawn(tmp_path / "out")["edit"]["strength"] == 1.0
    assert command(*arguments, "--redecode", "--strength=0.5", "--overwrite") == 0
    redecoded = np.asarray(Image.open(tmp_path / "out" / drawn(tmp_path / "out")["pictures"][0]["path"]))
    assert (redecoded[:, :16] != picture[:, :16]).any()


def test_an_edit_of_another_size(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, mask = Image.new("RGB", (96, 64), "red"), Image.new("L", (96, 64), 255)
    picture.save(tmp_path / "picture.png")
    mask.save(tmp_path / "mask.png")
    arguments = ["edit", str(tmp_path / "picture.png"), str(tmp_path / "mask.png"), "a <tiger>"]
    assert command(*arguments) == 2
    assert "the picture is 96 x 64 px but the model draws 32 x 32; crop" in capsys.readouterr().err
    assert command(*arguments, "--crop") == 0
    assert len(drawn(tmp_path / "out")["pictures"]) == 2


class ColourExtractor:
    """Finds a picture nearest to `dark` or `bright` by its mean."""

    def images(self, pictures: list[Image.Image]) -> torch.Tensor:
        means = torch.tensor([np.asarray(picture).mean() for picture in pictures]) / 255
        return torch.stack([1 - means, means], dim=1)

    def texts(self, texts: list[str]) -> torch.Tensor:
        return torch.tensor([[1.0, 0.0] if text == "dark" else [0.0, 1.0] for text in texts])


def test_a_shift_is_measured(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipeline.sheets.bias_report.ClipExtractor", lambda *_: ColourExtractor())
    answers = ["--caption=dark", "--caption=bright", "--set=extractor=a-clip"]
    assert command("bias", "cat", "tiger", *answers, count=5) == 0
    listed = drawn(tmp_path / "out")
    assert [row["caption"] for row in listed["shift"]] == ["dark", "bright"]
    made = [np.asarray(Image.open(tmp_path / "out" / p["path"])).mean() < 127.5 for p in listed["pictures"]]
    counts = [row["count"] for name in ("before", "after") for row in [listed["shift"][0][name]]]
    assert counts == [sum(made[:5]), sum(made[5:])]
    assert sum(row["photos"]["count"] for row in listed["shift"]) == 1
    assert listed["shift"][0]["before"]["interval"] == pytest.approx(
        Proportion(count=counts[0], n=5).interval, abs=1e-4
    )
    assert f"dark: {counts[0]}/5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["variations", "tigre"], "no learned concept is named 'tigre'; there are 3, such as tiger"),
        (["draw", "a <tigr>"], "<tigr> is no learned concept's placeholder token; the known ones are <tiger>"),
        (["draw", "a cat"], "no prompt has a learned concept's placeholder token in it; write one of <"),
        (["draw", "a <tiger>", "--count=0"], "--count 0"),
        (["draw", "a <tiger> " * 30], "more than the 22 that fit"),
        (["compose", "tiger", "taxi", "--prompt", "a {}"], "--prompt 'a {}' must have {} twice"),
        (["bias", "cat", "tiger", "--caption", "a"], "give two or more different captions"),
        (
            ["bias", "cat", "tiger", "--caption", "a", "--caption", "b"],
            "needs a feature extractor to compare pictures with captions: name a CLIP",
        ),
        (["bias", "cat", "tiger", "--prompt", "a"], "--prompt 'a' must have {} once"),
        (["edit", "nowhere.png", "mask.png", "a <tiger>"], "nowhere.png: "),
        (["draw", "a <tiger>", "--learned", "nowhere"], "no concepts there"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert command(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_credentials_in_an_address_are_not_shown(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    address = "http://127.0.0.1:9/photo.png?X-Amz-Signature=0123456789abcdef0123456789abcdef"
    assert command("edit", address, "mask.png", "a <tiger>") == 2
    told = capsys.readouterr().err
    assert "127.0.0.1:9/photo.png?X-Amz-Signature=***" in told
    assert "0123456789abcdef" not in told


def test_a_model_that_has_changed_since_is_not_used_silently(
    run: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run / "concepts/tiger/f-tiger/learned_embeds.safetensors"
    from textual_inversion.formats import parse_diffusers

    learned = parse_diffusers(file.read_bytes())
    provenance = {"old": {**learned.metadata, "model_hash": "old"}, "none": {}}
    fixed = [f"--output={tmp_path / 'out'}", "-n1", "--set=device=cpu", *FAST]
    for name, metadata in provenance.items():
        (tmp_path / f"{name}.safetensors").write_bytes(dump_diffusers(replace(learned, metadata=metadata)))
        arguments = ["draw", "a <tiger>", f"--learned={tmp_path / name}.safetensors", *fixed, "--overwrite"]
        assert use.main(arguments) == 2
        said = capsys.readouterr().err
        assert ("another state of model" if name == "old" else "name one with --model") in said
        assert use.main([*arguments, f"--model={tiny_model}"]) == 0
