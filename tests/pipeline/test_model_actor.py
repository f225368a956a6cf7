"""One actor through the settings of several stages, called without Ray."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.actor import model_loading
from pipeline.actor.learner import Learner
from pipeline.bulk.drawer import Drawer
from pipeline.bulk.picture_rows import PLAN_SCHEMA, plan_rows
from pipeline.config import RunConfig
from pipeline.inputs.manifest import read_manifest
from pipeline.inputs.prompt_table import Prompt
from pipeline.ledger.plan import ConceptTask
from pipeline.model_actor import ModelActor
from pipeline.stages import make_plan
from pipeline.store.errors import ActorBroken, ActorLeaving, RunAborted
from pipeline.store.storage import RunStore
from tests.pipeline.runs import task, tiny_config, write_manifest


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> RunConfig:
    manifest = write_manifest(tmp_path, ["toy"])
    return tiny_config(tiny_model, tmp_path / "out", manifest=str(manifest))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that are loaded in the test, by their paths."""
    loads: list[str] = []
    load = model_loading.load_backbone

    def noting(path: str, **options: str) -> object:
        loads.append(path)
        return load(path, **options)

    monkeypatch.setattr(model_loading, "load_backbone", noting)
    return loads


@pytest.fixture
def actor(config: RunConfig) -> Iterator[ModelActor]:
    actor = ModelActor(config)
    yield actor
    actor.close()


def changed(config: RunConfig) -> RunConfig:
    """The settings of a rule of the ladder."""
    return replace(config, seed=5, inversion=replace(config.inversion, steps=4))


def planned(config: RunConfig) -> ConceptTask:
    plan, _ = make_plan(config, RunStore(config.output))
    (one,) = plan.tasks(read_manifest(config.manifest))
    return one


def test_a_model_loaded_once_learns_by_several_settings_what_it_learns_by_each_alone(
    config: RunConfig, loads: list[str], actor: ModelActor, tmp_path: Path
) -> None:
    assert actor.vitals().slots == 0
    found = []
    for settings in (config, changed(config)):
        capacity = actor.prepare(replace(settings, device="auto"))
        assert capacity == actor.vitals().slots + config.actors.calls_ahead
        record = asyncio.run(actor.learn(planned(settings), 1))
        found.append(RunStore(config.output).get(record.folder.embedding))
    assert len(loads) == 1
    assert actor.vitals().steps == 6 + 4
    assert actor.progress() == []

    for number, settings in enumerate((config, changed(config))):
        alone = replace(settings, output=str(tmp_path / f"alone-{number}"))
        learner = Learner(alone)
        record = asyncio.run(learner.learn(planned(alone)))
        learner.close()
        assert RunStore(alone.output).get(record.folder.embedding) == found[number]
    assert found[0] != found[1]


def test_a_task_of_other_settings_than_the_actor_was_told_is_not_learned(config: RunConfig, actor: ModelActor) -> None:
    with pytest.raises(ActorBroken, match="not told by what settings"):
        asyncio.run(actor.learn(planned(config), 1))
    actor.prepare(changed(config))
    with pytest.raises(RunAborted, match="loaded something else than the run was planned for"):
        asyncio.run(actor.learn(planned(config), 1))
    assert not list(RunStore(config.output).list("concepts"))


def test_an_actor_with_notice_begins_nothing_by_any_settings(config: RunConfig, actor: ModelActor) -> None:
    async def take_back() -> None:
        notice = asyncio.create_task(actor.notice())
        await asyncio.sleep(0.01)
        assert not notice.done()
        actor.leave()
        await asyncio.wait_for(notice, 30)
        for settings in (config, changed(config)):
            actor.prepare(settings)
            with pytest.raises(ActorLeaving):
                await actor.learn(task("late"), 1)

    asyncio.run(take_back())


def test_draining_saves_what_is_learned(config: RunConfig, actor: ModelActor) -> None:
    asyncio.run(actor.drain(600))  # there is nothing to wait for
    endless = replace(config, inversion=replace(config.inversion, steps=100_000))
    actor.prepare(endless)
    one = planned(endless)

    async def stop() -> None:
        asyncio.create_task(actor.learn(one, 1)).add_done_callback(lambda call: call.cancelled() or call.exception())
        while not actor.vitals().slots_used:
            await asyncio.sleep(0.01)
        assert [each.concept_id for each in actor.progress()] == ["toy"]
        await actor.drain(600)

    asyncio.run(stop())
    assert RunStore(config.output).exists(one.folder.checkpoint)


def test_an_actor_draws_with_the_model_that_it_has_learned_with(
    config: RunConfig, loads: list[str], actor: ModelActor, tmp_path: Path
) -> None:
    actor.prepare(config)
    record = asyncio.run(actor.learn(planned(config), 1))
    prompts = [Prompt("a photo of a {}"), Prompt("a {} in snow")]
    batch = pa.Table.from_pylist(list(plan_rows(config, [record], prompts)), PLAN_SCHEMA)
    with pytest.raises(ActorBroken, match="not told to draw"):
        asyncio.run(actor.draw(batch))

    async def draw() -> pa.Table:
        assert await actor.prepare_drawing() == 1
        assert actor.vitals().slots == 0  # nothing is learned meanwhile
        return await actor.draw(batch)

    drawn = asyncio.run(draw())
    assert drawn["status"].to_pylist() == ["ok", "ok"]
    assert len(loads) == 1
    shutil.copytree(config.output, tmp_path / "alone")
    alone = Drawer(replace(config, output=str(tmp_path / "alone")))(batch)
    assert drawn["sha256"] == alone["sha256"]
    actor.prepare(changed(config))
    assert asyncio.run(actor.learn(planned(changed(config)), 1)).status == "done"
