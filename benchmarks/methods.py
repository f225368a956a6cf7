"""Compare methods on the demo world: every setup learns the same concepts, and CLIP scores the pictures drawn.

    python -m benchmarks.methods --concepts 8 --processes 2
    python -m benchmarks.methods --setups textual-inversion,high-lr,low-lr --steps 300 --output output/rates
    python -m benchmarks.methods --setups dvar,dvar-budget,textual-inversion,keep-best --output output/stopping

Setups are those of `benchmarks/setups.py` and the recipes. As soon as a concept is done in a setup, its row and its
pictures are in `rows/` of the output; at the end come all rows (`rows.parquet`), a table (`table.md`) and the
distortion-editability plot (`plot.png`, by matplotlib). Run it again to continue: stored rows are not measured again.
CLIP-I is computed on the prompt that names nothing but the concept, CLIP-T on all others (Gal et al. 2022, section 5).
PSNR and edge strength, of the same prompt as CLIP-I, compare pixels with the nearest photo.
All setups draw from the same noise. Where a setup and the same without its stop rule are both present, as in the last
command, a table of each concept's steps and scores with and without it follows (`stopping.md`).
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import islice
from typing import Any

import torch
from PIL import Image

from benchmarks.comparison import plot, rows_parquet, stopping, table
from benchmarks.concepts import read_objects
from benchmarks.setups import CAPTIONS, SETUPS, Setup, find
from pipeline.actor.model_loading import load_model
from pipeline.actor.publish import to_png
from pipeline.bulk.evaluation import PIXEL_SCORES, evaluation_seeds
from pipeline.bulk.protocols import Protocol, choose_protocol
from pipeline.bulk.rows import row_id
from pipeline.config import RunConfig
from pipeline.config_file import load_config
from pipeline.inputs.content_hash import content_hashes
from pipeline.inputs.models import extractor_hash, locate, model_hash
from pipeline.inputs.prompt_table import Prompt
from pipeline.store.addresses import absolute, read_bytes
from pipeline.store.errors import describe_error
from pipeline.store.storage import RunStore
from textual_inversion.concept import Concept, LearnedEmbedding
from textual_inversion.config import InversionConfig
from textual_inversion.engine import Outcome
from textual_inversion.extractors import ClipExtractor
from textual_inversion.families.base import Backbone
from textual_inversion.fidelity import pixel_scores, pixel_scores_between_photos, to_arrays
from textual_inversion.generate import ImageRequest, generate
from textual_inversion.grids import grid
from textual_inversion.learn import learn_outcomes
from textual_inversion.metrics import (
    clip_i_between_photos,
    clip_i_per_picture,
    clip_t_per_picture,
    mean_and_standard_error,
)
from textual_inversion.photos import open_photo
from textual_inversion.prompts import HOLE, class_noun, fill, name_in_prompt, without_placeholder

_ROW_FORMAT = 3
"""Version of the rows, counted up when a row gets new columns; rows of an earlier version are measured again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Concept to be measured in one setup."""

    name: str
    setup: Setup
    concept: Concept
    """Concept as the manifest describes it."""
    config: RunConfig
    """Configuration with the setup's settings of learning."""
    shared: str
    """Digest of the inputs of all jobs: the frozen models, the prompts, the sampler, the seed."""

    @property
    def path(self) -> str:
        return f"rows/{self.name}/{self.concept.concept_id}"

    def key(self) -> str:
        """Digest of all inputs of the row; the photos count by their content."""
        concept = self.setup.concept(self.concept)
        photos = [str(identity) for identity in content_hashes(self.concept.images).values()]
        parts = [
            asdict(replace(concept, images=("",) * len(concept.images))),
            photos,
            self.setup.drawn,
            asdict(self.config.inversion),
            self.shared,
            _ROW_FORMAT,
        ]
        if self.setup.drawn == "caption":
            parts.append(CAPTIONS.get(concept.concept_id))
        return row_id(*parts)


