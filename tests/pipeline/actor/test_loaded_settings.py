"""An actor serves only the run that was planned for the models and files which it has loaded."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.actor.loaded_settings import LoadedSettings
from pipeline.config import RunConfig
from pipeline.inputs.models import model_hash
from pipeline.ledger.digest import digest
from pipeline.ledger.plan import ConceptTask, settings_path
from pipeline.ledger.settings import current_settings
from pipeline.store.errors import RunAborted
from pipeline.store.storage import RunStore
from tests.pipeline.runs import task, tiny_config


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> RunConfig:
    """A run with a model of its own, which a test may change."""
    return tiny_config(shutil.copytree(tiny_model, tmp_path / "model"), tmp_path / "out")


def planned(config: RunConfig) -> ConceptTask:
    """A task of a run that has put its settings where runs do."""
    settings = current_settings(config)
    RunStore(config.output).put(settings_path(digest(settings)), json.dumps(settings).encode())
    return replace(task("toy"), inputs={"settings": digest(settings)})


def change_model(config: RunConfig) -> None:
    path = Path(config.model) / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text() + "\n")


def test_what_was_planned_is_served(config: RunConfig) -> None:
    loaded = LoadedSettings(config, {})
    loaded.check_unchanged()
    loaded.check(planned(config), RunStore(config.output))
    loaded.check(planned(replace(config, device="cuda")), RunStore(config.output))
    loaded.check(task("other"), RunStore(config.output))


def test_another_model_is_refused_with_both_digests(config: RunConfig) -> None:
    one = planned(config)
    before = model_hash(config.model)
    change_model(config)
    with pytest.raises(RunAborted) as refused:
        LoadedSettings(config, {}).check(one, RunStore(config.output))
    assert f"model is {before} in the plan but {model_hash(config.model)} here" in str(refused.value)


def test_other_settings_are_named_and_missing_ones_told(config: RunConfig) -> None:
    one, store = planned(config), RunStore(config.output)
    other = LoadedSettings(replace(config, seed=7), {})
    with pytest.raises(RunAborted, match="seed is 0 in the plan but 7 here"):
        other.check(one, store)
    store.delete(settings_path(one.inputs["settings"]))
    with pytest.raises(RunAborted, match=r"settings/.*\.json is not there"):
        other.check(one, store)


def test_a_model_that_is_replaced_while_it_is_loaded_is_refused(config: RunConfig) -> None:
    loaded = LoadedSettings(config, {})
    change_model(config)
    with pytest.raises(ValueError, match=r"replaced since it was loaded: model is .* before but .* now"):
        loaded.check_unchanged()


def test_settings_for_a_model_that_was_replaced_since_it_was_loaded_are_refused(config: RunConfig) -> None:
    loaded = {"model": model_hash(config.model)}
    assert LoadedSettings(replace(config, seed=7), loaded)
    change_model(config)
    with pytest.raises(
        ValueError, match=rf"replaced since it was loaded: model is {loaded['model']} before but .* now"
    ):
        LoadedSettings(replace(config, seed=7), loaded)
