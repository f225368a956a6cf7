"""Measure the quality gate on the demo world: concepts learned with too few steps, those below the gate tried again.

    python -m benchmarks.gate --set inversion.steps=60 --seeds 0,10,20

For every seed the demo's concepts are learned by the pipeline's own actor, in a process of its own and without Ray, and
concepts below the gate are learned again by the retry rules (`gate.ladder`). A try that is chosen for its scores looks
better than it is, so tries are scored again on pictures drawn from other noise than the choice was made by: the first
try against the kept one, concept by concept, and for every retry rule alone. The scores are from the run's own CLIP
(`extractor`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean, stdev

from benchmarks.timing import heading, say, table
from pipeline import run
from pipeline.actor.learner import Learner
from pipeline.actor.library import read_embedding
from pipeline.actor.model_loading import load_model
from pipeline.actor.samples import draw_samples, score
from pipeline.config import RunConfig
from pipeline.gate_retries import Retries
from pipeline.inputs.manifest import ManifestRow, read_manifest
from pipeline.inputs.models import locate
from pipeline.ledger.digest import digest
from pipeline.ledger.plan import ConceptTask, settings_path
from pipeline.ledger.records import ConceptRecord, Try, load_records
from pipeline.ledger.selection import ALL_CONCEPTS
from pipeline.report.run_stats import RetryStats
from pipeline.stages import make_plan
from pipeline.store.addresses import read_bytes
from pipeline.store.storage import ConceptFolder, RunStore
from textual_inversion.concept import Concept
from textual_inversion.extractors import ClipExtractor
from textual_inversion.families.base import Backbone
from textual_inversion.photos import open_photo

OTHER_NOISE = 1_000_003
"""Number added to the run's seed for pictures that are drawn to score a try again."""


@dataclass(frozen=True, slots=True)
class RetriedConcept:
    """Concept that was below the gate at its first try."""

    seed: int
    concept_id: str
    tries: tuple[Try, ...]
    kept: int
    """Index of the try that was kept, from 0."""
    passed: bool
    rescored: list[dict[str, float]]
    """Scores of each try on other pictures; empty for a try that failed."""


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    say(heading("The quality gate", "benchmarks.gate", arguments))
    spawn = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(options.processes, spawn) as pool:
        results = list(pool.map(partial(run_seed, options), options.seeds))
    retried = [one for _, found in results for one in found]
    rows = [row for row, _ in results]
    titles = [
        "seed",
        "concepts",
        "below at first",
        "passed then",
        "still below",
        "steps at first",
        "steps again",
        "s at first",
        "s again",
    ]
    say(table(titles, rows))
    say("\n" + table(*by_concept(retried)) + "\n" + table(*by_rule(retried)))
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--manifest", default="manifests/demo.parquet")
    parser.add_argument("--output", default="output/gate")
    parser.add_argument("--seeds", type=lambda text: [int(number) for number in text.split(",")], default=[0])
    parser.add_argument("--processes", type=int, default=2, help="seeds side by side")
    parser.add_argument("--set", metavar="A.B=C", action="append", default=[], help="as in pipeline.run")
    return parser.parse_args(arguments)


def configured(options: argparse.Namespace, seed: int) -> RunConfig:
    given = [options.manifest, "--output", f"{options.output}/{seed}", *(f"--set={each}" for each in options.set)]
    return run.configure(run.parse([*given, f"--set=seed={seed}"]))


def run_seed(options: argparse.Namespace, seed: int) -> tuple[list[object], list[RetriedConcept]]:
    """Learn and retry all concepts with one seed; return a row of the first table, and the retried concepts."""
    config = configured(options, seed)
    store = RunStore(config.output)
    plan, settings = make_plan(config, store)
    store.put(settings_path(digest(settings)), json.dumps(settings).encode())
    retries = Retries(config, store, plan, ALL_CONCEPTS, RetryStats(), lambda _record: None)
    began = time.perf_counter()
    first_s = 0.0
    tasks = list(plan.tasks(read_manifest(config.manifest)))
    for rung, rule in enumerate(retries.settings):
        tasks += learn_in_process(rule, [task for task in tasks if task.rung == rung], retries)
        first_s = first_s or time.perf_counter() - began
    seconds = time.perf_counter() - began
    records = list(load_records(store, plan.carried))
    found = list(rescore_retried(config, records))
    steps = sum((record.tries[0] if record.tries else record).steps for record in records)
    again = sum(one.steps for record in records for one in record.tries[1:])
    passed = sum(one.passed for one in found)
    row = [seed, len(records), len(found), passed, len(found) - passed, steps, again, first_s, seconds - first_s]
    return row, found


