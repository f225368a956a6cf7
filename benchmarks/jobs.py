"""Measure concepts in setups and seeds: learn, draw, score, and store one row of scores for each.

Jobs of one setup and seed are learned several at once, which the engine does faster than one after the other; processes
work side by side, a torch thread each. A row is stored as soon as it is there, under a key of all its inputs, so that a
stopped command goes on where it was.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import torch
from PIL import Image

from benchmarks.captions import read_captions
from benchmarks.concepts import read_masks, read_photos
from benchmarks.scores import PictureScorer
from benchmarks.setups import Setup
from benchmarks.timing import say
from pipeline.actor.model_loading import load_model
from pipeline.actor.publish import to_png
from pipeline.actor.samples import Samples, initializer_requests, sample_requests, score
from pipeline.actor.warm_start import read_encoder
from pipeline.bulk.evaluation import evaluation_seeds
from pipeline.bulk.protocols import Protocol, choose_protocol
from pipeline.bulk.rows import row_id
from pipeline.config import RunConfig
from pipeline.inputs.content_hash import content_hashes
from pipeline.inputs.models import extractor_hash, model_hash, with_captions
from pipeline.inputs.prompt_table import INITIALIZER, Prompt
from pipeline.store.errors import describe_error
from pipeline.store.storage import RunStore
from textual_inversion.concept import Concept, LearnedEmbedding
from textual_inversion.config import InversionConfig, SamplingConfig
from textual_inversion.engine import Outcome
from textual_inversion.families.base import Backbone
from textual_inversion.generate import ImageRequest, generate
from textual_inversion.grids import grid
from textual_inversion.learning import learn_outcomes
from textual_inversion.prompts import HOLE, class_noun, name_in_prompt, without_placeholder

_ROW_FORMAT = 4
"""Version of the rows, counted up when a row gets new columns; rows of an earlier version are measured again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scoring:
    """Extractors besides the run's own, and the concepts that every picture is compared with."""

    concepts: tuple[Concept, ...]
    """All concepts of the comparison with the photos that their pictures are compared with."""
    extractors: tuple[tuple[str, str], ...] = ()
    """Names and directories of further extractors."""
    outside: bool = False
    """True adds the outside models of `demo/perceptual.py`."""
    gate: bool = False
    """True adds `gate`: the scores that the quality gate sees, of the sample grid's own pictures and noise, and
    `clip_i_others`, the highest CLIP-I of the same pictures to another concept's photos."""

    def key(self) -> str:
        photos = {each.concept_id: [str(h) for h in content_hashes(each.images).values()] for each in self.concepts}
        hashes = {name: extractor_hash(path) for name, path in self.extractors}
        further = [name for name, is_used in (("mirror", self.extractors), ("gate", self.gate)) if is_used]
        return row_id(photos, hashes, self.outside, *further)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Concept to be measured in one setup, with one seed."""

    name: str
    setup: Setup
    concept: Concept
    """Concept as the manifest describes it."""
    config: RunConfig
    """Configuration with the setup's settings of learning; its seed is the job's."""
    shared: str
    """Digest of the inputs of all jobs: the frozen models, the prompts, the sampler, the scoring."""

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def path(self) -> str:
        return f"rows/{self.name}/{self.concept.concept_id}-{self.seed}"

    def key(self) -> str:
        """Digest of all inputs of the row; the photos count by their content."""
        concept = self.setup.concept(self.concept)
        init = self.config.inversion.init
        read = (*concept.images, *concept.masks, *([init.encoder] if init.method == "encoder" else []))
        files = [str(identity) for identity in content_hashes(read).values()]
        nameless = replace(concept, images=("",) * len(concept.images), masks=("",) * len(concept.masks))
        parts = [asdict(nameless), files, self.setup.drawn, asdict(self.config.inversion), self.seed, self.shared]
        if self.setup.drawn.endswith("captions"):
            parts.append(read_captions().get(concept.concept_id))
        return row_id(*parts, _ROW_FORMAT)


def make_jobs(
    setups: Mapping[str, Setup],
    concepts: Sequence[Concept],
    base: RunConfig,
    *,
    steps: int,
    seeds: Sequence[int],
    overrides: Sequence[str],
    scoring: Scoring,
) -> Iterator[Job]:
    """Yield the jobs, setup by setup and seed by seed. Raises ValueError for settings that make no sense."""
    protocol = choose_protocol(base)
    further = ["holes"] if any(prompt.template("") != prompt.text for prompt in protocol.prompts) else []
    inputs = [asdict(protocol), model_hash(base.model), extractor_hash(base.extractor), scoring.key()]
    shared = row_id(*inputs, *further)  # rows of prompts with further holes, once measured unfilled, are measured again
    for name, setup in setups.items():
        config = with_captions(replace(base, inversion=setup.inversion(steps, overrides)))
        for seed in seeds:
            for concept in concepts:
                yield Job(name=name, setup=setup, concept=concept, config=replace(config, seed=seed), shared=shared)


def measure_all(
    jobs: Sequence[Job], output: str, scoring: Scoring, *, processes: int, at_once: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Measure the jobs that have no row yet; return the rows of all, in order, and path -> error of those that failed.

    `at_once`: concepts that a process learns at the same time.
    """
    store = RunStore(output)
    rows = {job.path: row for job in jobs if (row := stored(store, job)) is not None}
    todo = [job for job in jobs if job.path not in rows]
    failures: dict[str, str] = {}
    began = time.monotonic()
    say(f"{len(jobs)} rows, {len(rows)} there already, {len(todo)} to measure\n")
    for job, result in measured(chunks(todo, at_once), output, scoring, processes):
        if isinstance(result, str):
            failures[job.path] = result
            say(f"FAILED {job.name} {job.concept.concept_id}, seed {job.seed}: {result}\n")
            continue
        rows[job.path] = result
        seconds = time.monotonic() - began
        done = len(rows) + len(todo) - len(jobs)
        left = seconds / done * (len(todo) - done - len(failures))
        say(
            f"{job.name} {job.concept.concept_id}, seed {job.seed}: {len(rows)} of {len(jobs)}, {seconds:.0f} s, "
            f"about {left:.0f} s more\n"
        )
    return [rows[job.path] for job in jobs if job.path in rows], failures


