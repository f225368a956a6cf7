"""Files of prompts with odd columns, values and bytes, as a dry run and the plan of bulk pictures take them."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
from hypothesis import strategies as st

from pipeline.bulk.picture_rows import PLAN_SCHEMA, plan_rows
from pipeline.dry_run import dry_run
from pipeline.inputs.manifest import ManifestRow, read_manifest
from pipeline.inputs.prompt_files import COLUMNS
from pipeline.inputs.prompt_table import read_prompts
from pipeline.ledger.plan import ConceptTask
from pipeline.store.storage import RunStore
from tests.faults.fuzz.campaign import Area
from tests.faults.fuzz.damage import BYTE_DAMAGE, ByteDamage, damaged
from tests.faults.fuzz.manifests import TEXTS, Column, ManifestCase, columns
from tests.faults.fuzz.outcomes import Undocumented, run_command
from tests.pipeline.outputs import end
from tests.pipeline.runs import tiny_config, write_manifest

FORMS = ("parquet", "csv", "tsv", "json", "jsonl", "ndjson", "txt")
_OTHER_COLUMNS = ("negative", "cfg_scale", "Prompt", "promt", "note", "", "a.b", "path", "status")
_OWN_KINDS = {
    "concept_id": ("text", "int64", "uuid", "float64"),
    "seed": ("int64", "float64", "uint64"),
    "guidance_scale": ("float64", "int64"),
    "steps": ("int64", "int8"),
    "width": ("int64",),
    "height": ("int64",),
}
_PROMPTS = st.one_of(
    st.sampled_from(("a photo of a {}", "{}", "a {token} {initializer}", "a {initializer} like {}", "(a {}:1.3)")),
    TEXTS,
)


@dataclass(frozen=True)
class PromptCase:
    """A file of prompts as it is drawn."""

    columns: tuple[Column, ...]
    form: str
    damages: tuple[ByteDamage, ...] = ()

    def to_bytes(self) -> bytes:
        """Return it in its form, damaged."""
        if self.form == "parquet":
            return ManifestCase(self.columns, 0, "file", self.damages).to_bytes()
        cells = zip(*(column.cells for column in self.columns), strict=True)
        rows = [dict(zip((column.name for column in self.columns), row, strict=True)) for row in cells]
        return damaged(_WRITERS[self.form](rows), self.damages)


def _delimited(delimiter: str) -> Callable[[list[dict[str, Any]]], bytes]:
    def write(rows: list[dict[str, Any]]) -> bytes:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
        return buffer.getvalue().encode("utf-8", "replace")

    return write


def _json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "\n".join(json.dumps(row, default=str) for row in rows).encode()


_WRITERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "csv": _delimited(","),
    "tsv": _delimited("\t"),
    "json": lambda rows: json.dumps(rows, default=str).encode(),
    "jsonl": _json_lines,
    "ndjson": _json_lines,
    "txt": lambda rows: "\n".join(str(row.get("prompt")) for row in rows).encode("utf-8", "replace"),
}


@st.composite
def prompt_files(draw: st.DrawFn) -> PromptCase:
    """Draw a file of prompts: mostly with a column of prompts, and further columns of any name and kind."""
    num_rows = draw(st.integers(1, 3))
    texts = tuple(draw(st.lists(_PROMPTS, min_size=num_rows, max_size=num_rows)))
    first = [Column("prompt", "text", texts)] if draw(st.integers(0, 9)) else []
    more = draw(st.lists(columns((*COLUMNS, *_OTHER_COLUMNS), _OWN_KINDS, num_rows), max_size=3))
    damages: tuple[ByteDamage, ...] = ()
    if not draw(st.integers(0, 4)):
        damages = tuple(draw(st.lists(BYTE_DAMAGE, min_size=1, max_size=2)))
    return PromptCase(tuple(first + more) or (Column("prompt", "text", texts),), draw(st.sampled_from(FORMS)), damages)


def prompt_area(folder: Path, model: Path) -> Area:
    """Return the area of prompts, which works in a folder with a tiny model."""
    manifest = str(write_manifest(folder, ["c0", "c1"], category=["object", "style"]))
    rows = [row for row in read_manifest(manifest) if isinstance(row, ManifestRow)]
    store = RunStore(str(folder / "records"))
    records = [end(store, ConceptTask(concept=row.concept, fingerprint="f"), status="done") for row in rows]
    base = dataclasses.replace(tiny_config(model, folder / "out"), manifest=manifest)
    numbers = count()

    def check(case: PromptCase) -> str:
        path = folder / f"{next(numbers)}.{case.form}"
        path.write_bytes(case.to_bytes())
        config = dataclasses.replace(base, generation=dataclasses.replace(base.generation, prompts=str(path)))
        said = run_command(lambda: dry_run(config), codes=(0, 1, 2))
        if said.code == 2:
            if path.name not in said.err:
                raise Undocumented(f"the error does not name the file: {said.err[-300:]}")
            return said.outcome
        planned = list(plan_rows(config, records, read_prompts(str(path))))
        table = pa.Table.from_pylist(planned, PLAN_SCHEMA)
        for carried in table["carried"].to_pylist():
            json.loads(carried or "{}")
        return said.outcome

    return Area("prompts", prompt_files(), check)
