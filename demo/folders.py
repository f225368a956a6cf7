"""Replace a saved model's folder as a whole, so that a reader never finds half of a new one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Give an absent folder beside `folder` to write into, and swap it in at the end; notes (`*.md`) are kept."""
    temporary = folder.with_name(folder.name + ".new")
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    yield temporary
    if folder.exists():
        for note in folder.glob("*.md"):
            shutil.copy(note, temporary)
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