def main(arguments: list[str] | None = None) -> int:
    """Measure the missing rows, then write table and plot; return 1 if a row failed."""
    options = parse(arguments)
    store = RunStore(absolute(options.output))
    jobs = list(make_jobs(options))
    rows = {job.path: row for job in jobs if (row := stored(store, job)) is not None}
    todo = [job for job in jobs if job.path not in rows]
    failures = {}
    began = time.monotonic()
    say(f"{len(jobs)} rows, {len(rows)} there already, {len(todo)} to measure\n")
    for job, result in measured(todo, store.root, options.processes):
        if isinstance(result, str):
            failures[job.path] = result
            say(f"FAILED {job.name} {job.concept.concept_id}: {result}\n")
            continue
        rows[job.path] = result
        say(f"{job.name} {job.concept.concept_id}: {len(rows)} of {len(jobs)}, {time.monotonic() - began:.0f} s\n")
    present = [rows[job.path] for job in jobs if job.path in rows]
    if present:
        what = {job.name: job.setup.what for job in jobs}
        store.put("rows.parquet", rows_parquet(present))
        store.put("table.md", table(present, what).encode())
        store.put("plot.png", plot(present))
        say(f"\n{table(present, what)}\n")
        if text := stopping(present, {job.name: job.setup.full_budget for job in jobs}):
            store.put("stopping.md", text.encode())
            say(f"{text}\n")
        say(f"{store.uri('table.md')}, plot.png, rows.parquet{', stopping.md' if text else ''}\n")
    return 1 if failures else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.methods", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--manifest", default="manifests/demo.parquet")
    parser.add_argument("--concepts", type=int, default=8, help="the first so many objects of the manifest")
    parser.add_argument("--setups", default=",".join(SETUPS), help="names, with commas between; default: all")
    parser.add_argument("--steps", type=int, default=500, help="of 4 samples; others get as many samples in all")
    parser.add_argument("--samples", type=int, default=4, help="pictures per prompt")
    parser.add_argument("--prompts", default="", metavar="URI", help="in place of the demo's")
    parser.add_argument("--processes", type=int, default=1, help="concepts measured at a time, a torch thread each")
    parser.add_argument("--output", default="output/methods")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="for every setup")
    return parser.parse_args(arguments)


def make_jobs(options: argparse.Namespace) -> Iterator[Job]:
    """Yield every setup's concepts, setup by setup. Raises ValueError for an unknown setup or a bad manifest row."""
    concepts = list(islice(read_objects(options.manifest), options.concepts))
    setups = {name: find(name) for name in options.setups.split(",")}
    base = load_config("", ["device=cpu", *options.set, f"evaluation.images_per_prompt={options.samples}"])
    base = replace(base, evaluation=replace(base.evaluation, prompts=options.prompts))
    hashes = model_hash(base.model), extractor_hash(base.extractor)
    shared = row_id(asdict(choose_protocol(base)), base.seed, *hashes)
    for name, setup in setups.items():
        config = replace(base, inversion=setup.inversion(options.steps, options.set))
        for concept in concepts:
            yield Job(name=name, setup=setup, concept=concept, config=config, shared=shared)


def stored(store: RunStore, job: Job) -> dict[str, Any] | None:
    """Return the stored row if it was measured with the same settings."""
    try:
        row: dict[str, Any] = json.loads(store.get(f"{job.path}.json"))
    except FileNotFoundError:
        return None
    return row if row["key"] == job.key() else None


def measured(jobs: list[Job], output: str, processes: int) -> Iterator[tuple[Job, dict[str, Any] | str]]:
    """Yield each job with its row or its error, in the order in which they end."""
    if not jobs:
        return
    spawn = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(min(processes, len(jobs)), mp_context=spawn) as pool:
        waiting = {pool.submit(measure, job, output): job for job in jobs}
        for future in as_completed(waiting):
            error = future.exception()  # any error: a long comparison goes on without that row
            yield waiting[future], describe_error(error) if error else future.result()


def measure(job: Job, output: str) -> dict[str, Any]:
    """Learn, draw and score one concept in one setup, and store its row. Raises ValueError if it cannot be learned."""
    backbone, extractor = models(replace(job.config, inversion=InversionConfig()))
    began = time.perf_counter()
    outcome = learned(job, backbone, extractor) if job.setup.drawn == "learned" else None
    seconds = time.perf_counter() - began
    embedding = outcome.embedding if outcome else None
    protocol = choose_protocol(job.config)
    photos = [open_photo(read_bytes(uri)) for uri in job.concept.images]
    shown = pictures(job, protocol, embedding, backbone)
    row: dict[str, Any] = {
        "key": job.key(),
        "setup": job.name,
        "concept_id": job.concept.concept_id,
        "budget": job.config.inversion.steps if outcome else 0,
        "steps": outcome.steps if outcome else 0,
        "kept_at": int(embedding.metadata["step"]) if embedding else 0,
        "seconds": seconds if outcome else 0.0,
        "norm": mean_norm(embedding) if embedding else None,
        **scores(photos, shown, prompts_of(job, protocol), protocol.reconstruction, extractor),
        **pixel_scores_of(photos, shown, protocol.reconstruction, backbone.resolution),
    }
    store = RunStore(output)
    if shown:
        store.put(f"{job.path}.png", to_png(grid(photos, list(shown.items()))))
    store.put(f"{job.path}.json", json.dumps(row, indent=1).encode())
    return row


@cache
def models(config: RunConfig) -> tuple[Backbone, ClipExtractor]:
    """Load the models once a process; `config` is that of all jobs, without their settings of learning."""
    torch.set_num_threads(1)
    return load_model(config), ClipExtractor(locate(config.extractor), config.device)


