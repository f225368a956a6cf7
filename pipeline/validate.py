"""`python -m pipeline.validate MANIFEST [--photos]`: check a job's input before paying for the job.

The same as `python -m pipeline.run MANIFEST --dry-run`, with the same options: it writes nothing and needs no GPU, no
torch and no Ray. With `--photos`, every photo and mask of the concepts to learn is fetched and opened.
"""

from __future__ import annotations

import sys

from pipeline.run import main as run_main


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return 0 if nothing would fail, 1 if something would, 2 if the job cannot begin."""
    return run_main([*(sys.argv[1:] if arguments is None else arguments), "--dry-run"])


if __name__ == "__main__":
    sys.exit(main())
