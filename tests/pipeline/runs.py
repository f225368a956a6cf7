"""Small manifests and settings that pipeline tests share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.config import RunConfig
from pipeline.config_file import parse_config
from pipeline.ledger.plan import ConceptTask
from textual_inversion.concept import Concept


def write_photo(path: Path, seed: int) -> str:
    """Write a small picture that differs by seed, and return its path."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(blocks).resize((40, 36), Image.Resampling.NEAREST).save(path)
    return str(path)


def write_manifest(folder: Path, names: list[str], **columns: list[Any]) -> Path:
    """Write a manifest of concepts with two photos each beside it, and return its path."""
    images = [[write_photo(folder / "photos" / f"{name}-{i}.png", 10 * k + i) for i in range(2)]
              for k, name in enumerate(names)]  # fmt: skip
    table = {"concept_id": names, "images": images, "initializer": ["cat"] * len(names), **columns}
    path = folder / "manifest.parquet"
    pq.write_table(pa.table(table), path)
    return path


BY_HAND = {"gradient_checkpointing": "off", "vae_slicing": "off", "vae_tiling": "off"}
"""Settings that leave an actor nothing to estimate, which takes seconds."""


def tiny_tree(model: Path | str, **changes: Any) -> dict[str, Any]:
    """Return settings for a run of a few seconds, as a tree that TOML or JSON can hold."""
    sampling = {"steps": 2, "batch_size": 4, "guidance_scale": 2.0}
    tree: dict[str, Any] = {
        "model": str(model),
        "extractor": "",
        "device": "cpu",
        "inversion": {"steps": 6, "batch_size": 2},
        "grid": {"prompts": ["a photo of a {}"], "images_per_prompt": 1, "sampling": sampling},
        "generation": {"sampling": sampling, "rows_per_part": 4},
        "actors": {"checkpoint_steps": 2, **BY_HAND},
    }
    for key, value in changes.items():
        if isinstance(value, dict):
            value = {**tree.get(key, {}), **value}
        tree[key] = value
    return tree


def tiny_config(model: Path | str, output: Path | str, **changes: Any) -> RunConfig:
    return parse_config(tiny_tree(model, output=str(output), **changes))


def tiny_toml(model: Path | str, **changes: Any) -> str:
    """Return the settings of `tiny_tree` as TOML: JSON values are TOML values, and sections are inline tables."""

    def value(item: Any) -> str:
        if isinstance(item, dict):
            return "{" + ", ".join(f"{key} = {value(inner)}" for key, inner in item.items()) + "}"
        return json.dumps(item)

    return "\n".join(f"{key} = {value(item)}" for key, item in tiny_tree(model, **changes).items())


def task(name: str, images: tuple[str, ...] = ("unused",), fingerprint: str = "") -> ConceptTask:
    concept = Concept(concept_id=name, placeholder_token=f"<{name}>", images=images, initializer="cat")
    return ConceptTask(concept=concept, fingerprint=fingerprint or f"f-{name}")
