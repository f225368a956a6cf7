"""How a command that only reads an output answers: for a person or as JSON, or with what is in its way."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from pipeline.redact import redact
from pipeline.s3 import is_clients
from pipeline.storage import RunStore

OK, USAGE = 0, 2

Found = TypeVar("Found", bound=Any)


def answer(
    output: str, find: Callable[[RunStore], Found], describe: Callable[[Found], Iterable[str]], *, as_json: bool
) -> int:
    """Print what `find` makes of an output, a dataclass, and return the exit code; its ValueErrors and whatever a store
    raises are told in a line."""
    try:
        found = find(RunStore(output))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {redact(str(error)) or type(error).__name__}\n")
        return USAGE
    except Exception as error:
        if not is_clients(error):
            raise
        sys.stderr.write(f"error: {redact(f'{output} cannot be reached: {error}')}\n")
        return USAGE
    text = json.dumps(dataclasses.asdict(found), indent=1) if as_json else "\n".join(describe(found))
    sys.stdout.write(redact(text) + "\n")
    return OK
