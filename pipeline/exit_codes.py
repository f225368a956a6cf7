"""Exit codes of the commands, as README lists them."""

OK = 0
FAILED = 1
"""A concept, a row or a picture failed."""
USAGE = 2
"""The command cannot do what it was asked; nothing was begun."""
STOPPED = 75
"""A signal ended the run; the same command goes on."""
LATE = 76
"""`--finish-by` ended the run; the same command goes on."""
