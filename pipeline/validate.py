"""`python -m pipeline.validate PHOTOS [--photos]`: check a job's input before paying for the job.

The same as `python -m pipeline.run PHOTOS --dry-run`, with the same options: it writes nothing and needs no GPU, no
torch and no Ray. With `--photos`, every photo and mask of the concepts to learn is fetched and opened.
"""

from __future__ import annotations

import sys

from pipeline.report.logs import configure_logs
from pipeline.run import parse, start


def main(arguments: list[str] | None = None, prog: str = "python -m pipeline.validate") -> int:
    """Run the command; return 0 if nothing would fail, 1 if something would, 4 if that is tolerated, 2 if the job
    cannot begin."""
    configure_logs()
    return start(parse(arguments, prog, __doc__, is_dry=True))


if __name__ == "__main__":
    sys.exit(main())
