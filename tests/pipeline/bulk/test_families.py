"""A concept of each family that learns a rectified flow, through the actors of every stage without a cluster: learned
with an adapter, sampled, scored, resumed, done, drawn in bulk and evaluated."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from math import isfinite
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load

from pipeline.actor.checkpoints import Checkpoints
from pipeline.actor.learner import Learner
from pipeline.bulk import evaluation, picture_rows
from pipeline.bulk.drawer import Drawer
from pipeline.bulk.protocols import Protocol
from pipeline.bulk.scorer import Scorer
from pipeline.inputs.manifest import read_manifest
from pipeline.inputs.prompt_table import Prompt
from pipeline.ledger.plan import ConceptTask
from pipeline.ledger.records import ConceptRecord
from pipeline.stages import make_plan
from pipeline.store.storage import RunStore
from tests.pipeline.runs import tiny_config, write_manifest
from tests.tiny_flux import tiny_flux
from tests.tiny_models import tiny_extractor
from tests.tiny_sd3 import tiny_stable_diffusion_3
from textual_inversion.slot_state import SlotState

ONE_BY_ONE = {"sampling": {"steps": 1, "batch_size": 1}}
"""Settings of drawing that need no trial of larger batches."""
PROMPTS = (Prompt("a photo of a {}"), Prompt("{} on the beach"))


def learn(learner: Learner, one: ConceptTask, attempt: int = 1) -> ConceptRecord:
    return asyncio.run(learner.learn(one, attempt))


@pytest.mark.parametrize("write", [tiny_stable_diffusion_3, tiny_flux], ids=["SD3", "FLUX"])
def test_a_concept_goes_through_every_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], Path]
) -> None:
    manifest = write_manifest(tmp_path, ["a"])
    config = tiny_config(
        write(tmp_path / "model"),
        tmp_path / "out",
        manifest=str(manifest),
        extractor=str(tiny_extractor("clip", tmp_path / "clip")),
        inversion={"steps": 4, "batch_size": 2, "adapter": {"kind": "lora", "rank": 1, "learning_rate": 0.1}},
        grid={"prompts": ["a photo of a {}"], "images_per_prompt": 1, **ONE_BY_ONE},
        generation=ONE_BY_ONE,
        actors={"slots": 1, "checkpoint_steps": 2},
    )
    store = RunStore(config.output)
    saved: list[SlotState] = []
    monkeypatch.setattr(Checkpoints, "save", lambda _self, _job, state, **_: saved.append(state))
    learner = Learner(config)
    try:
        [planned] = make_plan(config, store)[0].tasks(read_manifest(str(manifest)))
        record = learn(learner, planned)
        assert (record.status, record.steps, record.error) == ("done", 4, "")
        assert {"clip_i", "clip_t"} <= record.scores.keys()
        assert store.exists(record.folder.grid)

        resumed = replace(planned, fingerprint="resumed")
        store.put(resumed.folder.checkpoint, saved[0].to_bytes())
        again = learn(learner, resumed, attempt=2)
    finally:
        learner.close()
    for name in ("embedding", "adapter"):
        first, second = (load(store.get(getattr(each.folder, name))) for each in (record, again))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)

    plan = make_plan(config, store)[0]
    assert list(plan.tasks(read_manifest(str(manifest)))) == []
    assert plan.num_done == 1

    rows = list(picture_rows.plan_rows(config, [record], PROMPTS))
    drawn = Drawer(config)(pa.Table.from_pylist(rows, picture_rows.PLAN_SCHEMA)).to_pylist()
    assert [row["status"] for row in drawn] == ["ok"] * len(PROMPTS)

    protocol = Protocol(prompts=PROMPTS, images_per_prompt=2, sampling=config.generation.sampling)
    rows = list(evaluation.plan_rows(config, protocol, [record]))
    scored = Scorer(config)(pa.Table.from_pylist(rows, evaluation.PLAN_SCHEMA)).to_pylist()
    assert {row["setup"] for row in scored} == {"learned", "initializer", "prompt only", "image only"}
    assert {(row["status"], row["error"] or "") for row in scored} == {("ok", "")}
    assert all(isfinite(row["clip_i"]) for row in scored)
