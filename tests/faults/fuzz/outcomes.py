"""The outcomes that the documentation allows, and the check that a command or a message is one of them."""

from __future__ import annotations

import io
import sys
import traceback
from collections.abc import Callable, Collection
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from pipeline.report.command_errors import exit_code_of

ROOT = Path(__file__).resolve().parents[3]

MAX_LINE_CHARACTERS = 6000
"""Longest line that a command may print: an address may have 4,000 characters, and a reason 1,000."""


class Undocumented(AssertionError):
    """Raised for an outcome that no page documents; the text says which one, and after a colon more of this case."""


@dataclass(frozen=True, slots=True)
class Said:
    """The exit code of a command and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def outcome(self) -> str:
        return f"exit {self.code}"

    @property
    def lines(self) -> list[str]:
        """Lines of its standard output."""
        return self.out.split("\n")


def run_command(command: Callable[[], int], codes: Collection[int]) -> Said:
    """Run a command in this process as its module does, and return what it said.

    Raises Undocumented for another exit code than `codes`, a traceback, a text that blames this software, anything that
    a terminal cannot print, and for a code 2 without exactly one line that begins with `error: `.
    """
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="")
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace", newline="")
    with redirect_stdout(out), redirect_stderr(err):
        code = exit_code_of(command)
    said = Said(code, *(_content(stream) for stream in (out, err)))
    both = said.out + said.err
    if "bug in this software" in both or "Traceback" in both:
        raise Undocumented(f"exit {code}: {_last_lines(both)}")
    if code not in codes:
        raise Undocumented(f"exit {code}, expected one of {sorted(codes)}: {_last_lines(both)}")
    for line in said.lines:
        check_line(line)
    errors = [line for line in said.err.split("\n") if line.startswith("error: ")]
    if code == 2 and len(errors) != 1:
        raise Undocumented(f"exit 2 without one line of error: {len(errors)}; {_last_lines(said.err)}")
    for line in errors:
        check_line(line)
    return said


def check_line(text: str) -> None:
    """Raise Undocumented for a text that is more than a line, or that a terminal would not print as it is."""
    if not text.isprintable():
        raise Undocumented(f"it cannot be printed as it is: {text!r}"[:500])
    if len(text) > MAX_LINE_CHARACTERS:
        raise Undocumented(f"a line is too long: {len(text):,} characters, {text[:300]}")


def refusal_of(refuse: Callable[[], object], error: type[Exception] = ValueError) -> str:
    """Call a function; return the text of the error by which it refuses its input, or "" if it does not.

    Raises Undocumented for a text that is no printable line, and passes on all other errors.
    """
    try:
        refuse()
    except error as refusal:
        check_line(str(refusal))
        if not str(refusal).strip():
            raise Undocumented(f"{type(refusal).__name__} without a text") from refusal
        return str(refusal)
    return ""


def kind_of(error: BaseException) -> str:
    """Return the kind of an error, the same for every case that fails alike: its type and the place in our source."""
    if isinstance(error, Undocumented):
        return f"Undocumented: {str(error).partition(':')[0]}"
    place = "unknown place"
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT / "pipeline") or path.is_relative_to(ROOT / "textual_inversion"):
            place = f"{path.relative_to(ROOT)}:{frame.lineno}"
    return f"{type(error).__name__} in {place}"


def _content(stream: io.TextIOWrapper) -> str:
    stream.flush()
    buffer = stream.buffer
    assert isinstance(buffer, io.BytesIO)
    return buffer.getvalue().decode()


def _last_lines(text: str) -> str:
    return " | ".join(text.strip().splitlines()[-3:])[-700:]


def note(text: str) -> None:
    """Write a line of the command."""
    sys.stdout.write(text.encode(errors="backslashreplace").decode() + "\n")
    sys.stdout.flush()
