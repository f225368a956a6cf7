"""`python -m pipeline.validate MANIFEST [--photos]`: what is wrong with a job's input, before it is paid for.

The same as `python -m pipeline.run MANIFEST --dry-run`, and takes the same options: writes nothing, needs no GPU, no
torch and no Ray. With `--photos` every photo and mask of what is to be learned is fetched and opened.
"""

from __future__ import annotations

import sys

from pipeline.run import main as run_main


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0 if nothing would fail, 1 if something would, 2 if the job cannot begin."""
    return run_main([*(sys.argv[1:] if arguments is None else arguments), "--dry-run"])


if __name__ == "__main__":
    sys.exit(main())
