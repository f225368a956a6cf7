"""Errors that end a command: the line it prints, and its exit code."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

from pipeline.exit_codes import BUG, STOPPED, USAGE
from pipeline.store.errors import ClusterLost, describe_bug, one_line
from pipeline.store.redact import redact
from pipeline.store.trouble import describe_trouble, is_lasting, is_of_store


def exit_code_of(command: Callable[[], int]) -> int:
    """Call a command and return its exit code; an exception becomes one line on stderr and a code.

    Exception                                                       | Code
    --------------------------------------------------------------- | -------
    ValueError: a wrong option, setting or input                    | USAGE
    a store's error that lasts: a file in the output's place,       | USAGE
    no right, no bucket, another region, a package that is missing  |
    a store's error that may pass: a full disk, no answer           | STOPPED
    ClusterLost: Ray does not start, or brings no actor             | STOPPED
    KeyboardInterrupt                                               | STOPPED
    any other: a mistake in this software; with the traceback       | BUG
    """
    try:
        return command()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run the same command again to continue\n")
        return STOPPED
    except ValueError as error:
        sys.stderr.write(f"error: {one_line(str(error))}\n")
        return USAGE
    except ClusterLost as error:
        sys.stderr.write(f"error: {one_line(str(error))}; run the same command again to continue\n")
        return STOPPED
    except Exception as error:
        if is_of_store(error):
            sys.stderr.write(f"error: {one_line(describe_trouble(error))}\n")
            return USAGE if is_lasting(error) else STOPPED
        sys.stderr.write(redact(f"{traceback.format_exc()}error: {describe_bug(error)}\n"))
        return BUG