def learn_in_process(config: RunConfig, tasks: Sequence[ConceptTask], retries: Retries) -> list[ConceptTask]:
    """Learn tasks one after the other by an actor's own code in this process, and return the next tries."""
    learner = Learner(replace(config, device="cpu"))
    found = []
    try:
        for task in tasks:
            record = asyncio.run(learner.learn(task))
            if record.status == "failed" and not task.rung:
                raise ValueError(f"{record.concept_id}: {record.error}")
            if retries.takes(task, record) and (again := retries.next_try(task, record)) is not None:
                found.append(again)
    finally:
        learner.close()
    return found


def rescore_retried(config: RunConfig, records: Sequence[ConceptRecord]) -> Iterator[RetriedConcept]:
    """Yield the concepts that were tried again, with every try scored on other pictures."""
    tried = [record for record in records if record.tries]
    if not tried:
        return
    backbone = load_model(replace(config, device="cpu"))
    extractor = ClipExtractor(locate(config.extractor), "cpu")
    concepts = {
        row.concept.concept_id: row.concept for row in read_manifest(config.manifest) if isinstance(row, ManifestRow)
    }
    for record in tried:
        concept = concepts[record.concept_id]
        rescored = [rescore(config, backbone, extractor, concept, one) for one in record.tries]
        kept = [one.fingerprint for one in record.tries].index(record.result.fingerprint)
        yield RetriedConcept(config.seed, record.concept_id, record.tries, kept, record.gate == "passed", rescored)


def rescore(
    config: RunConfig, backbone: Backbone, extractor: ClipExtractor, concept: Concept, one: Try
) -> dict[str, float]:
    """Score a try on pictures from other noise than its own, the same for all tries of a concept."""
    if one.error:
        return {}
    folder = ConceptFolder(concept.concept_id, one.fingerprint)
    embedding = read_embedding(RunStore(config.output).uri(folder.embedding))
    samples = draw_samples(backbone, concept, embedding, config.grid, config.seed + OTHER_NOISE)
    return score(extractor, [open_photo(read_bytes(uri)) for uri in concept.images], samples)


def by_concept(retried: Sequence[RetriedConcept]) -> tuple[list[str], list[list[object]]]:
    """Return titles and rows: first try and kept one, on the pictures of the gate's verdict and on others."""
    titles = [
        "seed",
        "concept",
        "CLIP-I of the tries, as judged",
        "kept",
        "CLIP-I anew, first",
        "kept",
        "CLIP-T anew, first",
        "kept",
        "initializer word's CLIP-I",
    ]
    rows: list[list[object]] = []
    for concept in retried:
        first = concept.rescored[0]
        kept = concept.rescored[concept.kept]
        judged = ", ".join(f"{one.scores['clip_i']:.3f}" if one.scores else "failed" for one in concept.tries)
        rule = concept.tries[concept.kept].rung or "first"
        kept_as = rule if concept.passed else f"{rule}, below"
        rows.append(
            [
                concept.seed,
                concept.concept_id,
                judged,
                kept_as,
                first["clip_i"],
                kept["clip_i"],
                first.get("clip_t"),
                kept.get("clip_t"),
                first.get("clip_i_initializer"),
            ]
        )
    return titles, rows


def by_rule(retried: Sequence[RetriedConcept]) -> tuple[list[str], list[list[object]]]:
    """Return titles and rows: mean difference to the first try on other pictures, for the kept try and every rule."""
    titles = ["against the first try, anew", "concepts", "CLIP-I", "standard error", "better of them", "CLIP-T"]
    pairs = {"what was kept": [(concept.rescored[0], concept.rescored[concept.kept]) for concept in retried]}
    for concept in retried:
        for one, scores in zip(concept.tries[1:], concept.rescored[1:], strict=True):
            if scores:
                pairs.setdefault(f"retry rule `{one.rung}`", []).append((concept.rescored[0], scores))
    rows: list[list[object]] = []
    for name, found in pairs.items():
        likeness = [after["clip_i"] - before["clip_i"] for before, after in found]
        fit = [after["clip_t"] - before["clip_t"] for before, after in found if "clip_t" in before]
        error = stdev(likeness) / len(likeness) ** 0.5 if len(likeness) > 1 else None
        better = sum(value > 0 for value in likeness)
        rows.append([name, len(found), fmean(likeness) if found else None, error, better, fmean(fit) if fit else None])
    return titles, rows


if __name__ == "__main__":
    sys.exit(main())
