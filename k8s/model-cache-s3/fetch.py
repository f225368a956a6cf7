"""Copy the files of a model that the pipeline loads from a store to a folder.

    python fetch.py s3://bucket/models/stable-diffusion-v1-5 /models/stable-diffusion-v1-5

A file that is there with its size is not fetched again; a file appears under its name only when it is whole. Pickles
and code are left out: nothing loads them. Exit codes: 0 the folder has all files, 2 the address holds no model; a store
that fails raises, and the Job tries again.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path, PurePosixPath

import fsspec

LOADED = (".safetensors", ".json", ".txt", ".model", ".yaml")
"""Endings of weights, configurations and tokenizers."""
PARTIAL = ".partial"


def fetch(uri: str, target: Path) -> tuple[list[str], list[str]]:
    """Copy a model's files and return the names of those that were fetched, and of those that were there."""
    fs, folder = fsspec.url_to_fs(uri)
    fetched, present = [], []
    for path, info in sorted(fs.find(folder, detail=True).items()):
        name = PurePosixPath(path).relative_to(PurePosixPath(folder)).as_posix()
        if not name.endswith(LOADED):
            continue
        copy = target / name
        if copy.is_file() and copy.stat().st_size == info["size"]:
            present.append(name)
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        partial = copy.with_name(copy.name + PARTIAL)
        fs.get_file(path, str(partial))
        os.replace(partial, copy)
        fetched.append(name)
    return fetched, present


def main(uri: str, target: str) -> int:
    fetched, present = fetch(uri, Path(target))
    if not any(name.endswith(".safetensors") for name in fetched + present):
        sys.stderr.write(f"error: {uri} has no .safetensors file: nothing to fill {target} with\n")
        return 2
    sys.stdout.write(f"{target}: {len(fetched)} files fetched, {len(present)} there before\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
