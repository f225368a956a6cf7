"""Damaged embedding files of this and other tools, as `use`, `export` and `start_from` read them."""

from __future__ import annotations

import io
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from tests.faults.fuzz.campaign import Area
from tests.faults.fuzz.damage import BYTE_DAMAGE, ByteDamage, damaged
from tests.faults.fuzz.outcomes import Undocumented, refusal_of
from textual_inversion.concept import LearnedEmbedding
from textual_inversion.dialects import ONETRAINER, WEBUI, diffusers_files, dump_embedding, parse_embedding


@dataclass(frozen=True, slots=True)
class EmbeddingCase:
    """A whole file by name, its damages, and another file whose end it may get."""

    name: str
    damages: tuple[ByteDamage, ...]
    other: str


def whole_files() -> dict[str, bytes]:
    """Return embeddings of one and of two text encoders in every layout, by name."""
    rows = torch.arange(16.0).reshape(2, 8)
    one = LearnedEmbedding(placeholder_token="<a>", vectors={"clip_l": rows}, metadata={"model_hash": "m"})
    two = LearnedEmbedding(placeholder_token="<a>", vectors={"clip_l": rows, "clip_g": rows + 1}, metadata={})
    found = {f"{layout} {name}": dump_embedding(each, layout) for layout in (WEBUI, ONETRAINER)
             for name, each in (("one", one), ("two", two))}  # fmt: skip
    found |= {f"diffusers {key}": data for key, (_, data) in diffusers_files(two).items()}
    saved = {"torch": {"<a>": rows}, "torch webui": {"string_to_param": {"*": rows}, "step": 3}, "torch rows": rows}
    for name, content in saved.items():
        buffer = io.BytesIO()
        torch.save(content, buffer)
        found[name] = buffer.getvalue()
    return found


def embedding_area() -> Area:
    """Return the area of embedding files."""
    files = whole_files()

    def check(case: EmbeddingCase) -> str:
        data = damaged(files[case.name], case.damages, files[case.other])
        read: list[LearnedEmbedding] = []
        if refusal_of(lambda: read.append(parse_embedding(data, "name"))):
            return "refused"
        if not all(rows.isfinite().all() for rows in read[0].vectors.values()):
            raise Undocumented("rows that are not finite are read")
        return "read"

    names = st.sampled_from(sorted(files))
    cases = st.builds(
        EmbeddingCase, name=names, damages=st.lists(BYTE_DAMAGE, min_size=1, max_size=3).map(tuple), other=names
    )
    return Area("embeddings", cases, check)
