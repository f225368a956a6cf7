"""Run every use of learned concepts on the demo world, as shown in the README: `python -m demo.examples`.

It learns the concepts of `manifests/examples.parquet` (or takes those an earlier call learned), runs each command of
`pipeline.use` on them, and puts the sheets and the measurements into `demo/examples/`. The same weights give the same
pictures.
"""

from __future__ import annotations

import argparse
import json
import shlex
import time
from pathlib import Path

from PIL import Image, ImageDraw

from demo.captions import TINTS
from demo.make_manifests import DIVERSE_CONCEPT, DIVERSE_WORD, PENCIL_CONCEPT, SECOND_STYLE_CONCEPT, STYLE_CONCEPT
from demo.world import PICTURE_PX
from pipeline import run, use
from pipeline.exit_codes import OK

HERE = Path(__file__).parent
EDITED = HERE / "images/koala/2.png"
"""Picture to edit: a koala on a wooden table, which is kept."""
_QUALITY = 60
"""WebP quality of the committed sheets: a fifth of a PNG's bytes, with true colours, which a palette lost."""

# fmt: skip below: a command with its arguments reads better on one line
COMMANDS: dict[str, tuple[str, ...]] = {
    "variations": ("variations", "tiger", "-n6"),
    "draw": (
        "draw", "a photo of a <tiger> on the beach", "a <taxi> in the snow", "a pencil sketch of a <tomato>", "-n4",
    ),
    "style": ("style", PENCIL_CONCEPT, "cat", "house", "tiger", "-n4"),
    "unseen-style": ("style", STYLE_CONCEPT, "cat", "house", "-n4"),
    "second-unseen-style": ("style", SECOND_STYLE_CONCEPT, "cat", "house", "-n4"),
    "object-in-style": ("compose", "taxi", PENCIL_CONCEPT, "-n4"),
    "two-objects": ("compose", "tiger", "taxi", "-n4"),
    # little guidance: a high scale draws every picture towards the one that fits the word best
    "bias": (
        "bias", DIVERSE_WORD, DIVERSE_CONCEPT, "-n64", "--set=generation.sampling.guidance_scale=1.5",
        *(f"--caption=a photo of a {tint} {DIVERSE_WORD}" for tint in TINTS),
    ),
}  # fmt: skip
EDIT = ("a photo of a <tomato> on a wooden table", "a photo of a <tiger> on a wooden table", "-n4")


def draw_mask(path: Path) -> None:
    """Write a mask that is white where the koala is, with a margin."""
    mask = Image.new("L", (PICTURE_PX, PICTURE_PX))
    ImageDraw.Draw(mask).rounded_rectangle((5, 5, 58, 60), radius=10, fill=255)
    mask.save(path)


def shrink(sheet: Path, target: Path) -> None:
    """Write the sheet at a size to commit."""
    with Image.open(sheet) as picture:
        picture.save(target, quality=_QUALITY, method=6)


def main() -> None:
    """Learn the concepts, run the commands, and collect the sheets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("output/examples"), help="everything in full; may be deleted")
    parser.add_argument("--out", type=Path, default=HERE / "examples")
    parser.add_argument("--set", metavar="A.B=C", action="append", default=[], help="for learning, as in pipeline.run")
    options = parser.parse_args()
    learned = options.work / "run"
    settings = [
        "--set=gate.ladder=[]",
        *(f"--set={setting}" for setting in options.set),
    ]  # each concept is learned once
    if run.main([str(HERE.parent / "manifests/examples.parquet"), "--output", str(learned), *settings]) != OK:
        raise SystemExit("not all concepts were learned; see above")

    options.out.mkdir(parents=True, exist_ok=True)
    draw_mask(options.out / "mask.png")
    commands = COMMANDS | {"edit": ("edit", str(EDITED), str(options.out / "mask.png"), *EDIT)}
    figures: dict = {"learning": options.set, "commands": {}}
    for name, arguments in commands.items():
        output = options.work / name
        start_s = time.monotonic()
        if use.main([*arguments, "--learned", str(learned), "--output", str(output), "--overwrite"]) != use.OK:
            raise SystemExit(f"{name} failed; see above")
        shrink(output / "sheet.png", options.out / f"{name}.webp")
        listed = json.loads((output / "pictures.json").read_text())
        figures["model_hash"] = listed["model_hash"]
        shown = shlex.join(str(argument).removeprefix(f"{HERE.parent}/") for argument in arguments)
        figures["commands"][name] = {"command": shown, "seconds": round(time.monotonic() - start_s, 1)}
        if "shift" in listed:
            figures["shift"] = listed["shift"]
    (options.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
