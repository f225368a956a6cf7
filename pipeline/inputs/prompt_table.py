"""Prompts of bulk generation, row by row.

manifests/README.md describes the columns. A file with a mistake is refused, with the line or row that has it.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.inputs.cells import id_text, jsonable, short_repr, whole_number
from pipeline.inputs.manifest import MAX_CARRIED_BYTES
from pipeline.inputs.prompt_files import COLUMNS, prompt_files, prompt_rows
from pipeline.inputs.text_tables import Row
from pipeline.store.addresses import absolute
from pipeline.store.redact import redact, redacted
from textual_inversion.errors import BadInput
from textual_inversion.prompts import HOLE, weight_in

INITIALIZER = "{initializer}"
"""Hole in a prompt that the concept's initializer fills."""

TOKEN = "{token}"
"""Hole in a prompt that the placeholder token fills, without the class noun."""

_HOLES = re.compile("|".join(map(re.escape, (HOLE, TOKEN))))
_MAX_STEPS = 1000
_MAX_SIDE_PX = 8192


@dataclass(frozen=True, slots=True)
class Prompt:
    """Prompt with a hole, and the concepts it is drawn for."""

    text: str
    """Text with `{}` in place of the concept, as it was learned: its placeholder token, and with the class cue its
    class noun behind it. `{token}` is the token alone, and so is the `{}` of `{} {initializer}`, which names the class
    itself. `{initializer}` stands for the concept's initializer (left out for a concept that has none)."""
    concept_id: str | None = None
    """Id of the only concept it is drawn for; None for every concept."""
    category: str | None = None
    """Category of the concepts it is drawn for, `object` or `style`; None for both."""
    seed: int | None = None
    """Seed of the first picture, to which further ones add 1 each; None derives it from the run's seed, the concept and
    the text."""
    negative: str = ""
    """Negative prompt, in which the same holes may stand; empty for `generation.negative_prompt`."""
    guidance_scale: float | None = None
    """Guidance scale of its pictures, 1 or more; None for `generation.sampling.guidance_scale`."""
    steps: int | None = None
    """Denoising steps of its pictures; None for `generation.sampling.steps`."""
    size_px: tuple[int, int] | None = None
    """Width and height of its pictures; None for the model's own."""
    carried: str = ""
    """Values of the table's other columns, a JSON object; empty without any."""

    def is_for(self, concept_id: str, category: str) -> bool:
        return self.concept_id in (None, concept_id) and self.category in (None, category)

    def filled(self, token: str, initializer: str, prompt_as: str = "") -> str:
        """Return the prompt with a concept in its holes; see `fill_holes`."""
        return fill_holes(self.text, token, initializer, prompt_as)

    def template(self, initializer: str) -> str:
        """Return the prompt with `{}` for the concept and no other hole."""
        return self.filled(HOLE, initializer)

    def further_columns(self) -> list[str]:
        """Return the columns that it has besides those of the same prompt in an evaluation."""
        values = (self.negative, self.guidance_scale, self.steps, self.size_px)
        names = ("negative_prompt", "guidance_scale", "steps", "width and height")
        return [*(name for name, value in zip(names, values, strict=True) if value), *json.loads(self.carried or "{}")]


def fill_holes(text: str, token: str, initializer: str, prompt_as: str = "") -> str:
    """Return a text with a concept in its holes.

    `prompt_as`: text for `{}`, the concept's name in prompts; where it is empty, that is the token.
    """
    if INITIALIZER in text:
        text = text.replace(f"{HOLE} {INITIALIZER}", f"{TOKEN} {INITIALIZER}")
        text = " ".join(text.replace(INITIALIZER, initializer).split())
    words = {HOLE: prompt_as or token, TOKEN: token}
    return _HOLES.sub(lambda hole: words[hole[0]], text)


def read_prompts(uri: str) -> list[Prompt]:
    """Read prompts without duplicates: from a table (`.parquet`, `.csv`, `.tsv`, `.json`, `.jsonl`, `.ndjson`) with a
    column `prompt` and any others of `COLUMNS`, or from text, where empty lines and lines that begin with `#` are left
    out. A folder of Parquet files and a glob are read as one.

    Raises ValueError naming the file and the line or row.
    """
    uri = absolute(uri)
    found: dict[Prompt, tuple[str, Prompt]] = {}
    for file in prompt_files(uri):
        for location, row in prompt_rows(file):
            try:
                prompt = _parse(row)
                first, same = found.setdefault(replace(prompt, carried=""), (location, prompt))
                if same.carried != prompt.carried:
                    raise BadInput(f"it asks for the pictures of {first} again, with other values in carried columns")
            except BadInput as error:
                raise ValueError(f"{location}: {redact(str(error))}") from error
    if not found:
        raise ValueError(f"prompts {redact(uri)}: there are none in it")
    return [prompt for _, prompt in found.values()]


