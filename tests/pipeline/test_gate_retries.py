"""Concepts below the gate: tried again by the ladder, the best kept, wherever the run is interrupted."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from pipeline import gate_retries
from pipeline.config import RunConfig
from pipeline.config_file import load_config
from pipeline.gate_retries import Retries, decide, retry_rules
from pipeline.inputs.content_hash import content_hashes
from pipeline.inputs.manifest import read_manifest
from pipeline.ledger.digest import digest
from pipeline.ledger.done import find_done
from pipeline.ledger.gate import verdict
from pipeline.ledger.plan import ConceptTask, Plan, settings_of
from pipeline.ledger.records import ConceptRecord, Try, load_records, put_record, read_record
from pipeline.ledger.selection import ALL_CONCEPTS, Selection
from pipeline.report.run_stats import RetryStats
from pipeline.sample_config import GateConfig
from pipeline.store.storage import ConceptFolder, RunStore
from pipeline.times import now
from tests.pipeline.outputs import make_photos, put_manifest

RUNGS = ("seed", "seed + steps*2")
FIRST = {"good": 0.8, "poor": 0.1, "hopeless": 0.2}
"""CLIP-I of the first try; the initializer words have 0.5."""
AGAIN = {
    ("poor", "seed"): 0.3,
    ("poor", "seed + steps*2"): 0.7,
    ("hopeless", "seed"): 0.35,
    ("hopeless", "seed + steps*2"): 0.25,
}


@pytest.fixture(autouse=True)
def _light_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_retries, "current_settings", lambda config: settings_of(config, model_hash="m"))


class Learners:
    """Learn by a table of scores, as actors would; end the run after so many."""

    def __init__(self, store: RunStore, table: dict[tuple[str, str], float], at_most: int = 99) -> None:
        self.store, self.table, self.left = store, table, at_most
        self.learned: list[tuple[str, str, int]] = []

    def learn(self, config: RunConfig, task: ConceptTask, rung: str) -> ConceptRecord:
        self.left -= 1
        self.learned.append((task.concept.concept_id, rung, config.inversion.steps))
        clip_i = self.table[task.concept.concept_id, rung]
        return self.end(config, task, clip_i) if clip_i else self.fail(task)

    def end(self, config: RunConfig, task: ConceptTask, clip_i: float) -> ConceptRecord:
        scores = {"clip_i": clip_i, "clip_i_initializer": 0.5}
        record = ConceptRecord(
            concept_id=task.concept.concept_id,
            fingerprint=task.fingerprint,
            status="done",
            placeholder_token="<x>",
            scores=scores,
            inputs=task.inputs,
            steps=config.inversion.steps,
            finished_at=now(),
            gate=verdict(scores, config.gate),
        )
        if record.gate == "below" and config.gate.ladder:
            self.store.put(record.folder.ladder, b"{}")
        put_record(self.store, record)
        return record

    def fail(self, task: ConceptTask) -> ConceptRecord:
        return ConceptRecord(
            concept_id=task.concept.concept_id,
            fingerprint=task.fingerprint,
            status="failed",
            placeholder_token="<x>",
            error="the loss is not finite",
        )


def planned(config: RunConfig, store: RunStore) -> tuple[Plan, list[ConceptTask]]:
    done = find_done(store)
    settings = digest(settings_of(config, model_hash="m"))
    plan = Plan(settings, done.fingerprints, content_hashes, awaiting_retry=done.awaiting_retry)
    return plan, list(plan.tasks(read_manifest(config.manifest)))


def learned_once(store: RunStore, **gate: Any) -> RunConfig:
    """Three concepts, two of them below the gate."""
    manifest = put_manifest(store, make_photos(store, *FIRST))
    config = RunConfig(manifest=manifest, output=store.root, gate=GateConfig(ladder=RUNGS, **gate))
    for task in planned(config, store)[1]:
        Learners(store, {}).end(config, task, FIRST[task.concept.concept_id])
    return config


def again(config: RunConfig, store: RunStore, learners: Learners, chosen: Selection = ALL_CONCEPTS) -> RetryStats:
    plan, todo = planned(config, store)
    assert not todo
    counts = RetryStats()
    ended = learn_tries(config, store, plan, learners, counts, chosen)
    records = kept(config, store)
    assert len(ended) == counts.ended
    assert all(records[record.concept_id] == record for record in ended), "the last record of each"
    return counts


def learn_tries(
    config: RunConfig,
    store: RunStore,
    plan: Plan,
    learners: Learners,
    counts: RetryStats,
    chosen: Selection = ALL_CONCEPTS,
) -> list[ConceptRecord]:
    """Learn one try after the other, in the order in which they come up, and return the last records."""
    ended: list[ConceptRecord] = []
    retries = Retries(config, store, plan, chosen, counts, ended.append)
    queue = deque(retries.resumed())
    while queue and learners.left:
        task = queue.popleft()
        record = learners.learn(retries.settings[task.rung], task, config.gate.ladder[task.rung - 1])
        if (later := retries.next_try(task, record)) is not None:
            queue.append(later)
    return ended


def kept(config: RunConfig, store: RunStore) -> dict[str, ConceptRecord]:
    plan, _ = planned(config, store)
    return {record.concept_id: record for record in load_records(store, plan.carried)}


def test_the_best_try_is_kept_and_flagged(root: str) -> None:
    store = RunStore(root)
    config = learned_once(store)
    learners = Learners(store, AGAIN)
    counts = again(config, store, learners)

    steps = config.inversion.steps
    assert learners.learned == [
        ("poor", "seed", steps),
        ("hopeless", "seed", steps),
        ("poor", "seed + steps*2", 2 * steps),
        ("hopeless", "seed + steps*2", 2 * steps),
    ]
    assert (counts.tried, counts.passed, counts.better, counts.below, counts.waiting) == (4, 1, 1, 0, 0)
    assert counts.describe() == "2 (1 passed then, 1 better but still below)"

    records = kept(config, store)
    assert {name: (record.gate, record.scores["clip_i"]) for name, record in records.items()} == {
        "good": ("passed", 0.8),
        "poor": ("passed", 0.7),
        "hopeless": ("below", 0.35),
    }
    assert records["good"].tries == ()
    poor = records["poor"]
    assert [(each.rung, each.scores["clip_i"]) for each in poor.tries] == [("", 0.1), ("seed", 0.3), (RUNGS[1], 0.7)]
    assert poor.kept == poor.tries[2].fingerprint != poor.fingerprint
    assert poor.result == ConceptFolder("poor", poor.kept)
    assert poor.steps == 2 * steps
    assert read_record(store, poor.result).scores["clip_i"] == 0.7, "the try has a record of its own"
    assert not [path for path, _ in store.scan("concepts") if path.endswith("ladder.json")]
    settings = json.loads(store.get(f"settings/{read_record(store, poor.result).inputs['settings']}.json"))
    assert settings["inversion"]["steps"] == 2 * steps

    again(config, store, Learners(store, {}))  # nothing is tried twice


def test_a_ladder_ends_with_the_first_try_that_passes(root: str) -> None:
    store = RunStore(root)
    config = learned_once(store)
    table = {("poor", "seed"): 0.9, ("hopeless", "seed"): 0.3, ("hopeless", RUNGS[1]): 0.4}
    learners = Learners(store, table)
    again(config, store, learners)
    assert [(name, rung) for name, rung, _ in learners.learned] == list(table)


def test_a_concept_goes_on_at_once_whatever_the_others_do() -> None:
    store = RunStore("memory://at-once")
    manifest = put_manifest(store, make_photos(store, *FIRST))
    config = RunConfig(manifest=manifest, output=store.root, gate=GateConfig(ladder=RUNGS))
    plan, todo = planned(config, store)
    first = {task.concept.concept_id: task for task in todo}
    learners, counts = Learners(store, AGAIN), RetryStats()
    ended: list[ConceptRecord] = []
    retries = Retries(config, store, plan, ALL_CONCEPTS, counts, ended.append)

    task = retries.next_try(first["poor"], learners.end(config, first["poor"], FIRST["poor"]))
    for rung in (1, 2):
        assert task is not None
        assert (task.rung, task.concept, counts.waiting) == (rung, first["poor"].concept, 1)
        assert task.fingerprint == digest({**task.inputs}) != first["poor"].fingerprint
        task = retries.next_try(task, learners.learn(retries.settings[rung], task, RUNGS[rung - 1]))
    assert task is None
    assert [(record.concept_id, record.gate) for record in ended] == [("poor", "passed")]
    assert read_record(store, first["poor"].folder) == ended[0]
    assert not store.exists(first["poor"].folder.ladder)
    assert (counts.tried, counts.passed, counts.waiting) == (2, 1, 0)

    assert retries.next_try(first["hopeless"], learners.end(config, first["hopeless"], 0.2)) is not None
    assert list(retries.resumed()) == [], "these are no concepts of an earlier run"
    assert counts.waiting == 1


@pytest.mark.parametrize("stop_after", range(4))
def test_an_interrupted_ladder_goes_on(stop_after: int) -> None:
    calm, store = RunStore("memory://calm"), RunStore(f"memory://interrupted-{stop_after}")
    again(learned_once(calm), calm, Learners(calm, AGAIN))
    config = learned_once(store)
    first = Learners(store, AGAIN, at_most=stop_after)
    counts = again(config, store, first)
    is_settled = stop_after == 3  # poor, which passes by the last rule before hopeless is tried by it
    assert (counts.waiting, counts.learned_before) == (2 - is_settled, is_settled)
    assert kept(config, store)["poor"].gate == ("passed" if is_settled else "below"), "till then it shows what it was"

    second = Learners(store, AGAIN)
    assert again(config, store, second).learned_before == 2 - is_settled
    assert len(first.learned) + len(second.learned) == 4, "no try is made twice"
    shown = [
        {name: (r.gate, r.scores, r.steps) for name, r in kept(c, s).items()}
        for c, s in ((learned_once_config(calm), calm), (config, store))
    ]
    assert shown[0] == shown[1]


def test_tries_of_an_earlier_run_are_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    store = RunStore("memory://together")
    config = learned_once(store)
    again(config, store, Learners(store, AGAIN, at_most=2))  # a try of each of the two
    plan, _ = planned(config, store)
    reads: list[int] = []
    get_many = RunStore.get_many

    def count(store: RunStore, paths: Iterable[str]) -> dict[str, bytes | OSError]:
        wanted = list(paths)
        reads.append(len(wanted))
        return get_many(store, wanted)

    monkeypatch.setattr(RunStore, "get_many", count)
    monkeypatch.delattr(RunStore, "get")
    retries = Retries(config, store, plan, ALL_CONCEPTS, RetryStats(), lambda _: None)
    assert [(task.concept.concept_id, task.rung) for task in retries.resumed()] == [("poor", 2), ("hopeless", 2)]
    assert reads == [2, 2]


def test_a_try_whose_record_is_lost_after_the_plan_is_told() -> None:
    store = RunStore("memory://lost-try")
    config = learned_once(store)
    again(config, store, Learners(store, AGAIN, at_most=2))
    plan, _ = planned(config, store)
    for path, _ in list(store.scan("concepts/poor")):
        if path.endswith("record.json") and b'"kept": ""' in store.get(path) and b'"clip_i": 0.3' in store.get(path):
            store.delete(path)
            lost = path
    learners, counts = Learners(store, AGAIN), RetryStats()
    learn_tries(config, store, plan, learners, counts)
    assert [(name, rung) for name, rung, _ in learners.learned] == [("poor", RUNGS[1]), ("hopeless", RUNGS[1])]
    poor = kept(config, store)["poor"]
    assert poor.tries[1].error.startswith(f"{lost} cannot be read: ")
    assert poor.gate == "passed"


def learned_once_config(store: RunStore) -> RunConfig:
    return RunConfig(manifest=store.uri("m.parquet"), output=store.root, gate=GateConfig(ladder=RUNGS))


def test_a_try_that_fails_is_told_and_not_kept() -> None:
    store = RunStore("memory://failing")
    config = learned_once(store)
    counts = again(config, store, Learners(store, {**AGAIN, ("poor", "seed"): 0.0, ("poor", RUNGS[1]): 0.2}))
    poor = kept(config, store)["poor"]
    assert poor.tries[1].error == "the loss is not finite"
    assert (poor.scores["clip_i"], poor.gate) == (0.2, "below")
    assert counts.better == 2

    chosen = Selection(frozenset({"poor"}), retries_below_gate=True)  # asked for, it is tried once more
    assert again(config, store, Learners(store, {("poor", "seed"): 0.9}), chosen).passed == 1
    assert [each.error for each in kept(config, store)["poor"].tries] == ["", "", ""]


def test_photos_that_are_gone_keep_nobody_else_waiting() -> None:
    store = RunStore("memory://gone")
    config = learned_once(store)
    plan, _ = planned(config, store)
    store.delete("photos/hopeless-0.png")
    counts = RetryStats()
    learn_tries(config, store, plan, Learners(store, AGAIN), counts)
    assert (counts.passed, counts.below, counts.waiting) == (1, 0, 1)
    records = {record.concept_id: record for record in load_records(store, plan.carried)}
    assert records["poor"].gate == "passed"
    assert records["hopeless"].tries == (), "it waits until its photos are there again"


@pytest.mark.parametrize("earlier", ["0" * 32, "f" * 32])
def test_tries_that_are_left_of_earlier_photos_hide_no_present_ones(earlier: str) -> None:
    store = RunStore(f"memory://two-ladders-{earlier[0]}")
    config = learned_once(store)
    store.put(ConceptFolder("poor", earlier).ladder, b"{}")
    assert again(config, store, Learners(store, AGAIN)).passed == 1


def test_only_chosen_concepts_are_tried_again() -> None:
    store = RunStore("memory://chosen")
    config = learned_once(store)
    learners = Learners(store, AGAIN)
    again(config, store, learners, Selection(frozenset({"hopeless"})))
    assert {name for name, _, _ in learners.learned} == {"hopeless"}


def test_another_gate_makes_nothing_undone_until_it_is_asked_for() -> None:
    store = RunStore("memory://stricter")
    again(learned_once(store), store, Learners(store, AGAIN))
    strict = RunConfig(
        manifest=store.uri("m.parquet"), output=store.root, gate=GateConfig(min_clip_i=0.85, ladder=("seed=77",))
    )
    assert again(strict, store, Learners(store, {})).tried == 0

    table = {("good", "seed=77"): 0.9, ("poor", "seed=77"): 0.2, ("hopeless", "seed=77"): 0.1}
    chosen = Selection(frozenset(FIRST), retries_below_gate=True)
    counts = again(strict, store, Learners(store, table), chosen)
    assert (counts.tried, counts.passed) == (3, 1)
    records = kept(strict, store)
    assert {name: record.scores["clip_i"] for name, record in records.items()} == {
        "good": 0.9,
        "poor": 0.7,
        "hopeless": 0.35,  # earlier tries stay in the choice
    }
    assert len(records["poor"].tries) == 4


def test_so_many_at_most_are_tried_again() -> None:
    store = RunStore("memory://limited")
    config = learned_once(store)
    learners = Learners(store, AGAIN)
    counts = again(config, store, learners, Selection(frozenset({"hopeless", "poor"}), 1, retries_below_gate=True))
    assert len({name for name, _, _ in learners.learned}) == 1
    assert counts.ended == 1


def test_without_a_ladder_concepts_are_flagged_only() -> None:
    store = RunStore("memory://flagged")
    config = learned_once(store)
    flagged = RunConfig(manifest=config.manifest, output=store.root, gate=GateConfig(ladder=()))
    counts = again(flagged, store, Learners(store, {}))
    assert (counts.tried, counts.below) == (0, 2)
    assert kept(flagged, store)["poor"].gate == "below"


def test_rungs_change_the_runs_own_settings() -> None:
    ladder = ["seed", "seed + steps*1.5", "inversion.init.method=auto", "dvar"]
    settings = ["seed=5", "inversion.steps=50", "inversion.learning_rate=0.01", f"gate.ladder={json.dumps(ladder)}"]
    config = load_config(overrides=settings)
    seed, longer, auto, dvar = (rung.config for rung in retry_rules(config))
    assert (seed.seed, seed.inversion) == (6, config.inversion)
    assert (longer.seed, longer.inversion.steps, longer.inversion.learning_rate) == (7, 75, 0.01)
    assert (auto.seed, auto.inversion.init.method) == (5, "auto")
    assert dvar.inversion.stop.method == "dvar"
    assert not any(rung.config.gate.ladder for rung in retry_rules(config)), "a try is not tried again by itself"


@pytest.mark.parametrize(
    ("rung", "message"),
    [
        ("inversion.stepz=5", "inversion.stepz: no such setting"),
        ("no-such-recipe", "no such file, and the recipes are"),
        ("grid.images_per_prompt=9", "only `seed` and settings of `inversion`"),
        ("steps*0", "inversion.steps"),
    ],
)
def test_a_rung_that_makes_no_sense_is_named(rung: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"gate.ladder.*{message}"):
        retry_rules(RunConfig(gate=GateConfig(ladder=(rung,))))


def test_an_empty_part_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gate\.ladder"):
        GateConfig(ladder=("seed + ",))


def test_what_is_decided_on_a_concept() -> None:
    gate = GateConfig(min_clip_i=0.5)
    first = ConceptRecord(
        concept_id="cat",
        fingerprint="1" * 32,
        status="done",
        placeholder_token="<cat>",
        scores={"clip_i": 0.2},
        gate="below",
        steps=100,
    )
    better = Try(rung="seed", fingerprint="2" * 32, scores={"clip_i": 0.4}, steps=110)
    passing = Try(rung="steps*2", fingerprint="3" * 32, scores={"clip_i": 0.6}, steps=200)
    failed = Try(rung="auto", fingerprint="4" * 32, error="out of memory")
    assert decide(first, [], gate, is_end=False) is None
    assert decide(first, [better, failed], gate, is_end=False) is None

    record = decide(first, [better, passing], gate, is_end=False)
    assert record is not None
    assert (record.gate, record.kept, record.steps, record.scores) == ("passed", "3" * 32, 200, {"clip_i": 0.6})
    assert (record.fingerprint, [each.rung for each in record.tries]) == (first.fingerprint, ["", "seed", "steps*2"])

    cued = replace(passing, prompt_as="<cat> animal")
    record = decide(first, [better, cued], gate, is_end=False)
    assert record is not None
    assert record.name_in_prompts == "<cat> animal", "it is drawn as the try that is kept was learned"

    record = decide(first, [better, failed], gate, is_end=True)
    assert record is not None
    assert (record.gate, record.kept) == ("below", "2" * 32)
    again = decide(record, [], gate, is_end=True)
    assert again is not None
    assert (again.kept, [each.rung for each in again.tries]) == ("2" * 32, ["", "seed"]), (
        "a failed try may be tried again"
    )

    record = decide(first, [failed], gate, is_end=True)
    assert record is not None
    assert (record.gate, record.kept, record.steps) == ("below", "", 100)
