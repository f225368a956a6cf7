"""The comparison of methods: setups resolve, scores equal those made by hand, what is there is kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import methods, setups
from benchmarks.jobs import Job, chunks, measure_chunk, text_of, words_of
from benchmarks.methods import main, parse
from benchmarks.setups import SETUPS, Setup, find
from pipeline.actor.model_loading import load_model
from pipeline.bulk.evaluation import PIXEL_SCORES, evaluation_seeds
from pipeline.bulk.protocols import choose_protocol
from pipeline.inputs.prompt_table import Prompt
from pipeline.store.parquet import read_table
from tests.pipeline.runs import write_manifest
from tests.tiny_models import tiny_extractor
from textual_inversion.concept import Concept
from textual_inversion.config import InversionConfig
from textual_inversion.extractors import ClipExtractor
from textual_inversion.families.base import Backbone
from textual_inversion.fidelity import pixel_scores, pixel_scores_between_photos, to_arrays
from textual_inversion.generate import ImageRequest, generate

CONCEPT = Concept(
    concept_id="tiger", placeholder_token="<t>", images=("0", "1", "2"), initializer="cat", captions=("a {}",) * 3
)


@pytest.mark.parametrize("name", SETUPS)
def test_every_setup_is_a_configuration(name: str) -> None:
    learned = find(name).inversion(60, [])
    assert 1 <= learned.steps * learned.batch_size <= 60 * 4
    assert find(name).concept(CONCEPT).concept_id == "tiger"


def test_setups_have_the_same_number_of_samples_unless_a_recipe_asks_for_fewer() -> None:
    budgets = {name: SETUPS[name].inversion(1000, []) for name in ("class-cue", "ti-paper", "textboost-v2")}
    assert {name: (config.steps, config.batch_size) for name, config in budgets.items()} == {
        "class-cue": (1000, 4), "ti-paper": (500, 8), "textboost-v2": (100, 8)
    }  # fmt: skip


@pytest.mark.parametrize("name", [name for name, setup in SETUPS.items() if setup.full_budget])
def test_a_stop_rule_is_compared_with_the_same_without_it(name: str) -> None:
    ours, theirs = (find(each).inversion(500, []) for each in (name, SETUPS[name].full_budget))
    assert (theirs.stop.method, theirs.stop.keep_best) == ("budget", False)
    assert ours.stop != theirs.stop
    assert replace(ours, stop=theirs.stop) == theirs


def test_a_setup_changes_the_concept() -> None:
    one = Setup(what="", num_photos=1, num_vectors=2, initializer="").concept(CONCEPT)
    assert (one.images, one.captions, one.num_vectors, one.initializer) == (("0",), ("a {}",), 2, "")
    assert Setup(what="").concept(CONCEPT) == CONCEPT


def test_the_papers_learning_rates_keep_their_ratio() -> None:
    high, base, low = (SETUPS[name].inversion(500, []) for name in ("high-lr", "ti-paper", "low-lr"))
    assert (high.learning_rate / base.learning_rate, base.learning_rate / low.learning_rate) == pytest.approx((4, 50))
    assert {high.norm_control, base.norm_control, low.norm_control} == {"none"}


def test_recipes_are_setups_under_their_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.toml").write_text('model = "some/other"\n[inversion]\nlearning_rate = 0.5\nsteps = 3\n')
    monkeypatch.setattr(setups, "RECIPES", tmp_path)
    assert find("mine").inversion(10, []).learning_rate == 0.5
    assert [find("mine").inversion(steps, []).steps for steps in (10, 2)] == [3, 2]
    with pytest.raises(ValueError, match=r"no setup 'yours'; there are image-only, .* and the recipes mine"):
        find("yours")


def test_a_size_is_a_setup_whatever_the_budget() -> None:
    found = find("200x1").inversion(30, [])
    assert found == InversionConfig(steps=200, batch_size=1)
    assert [len(find(name).concept(CONCEPT).images) for name in ("8x2", "8x2-one-photo")] == [len(CONCEPT.images), 1]
    with pytest.raises(ValueError, match="no setup '0x1'"):
        find("0x1")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_extractor("clip", tmp_path_factory.mktemp("clip"))


@pytest.fixture
def arguments(tiny_model: Path, clip: Path, tmp_path: Path) -> list[str]:
    manifest, prompts = write_manifest(tmp_path, ["a", "b", "c"]), tmp_path / "prompts.txt"
    prompts.write_text("a photo of a {}\na rendering of a {}\n")
    values = [f"model={tiny_model}", f"extractor={clip}", "inversion.batch_size=2", "generation.sampling.batch_size=4"]
    settings = [word for value in values for word in ("--set", value)]
    files = ["--manifest", str(manifest), "--prompts", str(prompts), "--output", str(tmp_path / "out")]
    return [*files, "--no-outside", "--concepts", "2", "--steps", "2", "--samples", "2", *settings]


def jobs_of(arguments: list[str], *names: str) -> list[Job]:
    options = parse([*arguments, "--setups", *names])
    return methods.jobs_of(options, {name: find(name) for name in names})[0]


def measure(arguments: list[str], name: str, output: Path) -> dict[str, Any]:
    """Measure the first concept in one setup."""
    options = parse([*arguments, "--setups", name])
    jobs, scoring = methods.jobs_of(options, {name: find(name)})
    (row,) = measure_chunk(jobs[:1], str(output), scoring)
    assert isinstance(row, dict)
    return row


def test_jobs_go_setup_by_setup(arguments: list[str]) -> None:
    jobs = jobs_of(arguments, "textual-inversion", "prompt-only")
    assert [(job.name, job.concept.concept_id) for job in jobs] == [
        ("textual-inversion", "a"), ("textual-inversion", "b"), ("prompt-only", "a"), ("prompt-only", "b")
    ]  # fmt: skip
    assert len({job.key() for job in jobs}) == 4
    assert [job.key() for job in jobs] == [job.key() for job in jobs_of(arguments, "textual-inversion", "prompt-only")]
    more = jobs_of([*arguments, "--samples", "3"], "textual-inversion", "prompt-only")
    assert not {job.key() for job in jobs} & {job.key() for job in more}


def test_what_stands_in_the_prompts(arguments: list[str]) -> None:
    names = ("textual-inversion", "class-cue", "initializer", "prompt-only")
    words = [words_of(job) for job in jobs_of(arguments, *names) if job.concept.concept_id == "a"]
    assert words == [["<a>"], ["<a> cat"], ["cat"], [""]]
    one_photo = ("ti-one-photo", "ti-one-photo-noun", "textboost-v2", "textboost-v2-bare")
    words = [words_of(job) for job in jobs_of(arguments, *one_photo) if job.concept.concept_id == "a"]
    assert words == [["<a>"], ["<a> cat"], ["<a> cat"], ["<a>"]]
    with pytest.raises(ValueError, match="no caption for 'a'"):
        words_of(jobs_of(arguments, "long-captions")[0])


def test_every_hole_of_a_prompt_is_filled(arguments: list[str]) -> None:
    prompts = [Prompt("{}, {token}"), Prompt("a {} {initializer} on the moon")]
    names = ("textual-inversion", "class-cue", "initializer", "prompt-only", "no-initializer")
    jobs = [job for job in jobs_of(arguments, *names) if job.concept.concept_id == "a"]
    assert [[text_of(job, prompt, words_of(job)[0]) for prompt in prompts] for job in jobs] == [
        ["<a>, <a>", "a <a> cat on the moon"],
        ["<a> cat, <a>", "a <a> cat on the moon"],
        ["cat, cat", "a cat on the moon"],
        [",", "a cat on the moon"],
        ["<a>, <a>", "a <a> cat on the moon"],
    ]


def test_a_row_by_hand(arguments: list[str], tiny_backbone: Backbone, clip: Path, tmp_path: Path) -> None:
    job = jobs_of(arguments, "initializer")[0]
    row = measure(arguments, "initializer", tmp_path)
    judge, protocol = ClipExtractor(str(clip), "cpu"), choose_protocol(job.config)
    photos = judge.images([Image.open(path) for path in job.concept.images])

    def drawn(prompt: str, template: str) -> torch.Tensor:
        seeds = evaluation_seeds(next(p for p in protocol.prompts if p.text == template), 2, 0)
        pictures = generate(tiny_backbone, [ImageRequest(prompt, seed) for seed in seeds], protocol.sampling)
        return judge.images(pictures)

    identity = drawn("a photo of a cat", "a photo of a {}") @ photos.T
    text = judge.texts(["a rendering of a"])
    assert row["clip_i"] == pytest.approx(identity.mean().item(), abs=1e-5)
    rendering = drawn("a rendering of a cat", "a rendering of a {}")
    assert row["clip_t"] == pytest.approx((rendering @ text.T).mean().item(), abs=1e-5)
    assert row["clip_i_all"] == pytest.approx((identity.mean() + (rendering @ photos.T).mean()).item() / 2, abs=1e-5)
    seeds = evaluation_seeds(next(p for p in protocol.prompts if p.text == "a photo of a {}"), 2, 0)
    pictures = generate(tiny_backbone, [ImageRequest("a photo of a cat", seed) for seed in seeds], protocol.sampling)
    size = pictures[0].size
    by_hand = pixel_scores(to_arrays(pictures, size), to_arrays([Image.open(p) for p in job.concept.images], size))
    assert {name: row[name] for name in by_hand} == {
        name: pytest.approx(values.mean().item()) for name, values in by_hand.items()
    }
    assert (row["steps"], row["norm"]) == (0, None)
    assert json.loads((tmp_path / "rows/initializer/a-0.json").read_text()) == row


def test_photos_are_compared_with_each_other_pixel_by_pixel(arguments: list[str], tmp_path: Path) -> None:
    job = jobs_of(arguments, "image-only")[0]
    row = measure(arguments, "image-only", tmp_path)
    photos = [Image.open(path) for path in job.concept.images]
    side_px = load_model(job.config).resolution
    by_hand = pixel_scores_between_photos(to_arrays(photos, (side_px, side_px)))
    assert {name: row[name] for name in by_hand} == {
        name: pytest.approx(values.mean().item()) for name, values in by_hand.items()
    }


def test_without_a_prompt_that_names_the_concept_alone_there_are_no_pixel_scores(
    arguments: list[str], tmp_path: Path
) -> None:
    prompts = tmp_path / "others.txt"
    prompts.write_text("a rendering of a {}\n")
    row = measure([*arguments, "--prompts", str(prompts)], "initializer", tmp_path)
    assert not set(PIXEL_SCORES) & set(row)


def test_learning_from_one_photo_is_scored_against_all(arguments: list[str], tmp_path: Path) -> None:
    job = jobs_of(arguments, "ti-one-photo")[0]
    row = measure(arguments, "ti-one-photo", tmp_path)
    assert len(job.setup.concept(job.concept).images) == 1
    assert (row["steps"], row["budget"], row["kept_at"]) == (4, 4, 4)  # of two samples: as many as two steps of four
    assert row["norm"] > 0
    assert (tmp_path / "rows/ti-one-photo/a-0.png").exists()


def test_steps_taken_are_told_from_the_step_whose_rows_are_kept(arguments: list[str], tmp_path: Path) -> None:
    still = ["--set", "inversion.stop.check_every_steps=1", "--set", "inversion.learning_rate=1e-30"]
    row = measure([*arguments, *still], "keep-best", tmp_path)
    assert (row["steps"], row["budget"], row["kept_at"]) == (4, 4, 1)  # none is better than the first
    assert (len(row["clip_i_pictures"]), len(row["clip_t_pictures"])) == (2, 2)
    assert row["clip_t"] == pytest.approx(sum(row["clip_t_pictures"]) / 2)


def test_jobs_of_one_setup_and_seed_are_learned_together(arguments: list[str], tmp_path: Path) -> None:
    options = parse([*arguments, "--setups", "textual-inversion", "--seeds", "0", "7"])
    jobs, scoring = methods.jobs_of(options, {"textual-inversion": find("textual-inversion")})
    work = chunks(jobs, 2)
    assert [[(job.concept.concept_id, job.seed) for job in chunk] for chunk in work] == [
        [("a", 0), ("b", 0)], [("a", 7), ("b", 7)]
    ]  # fmt: skip
    assert [len(chunk) for chunk in chunks(jobs, 1)] == [1] * 4
    rows = [row for row in measure_chunk(work[1], str(tmp_path), scoring) if isinstance(row, dict)]
    alone = measure([*arguments, "--seeds", "7"], "textual-inversion", tmp_path / "alone")
    assert rows[0]["clip_i"] == pytest.approx(alone["clip_i"], abs=1e-3)
    assert [row["clip_own"] in (0.0, 0.5, 1.0) for row in rows] == [True, True]  # of two pictures
    assert {path.name for path in (tmp_path / "rows/textual-inversion").glob("*.json")} == {"a-7.json", "b-7.json"}


def test_photos_on_a_busy_background_are_scored_against_the_plain_ones(tmp_path: Path) -> None:
    options = parse(["--busy", "--concepts", "2", "--output", str(tmp_path)])
    jobs, scoring = methods.jobs_of(options, {"textual-inversion": find("textual-inversion")})
    assert len(jobs) == 2 < len(scoring.concepts)
    for job, plain in zip(jobs, scoring.concepts, strict=False):
        assert job.concept.concept_id == plain.concept_id
        assert not job.concept.masks
        assert all(Path(image).is_relative_to(tmp_path) and Path(image).exists() for image in job.concept.images)
        assert not set(job.concept.images) & set(plain.images)


def test_a_concept_that_cannot_be_learned_does_not_take_the_others_along(arguments: list[str], tmp_path: Path) -> None:
    options = parse([*arguments, "--setups", "textual-inversion"])
    jobs, scoring = methods.jobs_of(options, {"textual-inversion": find("textual-inversion")})
    bad = replace(jobs[1], concept=replace(jobs[1].concept, num_vectors=200))
    good, error = measure_chunk([jobs[0], bad], str(tmp_path), scoring)
    assert isinstance(good, dict)
    assert isinstance(error, str)
    assert "b" in error


def test_further_extractors_score_too(arguments: list[str], clip: Path, tmp_path: Path) -> None:
    row = measure([*arguments, "--extractors", f"twin={clip}"], "initializer", tmp_path)
    assert row["twin_i_pictures"] == pytest.approx(row["clip_i_pictures"])
    assert row["twin_own"] == row["clip_own"]
    assert len(row["twin_mirror_pictures"]) == len(row["twin_i_pictures"])
    assert abs(row["twin_mirror"]) < 0.5
    with pytest.raises(ValueError, match="give NAME=PATH"):
        jobs_of([*arguments, "--extractors", str(clip)], "initializer")


@pytest.mark.slow
def test_the_command_goes_on_where_it_stopped(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--jobs", "2", "--setups", "image-only,textual-inversion"]) == 0
    assert "4 rows, 0 there already, 4 to measure" in capsys.readouterr().out
    assert "| textual-inversion |" in (tmp_path / "out" / "table.md").read_text()
    assert len(read_table(tmp_path / "out" / "rows.parquet")) == 4

    assert main([*arguments, "--setups", "image-only,textual-inversion,keep-best,short-captions"]) == 1
    said = capsys.readouterr().out
    assert "8 rows, 4 there already, 4 to measure" in said
    assert "FAILED short-captions a, seed 0: ValueError: no caption for 'a'" in said
    assert len(read_table(tmp_path / "out" / "rows.parquet")) == 6
    assert "keep-best against textual-inversion" in (tmp_path / "out" / "stopping.md").read_text()
