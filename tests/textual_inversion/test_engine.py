"""What the engine promises about a concept's result: on a toy model, where a step takes a millisecond."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.toy_backbone import DIMS, ToyBackbone, plain_views
from textual_inversion.batch_invariance import choose_slots_per_pass
from textual_inversion.concept import Concept, LearnedEmbedding
from textual_inversion.config import InitConfig, InversionConfig
from textual_inversion.engine import Assignment, Engine, Outcome, SlotState
from textual_inversion.families import load_backbone
from textual_inversion.families.base import Backbone
from textual_inversion.learning import learn
from textual_inversion.objective import Batch
from textual_inversion.slots import Preview
from textual_inversion.stopping import CurvePoint, EvalLoss
from textual_inversion.training_data import TrainingData

ROOT = Path(__file__).resolve().parents[2]
BACKBONE = ToyBackbone()
CONFIG = InversionConfig(steps=7, batch_size=2, learning_rate=0.02, max_grad_norm=0.05)
KEY = next(iter(DIMS))
"""A text encoder of the toy model."""


def assignment(number: int, **changes: object) -> Assignment:
    """Concepts of one to three vectors, with photos of their own."""
    concept = Concept(
        concept_id=f"c{number}",
        placeholder_token=f"<c{number}>",
        images=("x",),
        initializer="stuffed toy" if number % 2 else "",
        category="style" if number % 3 == 2 else "object",
        num_vectors=1 + number % 3,
    )
    generator = torch.Generator().manual_seed(number)
    moments = torch.rand(3 + number % 2, 2, *BACKBONE.latent_shape, generator=generator)
    return Assignment(dataclasses.replace(concept, **changes), plain_views(moments))


def run(
    assignments: Sequence[Assignment],
    *,
    slots: int,
    config: InversionConfig = CONFIG,
    on_checkpoint: Callable[[Concept, SlotState], None] | None = None,
    checkpoint_steps: int = 0,
    backbone: Backbone = BACKBONE,
    slots_per_pass: int = 1,
    **options: object,
) -> dict[str, Outcome]:
    """With passes of their own unless said: what is equal then does not depend on the kernels."""
    waiting, outcomes = iter(assignments), {}
    engine = Engine(backbone, config, slots=slots, seed=5, slots_per_pass=slots_per_pass, **options)
    engine.run(
        lambda _wait: next(waiting, None),
        lambda outcome: outcomes.update({outcome.concept.concept_id: outcome}),
        on_checkpoint,
        checkpoint_steps,
    )
    return outcomes


def vectors(outcome: Outcome) -> dict[str, bytes]:
    assert outcome.embedding is not None, outcome.error
    return {key: rows.numpy().tobytes() for key, rows in outcome.embedding.vectors.items()}


def same(one: Outcome, other: Outcome) -> bool:
    return vectors(one) == vectors(other) and torch.equal(one.curve, other.curve) and one.steps == other.steps


@pytest.fixture(scope="module")
def demo_backbone() -> Backbone:
    return load_backbone(str(ROOT / "demo/model"), device="cpu", precision="float32")


@pytest.fixture(scope="module")
def alone() -> dict[str, Outcome]:
    """Each of five concepts learned in an engine of its own."""
    return {f"c{number}": run([assignment(number)], slots=1)[f"c{number}"] for number in range(5)}


def test_an_assignment_may_have_steps_of_its_own(alone: dict[str, Outcome]) -> None:
    found = run([assignment(0), dataclasses.replace(assignment(1), steps=3)], slots=2)
    assert same(found["c0"], alone["c0"])
    assert same(found["c1"], run([assignment(1)], slots=1, config=dataclasses.replace(CONFIG, steps=3))["c1"])


def test_without_steps_the_start_is_the_result() -> None:
    config = dataclasses.replace(CONFIG, steps=0, init=InitConfig(method="encoder", encoder="e.safetensors"))
    start = LearnedEmbedding(placeholder_token="<c0>", vectors={key: torch.ones(1, dim) for key, dim in DIMS.items()})
    outcome = run([dataclasses.replace(assignment(0), start=start)], slots=1, config=config)["c0"]
    assert vectors(outcome) == {key: rows.numpy().tobytes() for key, rows in start.vectors.items()}
    assert (outcome.steps, tuple(outcome.curve.shape)) == (0, (0, 3))


def test_an_outcome(alone: dict[str, Outcome]) -> None:
    outcome = alone["c2"]
    assert outcome.error is None
    assert outcome.steps == CONFIG.steps
    assert outcome.embedding is not None
    assert outcome.embedding.placeholder_token == "<c2>"
    assert {key: tuple(rows.shape) for key, rows in outcome.embedding.vectors.items()} == {
        key: (3, dim) for key, dim in DIMS.items()
    }
    assert outcome.curve[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7]
    norms = torch.stack([rows.norm(dim=1).mean() for rows in outcome.embedding.vectors.values()])
    torch.testing.assert_close(outcome.curve[-1, 2], norms.mean())
    assert outcome.seconds > 0


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 2, 0, 3, 1]])
@pytest.mark.parametrize("slots", [1, 2, 3, 8])
def test_alone_equals_in_company_in_any_order(alone: dict[str, Outcome], slots: int, order: list[int]) -> None:
    together = run([assignment(number) for number in order], slots=slots)
    assert {name for name in together if same(together[name], alone[name])} == set(alone)


def test_company_that_comes_and_goes() -> None:
    """A slot is refilled while its neighbours are in the middle: different budgets make them end at other times."""

    class Staggered:
        def due(self, step: int) -> bool:
            return step >= 2

        def stops(self, curve: Sequence[CurvePoint], _eval_losses: Sequence[EvalLoss]) -> bool:
            return len(curve) >= 2 + round(1e4 * curve[0].loss) % 6  # decided by the concept itself

    several = [assignment(number) for number in range(7)]
    apart = {a.concept.concept_id: run([a], slots=1, stop_rule=Staggered()) for a in several}
    together = run(several, slots=3, stop_rule=Staggered())
    assert len({outcome.steps for outcome in together.values()}) > 2
    assert all(same(together[name], apart[name][name]) for name in together)


@pytest.mark.parametrize("model", ["tiny", "demo"])
@pytest.mark.parametrize("is_shared", [False, True], ids=["own passes", "shared passes"])
def test_alone_equals_in_company_on_a_diffusion_model(
    request: pytest.FixtureRequest, model: str, is_shared: bool
) -> None:
    """Also where concepts may share passes: in another place, beside others or beside copies of itself, before and
    after a resume."""
    torch.set_num_threads(1)
    backbone = request.getfixturevalue(f"{model}_backbone")
    config = InversionConfig(steps=3, batch_size=4 if model == "demo" else 2)
    slots_per_pass = choose_slots_per_pass(backbone, config, slots=2)[0] if is_shared else 1
    settings: dict[str, Any] = {"config": config, "backbone": backbone, "slots_per_pass": slots_per_pass}

    def work(number: int) -> Assignment:
        shape = (3, 2, *backbone.latent_shape)
        moments = torch.rand(shape, generator=torch.Generator().manual_seed(number))
        return Assignment(assignment(number).concept, plain_views(moments))

    saved: dict[str, SlotState] = {}
    together = run(
        [work(number) for number in (2, 0, 1)],
        slots=2,
        on_checkpoint=lambda concept, state: saved.setdefault(concept.concept_id, state),
        checkpoint_steps=2,
        **settings,
    )
    for number in range(3):
        by_itself = run([work(number)], slots=slots_per_pass, **settings)
        assert same(by_itself[f"c{number}"], together[f"c{number}"])
    resumed = [dataclasses.replace(work(number), state=saved[f"c{number}"]) for number in (1, 2)]
    again = run([work(0), *resumed], slots=2, **settings)
    assert all(same(again[name], together[name]) for name in together)


def test_a_shared_pass_equals_passes_of_their_own_to_rounding(alone: dict[str, Outcome]) -> None:
    """What accelerators do; four places for three concepts, then for one."""
    together = run([assignment(number) for number in range(4)], slots=3, slots_per_pass=4)
    for name, outcome in together.items():
        torch.testing.assert_close(outcome.curve, alone[name].curve, rtol=1e-4, atol=1e-5)
        assert outcome.embedding is not None
        for key, rows in outcome.embedding.vectors.items():
            torch.testing.assert_close(rows, alone[name].embedding.vectors[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("slots_per_pass", [1, 4])
def test_every_pass_has_the_same_shape(monkeypatch: pytest.MonkeyPatch, slots_per_pass: int) -> None:
    shapes: set[tuple[int, ...]] = set()
    predict = BACKBONE.predict

    def spy(noisy_latents: Tensor, *rest: object) -> Tensor:
        shapes.add(tuple(noisy_latents.shape))
        return predict(noisy_latents, *rest)

    monkeypatch.setattr(BACKBONE, "predict", spy)
    run([assignment(number) for number in range(5)], slots=4, slots_per_pass=slots_per_pass)
    assert shapes == {(slots_per_pass * CONFIG.batch_size, *BACKBONE.latent_shape)}


def test_resuming_at_any_step_equals_no_interruption(alone: dict[str, Outcome]) -> None:
    saved: list[bytes] = []
    run([assignment(2)], slots=2, on_checkpoint=lambda _, state: saved.append(state.to_bytes()), checkpoint_steps=1)
    assert len(saved) == CONFIG.steps - 1
    for data in saved:
        resumed = Assignment(assignment(2).concept, assignment(2).views, SlotState.from_bytes(data))
        after: list[bytes] = []
        outcome = run(
            [assignment(0), resumed, assignment(1)],
            slots=2,
            on_checkpoint=lambda c, state, after=after: (
                after.append(state.to_bytes()) if c.concept_id == "c2" else None
            ),
            checkpoint_steps=1,
        )["c2"]
        assert same(outcome, alone["c2"])
        assert after == saved[len(saved) - len(after) :]


def test_checkpoints_come_at_the_concepts_own_steps() -> None:
    seen: list[tuple[str, int, int]] = []
    run(
        [assignment(number) for number in range(3)],
        slots=2,
        on_checkpoint=lambda concept, state: seen.append((concept.concept_id, state.step, len(state.curve))),
        checkpoint_steps=3,
        steps_ahead=5,
    )
    assert sorted(seen) == [(f"c{number}", step, step) for number in range(3) for step in (3, 6)]


def test_a_state_saved_after_the_last_step_ends_at_once(alone: dict[str, Outcome]) -> None:
    longer = dataclasses.replace(CONFIG, steps=CONFIG.steps + 1)
    states: list[SlotState] = []
    run(
        [assignment(1)], slots=1, config=longer, on_checkpoint=lambda _, state: states.append(state), checkpoint_steps=7
    )
    resumed = Assignment(assignment(1).concept, assignment(1).views, states[0])
    assert same(run([resumed], slots=1)["c1"], alone["c1"])


@pytest.mark.parametrize("steps_ahead", [0, 3, 100])
def test_a_loss_that_is_not_finite_ends_that_concept_alone(alone: dict[str, Outcome], steps_ahead: int) -> None:
    broken = Assignment(assignment(1).concept, plain_views(assignment(1).views.moments * 1e30))
    outcomes = run([assignment(0), broken, assignment(2)], slots=3, steps_ahead=steps_ahead)
    failed = outcomes.pop("c1")
    assert failed.embedding is None
    assert failed.error
    assert "not finite at step 1" in failed.error
    assert failed.steps == len(failed.curve) == 1
    assert all(same(outcomes[name], alone[name]) for name in ("c0", "c2"))


def test_rows_do_not_move_at_a_step_that_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[Tensor] = []
    predict, encode_prompts = BACKBONE.predict, BACKBONE.encode_prompts

    def encoding(ids: Any, rows: Mapping[str, Tensor], *rest: Any) -> Any:
        steps.append(rows["long"].detach().clone())
        return encode_prompts(ids, rows, *rest)

    def predicting(*inputs: Any) -> Tensor:
        return predict(*inputs) * (torch.nan if len(steps) == 2 else 1)

    monkeypatch.setattr(BACKBONE, "encode_prompts", encoding)
    monkeypatch.setattr(BACKBONE, "predict", predicting)
    run([assignment(0)], slots=1, steps_ahead=3)
    assert not torch.equal(steps[0], steps[1])
    assert torch.equal(steps[1], steps[2])


def late_fault(monkeypatch: pytest.MonkeyPatch, *, at_step: int, times: int) -> Callable[[int], None]:
    """Concept c1's loss is not finite the first so many times that it takes this step; later it is, as if a lower rate
    had led it past the fault. Call what is returned with the number of times that a resumed concept has behind it."""
    draw, moments, left = TrainingData.draw, assignment(1).views.moments, times

    def faulty(self: TrainingData, generator: torch.Generator, size: int, step: int, *rest: Any) -> Batch:
        nonlocal left
        drawn = draw(self, generator, size, step, *rest)
        if step + 1 != at_step or not torch.equal(self.moments, moments) or left == 0:
            return drawn
        left -= 1
        return dataclasses.replace(drawn, latents=drawn.latents * torch.nan)

    def resume(faults: int) -> None:
        nonlocal left
        left = times - faults

    monkeypatch.setattr(TrainingData, "draw", faulty)
    return resume


@pytest.mark.parametrize("steps_ahead", [0, 3, 100])
def test_after_a_loss_that_is_not_finite_the_last_good_state_is_gone_on_from_more_slowly(
    alone: dict[str, Outcome], monkeypatch: pytest.MonkeyPatch, steps_ahead: int
) -> None:
    monkeypatch.setattr("textual_inversion.engine.LAST_GOOD_EVERY_STEPS", 2)
    late_fault(monkeypatch, at_step=6, times=2)
    outcomes = run([assignment(number) for number in range(3)], slots=3, steps_ahead=steps_ahead)
    assert all(same(outcomes[name], alone[name]) for name in ("c0", "c2"))
    slower = outcomes["c1"]
    assert slower.setbacks == 2
    assert slower.steps == len(slower.curve) == CONFIG.steps
    assert torch.equal(slower.curve[:4], alone["c1"].curve[:4])  # up to the last good state nothing is lost
    assert slower.curve.isfinite().all()
    assert vectors(slower) != vectors(alone["c1"])
    assert {outcome.setbacks for outcome in (outcomes["c0"], alone["c1"])} == {0}


def test_a_loss_that_is_known_late_sets_a_concept_back_to_the_same_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps taken meanwhile count for nothing."""
    monkeypatch.setattr("textual_inversion.engine.LAST_GOOD_EVERY_STEPS", 4)
    resume = late_fault(monkeypatch, at_step=6, times=1)
    several, longer = [assignment(number) for number in range(3)], dataclasses.replace(CONFIG, steps=12)
    at_once = run(several, slots=2, config=longer, steps_ahead=0)
    resume(0)
    late = run(several, slots=2, config=longer, steps_ahead=1)
    assert at_once["c1"].setbacks == 1
    assert all(same(late[name], at_once[name]) for name in at_once)


