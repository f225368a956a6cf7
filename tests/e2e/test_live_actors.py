"""Actors live from learning to the end of a run: each loads the model once."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from pipeline import cluster
from pipeline.exit_codes import OK
from pipeline.inputs.models import locate
from pipeline.ledger.records import load_records
from pipeline.run import main
from pipeline.store.storage import RunStore
from tests.e2e.counted_loads import NotingActor, notes_of
from tests.pipeline.runs import tiny_toml, write_manifest

_SLOW = re.compile(
    "no actor is ready after|no core of the cluster was free for"
    r"|stuck in scheduling for|Found \d+ issues|waiting for metadata from|thread did not exit within"
)
"""Part of a warning that a machine which other work slows down brings about: two of ours, then those of Ray Data."""


def loads(output: Path) -> Counter[str]:
    """Models loaded, by process."""
    return Counter(notes_of(str(output)).read_text().split())


def warnings_in(stderr: str) -> list[str]:
    """Return the warnings that a user would see whatever the machine is busy with."""
    return [line for line in stderr.splitlines() if "WARNING" in line and not _SLOW.search(line)]


def test_a_warning_is_one_unless_it_says_that_the_machine_is_slow() -> None:
    of_settings = "2026-01-02 03:04:05,678\tWARNING dataset.py:226 -- `max_restarts` is deprecated"
    of_a_run = "WARNING pipeline.driver: an actor with 2 concepts was lost: it died"
    of_waiting = "WARNING pipeline.actor_wait: no actor is ready after 121 s: an actor needs 1 CPU"
    of_hanging = "2026-01-02 03:04:05,678\tWARNING issue.py:79 -- A task has been running or stuck in scheduling for 9s"
    said = [of_settings, of_waiting, "INFO pipeline.driver: nothing", of_a_run, of_hanging]
    assert warnings_in("\n".join(said)) == [of_settings, of_a_run]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_loads_the_model_once_an_actor(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It learns, tries again by two rules and draws; a later run only draws."""
    monkeypatch.setattr(cluster, "ModelActor", NotingActor)
    manifest, output = write_manifest(tmp_path, [f"c{number}" for number in range(4)]), tmp_path / "out"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of a {}\na {} in snow\n")
    (tmp_path / "job.toml").write_text(
        tiny_toml(
            tiny_model,
            extractor=locate("demo/clip"),
            inversion={"steps": 4, "batch_size": 2},
            gate={"min_clip_i": 2.0, "ladder": ["seed", "steps*2"]},  # which nothing reaches
            actors={"count": 2},
        )
    )
    command = [str(manifest), "--config", str(tmp_path / "job.toml"), "--output", str(output)]
    assert main([*command, "--prompts", str(prompts)]) == OK
    said = capfd.readouterr()
    assert "4 learned" in said.out
    assert "pictures: 8 drawn, 0 done before, 0 failed" in said.out
    assert warnings_in(said.err) == []
    records = [record for record in load_records(RunStore(str(output))) if record.tries]
    assert [[each.rung for each in record.tries] for record in records] == [["", "seed", "steps*2"]] * 4
    assert set(loads(output).values()) == {1}
    assert 1 <= len(loads(output)) <= 2

    before = loads(output)
    prompts.write_text("a {} on Mars\n")
    assert main([*command, "--prompts", str(prompts)]) == OK
    assert "pictures: 4 drawn" in capfd.readouterr().out
    later = loads(output) - before
    assert len(later) == 1  # four pictures make one batch
    assert set(later.values()) == {1}
