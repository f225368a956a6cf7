"""`python -m tests.faults.fuzz --cases N --seed S`: damage everything that a run reads, and check every outcome.

The cases are shared out among the areas. Each case must end in a documented outcome, within 60 seconds and 2 GiB of
memory. The same seed gives the same cases. Failures are printed once for each kind, with a case that fails so; the exit
code is 1 if there is any.
"""

from __future__ import annotations

import argparse
import logging
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path

from tests.faults.fuzz.artefacts import artefact_area
from tests.faults.fuzz.campaign import Area, Bounds, run_area
from tests.faults.fuzz.embeddings import embedding_area
from tests.faults.fuzz.manifests import manifest_area
from tests.faults.fuzz.models import model_area
from tests.faults.fuzz.outcomes import note
from tests.faults.fuzz.photos import photo_area
from tests.faults.fuzz.prompts import prompt_area
from tests.original_layout import save_in_one_file
from tests.tiny_flux import tiny_flux
from tests.tiny_models import tiny_latent_diffusion, tiny_stable_diffusion
from tests.tiny_sd3 import tiny_stable_diffusion_3
from tests.tiny_sdxl import tiny_stable_diffusion_xl

BOUNDS = Bounds(seconds=60.0, mebibytes=2048)
_ADDRESS_SPACE_BYTES = 24 * 2**30
"""Address space of the process: what asks for more gets a MemoryError, and does not harm the machine."""

SHARES = {"photos": 40, "manifests": 15, "prompts": 15, "models": 12, "artefacts": 12, "embeddings": 6}
"""Share of the cases in per cent, by area."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=10_000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--area", choices=SHARES, action="append", help="these areas alone; may be repeated")
    parser.add_argument("--shrink", action="store_true", help="make failing cases small, which takes minutes for each")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE_BYTES, _ADDRESS_SPACE_BYTES))
    chosen = {name: share for name, share in SHARES.items() if not options.area or name in options.area}
    began, findings, cases = time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory() as name:
        for area in _areas(Path(name), set(chosen)):
            num_cases = max(1, options.cases * chosen[area.name] // sum(chosen.values()))
            report = run_area(area, num_cases, options.seed, BOUNDS, shrinks=options.shrink)
            note(report.line())
            for kind, case in report.findings.items():
                note(f"FOUND {area.name}: {kind}\n{case}")
            findings += len(report.findings)
            cases += report.num_cases
    note(f"{cases:,} cases with seed {options.seed} in {time.monotonic() - began:.0f} s: {findings} kinds of failure")
    return 1 if findings else 0


def _areas(folder: Path, names: set[str]) -> list[Area]:
    """Make the areas, each in a folder of its own."""
    for name in SHARES:
        (folder / name).mkdir()
    model = tiny_stable_diffusion(folder / "sd")
    makers = {
        "photos": lambda: photo_area(folder / "photos"),
        "manifests": lambda: manifest_area(folder / "manifests", model),
        "prompts": lambda: prompt_area(folder / "prompts", model),
        "models": lambda: model_area(folder / "models", _models(folder, model), loads=True),
        "artefacts": lambda: artefact_area(folder / "artefacts", model),
        "embeddings": embedding_area,
    }
    return [make() for name, make in makers.items() if name in names]


def _models(folder: Path, model: Path) -> dict[str, Path]:
    """Return a tiny model of each family, and one in a single file, by name."""
    return {
        "sd": model,
        "single file": save_in_one_file(model, folder / "one.safetensors"),
        "ldm": tiny_latent_diffusion(folder / "ldm"),
        "sdxl": tiny_stable_diffusion_xl(folder / "sdxl"),
        "sd3": tiny_stable_diffusion_3(folder / "sd3"),
        "flux": tiny_flux(folder / "flux"),
    }


if __name__ == "__main__":
    sys.exit(main())
