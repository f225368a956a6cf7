"""Compare whole commands with diffusers' own training script: concepts an hour, and pictures from both programs' files.

    python -m benchmarks.peer --script textual_inversion.py --concepts 24 --jobs 2
    python -m benchmarks.peer --script textual_inversion.py --peers 500 1000 2000@5e-3 --recipes demo encoder-fast
    python -m benchmarks.peer --script textual_inversion.py --peers 12000 2000 --recipes defaults  # its README's budget

The script is `examples/textual_inversion/textual_inversion.py` of huggingface/diffusers, which the user fetches; it
needs accelerate and torchvision. It learns one concept a call, so that each call starts Python and loads the model;
`--jobs` calls run side by side, a torch thread each. `--peers` names samples, and after an @ the learning rate in place
of its README's (5e-4, scaled by the batch).

This project learns the same concepts from the same photos by one `python -m pipeline.run` a recipe: start of Ray,
sample grids, scores and report included, none of which the script makes. Times are of whole commands, from start to
end. One pipeline of diffusers then draws from both programs' `learned_embeds.safetensors`, with the same prompts, seeds
and sampler, and the pictures are scored as in `benchmarks.methods`. Setups that were learned before are not learned
again: delete the output to measure again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import StableDiffusionPipeline

from benchmarks.comparison import rows_parquet
from benchmarks.concepts import read_objects, read_photos
from benchmarks.intervals import Row, show_paired
from benchmarks.methods import add_inputs, configure, scoring_of, split
from benchmarks.scores import PictureScorer, score_names
from benchmarks.timing import heading, say, table
from pipeline.bulk.evaluation import evaluation_seeds
from pipeline.bulk.protocols import Protocol, choose_protocol
from pipeline.config import RunConfig
from pipeline.config_file import RECIPES, load_config
from pipeline.inputs.models import locate
from pipeline.store.parquet import read_table
from textual_inversion.concept import Concept
from textual_inversion.families.parts import SAMPLING_STEPS, drawing_defaults
from textual_inversion.families.sd import load_modules
from textual_inversion.families.unet import GUIDANCE_SCALE
from textual_inversion.grids import grid
from textual_inversion.model_files import find_model_files

DEFAULTS = "defaults"
"""Name of the run without a recipe."""
PEER_BATCH = 4
PEER_RATE = 5e-4
"""Learning rate of the script's README, there multiplied by the batch (`--scale_lr`)."""
_TAIL = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class Learned:
    """What a program made of all concepts."""

    seconds: float
    """Wall time from the start of its first process to the end of its last."""
    embeddings: Mapping[str, str]
    """Concept id -> path of its `learned_embeds.safetensors`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """The peer's script with one budget."""

    script: Path
    python: str
    model: Path
    samples: int
    rate: float | None
    """Learning rate that is not scaled; None for the README's."""
    resolution: int
    jobs: int

    @property
    def what(self) -> str:
        rate = f"{PEER_RATE:g}, scaled" if self.rate is None else f"{self.rate:g}"
        return f"diffusers' script, batch {PEER_BATCH}, rate {rate}"

    def learn(self, concepts: Sequence[Concept], seed: int, folder: Path) -> Learned:
        """Learn the concepts, `jobs` at a time. Raises RuntimeError if the script fails."""
        photos = [self._copy_photos(concept, folder) for concept in concepts]
        began = time.perf_counter()
        with ThreadPoolExecutor(self.jobs) as pool:
            paths = list(pool.map(partial(self._learn_one, seed, folder), concepts, photos))
        seconds = time.perf_counter() - began
        return Learned(
            seconds=seconds,
            embeddings={concept.concept_id: str(path) for concept, path in zip(concepts, paths, strict=True)},
        )

    def _copy_photos(self, concept: Concept, folder: Path) -> Path:
        """Put a concept's photos, and nothing else, in a folder, as the script takes them."""
        photos = folder / concept.concept_id / "photos"
        photos.mkdir(parents=True, exist_ok=True)
        for number, photo in enumerate(read_photos(concept)):
            photo.save(photos / f"{number}.png")
        return photos

    def _learn_one(self, seed: int, folder: Path, concept: Concept, photos: Path) -> Path:
        output = folder / concept.concept_id / "out"
        steps = self.samples // PEER_BATCH
        options: dict[str, object] = {
            "pretrained_model_name_or_path": self.model,
            "train_data_dir": photos,
            "placeholder_token": concept.placeholder_token,
            "initializer_token": concept.initializer,
            "learnable_property": "object",
            "resolution": self.resolution,
            "train_batch_size": PEER_BATCH,
            "max_train_steps": steps,
            "learning_rate": PEER_RATE if self.rate is None else self.rate,
            "save_steps": steps + 1,
            "checkpointing_steps": steps + 1,
            "mixed_precision": "no",
            "seed": seed,
            "output_dir": output,
        }
        scaled = ["--scale_lr"] if self.rate is None else []
        arguments = [f"--{name}={value}" for name, value in options.items()]
        command = [self.python, str(self.script), *arguments, *scaled]
        _run(command, os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
        return output / "learned_embeds.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ours:
    """A run of this project with one recipe, or with the defaults."""

    recipe: str
    """Name of the recipe, or `DEFAULTS`."""
    samples: int
    settings: tuple[str, ...]

    @property
    def what(self) -> str:
        return f"`python -m pipeline.run`, {f'recipe `{self.recipe}`' if self.recipe != DEFAULTS else DEFAULTS}"

    def learn(self, concepts: Sequence[Concept], seed: int, folder: Path) -> Learned:
        """Learn the concepts by one command. Raises RuntimeError if it fails."""
        folder.mkdir(parents=True, exist_ok=True)
        manifest, output = folder / "manifest.parquet", folder / "out"
        columns = {
            "concept_id": [each.concept_id for each in concepts],
            "images": [list(each.images) for each in concepts],
            "placeholder_token": [each.placeholder_token for each in concepts],
            "initializer": [each.initializer for each in concepts],
        }
        pq.write_table(pa.table(columns), manifest)
        settings = ["device=cpu", f"seed={seed}", *self.settings]
        command = [
            sys.executable,
            "-m",
            "pipeline.run",
            str(manifest),
            "--output",
            str(output),
            *(["--config", self.recipe] if self.recipe != DEFAULTS else []),
        ]
        began = time.perf_counter()
        own_cluster = os.environ | {"RAY_ADDRESS": "local"}  # whatever else runs on this machine
        _run([*command, *(f"--set={setting}" for setting in settings)], own_cluster)
        seconds = time.perf_counter() - began
        results = read_table(output / "results.parquet", ["concept_id", "embedding"]).to_pylist()
        return Learned(
            seconds=seconds, embeddings={row["concept_id"]: str(output / row["embedding"]) for row in results}
        )


def main(arguments: list[str] | None = None) -> int:
    """Learn with every setup, draw, score, and write `table.md`, `rows.parquet` and a sheet a concept and setup."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    output = Path(options.output)
    config = configure(options)
    everything = list(read_objects(options.manifest))
    concepts = list(islice(everything, options.concepts or None))
    model = full_precision_copy(config, output / "model")
    artist = Artist(model, choose_protocol(config))
    photos = {concept.concept_id: read_photos(concept) for concept in everything}
    scoring = scoring_of(options, everything)
    scorer = PictureScorer(config, dict(scoring.extractors), photos, artist.side_px, outside=scoring.outside)
    programs = programs_of(options, model, artist.side_px)
    lines, rows = [], list[Row]()
    for name, program in programs.items():
        seconds = []
        for seed in map(int, split(options.seeds)):
            learned = learned_by(program, concepts, seed, output / "learned" / name / str(seed))
            seconds.append(learned.seconds)
            say(f"{name}, seed {seed}: {len(concepts)} concepts in {learned.seconds:.0f} s\n")
            for concept in concepts:
                sheet = output / "pictures" / name / f"{concept.concept_id}-{seed}.png"
                rows.append({"setup": name, **artist.row(concept, seed, learned, scorer, sheet)})
        lines.append([name, program.samples, fmean(seconds), len(concepts) / fmean(seconds) * 3600])
    what = {name: program.what for name, program in programs.items()}
    text = heading("Against diffusers' own script", "benchmarks.peer", arguments, concepts=len(concepts))
    text += show_speed(lines) + "\n" + show_paired(rows, score_names(rows), next(iter(programs)), what)
    (output / "rows.parquet").write_bytes(rows_parquet(rows))
    (output / "table.md").write_text(text)
    say(f"\n{text}\n{output}: table.md, rows.parquet, pictures\n")
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--script", type=Path, required=True, help="diffusers' textual_inversion.py")
    parser.add_argument("--python", default=sys.executable, help="interpreter that runs the script (default: this one)")
    parser.add_argument("--peers", nargs="+", default=["1000", "2000"], metavar="SAMPLES[@RATE]")
    parser.add_argument(
        "--recipes", nargs="*", default=["demo", "fast", "encoder-fast"], metavar="NAME", help="recipes, or `defaults`"
    )
    add_inputs(parser, output="output/peer")
    return parser.parse_args(arguments)


def programs_of(options: argparse.Namespace, model: Path, side_px: int) -> dict[str, Peer | Ours]:
    """Return the setups by name: the peer's, the first of which is the baseline, then ours."""
    found: dict[str, Peer | Ours] = {}
    for budget in split(options.peers):
        samples, _, rate = budget.partition("@")
        found[f"peer-{budget}"] = Peer(
            script=options.script.resolve(),
            python=options.python,
            model=model.resolve(),
            samples=int(samples),
            rate=float(rate) if rate else None,
            resolution=side_px,
            jobs=options.jobs,
        )
    for recipe in split(options.recipes):
        inversion = load_config("" if recipe == DEFAULTS else (RECIPES / f"{recipe}.toml").read_text()).inversion
        if inversion.adapter.kind != "none":
            raise ValueError(f"recipe {recipe!r} learns an adapter, which diffusers does not load with an embedding")
        samples = inversion.steps * inversion.batch_size
        found[f"run-{recipe}"] = Ours(recipe=recipe, samples=samples, settings=tuple(options.set))
    return found


def learned_by(program: Peer | Ours, concepts: Sequence[Concept], seed: int, folder: Path) -> Learned:
    """Learn the concepts, or return what an earlier call measured of the same."""
    asked = [str(program), *(concept.concept_id for concept in concepts)]
    kept = folder / "learned.json"
    if kept.exists():
        found = json.loads(kept.read_text())
        if found.pop("asked") == asked:
            return Learned(**found)
    shutil.rmtree(folder, ignore_errors=True)
    learned = program.learn(concepts, seed, folder)
    if missing := {concept.concept_id for concept in concepts} - learned.embeddings.keys():
        raise RuntimeError(f"{program.what} did not learn {', '.join(sorted(missing))}")
    kept.write_text(json.dumps({"asked": asked, "seconds": learned.seconds, "embeddings": dict(learned.embeddings)}))
    return learned


def full_precision_copy(config: RunConfig, folder: Path) -> Path:
    """Save the run's model with float32 weights, because the script computes in the precision that it finds."""
    if not folder.exists():
        diffusers_pipeline(locate(config.model)).save_pretrained(folder)
    return folder


def diffusers_pipeline(model: str) -> Any:
    """Load diffusers' pipeline of a directory with float32 weights."""
    modules = load_modules(find_model_files(model), torch.float32)
    return StableDiffusionPipeline.from_pretrained(model, safety_checker=None, local_files_only=True, **modules)


class Artist:
    """One pipeline of diffusers that draws the words of all programs."""

    def __init__(self, model: Path, protocol: Protocol) -> None:
        self._pipeline = diffusers_pipeline(str(model))
        self._pipeline.set_progress_bar_config(disable=True)
        self._protocol = protocol
        guidance_scale, steps = drawing_defaults(
            self._pipeline.scheduler.config, guidance_scale=GUIDANCE_SCALE, steps=SAMPLING_STEPS
        )
        self._sampling = {
            "num_inference_steps": protocol.sampling.steps or steps,
            "guidance_scale": protocol.sampling.guidance_scale or guidance_scale,
        }
        self.side_px: int = self._pipeline.unet.config.sample_size * self._pipeline.vae_scale_factor

    def row(self, concept: Concept, seed: int, learned: Learned, scorer: PictureScorer, sheet: Path) -> Row:
        """Draw a concept's pictures with the word that a program learned, save them as a sheet, and score them."""
        token = concept.placeholder_token
        self._pipeline.load_textual_inversion(learned.embeddings[concept.concept_id], token=token)
        try:
            shown = dict(self._pictures(concept, seed))
        finally:
            self._pipeline.unload_textual_inversion(token)
        sheet.parent.mkdir(parents=True, exist_ok=True)
        grid(read_photos(concept), list(shown.items())).save(sheet)
        scores = scorer.score(concept.concept_id, shown, list(shown), self._protocol.reconstruction)
        return {"concept_id": concept.concept_id, "seed": seed, **scores}

    def _pictures(self, concept: Concept, seed: int) -> Iterator[tuple[str, list[Any]]]:
        """Yield each prompt's template with its pictures."""
        count = self._protocol.images_per_prompt
        for prompt in self._protocol.prompts:
            if prompt.is_for(concept.concept_id, concept.category):
                text = prompt.filled(concept.placeholder_token, concept.initializer, concept.placeholder_token)
                seeds = evaluation_seeds(prompt, count, seed)
                drawn = self._pipeline(
                    [text] * count,
                    **self._sampling,
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                )
                yield prompt.template(concept.initializer), drawn.images


def show_speed(lines: Sequence[Sequence[Any]]) -> str:
    """Return a table of whole commands; ratios are to the first."""
    first = lines[0][3]
    titles = ["setup", "samples a concept", "s for all", "concepts an hour", "times the first"]
    return table(titles, [[*line, line[3] / first] for line in lines])


def _run(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run a command. Raises RuntimeError with the end of its output if it fails."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command[:2])} ended with {done.returncode}: {(done.stdout + done.stderr)[-_TAIL:]}"
        )


if __name__ == "__main__":
    sys.exit(main())
