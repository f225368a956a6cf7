"""Write an export: the files of each concept for each tool, then the model card and the index."""

from __future__ import annotations

import hashlib
import io
import posixpath
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from PIL import Image

from pipeline.actor.library import read_embedding
from pipeline.actor.publish import to_png
from pipeline.exports.index import CARD, CSV, PARQUET, Entry, listed_files, to_card, to_csv, to_parquet, to_table
from pipeline.exports.merging import merged_files
from pipeline.exports.tools import TOOLS, Refused, files_for, word_in
from pipeline.ledger.records import ConceptRecord
from pipeline.sample_config import GridConfig
from pipeline.store.storage import RunStore
from textual_inversion.grids import first_sample
from textual_inversion.prompts import fill

_THREADS = 8
_BATCH = 64
_MAX_PREVIEW_PX = 512
_IN_ARCHIVE = ".zip/"
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)
"""Time of every entry of an archive, so that the same concepts give the same bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """An export of a run's concepts."""

    source: RunStore
    """Objects of the run."""
    target: RunStore
    """Place to write to."""
    tools: Sequence[str]
    grid: GridConfig
    """Settings of the run's sample grids, which the previews are cut from."""
    zipped: bool = False
    """Write one archive for each tool in place of its folder."""

    def write(self, names: Mapping[str, str], records: Sequence[ConceptRecord]) -> list[Entry]:
        """Write everything, the index last, and return an entry for each concept.

        Every object is compared with what the store holds. Files that an earlier index lists and this one does not
        are deleted at the end.
        """
        before = listed_files(self.target.get(PARQUET)) if self.target.exists(PARQUET) else ()
        entries = self._write_archives(names, records) if self.zipped else self._write_folders(names, records)
        table = to_table(entries, self.tools)
        card = to_card(entries, self.tools, source=posixpath.basename(self.source.root), zipped=self.zipped)
        for path, data in ((CARD, card), (CSV, to_csv(table)), (PARQUET, to_parquet(table))):
            self.target.put_checked(path, data)
        for path in sorted(_objects(before) - _objects(path for entry in entries for path in entry.files)):
            self.target.delete(path)
        return entries

    def _write_folders(self, names: Mapping[str, str], records: Sequence[ConceptRecord]) -> list[Entry]:
        def write(record: ConceptRecord) -> Entry:
            entry, files = self._make(names[record.concept_id], record)
            return replace(entry, files={path: self.target.put_checked(path, data) for path, data in files.items()})

        with ThreadPoolExecutor(_THREADS, thread_name_prefix="export") as pool:
            return list(pool.map(write, records))

    def _write_archives(self, names: Mapping[str, str], records: Sequence[ConceptRecord]) -> list[Entry]:
        """Write `<tool>.zip` for each tool, which holds what the folder `<tool>` would; in the index, the path of a
        file is the archive's with the path inside it."""
        entries = []
        with tempfile.TemporaryDirectory() as folder:
            for entry, files in self._made(names, records):
                for path, data in files.items():
                    tool, _, inside = path.partition("/")
                    with zipfile.ZipFile(Path(folder, f"{tool}.zip"), "a") as archive:
                        archive.writestr(zipfile.ZipInfo(inside, _ZIP_TIME), data, zipfile.ZIP_STORED)
                digests = {
                    path.replace("/", _IN_ARCHIVE, 1): hashlib.sha256(data).hexdigest() for path, data in files.items()
                }
                entries.append(replace(entry, files=digests))
            wanted = {path: digest for entry in entries for path, digest in entry.files.items()}
            for archive_path in sorted(Path(folder).iterdir()):
                _check_archive(archive_path, wanted)
                self.target.put_checked(archive_path.name, archive_path.read_bytes())
        return entries

    def _made(
        self, names: Mapping[str, str], records: Sequence[ConceptRecord]
    ) -> Iterator[tuple[Entry, dict[str, bytes]]]:
        """Yield every concept's entry and files, some of them made ahead by threads."""
        rest = iter(records)
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="export") as pool:
            while batch := list(islice(rest, _BATCH)):
                yield from pool.map(lambda record: self._make(names[record.concept_id], record), batch)

    def _make(self, name: str, record: ConceptRecord) -> tuple[Entry, dict[str, bytes]]:
        """Return a concept's entry, without its files, and its files for all tools: path -> content."""
        if record.is_damaged:
            return Entry(record=record, name=name, refused=dict.fromkeys(self.tools, record.error)), {}
        try:
            embedding = read_embedding(self.source.uri(record.result.embedding), record.files)
        except ValueError as error:
            return Entry(record=record, name=name, refused=dict.fromkeys(self.tools, str(error))), {}
        preview = self._preview(record)
        files: dict[str, bytes] = {}
        words: dict[str, str] = {}
        refused: dict[str, str] = {}
        for tool in self.tools:
            try:
                made = files_for(TOOLS[tool], name, embedding, preview)
                if made and TOOLS[tool].kind == "merged":
                    made |= {f"{name}/{path}": data for path, data in merged_files(embedding).items()}
            except Refused as error:
                refused[tool] = str(error)
                continue
            if made:
                words[tool] = word_in(TOOLS[tool], name, embedding)
                files |= {f"{tool}/{path}": data for path, data in made.items()}
        return replace(Entry.of(record, name, embedding), words=words, refused=refused), files

    def _preview(self, record: ConceptRecord) -> bytes:
        """Return the first sample picture as a PNG, or the whole sample grid where it cannot be found in it; empty if
        the run keeps none."""
        try:
            sheet = Image.open(io.BytesIO(self.source.get(record.result.grid)))
        except FileNotFoundError:
            return b""
        labels = [fill(prompt, record.name_in_prompts) for prompt in self.grid.prompts_for(record.category)]
        picture = first_sample(sheet.convert("RGB"), len(record.images), labels, self.grid.images_per_prompt)
        picture.thumbnail((_MAX_PREVIEW_PX, _MAX_PREVIEW_PX))
        return to_png(picture)


def _objects(paths: Iterable[str]) -> set[str]:
    """Return the stored objects that an index's paths lie in: archives, and the files themselves."""
    return {f"{path.partition(_IN_ARCHIVE)[0]}.zip" if _IN_ARCHIVE in path else path for path in paths}


def _check_archive(path: Path, wanted: Mapping[str, str]) -> None:
    """Raise OSError unless an archive holds exactly what was written to it."""
    with zipfile.ZipFile(path) as archive:
        found = {f"{path.name}/{name}": hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}
    if found != {name: digest for name, digest in wanted.items() if name.startswith(f"{path.name}/")}:
        raise OSError(f"{path.name} does not read back as it was written")
