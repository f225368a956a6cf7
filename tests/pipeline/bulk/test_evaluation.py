"""What an evaluation asks for, and the table that comes of it, without a cluster or a model."""

from __future__ import annotations

from dataclasses import replace
from math import isnan, nan
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.bulk.evaluation import PARTS, PIXEL_SCORES, RESULT_SCHEMA, plan_rows, table_path, unscored, write_table
from pipeline.bulk.protocols import Protocol, choose_protocol
from pipeline.config import RunConfig
from pipeline.inputs.models import ROOT
from pipeline.inputs.prompt_table import Prompt, read_prompts
from pipeline.ledger.records import ConceptRecord
from pipeline.store.parquet import read_table
from pipeline.store.storage import RunStore
from tests.pipeline.runs import tiny_config
from textual_inversion.config import SamplingConfig

PROTOCOL = Protocol(
    prompts=(Prompt("a photo of {}"), Prompt("{} on the beach"), Prompt("a {} {initializer} toy", category="object")),
    images_per_prompt=3,
    sampling=SamplingConfig(),
    reconstruction=("a photo of {}",),
)


def record(name: str, initializer: str = "cat", category: str = "object", photos: int = 2) -> ConceptRecord:
    return ConceptRecord(
        concept_id=name,
        fingerprint=f"f-{name}",
        status="done",
        placeholder_token=f"<{name}>",
        initializer=initializer,
        category=category,
        images=tuple(f"{name}-{i}.png" for i in range(photos)),
    )


def planned(config: RunConfig, *records: ConceptRecord, protocol: Protocol = PROTOCOL) -> list[dict[str, Any]]:
    return list(plan_rows(config, protocol, records))


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> RunConfig:
    return tiny_config(tiny_model, tmp_path)


def test_what_is_drawn_in_every_setup(config: RunConfig) -> None:
    rows = {(row["setup"], row["prompt"]): row for row in planned(config, record("a"))}
    drawn = {key: (row["drawn"], row["text"]) for key, row in rows.items()}
    assert drawn == {
        ("learned", "a photo of {}"): ("a photo of <a>", "a photo of"),
        ("learned", "{} on the beach"): ("<a> on the beach", "on the beach"),
        ("learned", "a {} {initializer} toy"): ("a <a> cat toy", "a cat toy"),
        ("initializer", "a photo of {}"): ("a photo of cat", "a photo of"),
        ("initializer", "{} on the beach"): ("cat on the beach", "on the beach"),
        ("prompt only", "a photo of {}"): ("a photo of", "a photo of"),
        ("prompt only", "{} on the beach"): ("on the beach", "on the beach"),
        ("prompt only", "a {} {initializer} toy"): ("a cat toy", "a cat toy"),
        ("image only", "a photo of {}"): ("", "a photo of"),
        ("image only", "{} on the beach"): ("", "on the beach"),
        ("image only", "a {} {initializer} toy"): ("", "a cat toy"),
    }
    assert {row["embedding"] for key, row in rows.items() if key[0] != "learned"} == {""}
    assert rows["learned", "a photo of {}"]["embedding"].endswith("f-a/learned_embeds.safetensors")


def test_a_concept_with_a_class_noun_is_drawn_with_it_and_compared_as_any_other(config: RunConfig) -> None:
    plain = planned(config, record("a"))
    cued = planned(config, replace(record("a"), prompt_as="<a> cat"))
    assert [row["drawn"] for row in cued if row["setup"] == "learned"] == [
        "a photo of <a> cat", "<a> cat on the beach", "a <a> cat toy",
    ]  # fmt: skip
    assert [row["text"] for row in cued] == [row["text"] for row in plain]
    assert [row for row in cued if row["setup"] != "learned"] == [row for row in plain if row["setup"] != "learned"]
    assert cued[2] == plain[2], "a prompt that names the class itself is the same row"
    named = planned(config, replace(record("a"), prompt_as="<a>"))
    assert named == plain, "scores of concepts without the class cue stay as they are"


def test_the_placeholder_alone_is_drawn_from_the_same_noise(config: RunConfig) -> None:
    bare = replace(PROTOCOL, prompts=(Prompt("a photo of {token}"), Prompt("{token} on the beach")))
    named = record("a")
    cued = replace(named, prompt_as="<a> cat")
    rows = planned(config, cued, protocol=bare)
    for row, other in zip(rows[:2], planned(config, named)[:2], strict=True):
        same = ("setup", "drawn", "text", "seeds", "num_samples", "are_pixels_compared")
        assert [row[name] for name in same] == [other[name] for name in same]
    assert [row["are_pixels_compared"] for row in rows[:2]] == [True, False]


