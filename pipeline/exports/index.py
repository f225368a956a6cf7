"""The index of an export: a row for each concept, as CSV and as Parquet, and the model card beside it."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.exports.tools import TOOLS
from pipeline.ledger.records import ConceptRecord
from pipeline.store.parquet import read_table
from textual_inversion.concept import LearnedEmbedding

CSV = "index.csv"
PARQUET = "index.parquet"
CARD = "README.md"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A concept of an export."""

    record: ConceptRecord
    name: str
    """Name of its files, without endings."""
    base_model: str = ""
    """Model that it was learned on; empty for a concept whose files could not be read."""
    model_hash: str = ""
    adapter: str = ""
    """Kind of its adapter; empty if it was learned without one."""
    words: Mapping[str, str] = field(default_factory=dict)
    """Tool -> text that calls it in a prompt there."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Path in the export -> SHA-256 of the content."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Tool -> reason why it has no files there."""

    @classmethod
    def of(cls, record: ConceptRecord, name: str, embedding: LearnedEmbedding) -> Entry:
        return cls(
            record=record,
            name=name,
            base_model=embedding.metadata.get("model", ""),
            model_hash=embedding.metadata.get("model_hash", ""),
            adapter=embedding.adapter.kind if embedding.adapter else "",
        )


def to_table(entries: Sequence[Entry], tools: Collection[str]) -> pa.Table:
    """Return the index as a table: what a concept is called in each tool, what it needs, how good it is, and its
    files."""
    scores = sorted({name for entry in entries for name in entry.record.scores})
    columns: dict[str, pa.Array] = {
        "concept_id": _texts([entry.record.concept_id for entry in entries]),
        "name": _texts([entry.name for entry in entries]),
        "placeholder_token": _texts([entry.record.placeholder_token for entry in entries]),
        "prompt_as": _texts([entry.record.name_in_prompts for entry in entries]),
        "category": _texts([entry.record.category for entry in entries]),
        "num_vectors": pa.array([entry.record.num_vectors for entry in entries], pa.int32()),
        "base_model": _texts([entry.base_model for entry in entries]),
        "model_hash": _texts([entry.model_hash for entry in entries]),
        "needs_adapter": pa.array([bool(entry.adapter) for entry in entries], pa.bool_()),
        "adapter": _texts([entry.adapter for entry in entries]),
        "gate": _texts([entry.record.gate for entry in entries]),
        **{score: pa.array([entry.record.scores.get(score) for entry in entries], pa.float64()) for score in scores},
        **{f"word_{tool}": _texts([entry.words.get(tool, "") for entry in entries]) for tool in tools},
        "fingerprint": _texts([entry.record.fingerprint for entry in entries]),
        "digest": _texts([_digest(entry.record) for entry in entries]),
        "files": pa.array([list(entry.files) for entry in entries], pa.list_(pa.string())),
        "sha256": pa.array([list(entry.files.values()) for entry in entries], pa.list_(pa.string())),
        "refused": _texts(["; ".join(f"{tool}: {why}" for tool, why in entry.refused.items()) for entry in entries]),
    }
    return pa.table(columns)


def to_parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def to_csv(table: pa.Table) -> bytes:
    """Return the table as CSV; lists are joined by spaces, which no path here has."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(table.schema.names)
    for row in table.to_pylist():
        writer.writerow([" ".join(value) if isinstance(value, list) else value for value in row.values()])
    return buffer.getvalue().encode()


def listed_files(data: bytes) -> set[str]:
    """Return the paths that an index in Parquet lists."""
    return {path for files in read_table(io.BytesIO(data), ["files"])["files"].to_pylist() for path in files}


def to_card(entries: Sequence[Entry], tools: Sequence[str], *, source: str, zipped: bool) -> bytes:
    """Return the model card: what is here, what it was learned on, and how each tool uses it.

    `source`: name of the run; an address would tell readers of the card about the machine or the store.
    """
    exported = [entry for entry in entries if entry.files]
    models = sorted({entry.base_model for entry in exported})
    lines = [
        "---",
        "tags: [textual-inversion, text-to-image, diffusion]",
        "---",
        "",
        f"# {len(exported):,} learned concepts",
        "",
        "Embeddings of Textual Inversion (Gal et al. 2022): new words for a frozen text-to-image model. They work with "
        "the base model that they were learned on, and with models fine-tuned from it as far as these still share its "
        "text encoder.",
        "",
        f"- Base model: {', '.join(f'`{model}`' for model in models) or 'unknown'}. The index has the digest of its "
        "files.",
        f"- Learned by: the run `{source}`, of which `{PARQUET}` and `{CSV}` name each concept's fingerprint and "
        "scores (`clip_i`: likeness to the photos, `clip_t`: fit to the prompt).",
        "- Licence and permitted use: those of the photos and of the base model. They are not stated in the run; add "
        "them before you publish these files.",
        "",
        "## Use",
        "",
        "| folder | tool | word in a prompt, for example | files |",
        "|---|---|---|---|",
    ]
    for tool in tools:
        words = [entry.words[tool] for entry in exported if entry.words.get(tool)]
        example = f"`{words[0]}`" if words else "-"
        folder = f"{tool}.zip" if zipped else f"{tool}/"
        lines.append(f"| `{folder}` | {TOOLS[tool].title} | {example} | {TOOLS[tool].use} |")
    if any(entry.adapter for entry in exported):
        lines += [
            "",
            "Concepts with `needs_adapter` in the index were learned with a LoRA of the text encoder. Load it with "
            "strength 1 beside the embedding; without it the word draws something else.",
        ]
    refused = [entry for entry in entries if entry.refused]
    if refused:
        lines += ["", "## Not exported", ""]
        lines += [
            f"- `{entry.record.concept_id}`: {tool}: {why}" for entry in refused for tool, why in entry.refused.items()
        ]
    return ("\n".join(lines) + "\n").encode()


def _texts(values: Sequence[str]) -> pa.Array:
    return pa.array(values, pa.string())


def _digest(record: ConceptRecord) -> str:
    """Return the SHA-256 of the concept's embedding as the run stores it; empty in records that keep none."""
    file = record.files.get("learned_embeds.safetensors")
    return file.sha256 if file else ""
