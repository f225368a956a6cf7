"""Run DreamBench (Ruiz et al. 2023) in one command: learn its subjects, draw its prompts and score the pictures.

    git clone https://github.com/google/dreambooth
    python -m benchmarks.dreambench dreambooth/dataset --output output/dreambench

Further arguments are those of `python -m pipeline.evaluate`. Settings come from `pipeline/recipes/dreambench.toml`. The
manifest and the prompts (each subject gets those of objects or of live subjects) are written to the output first.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import evaluate
from pipeline.bulk.protocols import PROMPTS
from pipeline.config_file import RECIPES
from pipeline.exit_codes import USAGE
from pipeline.inputs.prompt_table import read_prompts
from pipeline.store.storage import RunStore

RECIPE = RECIPES / "dreambench.toml"
CLASSES = "prompts_and_classes.txt"
LIVE = ("cat", "dog")
_PHOTOS = (".jpg", ".jpeg", ".png")


def main(arguments: list[str] | None = None) -> int:
    """Write manifest and prompts, then evaluate; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dreambench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataset", type=Path, help="the folder with a folder of photos for each subject")
    parser.add_argument("--output", default="output/dreambench", metavar="URI")
    options, others = parser.parse_known_args(arguments)
    try:
        subjects = read_subjects(options.dataset)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return USAGE
    store = RunStore(options.output)
    for name, rows in (("manifest", subjects), ("prompts", prompts_of(subjects))):
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), buffer)
        store.put(f"{name}.parquet", buffer.getvalue())
    settings = ["--config", str(RECIPE), "--prompts", store.uri("prompts.parquet"), "--output", store.root]
    return evaluate.main([store.uri("manifest.parquet"), *settings, *others])


def read_subjects(dataset: Path) -> list[dict[str, Any]]:
    """Return a manifest row for every subject of the class list that has photos. Raises ValueError if there is none."""
    listed = dataset / CLASSES
    if not listed.is_file():
        raise ValueError(f"{dataset} has no {CLASSES}; give the folder `dataset` of github.com/google/dreambooth")
    rows = []
    for subject, name in read_classes(listed.read_text()).items():
        photos = sorted(path for path in (dataset / subject).glob("*") if path.suffix.lower() in _PHOTOS)
        if photos:
            images = [str(path.resolve()) for path in photos]
            rows.append({"concept_id": subject, "images": images, "initializer": name})
    if not rows:
        raise ValueError(f"{dataset} has no photos of the subjects that {listed} lists")
    return rows


def read_classes(text: str) -> dict[str, str]:
    """Return subject -> class, from the lines between the heading `subject_name,class` and the next empty line."""
    _, _, table = text.partition("subject_name,class\n")
    return dict(line.split(",", 1) for line in table.partition("\n\n")[0].splitlines() if "," in line)


def prompts_of(subjects: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return the rows of a prompt table: each subject's own 25 prompts."""
    lists = {kind: read_prompts(str(PROMPTS / f"dreambench_{kind}.txt")) for kind in ("objects", "live")}
    return [
        {"prompt": prompt.text, "concept_id": subject["concept_id"]}
        for subject in subjects
        for prompt in lists["live" if subject["initializer"] in LIVE else "objects"]
    ]


if __name__ == "__main__":
    sys.exit(main())