def learned(job: Job, backbone: Backbone, extractor: ClipExtractor) -> Outcome:
    concept = job.setup.concept(job.concept)
    photos = [open_photo(read_bytes(uri)) for uri in concept.images]
    return learn_outcomes(
        backbone, [(concept, photos)], job.config.inversion, slots=1, seed=job.config.seed, extractor=extractor
    )[0]


def scores(
    photos: list[Image.Image],
    shown: Mapping[str, list[Image.Image]],
    prompts: Sequence[Prompt],
    reconstruction: Sequence[str],
    extractor: ClipExtractor,
) -> dict[str, Any]:
    """Return `clip_i` of the prompts that name nothing but the concept and `clip_t` of the others, each with its
    standard error over pictures (`_se`) and the value of every picture (`_pictures`); `clip_i_all` of all prompts.

    `photos` are all of the concept's, also those a setup did not learn from; with nothing `shown`, the photos
    themselves are scored.
    """
    real = extractor.images(photos)
    telling = []
    identity = []
    everything = []
    for prompt in prompts:
        seen = extractor.images(shown[prompt.text]) if shown else real
        likeness = clip_i_per_picture(seen, real) if shown else clip_i_between_photos(real)
        everything.append(likeness)
        if prompt.text in reconstruction:
            identity.append(likeness)
        else:
            telling.append(clip_t_per_picture(seen, extractor.texts([without_placeholder(prompt.text, HOLE)])))
    found: dict[str, Any] = {"clip_i_all": float(torch.cat(everything).mean())}
    for name, values in (("clip_i", identity or everything), ("clip_t", telling)):
        each = torch.cat(values) if values else torch.tensor([])
        found[name], found[f"{name}_se"] = mean_and_standard_error(each) if values else (None, None)
        found[f"{name}_pictures"] = each.tolist()
    return found


def pixel_scores_of(
    photos: list[Image.Image],
    shown: Mapping[str, list[Image.Image]],
    reconstruction: Sequence[str],
    side_px: int,
) -> dict[str, float | None]:
    """Return the mean PIXEL_SCORES of the prompts that name nothing but the concept; None where there are no such
    prompts, or no photo with edges. With nothing `shown`, the photos themselves are scored."""
    size = (side_px, side_px)
    pictures = [picture for text in reconstruction for picture in shown.get(text, ())]
    if pictures:
        found = pixel_scores(to_arrays(pictures, size), to_arrays(photos, size))
    elif not shown and len(photos) > 1:
        found = pixel_scores_between_photos(to_arrays(photos, size))
    else:
        return dict.fromkeys(PIXEL_SCORES)
    means = {name: float(values.mean()) for name, values in found.items()}
    return {name: None if math.isnan(value) else value for name, value in means.items()}


def prompts_of(job: Job, protocol: Protocol) -> list[Prompt]:
    return [prompt for prompt in protocol.prompts if prompt.is_for(job.concept.concept_id, job.concept.category)]


def pictures(
    job: Job, protocol: Protocol, embedding: LearnedEmbedding | None, backbone: Backbone
) -> dict[str, list[Image.Image]]:
    """Return prompt -> its pictures, drawn together so that batches are full; none where the photos are scored."""
    if job.setup.drawn == "photos":
        return {}
    word = word_of(job, embedding)
    count = protocol.images_per_prompt
    prompts = prompts_of(job, protocol)
    requests = []
    for prompt in prompts:
        text = fill(prompt.text, word) if word else without_placeholder(prompt.text, HOLE)
        seeds = evaluation_seeds(prompt, count, job.config.seed)
        requests += [ImageRequest(text, seed, (embedding,) if embedding else ()) for seed in seeds]
    num_batches = math.ceil(len(requests) / protocol.sampling.batch_size)
    sampling = replace(
        protocol.sampling, batch_size=math.ceil(len(requests) / num_batches)
    )  # else the last batch is padded
    drawn = generate(backbone, requests, sampling)
    return {prompt.text: drawn[i * count : (i + 1) * count] for i, prompt in enumerate(prompts)}


def word_of(job: Job, embedding: LearnedEmbedding | None = None) -> str:
    """Return the word in the prompts; with a class cue it is, as in learning, "S* cat"."""
    concept = job.setup.concept(job.concept)
    if job.setup.drawn == "initializer":
        return concept.initializer
    if job.setup.drawn == "prompt":
        return ""
    if job.setup.drawn == "caption":
        if concept.concept_id not in CAPTIONS:
            raise ValueError(f"no caption for {concept.concept_id!r}; add one to benchmarks/setups.py")
        return CAPTIONS[concept.concept_id]
    noun = embedding.class_noun if embedding else class_noun(concept, class_cue=job.config.inversion.class_cue)
    return name_in_prompt(concept.placeholder_token, noun)


def mean_norm(embedding: LearnedEmbedding) -> float:
    """Return the mean L2 norm of the rows."""
    rows = torch.cat([rows.norm(dim=1) for rows in embedding.vectors.values()])
    return float(rows.mean())


def say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