def test_setups_without_a_meaning_are_left_out(config: RunConfig) -> None:
    rows = planned(config, record("a", initializer="", photos=1))
    assert {row["setup"] for row in rows} == {"learned", "prompt only"}
    assert {row["prompt"] for row in planned(config, record("s", category="style"))} == {
        "a photo of {}",
        "{} on the beach",
    }
    bare = replace(PROTOCOL, prompts=(Prompt("{}"),))
    assert {row["setup"] for row in planned(config, record("a"), protocol=bare)} == {
        "learned",
        "initializer",
        "image only",
    }
    alone = replace(config, evaluation=replace(config.evaluation, references=False))
    assert {row["setup"] for row in planned(alone, record("a"))} == {"learned"}


def test_noise_is_shared_by_concepts_and_setups_and_differs_between_prompts(config: RunConfig) -> None:
    rows = [row for row in planned(config, record("a"), record("b")) if row["drawn"]]
    seeds = {row["prompt"]: tuple(row["seeds"]) for row in rows}
    assert all(tuple(row["seeds"]) == seeds[row["prompt"]] for row in rows)
    assert len({seed for of_prompt in seeds.values() for seed in of_prompt}) == 9
    given = replace(PROTOCOL, prompts=(Prompt("a {}", seed=7),))
    assert planned(config, record("a"), protocol=given)[0]["seeds"] == [7, 8, 9]


def test_a_row_changes_with_what_its_scores_depend_on(config: RunConfig, tmp_path: Path) -> None:
    concept = record("a")

    def ids(config: RunConfig = config, record: ConceptRecord = concept, protocol: Protocol = PROTOCOL) -> set[str]:
        return {row["row_id"] for row in planned(config, record, protocol=protocol)}

    first = ids()
    assert ids() == first
    assert len(first) == 11
    batch = replace(PROTOCOL, sampling=SamplingConfig(batch_size=2))
    assert ids(protocol=batch) == first
    (tmp_path / "dino").mkdir()
    (tmp_path / "dino" / "config.json").write_text("{}")
    assert ids(protocol=replace(PROTOCOL, reconstruction=())) == first  # no pixel scores then, but the same pictures
    assert not first & ids(record=replace(concept, fingerprint="other"))
    assert not first & ids(config=replace(config, extractor="owner/clip"))
    with_dino = replace(config.evaluation, dino=str(tmp_path / "dino"))
    assert not first & ids(config=replace(config, evaluation=with_dino))
    assert not first & ids(protocol=replace(PROTOCOL, sampling=SamplingConfig(steps=3)))
    more = ids(protocol=replace(PROTOCOL, prompts=(*PROTOCOL.prompts, Prompt("{} in the snow"))))
    assert first < more


def test_pixels_are_compared_where_picture_and_photo_show_the_same(config: RunConfig) -> None:
    rows = planned(config, record("a"), record("s", category="style"))
    compared = {(row["concept_id"], row["setup"], row["prompt"]) for row in rows if row["are_pixels_compared"]}
    assert compared == {("a", "learned", "a photo of {}"), ("a", "image only", "a photo of {}")}


def put_part(config: RunConfig, name: str, rows: list[dict[str, Any]]) -> None:
    folder = Path(config.output) / PARTS
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, RESULT_SCHEMA), folder / f"{name}.parquet")


def scored(row_id: str, concept: str, prompt: str, clip_i: float, clip_t: float | None, **more: Any) -> dict[str, Any]:
    row = {"row_id": row_id, "concept_id": concept, "fingerprint": "f", "setup": "learned", "prompt": prompt}
    return {
        **row,
        "text": "",
        "num_samples": 3,
        "protocol": "quick",
        "seed": 0,
        "clip_i": clip_i,
        "clip_t": clip_t,
        "status": "ok",
        **more,
    }


