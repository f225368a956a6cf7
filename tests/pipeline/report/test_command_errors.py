"""Every command ends with one line and a code that tells what to do, whatever is wrong with its output."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import evaluate, explain, export, run, status, use, validate
from pipeline.exit_codes import BUG, OK, STOPPED, USAGE
from pipeline.report.command_errors import exit_code_of
from pipeline.store import disk
from pipeline.store.errors import ClusterLost


def raising(error: BaseException) -> Callable[[], int]:
    def command() -> int:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("steps = 0"), USAGE, "error: steps = 0\n"),
        (ValueError("column 'a\x1b[2J\n\x0f'"), USAGE, "error: column 'a\\x1b[2J \\x0f'\n"),
        (ValueError("x" * 100_000), USAGE, f"error: {'x' * 4000}... (100,000 characters)\n"),
        (ImportError("Please install gcsfs"), USAGE, "error: a package is missing: Please install gcsfs\n"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), STOPPED, "error: /x: No space left on device;"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), USAGE, "error: /x: Permission denied; there"),
        (ClusterLost("no node lives"), STOPPED, "error: no node lives; run the same command again to continue\n"),
        (KeyboardInterrupt(), STOPPED, "interrupted; run the same command again to continue\n"),
    ],
)  # fmt: skip
def test_an_error_is_one_line(error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(raising(error)) == code
    printed = capsys.readouterr().err
    assert printed.startswith(said)
    assert printed.count("\n") == 1


def test_a_mistake_in_the_code_has_a_traceback_and_a_code_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(raising(KeyError("s3://key:pw@bucket/x"))) == BUG
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback")
    assert printed.splitlines()[-1].startswith("error: bug in this software")
    assert "pw@" not in printed
    assert exit_code_of(lambda: OK) == OK


@pytest.fixture
def manifest(tmp_path: Path) -> str:
    path = tmp_path / "m.parquet"
    pq.write_table(pa.table({"concept_id": ["a"], "images": [[str(tmp_path / "a.png")]]}), path)
    return str(path)


def commands(output: str, manifest: str) -> dict[str, Callable[[], int]]:
    elsewhere = str(Path(manifest).parent / "elsewhere")
    return {
        "run": lambda: run.main([manifest, "--output", output]),
        "validate": lambda: validate.main([manifest, "--output", output]),
        "evaluate": lambda: evaluate.main([output]),
        "status": lambda: status.main([output]),
        "explain": lambda: explain.main([output, "a"]),
        "export": lambda: export.main([output, "--for", "webui", "--to", elsewhere]),
        "use": lambda: use.main(["draw", "a <x>", "--learned", output, "--output", elsewhere]),
    }


@pytest.mark.parametrize("command", ["run", "validate", "evaluate", "status", "explain", "export", "use"])
def test_a_missing_client_is_named(
    command: str, manifest: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(_: str) -> None:
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec.core, "get_filesystem_class", missing)
    assert commands("gs://bucket/out", manifest)[command]() == USAGE
    assert "error: a package is missing: Please install gcsfs" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["status", "explain", "export", "use"])
@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_file_where_a_run_should_be_is_no_run(
    command: str, place: str, manifest: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    assert commands(str(tmp_path / place), manifest)[command]() == USAGE
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (errno.ENOTDIR, USAGE, "a file lies where a folder must be"),
        (errno.EROFS, USAGE, "the file system is read-only"),
        (errno.EACCES, USAGE, "there is no right"),
        (errno.ENOSPC, STOPPED, "the disk is full"),
    ],
)
def test_a_run_whose_output_cannot_be_written(
    number: int, code: int, said: str, manifest: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fail(path: Path, _: bytes) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(disk, "put", fail)
    assert run.main([manifest, "--output", str(tmp_path / "out")]) == code
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_a_run_into_a_file(manifest: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    for place in ("file", "file/below"):
        for command in (run.main, validate.main):
            assert command([manifest, "--output", str(tmp_path / place)]) == USAGE
            assert "a file lies where a folder must be" in capsys.readouterr().err


def test_a_dry_run_finds_that_there_is_no_right(
    manifest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert validate.main([manifest, "--output", str(tmp_path / "out" / "below")]) == USAGE
    assert "Permission denied; there is no right" in capsys.readouterr().err
