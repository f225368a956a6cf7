"""The benchmark of a million concepts on some dozens; its store answers as S3 does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import scale
from benchmarks.made_up_store import MadeUpStore, concept_id


@pytest.fixture
def store(tmp_path: Path) -> MadeUpStore:
    """Seven concepts of three objects."""
    (tmp_path / "fingerprints").write_text("".join(f"{number:032x}" for number in range(7)))
    (tmp_path / "tags").write_bytes(bytes(range(7 * 16)))
    np.arange(7, dtype=np.int64).tofile(tmp_path / "sizes")
    found = MadeUpStore(tmp_path, {"grid.png": b"grid", "curve.parquet": b"curve"})
    found.open()
    return found


def test_objects_of_a_made_up_store_are_listed_in_order_and_from_any_place(store: MadeUpStore) -> None:
    everything, is_cut = store.list("out/concepts/", "", 100)
    keys = [key for key, _, _ in everything]
    assert len(keys) == 21
    assert keys == sorted(keys)
    assert not is_cut
    assert everything[5] == (f"out/concepts/{concept_id(1)}/{1:032x}/record.json", bytes(range(16, 32)).hex(), 1)
    assert store.list("out/concepts/", keys[3], 5) == (everything[4:9], True)
    assert store.list("out/concepts/concept-0000006", "", 5) == (everything[18:], False)
    assert store.list("out/concepts/", "out/concepts/concept-0000005\U0010ffff", 1) == (everything[18:19], True)
    store.put |= {"out/records/b": b"2", "out/records/a": b"1"}
    assert [key for key, _, _ in store.list("out/records/", "", 9)[0]] == ["out/records/a", "out/records/b"]


@pytest.mark.slow
def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert scale.main(["--concepts", "60"]) == 0
    said = capsys.readouterr().out
    for words in ("records copied as they end", "plan, nothing done", "list 300 objects", "resume, all done", "report"):
        assert words in said
    assert "plan of 600 bulk pictures" in said
    assert "metadata and plan of 600 bulk pictures" in said