def stored(store: RunStore, job: Job) -> dict[str, Any] | None:
    """Return the stored row if it was measured with the same settings."""
    try:
        row: dict[str, Any] = json.loads(store.get(f"{job.path}.json"))
    except FileNotFoundError:
        return None
    return row if row["key"] == job.key() else None


def chunks(jobs: Sequence[Job], at_once: int) -> list[list[Job]]:
    """Group jobs of one setup and seed, at most `at_once` together."""
    groups: dict[tuple[str, int], list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.name, job.seed), []).append(job)
    return [group[i : i + at_once] for group in groups.values() for i in range(0, len(group), at_once)]


def measured(
    work: Sequence[list[Job]], output: str, scoring: Scoring, processes: int
) -> Iterator[tuple[Job, dict[str, Any] | str]]:
    """Yield each job with its row or its error, chunk by chunk in the order in which they end."""
    if not work:
        return
    spawn = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(min(processes, len(work)), mp_context=spawn) as pool:
        waiting = {pool.submit(measure_chunk, chunk, output, scoring): chunk for chunk in work}
        for future in as_completed(waiting):
            error = future.exception()  # any error: a long comparison goes on without these rows
            chunk = waiting[future]
            yield from zip(chunk, [describe_error(error)] * len(chunk) if error else future.result(), strict=True)


def measure_chunk(jobs: Sequence[Job], output: str, scoring: Scoring) -> list[dict[str, Any] | str]:
    """Measure jobs of one setup and seed; return a row or an error for each. Where a concept cannot be learned, each is
    learned alone."""
    try:
        return list(measure(jobs, output, scoring))
    except ValueError as error:
        if len(jobs) == 1:
            return [describe_error(error)]
        return [result for job in jobs for result in measure_chunk([job], output, scoring)]


