"""Compare the settings, models and files that an actor has loaded with those that a concept was planned for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pipeline.config import RunConfig
from pipeline.ledger.differences import flatten
from pipeline.ledger.digest import digest
from pipeline.ledger.plan import ConceptTask, settings_path
from pipeline.ledger.settings import current_settings
from pipeline.store.errors import RunAborted
from pipeline.store.storage import RunStore


class LoadedSettings:
    """Settings of an actor, with the digests of the models and files on its machine.

    An instance is made before the actor reads files that only these settings name, and checked by `check_unchanged`
    afterwards, so that the digests are those of the bytes that were loaded. Hashing a model again costs nothing while
    its files keep size and time.
    """

    def __init__(self, config: RunConfig, loaded: Mapping[str, str]) -> None:
        """Compute the digests. `loaded`: those of the models that were loaded before, see `LoadedModel.digests`.

        Raises ValueError for a model or file that cannot be read, or that was replaced since it was loaded.
        """
        self._config = config
        now = current_settings(config)
        self._settings = {**now, **loaded}
        self._digest = digest(self._settings)
        self._compare(now)

    def check_unchanged(self) -> None:
        """Raise ValueError naming a model or file that was replaced since the actor loaded it."""
        self._compare(current_settings(self._config))

    def _compare(self, now: dict[str, Any]) -> None:
        if now != self._settings:
            raise ValueError(f"replaced since it was loaded: {_differences(self._settings, now, 'before', 'now')}")

    def check(self, task: ConceptTask, store: RunStore) -> None:
        """Raise RunAborted naming both digests if the task's fingerprint was made for other settings, models or
        files."""
        planned = task.inputs.get("settings", self._digest)
        if planned == self._digest:
            return
        try:
            settings = json.loads(store.get(settings_path(planned)))
            found = _differences(settings, json.loads(json.dumps(self._settings)), "in the plan", "here")
        except FileNotFoundError:
            found = f"{settings_path(planned)} is not there to say what"
        raise RunAborted(
            f"an actor has loaded something else than the run was planned for (settings {planned} in the plan, "
            f"{self._digest} here): {found}; give all machines the same model and files, and run the same command again"
        )


def _differences(before: dict[str, Any], now: dict[str, Any], when_before: str, when_now: str) -> str:
    """Return the name and both values of each setting that differs, most telling first: digests stand at the end of
    the settings."""
    old = dict(flatten(before))
    new = dict(flatten(now))
    names = [name for name in dict.fromkeys((*old, *new)) if old.get(name) != new.get(name)]
    return "; ".join(f"{name} is {old.get(name)} {when_before} but {new.get(name)} {when_now}" for name in names)
