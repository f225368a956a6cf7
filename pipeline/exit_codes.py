"""Exit codes of the commands."""

OK = 0
FAILED = 1
"""A concept, a row or a picture failed."""
USAGE = 2
"""The command cannot do what it was asked to; nothing was begun."""
TOLERATED = 4
"""Something failed, and no more than `tolerance.failures` allows; `tolerance.exit_code` gives another code."""
BUG = 70
"""A mistake in this software ended the command; the traceback is on stderr."""
STOPPED = 75
"""A signal ended the run, or its storage failed; the same command continues it."""
LATE = 76
"""`--finish-by` ended the run; the same command continues it."""

MEANINGS = {
    OK: "all is done",
    FAILED: "something failed",
    USAGE: "the command could not begin",
    TOLERATED: "something failed, within the tolerance",
    BUG: "a mistake in this software ended it",
    STOPPED: "stopped before the end; the same command continues it",
    LATE: "ended at --finish-by; the same command continues it",
}
"""Exit code -> its meaning, in a few words."""
