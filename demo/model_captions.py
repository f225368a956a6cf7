"""Write the captions of the demo world that knowledge preservation holds a text encoder to: `demo/model/captions.txt`.

    python -m demo.model_captions

They are captions of random scenes of the taught objects; no picture is drawn. To be run again with every new model: the
captions must be of the version of the world that the model was trained in.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from demo.objects import TRAINING
from demo.world import caption, sample_scene

FILE = Path(__file__).resolve().parent / "model" / "captions.txt"


def sample_captions(count: int, seed: int) -> tuple[str, ...]:
    """Return that many different captions of at least two words, in the order in which they are drawn."""
    rng = np.random.default_rng(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        text = caption(sample_scene(TRAINING, rng), rng)
        if len(text.split()) > 1:
            found[text] = None
    return tuple(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=450)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--file", type=Path, default=FILE)
    options = parser.parse_args()
    options.file.write_text("".join(f"{text}\n" for text in sample_captions(options.count, options.seed)))
    sys.stdout.write(f"{options.count} captions in {options.file}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
