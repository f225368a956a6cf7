"""What torch.compile made, kept from one process for the next."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.actor import compile_cache
from pipeline.actor.compile_cache import _Counts, file_name, kept_compilations
from pipeline.store.storage import RunStore

ROOT = Path(__file__).resolve().parents[3]

COMPILE = """
import logging, sys
import torch
from pipeline.actor.compile_cache import kept_compilations
from textual_inversion.compiled import Compiled

logging.basicConfig(level=logging.INFO, format="%(message)s")
torch.manual_seed(0)

class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 8))

    def forward(self, x):
        return (self.layers(x),)

inputs = torch.randn(4, 8, requires_grad=True)
with kept_compilations(sys.argv[1], "a.torchcache"):
    (outputs,) = Compiled(Network())(inputs)
    outputs.square().sum().backward()
print(inputs.grad.sum().item())
"""


@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    """Each has a cache folder of torch's own, as on two nodes."""

    def run(node: str) -> tuple[str, str]:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / node)}
        command = [sys.executable, "-c", COMPILE, str(tmp_path / "kept")]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False
        )
        assert done.returncode == 0, done.stderr
        [counted] = [line for line in done.stderr.splitlines() if "graphs compiled" in line]
        return done.stdout, counted

    first, second = run("one"), run("two")
    assert first[1].startswith("2 graphs compiled and 0 found in "), "a forward and a backward pass"
    assert second[1].startswith("0 graphs compiled and 2 found in ")
    assert first[0] == second[0]


@pytest.fixture
def torch_compiles(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Let torch seem to compile one graph in each block; return what it was given to load."""
    counts = iter(_Counts(compiled=number // 2, found=0) for number in range(1, 100))
    monkeypatch.setattr(_Counts, "now", lambda: next(counts))
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"made anew", None))
    loaded: list[bytes] = []
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", lambda data: loaded.append(data) or "loaded")
    return loaded


def test_without_a_folder_nothing_is_read_or_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise AssertionError("a store is asked for")

    monkeypatch.setattr(compile_cache, "RunStore", none)
    with kept_compilations("", "a"):
        pass


def test_a_torch_that_cannot_keep_anything_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(torch.compiler, "load_cache_artifacts")
    with caplog.at_level(logging.WARNING, "pipeline"), kept_compilations(str(tmp_path), "a"):
        pass
    assert "actors.compile_cache needs torch 2.7 or later" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_the_first_process_stores_and_the_next_loads(tmp_path: Path, torch_compiles: list[bytes]) -> None:
    with kept_compilations(str(tmp_path), "here/a"):
        assert torch_compiles == []
    assert (tmp_path / "here/a").read_bytes() == b"made anew"
    with kept_compilations(str(tmp_path), "here/a"):
        assert torch_compiles == [b"made anew"]


def test_a_file_that_another_process_stored_meanwhile_stays(tmp_path: Path, torch_compiles: list[bytes]) -> None:
    with kept_compilations(str(tmp_path), "a"):
        (tmp_path / "a").write_bytes(b"of another")
    assert (tmp_path / "a").read_bytes() == b"of another"
    assert torch_compiles == []


def test_a_file_without_some_of_what_is_compiled_is_replaced(tmp_path: Path, torch_compiles: list[bytes]) -> None:
    (tmp_path / "a").write_bytes(b"of older code")
    with kept_compilations(str(tmp_path), "a"):
        assert torch_compiles == [b"of older code"]
    assert (tmp_path / "a").read_bytes() == b"made anew"


def test_what_fails_to_compile_is_not_kept(tmp_path: Path, torch_compiles: list[bytes]) -> None:
    with pytest.raises(RuntimeError, match="no compiler"), kept_compilations(str(tmp_path), "a"):
        raise RuntimeError("no compiler")
    assert list(tmp_path.iterdir()) == torch_compiles == []


def test_a_damaged_file_costs_time_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By torch's own reader, which compares a checksum."""
    (tmp_path / "a").write_bytes(b"no cache of torch's")
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: None)
    with caplog.at_level(logging.WARNING, "pipeline"), kept_compilations(str(tmp_path), "a"):
        pass
    assert f"{RunStore(str(tmp_path)).uri('a')} is damaged, so all is compiled anew" in caplog.text


def test_a_store_that_fails_costs_time_alone(
    tmp_path: Path, torch_compiles: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    with caplog.at_level(logging.WARNING, "pipeline"), kept_compilations(str(tmp_path / "file"), "a"):
        pass
    assert "was not stored" in caplog.text
    assert torch_compiles == []


def test_a_name_tells_what_a_file_depends_on() -> None:
    cpu = torch.device("cpu")
    names = {file_name(cpu, model, mode) for model in ("one", "two") for mode in ("on", "graphs")}
    assert len(names) == 4
    assert names == {file_name(cpu, model, mode) for model in ("one", "two") for mode in ("on", "graphs")}
    version = torch.__version__.replace("+", "-")
    assert all(name.startswith(f"torch-{version}-cpu/") for name in names)
