"""A finished output with any byte of any object changed between two commands: damage is named, and repaired or refused.

The commands that read an output are called as they are: `status`, `explain`, `run --dry-run`, with `--verify`, and the
functions that a run and `use` read it with.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from pipeline import explain, status
from pipeline.actor.checkpoints import Checkpoints
from pipeline.actor.learner import Learner
from pipeline.actor.library import Library, open_library
from pipeline.bulk.generate import METADATA
from pipeline.bulk.picture_rows import RESULT_SCHEMA
from pipeline.bulk.rows import done_row_ids
from pipeline.config import RunConfig
from pipeline.dry_run import dry_run
from pipeline.inputs.manifest import read_by_priority
from pipeline.ledger.plan import ConceptTask
from pipeline.ledger.records import put_record
from pipeline.report.page import RunFigures, build_report
from pipeline.report.run_file import RUN_FILE
from pipeline.stages import Run, make_plan
from pipeline.store.lease import PATH as LEASE
from pipeline.store.lease import Holder
from pipeline.store.storage import RunStore
from tests.faults.fuzz.campaign import Area
from tests.faults.fuzz.damage import BYTE_DAMAGE, JSON_DAMAGE, ByteDamage, JsonDamage, damaged
from tests.faults.fuzz.outcomes import Said, Undocumented, refusal_of, run_command
from tests.pipeline.runs import tiny_config, write_manifest
from textual_inversion.slot_state import SlotState

CONCEPTS = ("a", "b", "c")
"""Concepts that are done; one more has failed."""
_FAILED = "broken"
_WAYS = ("bytes", "bytes", "json", "delete", "swap", "folder")
_COMMANDS = ("status", "status --json", "explain", "dry run", "verify", "report", "use")


@dataclass(frozen=True, slots=True)
class ArtefactCase:
    """A change of one object of an output, and the command that meets it."""

    path: str
    way: str
    of_bytes: tuple[ByteDamage, ...]
    of_json: JsonDamage
    other: str
    command: str


@dataclass(frozen=True, slots=True)
class Output:
    """A finished output in a folder, and the contents of its objects by path."""

    config: RunConfig
    folder: Path
    contents: dict[str, bytes]

    def is_described(self, path: str) -> bool:
        """Return whether the record of a done concept holds the digest of this file."""
        record = self.contents.get(f"{path.rpartition('/')[0]}/record.json")
        return record is not None and path.rpartition("/")[2] in json.loads(record)["files"]


def artefact_area(folder: Path, model: Path) -> Area:
    """Return the area of artefacts, which works in a folder with a tiny model."""
    output = _finished_output(folder, model)
    numbers = count()

    def check(case: ArtefactCase) -> str:
        place = folder / f"case-{next(numbers)}"
        shutil.copytree(output.folder, place, copy_function=os.link)
        try:
            changed = _inflict(case, place, output)
            config = dataclasses.replace(output.config, output=str(place))
            return _CHECKS[case.command](case, config, output, changed)
        finally:
            shutil.rmtree(place)

    paths = st.sampled_from(sorted(output.contents))
    cases = st.builds(
        ArtefactCase, path=paths, way=st.sampled_from(_WAYS),
        of_bytes=st.lists(BYTE_DAMAGE, min_size=1, max_size=2).map(tuple),
        of_json=JSON_DAMAGE, other=paths, command=st.sampled_from(_COMMANDS),
    )  # fmt: skip
    return Area("artefacts", cases, check)


def _finished_output(folder: Path, model: Path) -> Output:
    """Learn a few concepts in this process, and leave every kind of object that a run may leave."""
    manifest = write_manifest(folder, [*CONCEPTS, _FAILED], note=["x", "y", "z", None])
    (folder / "photos" / f"{_FAILED}-0.png").write_bytes(b"no picture")
    place = folder / "finished"
    config = dataclasses.replace(tiny_config(model, place, inversion={"steps": 4}), manifest=str(manifest))
    run, store = Run(config), RunStore(config.output)
    tasks = list(run.plan.tasks(read_by_priority(config.manifest)))
    for record in asyncio.run(_learn(config, tasks)):
        run.stats.settle(record)
        if record.status == "failed":
            put_record(store, record)
    build_report(store, config, RunFigures(), run.plan.carried, run.plan.bad)
    run.write_state("ended")
    store.put(LEASE, Holder.for_this_process(60.0).to_bytes())
    store.put(f"{METADATA}/part-00000.parquet", _drawn_rows())
    objects = store.list()
    assert {path.rpartition("/")[2] for path in objects} >= {"record.json", "failure.json", "checkpoint.safetensors"}
    return Output(config, place, {path: store.get(path) for path in objects})


async def _learn(config: RunConfig, tasks: list[ConceptTask]) -> list[Any]:
    delete = Checkpoints.delete
    Checkpoints.delete = lambda *_: None  # type: ignore[method-assign]  # so that checkpoints are among the objects
    learner = Learner(config)
    try:
        return await asyncio.gather(*(learner.learn(task) for task in tasks))
    finally:
        learner.close()
        Checkpoints.delete = delete  # type: ignore[method-assign]


def _drawn_rows() -> bytes:
    rows = [
        {"row_id": str(number), "concept_id": "a", "prompt": "a photo", "seed": number, "status": "ok"}
        for number in range(9)
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, RESULT_SCHEMA), buffer)
    return buffer.getvalue()


def _inflict(case: ArtefactCase, place: Path, output: Output) -> bytes | None:
    """Change an object; return its new content, None where there is none."""
    path, content = place / case.path, output.contents[case.path]
    path.unlink()
    match case.way:
        case "delete":
            return None
        case "folder":
            path.mkdir()
            return None
        case "json":
            content = case.of_json.apply(content)
        case "swap":
            content = output.contents[case.other]
        case _:
            content = damaged(content, case.of_bytes, output.contents[case.other])
    path.write_bytes(content)
    return content


Check = Callable[[ArtefactCase, RunConfig, Output, bytes | None], str]


def _check_status(case: ArtefactCase, config: RunConfig, _: Output, __: bytes | None) -> str:
    options = ["--json"] if case.command.endswith("--json") else []
    said = run_command(partial(_exit_code, status.main, [config.output, *options]), codes=(0, 2))
    return _read(said, case)


def _check_explain(case: ArtefactCase, config: RunConfig, output: Output, __: bytes | None) -> str:
    parts = case.path.split("/")
    concept = parts[1] if parts[0] == "concepts" else "a"
    said = run_command(partial(_exit_code, explain.main, [config.output, concept]), codes=(0, 2))
    del output
    return _read(said, case)


def _exit_code(main: Callable[[list[str]], int], arguments: list[str]) -> int:
    return main(arguments)


def _read(said: Said, case: ArtefactCase) -> str:
    """Return the outcome of a command that reads an output. Raises Undocumented unless a refusal names the object."""
    if said.code == 2 and case.path.rpartition("/")[2] not in said.err:
        raise Undocumented(f"the error does not name {case.path}: {said.err[-300:]}")
    return f"{case.command} {said.outcome}"


def _check_dry_run(case: ArtefactCase, config: RunConfig, output: Output, changed: bytes | None) -> str:
    verify = case.command == "verify"
    if case.way == "folder" and case.path == RUN_FILE:
        return _read(run_command(lambda: dry_run(config, verify=verify), codes=(2,)), case)  # as the run itself would
    said = run_command(lambda: dry_run(config, verify=verify), codes=(0, 1))
    concept = case.path.split("/")[1] if case.path.startswith("concepts/") else ""
    is_told = any(line.startswith(f"{concept}: ") for line in said.lines) and said.code == 1
    if concept in CONCEPTS and case.path.endswith("/record.json"):
        _check_record(said, case, changed, output, is_told=is_told)
    elif concept in CONCEPTS and output.is_described(case.path):
        former = output.contents[case.path]
        is_seen = changed != former if verify else changed is None or len(changed) != len(former)
        if is_seen != is_told:
            raise Undocumented(f"{case.path} is {'changed' if is_seen else 'whole'}: {said.out[-300:]}")
    elif said.code or "3 done, 1 to do" not in said.out:
        raise Undocumented(f"{case.path} decides what is done: {said.out[-300:]}")
    return f"{case.command} {said.outcome}"


def _check_record(said: Said, case: ArtefactCase, changed: bytes | None, output: Output, *, is_told: bool) -> None:
    """Raise Undocumented unless a record that says something else than it did is told, or is learned anew."""
    if not changed:
        if "2 done, 2 to do" not in said.out:
            raise Undocumented(f"a concept without a record counts as done: {said.out[-300:]}")
    elif not is_told and _content(changed) != _content(output.contents[case.path]):
        raise Undocumented(f"an edited record counts as done: {said.out[-300:]}")


def _content(record: bytes) -> object:
    """Return what a record says; of one without a digest, as earlier releases wrote them, nothing."""
    try:
        tree = json.loads(record)
    except ValueError:
        return hashlib.sha256(record).hexdigest()
    return {} if isinstance(tree, dict) and "digest" not in tree else tree


def _check_report(case: ArtefactCase, config: RunConfig, _: Output, changed: bytes | None) -> str:
    """Check that results and report are written, and what else of a run reads the changed object."""
    store = RunStore(config.output)
    if case.way == "folder" and case.path in ("results.parquet", "report.html"):
        return "report not possible"  # a folder lies in its place, which the command says with code 2
    plan, _settings = make_plan(config, store)
    list(plan.tasks(read_by_priority(config.manifest)))
    build_report(store, config, RunFigures(), plan.carried, plan.bad)
    build_report(store, config, RunFigures())
    done_row_ids(store, METADATA)
    if changed is not None and case.path.endswith("checkpoint.safetensors"):
        refusal_of(lambda: SlotState.from_bytes(changed))
    if changed is not None and case.path == LEASE:
        Holder.from_bytes(changed)
    return "report written"


def _check_use(case: ArtefactCase, config: RunConfig, output: Output, _: bytes | None) -> str:
    """Check that each concept is refused, or read with the bytes that were learned."""
    found: list[Library] = []
    if refused := refusal_of(lambda: found.append(open_library([config.output]))):
        raise Undocumented(f"the whole output is refused for {case.path}: {refused[:300]}")
    refusals = 0
    for name in CONCEPTS:
        if refusal_of(partial(_read_concept, found[0], name)):
            refusals += 1
            continue
        concept = found[0].named(name)
        path = concept.uri.removeprefix(f"{config.output}/")
        if Path(concept.uri).read_bytes() != output.contents.get(path) and not _lacks_digests(case, config):
            raise Undocumented(f"{name} is used with other bytes than were learned")
    return f"use refuses {refusals} of 3"


def _read_concept(library: Library, name: str) -> None:
    library.named(name).read()


def _lacks_digests(case: ArtefactCase, config: RunConfig) -> bool:
    """Return whether the changed object is a record that passes for one of an earlier release, without digests."""
    path = Path(config.output) / case.path
    return path.name == "record.json" and path.is_file() and _content(path.read_bytes()) == {}


_CHECKS: dict[str, Check] = {
    "status": _check_status,
    "status --json": _check_status,
    "explain": _check_explain,
    "dry run": _check_dry_run,
    "verify": _check_dry_run,
    "report": _check_report,
    "use": _check_use,
}