def prompt_notes(texts: Iterable[str]) -> list[str]:
    """Return remarks on prompts that are drawn otherwise than another tool would draw them."""
    weights = [weight for weight in map(weight_in, texts) if weight]
    if not weights:
        return []
    return [f"{len(weights)} prompts have weights such as {weights[0]!r}; weights are not interpreted, but plain text"]


def unknown_concepts(prompts: Sequence[Prompt], known: Iterable[str]) -> list[str]:
    """Return a remark on each concept id of the prompts that is none of the `known` ids."""
    wanted = {prompt.concept_id for prompt in prompts if prompt.concept_id is not None}
    if not wanted:
        return []
    ids = set(known)
    remarks: list[str] = []
    for concept_id in sorted(wanted - ids):
        close = difflib.get_close_matches(concept_id, ids, n=1) if len(remarks) < 10 else []  # slow for many
        meant = f"; did you mean {close[0]!r}?" if close else ""
        remarks.append(f"no concept has the concept_id {short_repr(concept_id)} of a prompt{meant}")
    return remarks


def _parse(row: Row) -> Prompt:
    """Return the prompt of a row. Raises BadInput naming the column and the value."""
    if isinstance(row, BadInput):
        raise row
    text = row.get("prompt")
    if not isinstance(text, str) or not _HOLES.search(text):
        raise BadInput(f"prompt {short_repr(text)} must be text with {{}} where the concept goes")
    category = row.get("category") or None
    if category not in (None, "object", "style"):
        raise BadInput(f"category {short_repr(category)} must be 'object' or 'style', or be left out")
    negative = row.get("negative_prompt")
    if not isinstance(negative, str | None):
        raise BadInput(f"negative_prompt {short_repr(negative)} must be text")
    return Prompt(
        text,
        _concept_id(row.get("concept_id")),
        category,
        _whole_number(row, "seed", 0, 2**62 - 1),
        (negative or "").strip(),
        _guidance_scale(row),
        _whole_number(row, "steps", 1, _MAX_STEPS),
        _size_px(row),
        _carried(row),
    )


def _concept_id(value: Any) -> str | None:
    concept_id = id_text(value)
    if concept_id is None or (isinstance(concept_id, float) and math.isnan(concept_id)):
        return None
    if isinstance(concept_id, float):
        raise BadInput(
            f"concept_id {concept_id} is a broken number, as pandas makes of whole ones beside missing ones; write "
            "texts, or whole numbers by .astype('Int64')"
        )
    if not isinstance(concept_id, str) or not concept_id.strip():
        raise BadInput(f"concept_id {short_repr(concept_id)} must be a concept's id; null stands for every concept")
    return concept_id


def _whole_number(row: Mapping[str, Any], name: str, least: int, most: int) -> int | None:
    value = whole_number({name: _number(row.get(name))}, name, None, most)
    if value is not None and value < least:
        raise BadInput(f"{name} {value} must be a whole number, {least} or more")
    return value


def _guidance_scale(row: Mapping[str, Any]) -> float | None:
    value = _number(row.get("guidance_scale"))
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value < math.inf:
        raise BadInput(f"guidance_scale {short_repr(value)} must be a number, 1 (no guidance) or more")
    return float(value)


def _size_px(row: Mapping[str, Any]) -> tuple[int, int] | None:
    width, height = (_whole_number(row, name, 1, _MAX_SIDE_PX) for name in ("width", "height"))
    if width is None and height is None:
        return None
    if width is None or height is None:
        raise BadInput(f"width {width} and height {height}: give both, or neither")
    return width, height


def _number(value: Any) -> Any:
    """Return the number that a text spells (the cells of CSV and of partition folders are texts), else the value."""
    if isinstance(value, str):
        try:
            return float(value) if "." in value or "e" in value.lower() else int(value)
        except ValueError:
            pass
    return value


def _carried(row: Mapping[str, Any]) -> str:
    others = {name: redacted(jsonable(value)) for name, value in row.items() if name not in COLUMNS}
    text = json.dumps(others, ensure_ascii=False) if others else ""
    if len(text.encode()) > MAX_CARRIED_BYTES:
        raise BadInput(f"its other columns hold more than {MAX_CARRIED_BYTES:,} bytes; drop large ones")
    return text


def slug(text: str) -> str:
    """Return a prompt's words as the part of a file's name: at most 48 letters, digits and hyphens, all ASCII."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:48].strip("-")
