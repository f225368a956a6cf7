"""Bad rows and photos among good ones: each gives its documented outcome, and nobody else notices."""

from __future__ import annotations

import asyncio
import re
from functools import partial
from pathlib import Path

import pytest

from pipeline.actor.learner import Learner
from pipeline.config import RunConfig
from pipeline.exit_codes import FAILED
from pipeline.inputs.content_hash import content_hashes
from pipeline.inputs.manifest import BadRow, read_manifest
from pipeline.inputs.models import load_model_vocabularies
from pipeline.ledger.digest import digest
from pipeline.ledger.plan import ConceptTask, Plan
from pipeline.ledger.preflight import examine
from pipeline.ledger.records import ConceptRecord, put_record
from pipeline.ledger.settings import current_settings
from pipeline.report.page import RunFigures, build_report
from pipeline.run import main
from pipeline.store.storage import RunStore
from tests.faults.corpus import NEIGHBOURS, Case, write_corpus, write_rows
from tests.pipeline.runs import tiny_config, tiny_toml


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Case]]:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> RunConfig:
    return tiny_config(tiny_model, tmp_path / "out", inversion={"steps": 2, "batch_size": 2}, actors={"slots": 3})


def planned(manifest: str, config: RunConfig) -> tuple[Plan, list[ConceptTask]]:
    plan = Plan(digest(current_settings(config)), set(), partial(content_hashes, photos=config.photos))
    return plan, list(plan.tasks(read_manifest(manifest)))


def of_outcome(cases: list[Case], *outcomes: str) -> list[str]:
    return [case.name for case in cases if case.outcome in outcomes]


def learn_all(config: RunConfig, tasks: list[ConceptTask]) -> dict[str, ConceptRecord]:
    async def together(learner: Learner) -> list[ConceptRecord]:
        return await asyncio.gather(*(learner.learn(task) for task in tasks))

    learner = Learner(config)
    try:
        return {record.concept_id: record for record in asyncio.run(together(learner))}
    finally:
        learner.close()


def test_bad_rows_are_told_before_anything_begins(corpus: tuple[str, list[Case]], config: RunConfig) -> None:
    manifest, cases = corpus
    plan, tasks = planned(manifest, config)
    assert [task.concept.concept_id for task in tasks] == of_outcome(cases, "fixed", "failed")
    expected = [(number, case) for number, case in enumerate(cases, 1) if case.outcome == "bad row"]
    assert sorted(row.row for row in plan.bad) == [number for number, _ in expected]
    reasons = {row.row: row.reason for row in plan.bad}
    for number, case in expected:
        assert re.search(case.said.replace("{}", r"\{\}"), reasons[number]), (case.name, reasons[number])
        assert reasons[number].isprintable()


def test_a_dry_run_foresees_every_failure_and_no_other(corpus: tuple[str, list[Case]], config: RunConfig) -> None:
    manifest, cases = corpus
    _, tasks = planned(manifest, config)
    found = list(examine(tasks, config, [], load_model_vocabularies(config), photos=True))
    said = {finding.concept_id: finding.text for finding in found if finding.is_fatal}
    assert sorted(said) == sorted(of_outcome(cases, "failed"))
    for case in cases:
        assert case.said in said.get(case.name, "") or case.outcome != "failed", (case.name, said[case.name])
    notes = {finding.concept_id for finding in found if not finding.is_fatal}
    assert notes == {"initializer-spelled-out"}


@pytest.mark.slow
def test_each_gives_its_outcome_and_neighbours_keep_their_bytes(
    corpus: tuple[str, list[Case]], config: RunConfig, tiny_model: Path, tmp_path: Path
) -> None:
    manifest, cases = corpus
    plan, tasks = planned(manifest, config)
    records = learn_all(config, tasks)
    for case in cases:
        if case.outcome == "fixed":
            assert records[case.name].status == "done", (case.name, records[case.name].error)
        if case.outcome == "failed":
            assert records[case.name].status == "failed", case.name
            assert case.said in records[case.name].error, (case.name, records[case.name].error)

    calm = tiny_config(tiny_model, tmp_path / "calm", inversion={"steps": 2, "batch_size": 2}, actors={"slots": 3})
    learn_all(calm, [task for task in tasks if task.concept.concept_id in NEIGHBOURS])
    for name in NEIGHBOURS:
        folder = next(task.folder for task in tasks if task.concept.concept_id == name)
        for path in (folder.embedding, folder.grid):
            assert RunStore(config.output).get(path) == RunStore(calm.output).get(path), path

    store = RunStore(config.output)
    for record in records.values():
        if record.status == "failed":
            put_record(store, record)
    build_report(store, config, RunFigures(), plan.carried, plan.bad)
    written = {path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {path.relative_to(tmp_path / "out").parts[0] for path in written} == {
        "concepts", "results.parquet", "report.html"
    }  # fmt: skip
    assert not [path for path in written if b"SeCrEt" in path.read_bytes()]
    assert sorted(path.name for path in (tmp_path / "out" / "concepts").iterdir()) == sorted(records)


def test_no_credential_is_printed_or_logged(
    corpus: tuple[str, list[Case]], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tmp_path / "job.toml"
    job.write_text(tiny_toml(tiny_model))
    assert main([corpus[0], "--config", str(job), "--output", str(tmp_path / "out"), "--dry-run"]) == FAILED
    said = capsys.readouterr()
    assert "ssh://***@host/1.png" in said.out
    assert "1.png?sig=***" in said.out
    assert "SeCrEt" not in said.out + said.err
    assert main(["https://me:SeCrEt@127.0.0.1:9/m.parquet?sig=SeCrEt", "--config", str(job), "--dry-run"]) != 0
    said = capsys.readouterr()
    assert "SeCrEt" not in said.out + said.err


def test_a_manifest_of_bad_rows_alone_is_all_told(tmp_path: Path) -> None:
    rows = [{"concept_id": None, "images": None}, {"concept_id": "a", "images": []}]
    (tmp_path / "photos").mkdir()
    schema_row = {"concept_id": "b", "images": ["x.png"]}
    found = list(read_manifest(write_rows(tmp_path, [*rows, schema_row])))
    assert [isinstance(row, BadRow) for row in found] == [True, True, False]