def test_setbacks_come_out_the_same_after_a_resume_at_any_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("textual_inversion.engine.LAST_GOOD_EVERY_STEPS", 2)
    resume = late_fault(monkeypatch, at_step=6, times=1)
    saved: list[bytes] = []
    whole = run([assignment(1)], slots=1, on_checkpoint=lambda _, s: saved.append(s.to_bytes()), checkpoint_steps=1)
    assert whole["c1"].setbacks == 1
    for data in saved:
        state = SlotState.from_bytes(data)
        resume(state.setbacks)
        resumed = Assignment(assignment(1).concept, assignment(1).views, state)
        assert same(run([resumed], slots=1)["c1"], whole["c1"])


def test_setbacks_are_bounded_and_then_the_concept_fails_alone(
    alone: dict[str, Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    late_fault(monkeypatch, at_step=3, times=3)
    outcomes = run([assignment(number) for number in range(3)], slots=2)
    assert all(same(outcomes[name], alone[name]) for name in ("c0", "c2"))
    assert outcomes["c1"].embedding is None
    assert outcomes["c1"].setbacks == 2
    assert "not finite at step 3" in (outcomes["c1"].error or "")
    assert "at a lower rate" in (outcomes["c1"].error or "")


def test_states_are_handed_over_at_once_when_asked_for(alone: dict[str, Outcome]) -> None:
    work, states, outcomes = iter([assignment(0), assignment(1)]), [], {}
    engine = Engine(BACKBONE, CONFIG, slots=2, seed=5, slots_per_pass=1, steps_ahead=100)

    def save(concept: Concept, state: SlotState) -> None:
        states.append((concept.concept_id, state.step))
        resumed = Assignment(
            assignment(int(concept.concept_id[1])).concept, assignment(int(concept.concept_id[1])).views
        )
        again = run([dataclasses.replace(resumed, state=SlotState.from_bytes(state.to_bytes()))], slots=1)
        assert same(again[concept.concept_id], alone[concept.concept_id])

    def next_assignment(_wait: bool) -> Assignment | None:
        engine.save_soon()
        return next(work, None)

    engine.run(next_assignment, lambda outcome: outcomes.update({outcome.concept.concept_id: outcome}), save)
    assert states == [("c0", 1), ("c1", 1)]
    assert all(same(outcomes[name], alone[name]) for name in ("c0", "c1"))


def test_a_stopped_engine_hands_over_what_is_in_its_slots(alone: dict[str, Outcome]) -> None:
    engine = Engine(BACKBONE, CONFIG, slots=2, seed=5, slots_per_pass=1, steps_ahead=100)
    work, states, outcomes = iter([assignment(number) for number in range(3)]), {}, []

    def stopping(_wait: bool) -> Assignment | None:
        if (one := next(work)).concept.concept_id == "c1":
            engine.stop()
        return one

    engine.run(stopping, outcomes.append, lambda concept, state: states.update({concept.concept_id: state}))
    assert {name: state.step for name, state in states.items()} == {"c0": 1, "c1": 1}
    assert (outcomes, engine.progress()) == ([], [])
    assert next(work).concept.concept_id == "c2"
    engine.run(lambda _wait: pytest.fail("asked for more"), outcomes.append)
    again = run([dataclasses.replace(assignment(number), state=states[f"c{number}"]) for number in range(2)], slots=2)
    assert all(same(again[name], alone[name]) for name in states)


def test_stopping_takes_no_outcome_away(alone: dict[str, Outcome]) -> None:
    """The last step of a concept is its last, stopped or not."""
    engine = Engine(BACKBONE, CONFIG, slots=1, seed=5, slots_per_pass=1)
    work, outcomes = iter([assignment(1)]), []

    def checkpointed(_concept: Concept, state: SlotState) -> None:
        if state.step == CONFIG.steps - 1:
            engine.stop()

    engine.run(lambda _: next(work), outcomes.append, checkpointed, checkpoint_steps=1)
    assert [outcome.error for outcome in outcomes] == [None]
    assert same(outcomes[0], alone["c1"])


def bad_assignments() -> dict[str, Assignment]:
    good = assignment(1)
    state = dataclasses.replace(SlotState.initial({}), step=1, curve=torch.ones(1, 3))
    wrong_start = LearnedEmbedding(placeholder_token="<old>", vectors={})
    return {
        "too many vectors": assignment(1, num_vectors=17),
        "prompt too long": assignment(1, num_vectors=16, category="style"),
        "moments of another model": Assignment(good.concept, plain_views(torch.zeros(3, 2, 4, 8, 8))),
        "no views": Assignment(good.concept, plain_views(good.views.moments[:0])),
        "nan": Assignment(good.concept, plain_views(good.views.moments * torch.nan)),
        "state of another model": Assignment(good.concept, good.views, state),
        "state without its curve": Assignment(
            good.concept, good.views, dataclasses.replace(state, curve=torch.ones(0, 3))
        ),
        "start of another model": Assignment(good.concept, good.views, start=wrong_start),
    }


@pytest.mark.parametrize("name", list(bad_assignments()))
def test_a_bad_assignment_ends_alone_and_says_why(alone: dict[str, Outcome], name: str) -> None:
    outcomes = run([assignment(0), bad_assignments()[name], assignment(2)], slots=2)
    failed = outcomes.pop("c1")
    assert failed.error
    assert failed.embedding is None
    assert failed.steps == 0
    assert all(same(outcomes[name], alone[name]) for name in ("c0", "c2"))


def test_waiting_is_asked_for_only_when_idle() -> None:
    """Work that arrives late: nothing at first for the second slot, a wait once both are free."""
    asked: list[bool] = []
    supply = [assignment(0), None, assignment(1), None, None, None]
    outcomes: list[Outcome] = []

    def next_assignment(wait: bool) -> Assignment | None:
        asked.append(wait)
        return supply.pop(0) if supply else None

    Engine(BACKBONE, CONFIG, slots=2, seed=5).run(next_assignment, outcomes.append)
    assert [outcome.concept.concept_id for outcome in outcomes] == ["c0", "c1"]
    assert asked[:3] == [True, False, False]
    assert asked[-1] is True
    assert asked.count(True) == 2


def test_a_callbacks_error_is_the_callers() -> None:
    def broken(_outcome: Outcome) -> None:
        raise RuntimeError("disk full")

    work = iter([assignment(0)])
    with pytest.raises(RuntimeError, match="disk full"):
        Engine(BACKBONE, CONFIG, slots=1, seed=0).run(lambda _: next(work, None), broken)


@pytest.mark.parametrize("change", [{"class_cue": True}, {"init": InitConfig(noise=0.5)}, {"norm_control": "sphere"}])
def test_settings_matter(alone: dict[str, Outcome], change: dict[str, object]) -> None:
    changed = run([assignment(1)], slots=1, config=dataclasses.replace(CONFIG, **change))["c1"]
    assert vectors(changed) != vectors(alone["c1"])


def test_the_seed_and_the_concepts_name_decide_the_draws(alone: dict[str, Outcome]) -> None:
    renamed = assignment(1, concept_id="other")
    assert vectors(run([renamed], slots=1)["other"]) != vectors(alone["c1"])
    respelled = assignment(1, placeholder_token="a")  # how the placeholder is spelled does not matter
    assert vectors(run([respelled], slots=1)["c1"]) == vectors(alone["c1"])


def test_learning_lowers_the_loss() -> None:
    config = InversionConfig(steps=150, batch_size=8, learning_rate=0.05, norm_control="none")
    curve = run([assignment(0)], slots=1, config=config)["c0"].curve
    assert curve[-30:, 1].mean() < 0.9 * curve[:30, 1].mean()


def test_at_least_one_slot() -> None:
    with pytest.raises(ValueError, match="slots = 0"):
        Engine(BACKBONE, CONFIG, slots=0, seed=0)


def pictures(seed: int) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (10, 12, 3), dtype=np.uint8)) for _ in range(2)]