def test_the_table_holds_what_is_asked_for_now(config: RunConfig) -> None:
    store = RunStore(config.output)
    put_part(
        config,
        "one",
        [
            scored("1", "a", "a photo of {}", 0.9, 0.1),
            scored("2", "a", "{} on the beach", 0.7, 0.3),
            scored("3", "a", "{} in the snow", 0.5, 0.5),
            scored("old", "a", "{} on the moon", 0.0, 0.0),
            {**scored("4", "b", "a photo of {}", 0, 0), "clip_i": None, "status": "failed", "error": "no such photo"},
        ],
    )
    put_part(
        config, "two", [scored("1", "a", "a photo of {}", 0.9, 0.1), scored("5", "b", "{} on the beach", 0.2, 0.6)]
    )
    wanted = {"1": "a", "2": "a", "3": "a", "4": "b", "5": "b", "6": "c"}
    totals = write_table(store, config, PROTOCOL, set(wanted))
    table = read_table(Path(config.output) / table_path(config))
    assert sorted((row["concept_id"], row["prompt"]) for row in table.to_pylist()) == [
        ("a", "a photo of {}"),
        ("a", "{} in the snow"),
        ("a", "{} on the beach"),
        ("b", "{} on the beach"),
    ]
    assert table.schema.metadata[b"extractor"] == config.extractor.encode()
    assert not {"row_id", "status", "error"} & set(table.column_names)

    a, b = totals["learned"]["a"], totals["learned"]["b"]
    assert a.score("clip_i") == pytest.approx(0.9)  # of the prompt that says nothing else
    assert a.score("clip_t") == pytest.approx(0.4)  # of the others
    assert (b.score("clip_i"), b.score("clip_t")) == pytest.approx((0.2, 0.6))  # of what there is
    assert a.score("dino") != a.score("dino")  # not a number: nothing scored it
    assert unscored(store, wanted) == {"b": "no such photo", "c": "not scored"}


def test_parts_from_before_there_were_pixel_scores_and_mirror_margins_are_kept(config: RunConfig) -> None:
    store = RunStore(config.output)
    rows = [scored("1", "a", "a photo of {}", 0.9, 0.1)]
    columns = [name for name in RESULT_SCHEMA.names if not name.startswith((*PIXEL_SCORES, "mirror"))]
    old_schema = pa.schema([RESULT_SCHEMA.field(name) for name in columns])
    folder = Path(config.output) / PARTS
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, old_schema), folder / "old.parquet")
    put_part(config, "two", [scored("2", "b", "a photo of {}", 0.7, 0.3, psnr_db=14.5, edge_ratio=nan)])

    totals = write_table(store, config, PROTOCOL, {"1", "2"})["learned"]
    assert (folder / "old.parquet").exists()
    table = {row["concept_id"]: row for row in read_table(Path(config.output) / table_path(config)).to_pylist()}
    assert (table["a"]["clip_i"], table["a"]["psnr_db"], table["b"]["psnr_db"]) == (0.9, None, 14.5)
    assert isnan(totals["a"].score("psnr_db"))
    assert isnan(totals["b"].score("edge_ratio"))
    assert totals["b"].score("psnr_db") == pytest.approx(14.5)
    assert unscored(store, {"1": "a", "2": "b"}) == {}


def test_without_a_reconstruction_prompt_all_prompts_count_for_both(config: RunConfig) -> None:
    put_part(config, "one", [scored("1", "a", "x {}", 0.9, 0.1), scored("2", "a", "y {}", 0.7, 0.3)])
    protocol = replace(PROTOCOL, reconstruction=())
    total = write_table(RunStore(config.output), config, protocol, {"1", "2"})["learned"]["a"]
    assert (total.score("clip_i"), total.score("clip_t")) == pytest.approx((0.8, 0.2))


def test_protocols_by_name(config: RunConfig, tmp_path: Path) -> None:
    def chosen(**settings: Any) -> Protocol:
        return choose_protocol(replace(config, evaluation=replace(config.evaluation, **settings)))

    paper = chosen(protocol="paper")
    assert (paper.images_per_prompt, paper.sampling.steps, paper.sampling.solver) == (64, 50, "ddim")
    assert paper.sampling.guidance_scale == 5.0
    assert paper.sampling.batch_size == config.generation.sampling.batch_size
    assert set(paper.reconstruction) <= {prompt.text for prompt in paper.prompts}
    quick = chosen()
    assert set(quick.reconstruction) <= {prompt.text for prompt in quick.prompts}
    assert quick.prompts == tuple(read_prompts(str(ROOT / "manifests/demo_prompts.parquet"))), "the demo's, packaged"
    assert len(chosen(protocol="dreambench").prompts) == 25
    file = tmp_path / "p.txt"
    file.write_text("{} in the rain\n")
    mine = chosen(protocol="paper", prompts=str(file), images_per_prompt=2)
    assert (mine.prompts, mine.images_per_prompt) == ((Prompt("{} in the rain"),), 2)


def test_prompts_with_settings_of_their_own_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,steps,scene\na {},9,hall\n")
    config = tiny_config("m", tmp_path, evaluation={"prompts": str(tmp_path / "p.csv")})
    with pytest.raises(ValueError, match=r"p\.csv: an evaluation draws .*; take out scene, steps"):
        choose_protocol(config)
