"""What the engine promises holds for every method: each test runs under every configuration in `METHODS`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.toy_backbone import ALPHAS_CUMPROD, DIMS, MAX_LENGTH, ToyBackbone
from textual_inversion.augment_config import AugmentConfig
from textual_inversion.concept import Concept, LearnedEmbedding
from textual_inversion.config import AdapterConfig, InversionConfig, PenaltyConfig, StopConfig, TimestepConfig
from textual_inversion.engine import Assignment, Engine, Outcome, SlotState
from textual_inversion.initialise import augmentation_rows, initial_rows
from textual_inversion.latents import EncodedViews
from textual_inversion.lora import initial_adapter
from textual_inversion.paired_augment import TRANSFORM_SETS, Augmentation
from textual_inversion.rng import generator_for

BACKBONE = ToyBackbone()
TOKENS = TRANSFORM_SETS["release"].tokens
STEPS, SEED = 7, 5
PIXELS = (3, BACKBONE.resolution, BACKBONE.resolution)

LORA = AdapterConfig(kind="lora", rank=2, targets=("fc2",), learning_rate=0.01)

CROSS_ATTENTION = dataclasses.replace(LORA, kind="causal", targets=("fc2", "cross_attention"))

METHODS: dict[str, dict[str, object]] = {
    "plain": {},
    "lora with knowledge preservation": {"adapter": LORA, "penalties": PenaltyConfig(knowledge=0.1)},
    "causal adapter with class cue": {"adapter": dataclasses.replace(LORA, kind="causal"), "class_cue": True},
    "cross-attention adapter": {"adapter": CROSS_ATTENTION},
    "progressive": {"progressive": True, "weight_decay": 0.1},
    "per-image tokens": {"per_image_tokens": True},
    "textboost as released": {
        "learning_rate_schedule": "linear", "templates": "textboost", "max_grad_norm": 0.0,
        "adapter": dataclasses.replace(LORA, weight_decay=0.1, max_grad_norm=0.01),
    },
    "paired augmentation": {"augment": AugmentConfig(paired=2), "adapter": LORA},
    "riemannian": {"optimizer": "riemannian", "norm_control": "sphere", "direction_prior": 0.1, "norm_cap": 2.0},
    "progressive riemannian": {"optimizer": "riemannian", "norm_control": "sphere", "progressive": True},
    "distances": {"penalties": PenaltyConfig(class_distance=0.1, start_distance=0.01)},
    "clip": {"penalties": PenaltyConfig(clip=0.3)},
    "snr timesteps, min-snr weights": {"timesteps": TimestepConfig(sampler="snr", min_snr_gamma=5.0)},
    "range of timesteps": {"timesteps": TimestepConfig(sampler="range", low=50, high=90)},
    "dvar": {"stop": StopConfig(method="dvar", check_every_steps=1, window=2, variance_ratio=0.5)},
    "best of the frozen losses": {"stop": StopConfig(keep_best=True, check_every_steps=2), "adapter": LORA},
}  # fmt: skip


def config(name: str, **changes: object) -> InversionConfig:
    return InversionConfig(
        **{"steps": STEPS, "batch_size": 2, "learning_rate": 0.05, "max_grad_norm": 0.05, **METHODS[name], **changes}
    )


def assignment(number: int, state: SlotState | None = None, start: LearnedEmbedding | None = None) -> Assignment:
    """Concepts of one to three vectors, each of two or three photos with two views; some with masks and captions."""
    photos = 2 + number % 2
    concept = Concept(
        concept_id=f"c{number}",
        placeholder_token=f"<c{number}>",
        images=("x",) * photos,
        initializer="stuffed toy" if number % 2 else "",
        category="style" if number == 2 else "object",
        num_vectors=1 + number % 3,
        captions=tuple(f"a {{}} on sofa {i}" for i in range(photos)) if number == 3 else (),
    )
    generator = torch.Generator().manual_seed(number)
    names = sorted(TOKENS)
    views = EncodedViews(
        moments=torch.rand(2 * photos, 2, *BACKBONE.latent_shape, generator=generator),
        photo_indices=tuple(i // 2 for i in range(2 * photos)),
        augmentations=tuple(
            Augmentation(before=(names[i % 12],)[: i % 3], after=(names[(5 * i + 1) % 12],)[: i % 3 // 2])
            for i in range(2 * photos)
        ),
        masks=torch.rand(2 * photos, 1, *BACKBONE.latent_shape[1:], generator=generator) if number == 1 else None,
    )
    return Assignment(concept, views, state, start)


def image_features(pixels: Tensor) -> Tensor:
    """Stands in for CLIP."""
    weight = torch.randn(5, pixels[0].numel(), generator=torch.Generator().manual_seed(4))
    return pixels.flatten(1) @ weight.T


def run(
    assignments: Sequence[Assignment],
    settings: InversionConfig,
    *,
    slots: int = 1,
    slots_per_pass: int = 1,
    on_checkpoint: Callable[[Concept, SlotState], None] | None = None,
    **options: Any,
) -> dict[str, Outcome]:
    waiting, outcomes = iter(assignments), {}
    options |= {"slots_per_pass": slots_per_pass, "image_features": image_features}
    engine = Engine(BACKBONE, settings, slots=slots, seed=SEED, **options)
    engine.run(
        lambda _wait: next(waiting, None),
        lambda outcome: outcomes.update({outcome.concept.concept_id: outcome}),
        on_checkpoint,
        1 if on_checkpoint else 0,
    )
    return outcomes


def contents(outcome: Outcome) -> dict[str, list[float]]:
    """Everything that must be the same, exactly."""
    assert outcome.embedding is not None, outcome.error
    tensors = {**outcome.embedding.vectors, "curve": outcome.curve, "looks": outcome.eval_losses}
    if outcome.embedding.adapter:
        for name, (down, up) in outcome.embedding.adapter.tensors.items():
            tensors |= {f"{name} down": down, f"{name} up": up}
    return {name: tensor.flatten().tolist() for name, tensor in tensors.items()} | {
        "step": [float(outcome.embedding.metadata["step"]), outcome.steps]
    }


@pytest.mark.parametrize("name", METHODS)
def test_alone_equals_in_company_in_any_order(name: str) -> None:
    alone = {f"c{number}": contents(run([assignment(number)], config(name))[f"c{number}"]) for number in range(4)}
    for slots, order in ((2, [0, 1, 2, 3]), (3, [3, 1, 0, 2])):
        together = run([assignment(number) for number in order], config(name), slots=slots)
        assert {each: contents(outcome) for each, outcome in together.items()} == alone


@pytest.mark.parametrize("name", METHODS)
def test_resuming_at_any_step_equals_no_interruption(name: str) -> None:
    saved: list[bytes] = []
    whole = run([assignment(2)], config(name), on_checkpoint=lambda _, state: saved.append(state.to_bytes()))["c2"]
    assert len(saved) == whole.steps - 1
    for data in saved:
        resumed = assignment(2, SlotState.from_bytes(data))
        after: list[bytes] = []
        outcomes = run(
            [assignment(0), resumed],
            config(name),
            slots=2,
            on_checkpoint=lambda c, state, after=after: (
                after.append(state.to_bytes()) if c.concept_id == "c2" else None
            ),
        )
        assert contents(outcomes["c2"]) == contents(whole)
        assert after == saved[len(saved) - len(after) :]


@pytest.mark.parametrize("name", METHODS)
def test_a_shared_pass_equals_passes_of_their_own_to_rounding(name: str) -> None:
    apart = run([assignment(number) for number in range(4)], config(name), slots=3)
    together = run([assignment(number) for number in range(4)], config(name), slots=3, slots_per_pass=4)
    for each, outcome in apart.items():
        other = contents(together[each])
        for part, values in contents(outcome).items():
            assert other[part] == pytest.approx(values, rel=2e-3, abs=2e-4)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "plain"])
def test_every_method_matters(name: str) -> None:
    plain = run([assignment(1)], config("plain"))["c1"]
    changed = run([assignment(1)], config(name))["c1"]
    assert changed.embedding.vectors["long"].tolist() != plain.embedding.vectors["long"].tolist()


def test_only_the_concepts_own_rows_are_kept() -> None:
    for name in ("per-image tokens", "paired augmentation"):
        outcome = run([assignment(2)], config(name))["c2"]
        shapes = {key: tuple(rows.shape) for key, rows in outcome.embedding.vectors.items()}
        assert shapes == {key: (3, dim) for key, dim in DIMS.items()}


def states(name: str, number: int, **changes: object) -> list[SlotState]:
    saved: list[SlotState] = []
    run([assignment(number)], config(name, **changes), on_checkpoint=lambda _, state: saved.append(state))
    return saved


def test_each_photos_row_moves_once_it_has_been_named() -> None:
    before, *_, after = states("per-image tokens", 1, steps=30)
    rows = after.parameters["long"] - before.start["long"]
    assert rows.shape == (2 + 3, DIMS["long"])  # two of the concept, one for each of three photos
    assert (rows.abs().sum(1) > 0).all()


def test_augmentation_rows_start_at_their_words_and_only_those_in_prompts_move() -> None:
    *_, after = states("paired augmentation", 1, steps=30)
    expected = augmentation_rows(BACKBONE, TOKENS)
    used = {name for augmentation in assignment(1).views.augmentations for name in augmentation.names}
    for key in DIMS:
        assert torch.equal(after.start[key][2:], expected[key])
        moved = (after.exp_avg[key][2:].abs().sum(1) > 0).tolist()
        assert moved == [name in used for name in TOKENS]


def test_progressive_vectors_join_in_turn() -> None:
    """Three vectors in seven steps: after 0, 3 and 5 of them."""
    initial = initial_rows(assignment(2).concept, BACKBONE, noise=0.0, seed=SEED)["long"]
    for state in states("progressive", 2):
        moved = (state.parameters["long"] != initial).any(1).tolist()
        assert moved == [state.step > joined for joined in (0, 3, 5)]
        assert (state.exp_avg["long"].abs().sum(1) > 0).tolist() == moved


def test_riemannian_rows_keep_their_norm_from_the_start() -> None:
    for state in states("riemannian", 2):
        for key, table in BACKBONE.token_tables.items():
            for rows in (state.start[key], state.parameters[key]):
                assert (rows.norm(dim=1) - 2.0 * table.mean_norm).abs().max() < 2e-6
            assert state.exp_avg[key].abs().sum() == 0


@pytest.mark.parametrize("control", ["clamp", "sphere"])
def test_the_cap_is_in_units_of_the_vocabularys_norm_and_the_adapter_knows_none(control: str) -> None:
    settings = config("plain", norm_control=control, norm_cap=0.5, adapter=dataclasses.replace(LORA, learning_rate=1.0))
    outcome = run([assignment(2)], settings)["c2"]
    for key, table in BACKBONE.token_tables.items():
        norms = outcome.embedding.vectors[key].norm(dim=1)
        torch.testing.assert_close(norms, torch.full((3,), 0.5 * table.mean_norm))
    _, up = outcome.embedding.adapter.tensors["long.fc2"]
    assert up.norm(dim=1).max() > 2 * 0.5 * BACKBONE.token_tables["long"].mean_norm


def test_the_adapter_starts_as_the_released_code_does_and_both_halves_learn() -> None:
    first, *_ = states("causal adapter with class cue", 1)
    outcome = run([assignment(1)], config("causal adapter with class cue"))["c1"]
    adapter = outcome.embedding.adapter
    assert (adapter.kind, adapter.scale) == ("causal", 2.0)  # alpha 4, rank 2
    generator = generator_for(SEED, "c1", "adapter")
    initial = initial_adapter(BACKBONE.adapter_layers, ("fc2",), 2, generator)
    assert adapter.tensors.keys() == initial.keys()
    for name, (down, up) in adapter.tensors.items():
        assert down.shape == initial[name][0].shape
        # Adam's first steps are of the learning rate's size, and seven of them no more than seven times that
        assert 0 < (down - initial[name][0]).abs().max() < 7 * 1.01 * LORA.learning_rate
        assert 0 < up.abs().max() < 7 * 1.01 * LORA.learning_rate
    assert "adapter" not in first.start


def test_a_start_with_its_adapter() -> None:
    learned = run([assignment(1)], config("causal adapter with class cue"))["c1"].embedding
    saved: list[SlotState] = []
    settings = config(
        "causal adapter with class cue", adapter=dataclasses.replace(LORA, kind="causal", learning_rate=1e-9)
    )
    again = run([assignment(1, start=learned)], settings, on_checkpoint=lambda _, state: saved.append(state))["c1"]
    for name, (down, _up) in learned.adapter.tensors.items():
        torch.testing.assert_close(again.embedding.adapter.tensors[name][0], down)
    refused = run([assignment(1, start=learned)], config("plain"))["c1"]
    assert "set adapter.kind to 'causal'" in refused.error
    other_rank = config("plain", adapter=dataclasses.replace(LORA, rank=3))
    assert (
        "does not fit the model or the adapter settings" in run([assignment(1, start=learned)], other_rank)["c1"].error
    )


def plain_step(settings: InversionConfig) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]], list[float]]:
    """TextBoost v1 without paired views in plain torch, with the engine's draws: one concept, its adapter and rows in
    `torch.optim.AdamW`, clipped together -> rows, adapter, losses."""
    from textual_inversion.families.base import stack_prompts
    from textual_inversion.knowledge import KnowledgePreservation, read_captions
    from textual_inversion.lora import AdapterBatch
    from textual_inversion.prompts import OBJECT_TEMPLATES, encode_prompt

    concept, views = assignment(1).concept, assignment(1).views
    rows = {key: value.requires_grad_() for key, value in initial_rows(concept, BACKBONE, noise=0.0, seed=SEED).items()}
    tensors = initial_adapter(BACKBONE.adapter_layers, ("fc2",), 2, generator_for(SEED, "c1", "adapter"))
    low_rank = {name: (down.requires_grad_(), up.requires_grad_()) for name, (down, up) in tensors.items()}
    parameters = [*rows.values(), *(half for pair in low_rank.values() for half in pair)]
    optimizer = torch.optim.AdamW(
        [
            {"params": list(rows.values()), "lr": settings.learning_rate},
            {"params": [half for pair in low_rank.values() for half in pair], "lr": settings.adapter.learning_rate},
        ],
        weight_decay=0.0,
    )
    knowledge = KnowledgePreservation(BACKBONE, read_captions(""))
    of_class, losses = knowledge.class_prompts(concept, "textual_inversion"), []
    for step in range(settings.steps):
        generator = generator_for(SEED, "c1", "step", step)
        view = torch.randint(len(views), (2,), generator=generator)
        eps, noise = (torch.randn(2, *BACKBONE.latent_shape, generator=generator) for _ in range(2))
        t = torch.randint(100, (2,), generator=generator)
        template = torch.randint(27, (2,), generator=generator)
        others = knowledge.draw(2, of_class, generator)

        def adapters() -> list[AdapterBatch]:
            return [
                AdapterBatch(
                    tensors={name: (down[None], up[None]) for name, (down, up) in low_rank.items()},
                    concept=torch.zeros(2, dtype=torch.long), scale=torch.tensor([2.0]),
                    positions=dict.fromkeys(DIMS, torch.ones(2, MAX_LENGTH, dtype=torch.bool)),
                )
            ]  # fmt: skip

        ids = stack_prompts(
            [encode_prompt(OBJECT_TEMPLATES[i], {"{}": range(2)}, BACKBONE.vocabularies) for i in template]
        )
        abar = ALPHAS_CUMPROD[t].view(2, 1, 1, 1)
        latents = views.moments[view, 0] + views.moments[view, 1] * eps
        x_t = abar.sqrt() * latents + (1 - abar).sqrt() * noise
        said = BACKBONE.predict(x_t, t, BACKBONE.encode_prompts(ids, rows, adapters()))
        mask = views.masks[view]
        error = ((said - noise).square() * mask).sum((1, 2, 3)) / (2 * mask.sum((1, 2, 3)))
        adapted = BACKBONE.encode_prompts(others.ids, {}, adapters()).hidden
        frozen = BACKBONE.encode_prompts(others.ids, {}).hidden
        loss = error.mean() + 0.1 * (1 - F.cosine_similarity(adapted, frozen, dim=-1)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    return rows, low_rank, losses


def test_textboost_v1_equals_a_plain_reference() -> None:
    settings = config("lora with knowledge preservation", norm_control="none")
    rows, low_rank, losses = plain_step(settings)
    outcome = run([assignment(1)], settings)["c1"]
    torch.testing.assert_close(outcome.curve[:, 1], torch.tensor(losses), rtol=1e-5, atol=1e-6)
    for key, value in rows.items():
        torch.testing.assert_close(outcome.embedding.vectors[key], value.detach(), rtol=0, atol=2e-5)
    for name, (down, up) in low_rank.items():
        torch.testing.assert_close(outcome.embedding.adapter.tensors[name][0], down.detach(), rtol=0, atol=2e-5)
        torch.testing.assert_close(outcome.embedding.adapter.tensors[name][1], up.detach(), rtol=0, atol=2e-5)


def test_dvar_ends_each_concept_when_its_own_frozen_loss_has_settled() -> None:
    stop = StopConfig(method="dvar", check_every_steps=1, window=5, variance_ratio=0.02)
    settings = config("plain", steps=40, adapter=LORA, stop=stop)
    outcomes = run([assignment(number) for number in range(4)], settings, slots=2)
    assert len({outcome.steps for outcome in outcomes.values()}) > 1
    for outcome in outcomes.values():
        looks = outcome.eval_losses
        assert looks[:, 0].tolist() == list(range(1, outcome.steps + 1))
        if outcome.steps < 40:
            losses = looks[:, 1].double()
            assert losses[-5:].var(correction=0) < 0.02 * losses.var(correction=0)


def test_the_frozen_batch_is_the_same_at_every_look() -> None:
    """With parameters that do not move, every look sees the same loss; the training loss is another at every step."""
    settings = config("dvar", learning_rate=1e-12, stop=StopConfig(check_every_steps=1, keep_best=True))
    outcome = run([assignment(0)], settings)["c0"]
    assert len(set(outcome.eval_losses[:, 1].tolist())) == 1
    assert len(set(outcome.curve[:, 1].tolist())) == STEPS
    assert outcome.embedding.metadata["step"] == "1"


def test_the_best_rows_are_those_of_the_least_frozen_loss() -> None:
    settings = config("best of the frozen losses", adapter=dataclasses.replace(LORA, learning_rate=0.3), steps=4)
    saved: dict[int, SlotState] = {}
    outcome = run([assignment(0)], settings, on_checkpoint=lambda _, state: saved.update({state.step: state}))["c0"]
    assert outcome.eval_losses[:, 0].tolist() == [2, 4]
    best = int(outcome.eval_losses[outcome.eval_losses[:, 1].argmin(), 0])
    assert best == 2, "a learning rate at which the last is not the best"
    assert outcome.steps == 4
    assert outcome.embedding.metadata["step"] == str(best)
    for key in DIMS:
        assert torch.equal(outcome.embedding.vectors[key], saved[best].parameters[key])
    ups = [up for _, up in outcome.embedding.adapter.tensors.values()]
    assert any(not torch.equal(up, torch.zeros_like(up)) for up in ups)


def test_a_look_costs_the_training_no_draws() -> None:
    looking = run([assignment(0)], config("plain", stop=StopConfig(keep_best=True, check_every_steps=1)))["c0"]
    assert torch.equal(looking.curve, run([assignment(0)], config("plain"))["c0"].curve)
    assert run([assignment(0)], config("plain"))["c0"].eval_losses.shape == (0, 2)


@pytest.mark.parametrize("name", ["dvar", "best of the frozen losses"])
def test_looks_that_are_read_later_end_a_concept_at_the_same_step_with_the_same_rows(name: str) -> None:
    at_once = {f"c{number}": contents(run([assignment(number)], config(name))[f"c{number}"]) for number in range(4)}
    later = run([assignment(number) for number in range(4)], config(name), slots=3, steps_ahead=100)
    assert {each: contents(outcome) for each, outcome in later.items()} == at_once


def test_a_look_is_a_pass_of_one_concept_and_its_batch_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at, purposes = [], []
    predict = BACKBONE.predict

    def predicting(noisy: Tensor, *rest: Any) -> Tensor:
        if not torch.is_grad_enabled():
            looked_at.append(noisy)
        return predict(noisy, *rest)

    def drawing(seed: int, concept_id: str, purpose: str, step: int = 0) -> torch.Generator:
        purposes.append(purpose)
        return generator_for(seed, concept_id, purpose, step)

    monkeypatch.setattr(BACKBONE, "predict", predicting)
    monkeypatch.setattr("textual_inversion.passes.generator_for", drawing)
    settings = config("plain", stop=StopConfig(keep_best=True, check_every_steps=2))
    outcomes = run([assignment(number) for number in range(3)], settings, slots=4, slots_per_pass=4)
    assert [outcome.eval_losses[:, 0].tolist() for outcome in outcomes.values()] == [[2, 4, 6, 7]] * 3
    assert [len(noisy) for noisy in looked_at] == [settings.batch_size] * 3 * 4
    assert len({noisy.numpy().tobytes() for noisy in looked_at}) == purposes.count("frozen") == 3


def test_too_many_photos_for_a_token_each() -> None:
    one = assignment(0)
    views = dataclasses.replace(one.views, photo_indices=(0, 1, 2, 40))
    failed = run([Assignment(one.concept, views)], config("per-image tokens"))["c0"]
    assert "41 photos are more than the 32" in failed.error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timesteps": TimestepConfig(sampler="range", low=500, high=900)}, "this model's schedule has 100 timesteps"),
        ({"adapter": dataclasses.replace(LORA, targets=("q_proj",))}, "no such layers"),
        ({"penalties": PenaltyConfig(clip=0.1)}, "needs a CLIP; name one as `extractor`"),
        ({"adapter": LORA, "penalties": PenaltyConfig(knowledge=0.1, captions="no/such/file")}, "no/such/file"),
    ],
)
def test_settings_that_do_not_go_with_the_model(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(BACKBONE, config("plain", **changes), slots=1, seed=0)
