"""Measure what each part of TextBoost adds and costs: its parts switched on and off, from one photo.

    python -m benchmarks.ablation --seeds 0 1 2 --jobs 2
    python -m benchmarks.ablation --recipe textboost-v2 --photos 1 --concepts 16
    python -m benchmarks.ablation --recipe textboost-v2 --setups whole without-norm-control --against 200x1

A part is a set of settings that switch it off; `PARTS` lists them. Parts that the recipe does not use are left out. The
setups are the whole recipe, the recipe without each part, the recipe with each part alone, the recipe without any part
(its budget is left), and the setups of `--against` (by default plain inversion with the project's settings) from the
same photos. After the tables of `benchmarks.methods`, with the whole recipe as the baseline, `ablation.md` has two
lines for each part: the recipe less the recipe without it, and the part alone less the bare recipe, concept by concept
with 95 % intervals (knowledge preservation, clipping and cross-attention adapters alone: with the adapter, less the
adapter alone). A part that adds nothing in either line is idle; one whose two lines differ acts through the others.
Lines for which `--setups` left out a setup are empty.

Every setup of a recipe with a class cue is drawn as it learned: with the noun where the cue is on, without where it is
off. Time: as `benchmarks.methods`, about half a minute of one core for each setup, seed and concept of the demo model;
19 setups of the first recipe.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks.intervals import Row, against, signed
from benchmarks.methods import add_options, measure_setups, report, split
from benchmarks.scores import score_names
from benchmarks.setups import Setup, find, settings_of
from benchmarks.timing import say, table
from pipeline.store.addresses import absolute
from pipeline.store.storage import RunStore
from textual_inversion.adapter_config import CROSS_ATTENTION

WHOLE = "whole"
BARE = "bare"
PLAIN = "textual-inversion"


@dataclass(frozen=True, slots=True)
class Part:
    """Part of a method that can be switched off."""

    title: str
    off: tuple[str, ...]
    """Settings of the section `inversion` without the part."""


PARTS = {
    "paired-augmentation": Part("paired augmentation with its tokens", ("augment.paired=0",)),
    "crops": Part("weak crops", ("augment.crops=0",)),
    "class-cue": Part("class noun behind the word", ("class_cue=false",)),
    "knowledge": Part("knowledge preservation", ("penalties.knowledge=0.0",)),
    "snr-timesteps": Part("noisy timesteps more often", ("timesteps.sampler=uniform",)),
    "adapter": Part(
        "adapter, with its knowledge preservation",
        ("adapter.kind=none", "penalties.knowledge=0.0"),
    ),
    "norm-control": Part("bound on the row's norm", ("norm_control=none", "norm_cap=0.0")),
    "clipping": Part("clipped gradients of the adapter", ("max_grad_norm=0.0", "adapter.max_grad_norm=0.0")),
    "weight-decay": Part("weight decay", ("weight_decay=0.0", "adapter.weight_decay=0.0")),
    "rate": Part("row's rate, other than the default's", ("learning_rate=5e-3",)),
    "rate-decay": Part("falling rate of the row", ("learning_rate_schedule=constant",)),
    "templates": Part("templates of its own", ("templates=textual_inversion",)),
}
"""Name -> part."""
CROSS_ATTENTION_PART = "cross-attention"
"""Part of the recipes whose adapter has the target `cross_attention`; without it, the other targets stay."""
ADAPTER = "adapter"
WITHIN_ADAPTER = ("knowledge", "clipping", CROSS_ATTENTION_PART)
"""Parts that need the adapter; alone, they are compared with the adapter alone."""


def main(arguments: list[str] | None = None) -> int:
    """Measure all setups, and print the tables; return 1 if a row failed."""
    options = parse(arguments)
    parts = used_parts(options.recipe)
    others = split(options.against)
    setups = make_setups(options.recipe, parts, options.photos, others)
    setups = {name: setups[name] for name in split(options.setups) or setups}
    rows, failures = measure_setups(options, setups)
    if rows:
        store = RunStore(absolute(options.output))
        text = report(store, rows, setups, baseline=WHOLE if WHOLE in setups else next(iter(setups)))
        added = show_parts(rows, parts, others)
        store.put("ablation.md", added.encode())
        say(f"\n{text}\n{added}\n{store.uri('ablation.md')}, table.md, plot.png, rows.parquet\n")
    return 1 if failures else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ablation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", default="textboost-v1")
    parser.add_argument(
        "--setups", nargs="+", default=[], metavar="NAME", help="some of whole, bare, without-PART, ..."
    )
    parser.add_argument(
        "--against", nargs="+", default=[PLAIN], metavar="NAME", help="setups that the whole is held to"
    )
    parser.add_argument("--photos", type=int, default=1, help="photos to learn from, the first ones")
    add_options(parser, output="output/ablation")
    return parser.parse_args(arguments)


def used_parts(recipe: str) -> dict[str, Part]:
    """Return the parts that switching off changes in this recipe."""
    whole = Setup(what="", recipe=recipe).inversion(1000, ())
    parts = dict(PARTS)
    others = [target for target in whole.adapter.targets if target != CROSS_ATTENTION]
    if others and len(others) < len(whole.adapter.targets):
        kept = "[" + ", ".join(f'"{target}"' for target in others) + "]"
        parts[CROSS_ATTENTION_PART] = Part("adapters in the cross-attention", (f"adapter.targets={kept}",))
    return {
        name: part
        for name, part in parts.items()
        if Setup(what="", recipe=recipe, settings=settings_of(*part.off)).inversion(1000, ()) != whole
    }


def make_setups(recipe: str, parts: Mapping[str, Part], num_photos: int, others: Sequence[str]) -> dict[str, Setup]:
    """Return name -> setup: those of `setups.py` that `others` names, the recipe without any part, with all, without
    each and with each alone."""
    whole = Setup(what=f"recipe {recipe}", recipe=recipe, num_photos=num_photos)

    def without(what: str, names: Sequence[str]) -> Setup:
        off = dict.fromkeys(setting for name in names for setting in parts[name].off)
        return replace(whole, what=what, settings=settings_of(*off))

    setups = {name: replace(find(name), num_photos=num_photos) for name in others} | {
        BARE: without(f"recipe {recipe} without any part", list(parts)),
        WHOLE: whole,
    }
    setups |= {f"without-{name}": without(f"without {part.title}", [name]) for name, part in parts.items()}
    for name, part in parts.items():
        needed = {name, ADAPTER} if name in WITHIN_ADAPTER else {name}
        setups[f"only-{name}"] = without(f"{part.title} alone", [other for other in parts if other not in needed])
    return setups


def show_parts(rows: Sequence[Row], parts: Mapping[str, Part], others: Sequence[str]) -> str:
    """Return a Markdown table: the difference that each part makes to each score, within the whole and alone, and that
    between the whole and each of `others`."""
    scores = score_names(rows)
    lines: list[list[object]] = []
    for name, part in parts.items():
        is_within = name in WITHIN_ADAPTER
        alone = f"only-{ADAPTER}" if is_within else BARE
        title = "with the adapter alone" if is_within else "alone"
        pairs = ((WHOLE, f"without-{name}", "in the whole recipe"), (f"only-{name}", alone, title))
        for first, second, title in pairs:
            cells = [signed(against(rows, score, second).get(first)) for score in scores]
            lines.append([part.title, title, *cells])
    lines += [
        [title, "", *(signed(against(rows, score, second).get(first)) for score in scores)]
        for title, first, second in (
            ("all parts together", WHOLE, BARE),
            *((f"the whole recipe less {other}", WHOLE, other) for other in others),
        )
    ]
    return table(["what the part adds", "", *scores.values()], lines)


if __name__ == "__main__":
    sys.exit(main())
