"""All commands under one name."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.__main__ import COMMANDS, main
from pipeline.exit_codes import USAGE

PIPELINE = Path(__file__).resolve().parents[2] / "pipeline"


def usage(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return what a command prints for --help."""
    with pytest.raises(SystemExit, match="0"):
        main([*arguments, "--help"])
    return capsys.readouterr().out


def test_every_command_is_there() -> None:
    modules = {path.stem for path in PIPELINE.glob("*.py") if '"__main__"' in path.read_text()} - {"__main__"}
    assert {module for module, _ in COMMANDS.values()} == modules


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    text = usage(capsys)
    assert text.startswith("usage: ti [-h] COMMAND ...")
    assert all(f"  {name}  " in text for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_names_itself_as_it_was_called(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert usage(capsys, name).startswith(f"usage: ti {name} ")


def test_validate_describes_itself(capsys: pytest.CaptureFixture[str]) -> None:
    text = usage(capsys, "validate")
    assert "--dry-run" not in text.partition("options:")[2]
    assert "--photos              fetch and open every photo, too" in text


def test_arguments_and_exit_codes_are_the_commands_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "m.parquet", "--set", "inversion.stepz=3"]) == USAGE
    assert "did you mean inversion.steps" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["walk"])
    assert "invalid choice: 'walk'" in capsys.readouterr().err
