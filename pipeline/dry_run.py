"""`--dry-run`: what a run would do or fail at, the worst first, and an estimate of its time and cost.

It writes nothing, and needs no GPU, no torch and no Ray.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from itertools import chain

from pipeline.bounds import Bound
from pipeline.config import RunConfig
from pipeline.exit_codes import FAILED
from pipeline.gate_retries import concepts_to_retry
from pipeline.inputs.manifest import BadRow, concept_ids, count_rows, manifest_notes, read_by_priority
from pipeline.inputs.models import check_init_encoder, demo_budget_note, demo_note, load_model_vocabularies
from pipeline.inputs.other_concepts import read_others
from pipeline.inputs.prompt_table import Prompt, prompt_notes, read_prompts, unknown_concepts
from pipeline.ledger.digest import digest
from pipeline.ledger.known_failures import read_known
from pipeline.ledger.plan import Plan
from pipeline.ledger.preflight import Finding, examine
from pipeline.ledger.prune import Leftovers, find_leftovers
from pipeline.ledger.selection import ALL_CONCEPTS, Selection
from pipeline.report.estimate import NO_RATE, read_rate
from pipeline.report.outcome import outcome_of
from pipeline.report.remarks import grouped
from pipeline.report.run_stats import RunStats
from pipeline.report.run_summary import describe_left_out, place_of
from pipeline.stages import make_plan
from pipeline.store.errors import one_line
from pipeline.store.redact import redact
from pipeline.store.storage import RunStore

_SHOWN = 20
"""Failures with one cause that are listed one by one."""
_SHOWN_NOTES = 3


def dry_run(
    config: RunConfig,
    selection: Selection = ALL_CONCEPTS,
    *,
    photos: bool = False,
    prune: Bound | None = None,
    verify: bool = False,
) -> int:
    """Print bad rows, what else would fail, notes, an estimate and counts, in this order; return the exit code.

    `photos`: also fetch and open them. `prune`: also print what `--prune` with this bound would delete. `verify`: also
    read the files of what is done.
    """
    prompts = read_prompts(config.generation.prompts) if config.generation.prompts else []
    vocabularies = load_model_vocabularies(config)  # before the plan, which reads the whole model for its digest
    check_init_encoder(config)
    read_others(config.gate.others)
    store = RunStore(config.output)
    store.check_writable()
    plan, settings = make_plan(config, store, selection, verify=verify)
    notes = [("", note) for note in notes_on(config, prompts)]
    stray = stray_prompts(config, store, prompts)
    findings = list(
        examine(plan.tasks(read_by_priority(config.manifest)), config, prompts, vocabularies, photos=photos)
    )
    failing = {finding.concept_id: finding.text for finding in findings if finding.is_fatal}
    _print_failures(plan.bad, findings, stray, plan)
    notes += [(finding.concept_id, finding.text) for finding in findings if not finding.is_fatal]
    _write("note: ", grouped(notes, _SHOWN_NOTES))
    if failing:
        _write("", [f"{len(failing)} of {plan.num_todo} concepts to do would fail, or pictures of them"])
    if num_to_learn := plan.num_todo:
        rate = read_rate(store)
        estimate = rate.describe(num_to_learn, digest(settings), config.report) if rate else NO_RATE
        _write("estimate: ", [estimate])
    _write("", [describe_counts(plan, selection, prompts, config.output)])
    if to_retry := concepts_to_retry(store, plan, selection):
        _write("", [f"{len(to_retry)} below the gate would be tried again"])
    stats = RunStats(count_rows(config.manifest), failures=failing, known_before=read_known(store))
    outcome = outcome_of(config, stats, plan)
    _write("", filter(None, [outcome.describe(config)]))
    is_refused = prune is not None and not _describe_pruning(find_leftovers(store, config.manifest, plan), prune)
    return FAILED if plan.damaged or stray or is_refused else outcome.exit_code


def describe_counts(plan: Plan, selection: Selection, prompts: Sequence[Prompt], output: str) -> str:
    """Return the counts of the plan in one line."""
    return (
        f"{plan.num_done} done, {plan.num_todo} to do, {describe_left_out(plan, selection)}{len(plan.bad)} bad rows, "
        f"{len(prompts)} prompts; output {redact(output)}"
    )


def notes_on(config: RunConfig, prompts: Sequence[Prompt]) -> list[str]:
    """Return remarks on the model, the manifest, and the texts of bulk and sample prompts."""
    texts = [text for prompt in prompts for text in (prompt.text, prompt.negative)]
    texts += [config.generation.negative_prompt, *config.grid.prompts, *config.grid.style_prompts]
    notes = (demo_note(config), demo_budget_note(config), *manifest_notes(config.manifest), *prompt_notes(texts))
    return [note for note in notes if note]


def stray_prompts(config: RunConfig, store: RunStore, prompts: Sequence[Prompt]) -> list[str]:
    """Return a remark on each concept of a prompt that neither the manifest nor the output has."""
    if not unknown_concepts(prompts, concept_ids(config.manifest)):
        return []
    in_output = (path.split("/")[1] for path, _ in store.scan("concepts"))
    return unknown_concepts(prompts, chain(concept_ids(config.manifest), in_output))


def _print_failures(bad: Sequence[BadRow], findings: Iterable[Finding], stray: Iterable[str], plan: Plan) -> None:
    """Print bad rows, damaged results and what else would fail."""
    _write("bad row: ", grouped(((place_of(row), row.reason) for row in bad), _SHOWN))
    _write("", grouped(((name, redact(damage)) for name, damage in plan.damaged.items()), _SHOWN))
    fatal = [("", remark) for remark in stray]
    fatal += [(finding.concept_id, finding.text) for finding in findings if finding.is_fatal]
    _write("would fail: ", grouped(fatal, _SHOWN))


def _describe_pruning(leftovers: Leftovers, bound: Bound) -> bool:
    """Print what `--prune` would delete; return whether the bound allows it."""
    _write("--prune would delete ", leftovers.lines())
    try:
        leftovers.check(bound)
    except ValueError as error:
        _write("would fail: ", [str(error)])
        return False
    return True


def _write(begin: str, lines: Iterable[str]) -> None:
    sys.stdout.write("".join(f"{one_line(begin + line)}\n" for line in lines))
