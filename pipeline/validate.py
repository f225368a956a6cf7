"""`python -m pipeline.validate MANIFEST [--photos]`: check a job's input before paying for the job.

The same as `python -m pipeline.run MANIFEST --dry-run`, with the same options: it writes nothing and needs no GPU, no
torch and no Ray. With `--photos`, every photo and mask of the concepts to learn is fetched and opened.
"""

from __future__ import annotations

import sys

from pipeline.report.logs import configure_logs
from pipeline.run import parse, start


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return 0 if nothing would fail, 1 if something would, 4 if that is tolerated, 2 if the job
    cannot begin."""
    configure_logs()
    options = parse(arguments, "python -m pipeline.validate", __doc__)
    options.dry_run = True
    return start(options)


if __name__ == "__main__":
    sys.exit(main())