def measure(jobs: Sequence[Job], output: str, scoring: Scoring) -> Iterator[dict[str, Any]]:
    """Learn, draw and score concepts in one setup and seed, and store their rows. Raises ValueError if one cannot be
    learned."""
    backbone, scorer = models(replace(jobs[0].config, inversion=InversionConfig(), seed=0), scoring)
    began = time.perf_counter()
    outcomes = (
        learn_together(jobs, backbone, scorer) if jobs[0].setup.drawn.startswith("learned") else [None] * len(jobs)
    )
    seconds = (time.perf_counter() - began) / len(jobs)
    protocol = choose_protocol(jobs[0].config)
    store = RunStore(output)
    for job, outcome in zip(jobs, outcomes, strict=True):
        embedding = outcome.embedding if outcome else None
        shown = pictures(job, protocol, embedding, backbone)
        prompts = list(dict.fromkeys(template_of(job, prompt) for prompt in prompts_of(job, protocol)))
        row: dict[str, Any] = {
            "key": job.key(),
            "setup": job.name,
            "concept_id": job.concept.concept_id,
            "seed": job.seed,
            "budget": job.config.inversion.steps if outcome else 0,
            "steps": outcome.steps if outcome else 0,
            "kept_at": int(embedding.metadata["step"]) if embedding else 0,
            "seconds": seconds if outcome else 0.0,
            "norm": mean_norm(embedding) if embedding else None,
            **scorer.score(job.concept.concept_id, shown, prompts, protocol.reconstruction),
        }
        if scoring.gate and embedding:
            row["gate"] = gate_scores(job, embedding, backbone, scorer)
        if shown:
            store.put(f"{job.path}.png", to_png(grid(read_photos(job.concept), list(shown.items()))))
        store.put(f"{job.path}.json", json.dumps(row, indent=1).encode())
        yield row


@cache
def models(config: RunConfig, scoring: Scoring) -> tuple[Backbone, PictureScorer]:
    """Load the models once a process; `config` is that of all jobs, without their settings of learning and seeds."""
    torch.set_num_threads(1)
    backbone = load_model(config)
    photos = {concept.concept_id: read_photos(concept) for concept in scoring.concepts}
    extractors = dict(scoring.extractors)
    return backbone, PictureScorer(config, extractors, photos, backbone.resolution, outside=scoring.outside)


def learn_together(jobs: Sequence[Job], backbone: Backbone, scorer: PictureScorer) -> list[Outcome]:
    concepts = [job.setup.concept(job.concept) for job in jobs]
    cases = [(concept, read_photos(concept)) for concept in concepts]
    masks = {concept.concept_id: read_masks(concept, photos) for concept, photos in cases if concept.masks}
    config = jobs[0].config
    return learn_outcomes(
        backbone,
        cases,
        config.inversion,
        slots=len(cases),
        seed=config.seed,
        extractor=scorer.clip,
        masks=masks,
        encoder=read_encoder(config, backbone) if config.inversion.init.method == "encoder" else None,
    )


def gate_scores(job: Job, embedding: LearnedEmbedding, backbone: Backbone, scorer: PictureScorer) -> dict[str, float]:
    """Return the scores that the quality gate sees, and the highest CLIP-I to another concept's photos."""
    concept = job.setup.concept(job.concept)
    grid_config = job.config.grid
    requests = sample_requests(concept, embedding, grid_config, job.seed, initial=False)
    sampling = replace(grid_config.sampling, batch_size=min(len(requests), grid_config.sampling.batch_size))
    of_word = tuple(initializer_requests(concept, grid_config, job.seed))
    drawn = [*generate(backbone, requests, sampling), *initializer_pictures(of_word, backbone, sampling)]
    samples = Samples.from_pictures(drawn, concept.category, grid_config, embedding)
    found = score(scorer.clip, read_photos(job.concept), samples)
    return found | {"clip_i_others": scorer.nearest_other(concept.concept_id, samples.learned[0])}