def test_learn() -> None:
    concepts = [(assignment(number).concept, pictures(number)) for number in range(3)]
    learned = learn(BACKBONE, concepts, CONFIG, slots=2, seed=3)
    assert [embedding.placeholder_token for embedding in learned] == ["<c0>", "<c1>", "<c2>"]
    again = learn(BACKBONE, concepts[::-1], CONFIG, slots=2, seed=3)[::-1]
    for one, other in zip(learned, again, strict=True):
        assert all(torch.equal(one.vectors[key], other.vectors[key]) for key in DIMS)
    assert learn(BACKBONE, [], CONFIG) == []


def test_learn_names_what_failed() -> None:
    with pytest.raises(ValueError, match=r"concept 'c1': num_vectors 17"):
        learn(BACKBONE, [(assignment(1, num_vectors=17).concept, pictures(0))], CONFIG)


def test_previews_come_at_their_steps_together_and_change_nothing(alone: dict[str, Outcome]) -> None:
    seen: list[list[tuple[str, int]]] = []
    rows: dict[tuple[str, int], Tensor] = {}

    def look(previews: Sequence[Preview]) -> None:
        torch.rand(7)  # as drawing may
        seen.append([(each.concept.concept_id, each.step) for each in previews])
        for concept, step, embedding in previews:
            rows[concept.concept_id, step] = embedding.vectors[KEY]
            assert embedding.metadata["step"] == str(step)

    waiting, outcomes = iter([assignment(number) for number in range(3)]), dict[str, Outcome]()
    engine = Engine(BACKBONE, CONFIG, slots=2, seed=5, slots_per_pass=1, steps_ahead=100)
    engine.run(
        lambda _wait: next(waiting, None),
        lambda outcome: outcomes.update({outcome.concept.concept_id: outcome}),
        on_preview=look,
        preview_steps=3,
    )
    first = [[("c0", step), ("c1", step)] for step in (0, 3, 6)]
    assert seen == [*first, [("c2", 0)], [("c2", 3)], [("c2", 6)]]
    assert all(same(outcomes[name], alone[name]) for name in outcomes)
    assert not torch.equal(rows["c0", 0], rows["c0", 3])
    states: dict[int, SlotState] = {}
    run([assignment(0)], slots=1, on_checkpoint=lambda _, state: states.update({state.step: state}), checkpoint_steps=3)
    assert torch.equal(rows["c0", 3], states[3].parameters[KEY][: len(rows["c0", 3])])
