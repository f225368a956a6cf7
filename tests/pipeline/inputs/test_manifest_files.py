"""Partitioned manifests: folders that name columns."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.inputs import manifest_files
from pipeline.inputs.manifest import BadRow, ManifestRow, concept_ids, count_rows, read_by_priority, read_manifest
from pipeline.inputs.manifest_files import list_folders_once, partitions


def put(root: Path, path: str, **columns: list[object]) -> str:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"concept_id": [Path(path).stem], "images": [["/a.png"]], **columns}), root / path)
    return str(root)


def test_folders_name_columns(tmp_path: Path) -> None:
    put(tmp_path, "category=style/num_vectors=4/region=a%20b%2Fc/first.parquet")
    uri = put(tmp_path, "category=object/num_vectors=__HIVE_DEFAULT_PARTITION__/region=007/second.parquet", sku=[1])
    second, first = read_manifest(uri)
    assert isinstance(first, ManifestRow)
    assert (first.concept.category, first.concept.num_vectors, first.carried) == ("style", 4, {"region": "a b/c"})
    assert isinstance(second, ManifestRow)
    assert (second.concept.category, second.concept.num_vectors) == ("object", 1)
    assert second.carried == {"sku": 1, "region": "007"}, "a value is text, as it is written"
    assert count_rows(uri) == 2


def test_a_file_named_outright_has_the_columns_of_its_folders(tmp_path: Path) -> None:
    put(tmp_path, "category=style/a.parquet")
    for uri in (tmp_path / "category=style/a.parquet", tmp_path / "category=style", tmp_path / "category=*/*.parquet"):
        (row,) = read_manifest(str(uri))
        assert isinstance(row, ManifestRow)
        assert row.concept.category == "style"


def test_ids_and_priorities_may_be_folders(tmp_path: Path) -> None:
    for name, priority in (("a", "0"), ("b", "5"), ("c", "high")):
        folder = tmp_path / f"concept_id={name}/priority={priority}"
        folder.mkdir(parents=True)
        pq.write_table(pa.table({"images": [["/a.png"]]}), folder / "m.parquet")
    assert list(concept_ids(str(tmp_path))) == ["a", "b", "c"]
    first, second, third = read_by_priority(str(tmp_path))
    assert isinstance(first, ManifestRow)
    assert isinstance(third, ManifestRow)
    assert (first.concept.concept_id, first.priority, third.concept.concept_id) == ("b", 5, "a")
    assert isinstance(second, BadRow)
    assert second.reason == "priority is 'high'; it must be a whole number"


def test_a_column_in_file_and_folder_is_refused(tmp_path: Path) -> None:
    uri = put(tmp_path, "category=style/a.parquet", category=["object"])
    with pytest.raises(ValueError, match=r"a\.parquet: it has two columns of the name 'category'"):
        next(read_manifest(uri))
    uri = put(tmp_path / "captions=x", "captions=x/a.parquet")
    with pytest.raises(ValueError, match="column 'captions' is string; it must be a list of strings"):
        next(read_manifest(uri))


def test_a_signed_web_address_names_no_columns() -> None:
    assert partitions("https://host/a/m.parquet?X-Amz-Credential=key/2026/s3") == {}
    assert list(partitions("s3://bucket/day=2026-11-27/m.parquet")) == ["day"]


def test_a_folder_of_photos_is_listed_once_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it is read: a photo that comes meanwhile belongs to the next run."""
    listed: list[str] = []
    list_folder = manifest_files.files_of_folder

    def counting(uri: str) -> list[str] | None:
        listed.append(uri)
        return list_folder(uri)

    monkeypatch.setattr(manifest_files, "files_of_folder", counting)
    (tmp_path / "mug").mkdir()
    (tmp_path / "mug/1.png").touch()

    def ids() -> list[str]:
        assert count_rows(str(tmp_path)) == len(list(read_by_priority(str(tmp_path))))
        return list(concept_ids(str(tmp_path)))

    with list_folders_once():
        assert ids() == ["mug"]
        (tmp_path / "cup").mkdir()
        (tmp_path / "cup/1.png").touch()
        assert ids() == ["mug"]
    assert listed == [str(tmp_path)]
    assert ids() == ["cup", "mug"]