@cache
def initializer_pictures(
    requests: tuple[ImageRequest, ...], backbone: Backbone, sampling: SamplingConfig
) -> list[Image.Image]:
    """Draw the pictures of an initializer word, once for all setups that a process measures."""
    return generate(backbone, requests, sampling)


def prompts_of(job: Job, protocol: Protocol) -> list[Prompt]:
    return [prompt for prompt in protocol.prompts if prompt.is_for(job.concept.concept_id, job.concept.category)]


def pictures(
    job: Job, protocol: Protocol, embedding: LearnedEmbedding | None, backbone: Backbone
) -> dict[str, list[Image.Image]]:
    """Return template -> the pictures of the prompts that have it, drawn together so that batches are full; none where
    the photos are scored."""
    if job.setup.drawn == "photos":
        return {}
    words = words_of(job, embedding)
    count = protocol.images_per_prompt
    prompts = prompts_of(job, protocol)
    requests = []
    for prompt in prompts:
        for i, seed in enumerate(evaluation_seeds(prompt, count, job.seed)):
            text = text_of(job, prompt, words[i % len(words)])
            requests.append(ImageRequest(text, seed, (embedding,) if embedding else ()))
    num_batches = math.ceil(len(requests) / protocol.sampling.batch_size)
    batch_size = math.ceil(len(requests) / num_batches)  # else the last batch is padded
    drawn = generate(backbone, requests, replace(protocol.sampling, batch_size=batch_size))
    found: dict[str, list[Image.Image]] = {}
    for i, prompt in enumerate(prompts):
        found.setdefault(template_of(job, prompt), []).extend(drawn[i * count : (i + 1) * count])
    return found


def template_of(job: Job, prompt: Prompt) -> str:
    """Return the prompt with `{}` as its only hole; the manifest's initializer, which setups may change, fills
    `{initializer}`, so that all setups draw the same prompts."""
    return prompt.template(job.concept.initializer)


def text_of(job: Job, prompt: Prompt, word: str) -> str:
    """Return the prompt with one of `words_of` in it. The initializer does not stand beside itself: a prompt that
    names it is drawn without the concept."""
    is_learned = job.setup.drawn.startswith("learned")
    if not word or (job.setup.drawn == "initializer" and INITIALIZER in prompt.text):
        return without_placeholder(template_of(job, prompt), HOLE)
    return prompt.filled(job.concept.placeholder_token if is_learned else word, job.concept.initializer, word)


def words_of(job: Job, embedding: LearnedEmbedding | None = None) -> list[str]:
    """Return the texts that stand in the prompts in turn; with a class cue the word is, as in learning, "S* cat".

    Raises ValueError for a concept without the captions that the setup asks for.
    """
    concept = job.setup.concept(job.concept)
    if job.setup.drawn == "initializer":
        return [concept.initializer]
    if job.setup.drawn == "prompt":
        return [""]
    if job.setup.drawn.endswith("captions"):
        length = job.setup.drawn.removesuffix("_captions")
        written = read_captions().get(concept.concept_id)
        if not written:
            raise ValueError(f"no caption for {concept.concept_id!r}; add some to benchmarks/captions.toml")
        return list(written[length])
    noun = embedding.class_noun if embedding else class_noun(concept, class_cue=job.config.inversion.class_cue)
    noun = {"learned_without_noun": "", "learned_with_noun": concept.initializer}.get(job.setup.drawn, noun)
    return [name_in_prompt(concept.placeholder_token, noun)]


def mean_norm(embedding: LearnedEmbedding) -> float:
    """Return the mean L2 norm of the rows."""
    rows = torch.cat([rows.norm(dim=1) for rows in embedding.vectors.values()])
    return float(rows.mean())
