"""The training loop: several concepts learn their embedding rows at once; when one ends, its slot is refilled.

`Engine.run` is the only loop over optimizer steps in the project. `Engine` says what it guarantees about a result.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from textual_inversion.concept import Concept, LearnedEmbedding
from textual_inversion.config import InversionConfig, PenaltyConfig
from textual_inversion.errors import NUMERICS, ConceptError
from textual_inversion.families.base import Backbone
from textual_inversion.initialise import class_vectors
from textual_inversion.knowledge import KnowledgePreservation, read_captions
from textual_inversion.optim import adamw_, clip_gradients, gradient_norms, rate_factor, riemannian_sgd_
from textual_inversion.parameters import Layout, num_photos
from textual_inversion.passes import Passes
from textual_inversion.slot_state import SlotState, curve_tensor, eval_tensor, to_cpu
from textual_inversion.slots import Assignment, Outcome, Preview, Readback, Slot, SlotProgress, step_counts
from textual_inversion.stacks import Stacks
from textual_inversion.stopping import CurvePoint, StopRule, is_eval_step, stop_rule_from_config
from textual_inversion.training_data import ImageFeatures, TrainingData
from textual_inversion.transfer import start_readback

__all__ = ["Assignment", "Engine", "Outcome", "SlotState"]

LAST_GOOD_EVERY_STEPS = 100
"""Steps of a concept between two states that it can roll back to. Its own steps count, so a resume changes nothing."""

NextAssignment = Callable[[bool], Assignment | None]
OnOutcome = Callable[[Outcome], None]
OnCheckpoint = Callable[[Concept, SlotState], None]
OnStep = Callable[[Concept, CurvePoint], None]
OnPreview = Callable[[Sequence[Preview]], None]


class Engine:
    """Textual Inversion (Gal et al. 2022, Eq. 2) of several concepts at once, on one frozen backbone.

    Each slot holds one concept's parameters (`parameters.Layout`), Adam moments and step. Samples of different
    concepts share forward and backward passes; nothing else is shared:

    - a loss is averaged over its concept's samples and summed over concepts, so gradients are those of the concept
      alone; clipping, Adam's bias correction and norm control are per slot;
    - every draw is seeded by (seed, concept id, step), never by the slot or the time;
    - every pass of a step has the same shape, `slots_per_pass * batch_size` samples: a pass with fewer concepts is
      padded with copies of its first, whose gradient is dropped; an evaluation is a pass of one concept.

    **What is equal.** A concept's rows come from the same operations on the same shapes, whichever concepts the other
    slots hold; only the place of its samples in the batch may differ. Where the kernels treat all places alike, which
    `batch_invariance.learning_is_invariant` checks, a result is bit-for-bit the same alone, among others, in any order,
    in any slot and after any resume, given the same machine, library versions, number of threads and `slots_per_pass`.
    Where they do not, and between two values of `slots_per_pass` above 1, results are equal to rounding. With 1 a
    concept has passes of its own, and nothing depends on places or on the number of slots.
    """

    def __init__(
        self,
        backbone: Backbone,
        config: InversionConfig,
        *,
        slots: int,
        seed: int,
        stop_rule: StopRule | None = None,
        slots_per_pass: int | None = None,
        max_vectors: int = 16,
        steps_ahead: int | None = None,
        image_features: ImageFeatures | None = None,
    ) -> None:
        """Make the empty slots. Raises ValueError if the configuration does not go with the model.

        slots: number of concepts learned at a time.
        stop_rule: rule that ends a concept; None takes the configured one.
        slots_per_pass: number of concepts that share a forward and backward pass; None is all.
        max_vectors: most rows that a placeholder may stand for.
        steps_ahead: most steps that the host queues before it waits for the oldest one's losses; None is 0 on a CPU,
            else 16.
        image_features: image encoder that `penalties.clip` compares pictures by.
        """
        if slots < 1:
            raise ValueError(f"slots = {slots}: must be 1 or more")
        if config.penalties.clip and image_features is None:
            raise ValueError(f"penalties.clip = {config.penalties.clip}: needs a CLIP; name one as `extractor`")
        self._backbone = backbone
        self._config = config
        self._seed = seed
        self._stop_rule = stop_rule or stop_rule_from_config(config)
        default = 0 if backbone.device.type == "cpu" else 16
        self._steps_ahead = default if steps_ahead is None else steps_ahead
        self._image_features = image_features if config.penalties.clip else None
        self._knowledge = None
        if config.penalties.knowledge:
            self._knowledge = KnowledgePreservation(backbone, read_captions(config.penalties.captions))
        self._layout = Layout.from_config(backbone, config, max_vectors)
        self._slots: list[Slot | None] = [None] * slots
        self._readbacks: deque[Readback] = deque()
        self._save_all = False
        self._stop_requested = threading.Event()
        self.steps_taken = 0
        """Sum of the steps of all concepts."""
        self._stacks = Stacks(self._layout, slots)
        self._passes = Passes(
            self._layout,
            self._stacks,
            num_slots=slots,
            size=slots_per_pass or slots,
            seed=seed,
            image_features=self._image_features,
        )

    def run(
        self,
        next_assignment: NextAssignment,
        on_outcome: OnOutcome,
        on_checkpoint: OnCheckpoint | None = None,
        checkpoint_steps: int = 0,
        on_step: OnStep | None = None,
        on_preview: OnPreview | None = None,
        preview_steps: int = 0,
    ) -> None:
        """Learn the assignments that `next_assignment` returns, until it has none for an idle engine, or until `stop`.

        next_assignment(wait): called for each free slot. None with `wait` false means none yet; `wait` is true only
            while no concept is being learned, and None then ends the run.
        on_outcome: called once for each assignment, in the order in which they end.
        on_checkpoint: called every `checkpoint_steps` of a concept's own steps, with a copy of its state.
        on_step: called with each step's numbers when they have been read back, unless they are not finite.
        on_preview: called between two steps with the concepts that have taken 0, `preview_steps`, 2 * `preview_steps`,
            ... steps and take another, all in one call; learning waits for it. Once more after a resume or rollback.

        After a loss that is not finite its concept goes on from its last good state at a lower rate (`Slot.roll_back`).
        If that does not help, or if the assignment is bad, the concept alone ends, with an error in its outcome. An
        exception of a callback is raised here.
        """
        config = self._config
        passes = self._passes
        groups = self._stacks.groups
        learned = self._stacks.learned
        rows = self._stacks.rows
        is_stopped = self._stop_requested.is_set()
        while not is_stopped and self._refill(next_assignment, on_outcome):
            learning = [slot for slot in self._slots if slot]
            if on_preview and (due := [slot for slot in learning if slot.step % preview_steps == 0]):
                on_preview([self._preview(slot) for slot in due])

            # Draw, corrupt, predict, differentiate: in passes that several concepts may share.
            found = []
            for members in passes.cut(learning):
                values = self._stacks.leaves(passes.index(members))
                loss = passes.loss(members, values, passes.draw(members), config.penalties)
                found.append((loss.detach(), *torch.autograd.grad(loss.sum(), [values[name] for name in learned])))
            losses, *gradients = (passes.by_slot(learning, torch.cat(parts)) for parts in zip(*found, strict=True))
            grads = dict(zip(learned, gradients, strict=True))

            # Clip and step: for all slots at once, each by its own gradient norm and step count.
            grad_norms = gradient_norms(grads)
            is_finite = losses.isfinite() & grad_norms.isfinite()
            grads = self._clip(grads, grad_norms)
            is_placeholder_row = passes.is_placeholder_row(self._slots)
            counts, lr_scales, row_lr_scales = self._count_step(learning)
            for name, group in learned.items():
                if name in rows and config.optimizer == "riemannian":
                    prior = self._stacks.class_directions(name) * is_placeholder_row[..., None]
                    riemannian_sgd_(group, grads[name], counts, row_lr_scales, is_finite, prior, config.direction_prior)
                elif name in rows:
                    adamw_(group, grads[name], counts, row_lr_scales, is_finite, config)
                else:  # an adapter is trained as often as the first row
                    adamw_(group, grads[name], counts[:, :1], lr_scales, is_finite, config)
            row_norms = self._stacks.mean_norms(is_placeholder_row).where(is_finite, torch.nan)

            # Evaluate, and start to read back what the step came to; a few steps later it has arrived.
            evaluated, eval_losses = self._evaluate(learning)
            numbers = start_readback(torch.stack([losses, row_norms, eval_losses]))
            self._readbacks.append(Readback(learning, evaluated, numbers))

            # Read back, roll back, end, save.
            is_stopped = self._stop_requested.is_set()
            save_all = self._save_all or is_stopped
            self._save_all = False
            self._read_back(learning, checkpoint_steps, save_all, on_step)
            for slot in learning:
                if slot.error:
                    slot.roll_back(groups)
                elif slot.step % LAST_GOOD_EVERY_STEPS == 0:
                    slot.keep_as_last_good(groups)
                if slot.error or self._is_done(slot):
                    on_outcome(self._end(slot))
                elif on_checkpoint and (save_all or (checkpoint_steps and slot.step % checkpoint_steps == 0)):
                    on_checkpoint(slot.concept, slot.state(groups))
        self._slots = [None] * len(self._slots)

    def save_soon(self) -> None:
        """Hand every concept's state to `on_checkpoint` after the step under way. May be called on any thread."""
        self._save_all = True

    def stop(self) -> None:
        """End `run` after the step under way or the next, for good. May be called on any thread, also before `run`.

        A concept that ends with the last step goes to `on_outcome` as ever. Every other concept in a slot goes to
        `on_checkpoint`, however far its next checkpoint is; it has no outcome, and can be resumed from that state in
        another engine. A call of `next_assignment` that waits is not interrupted: its caller must let it return.
        """
        self._stop_requested.set()

    def embedding(self, concept: Concept, parameters: Mapping[str, Tensor], step: int) -> LearnedEmbedding:
        """Make a concept's embedding of its parameters, as a `SlotState` has them, after a step."""
        return self._layout.embedding(concept, parameters, {"step": str(step), "initializer": concept.initializer})

    def progress(self) -> list[SlotProgress]:
        """Return how far each concept in a slot is. May be called on any thread."""
        return [SlotProgress.of(slot) for slot in self._slots if slot]

    # Parts of a step.

    def _clip(self, grads: Mapping[str, Tensor], norms: Tensor) -> dict[str, Tensor]:
        """Clip each concept's gradient, as a whole (`norms` [slots]) or its adapter's alone, as configured."""
        clipped = clip_gradients(grads, norms, self._config.max_grad_norm)
        adapter = {name: grad for name, grad in clipped.items() if name not in self._stacks.rows}
        max_norm = self._config.adapter.max_grad_norm
        if not (adapter and max_norm):
            return clipped
        return clipped | clip_gradients(adapter, gradient_norms(adapter), max_norm)

    def _count_step(self, learning: list[Slot]) -> tuple[Tensor, Tensor, Tensor]:
        """Count one more step of each concept; return `step_counts` and `lr_scales` as in `optim`, the latter for an
        adapter and for the rows."""
        for slot in learning:
            slot.step += 1
        self.steps_taken += len(learning)
        schedule = self._config.learning_rate_schedule
        scales = [
            (slot.lr_scale, slot.lr_scale * rate_factor(schedule, slot.step, slot.config.steps)) if slot else (1.0, 1.0)
            for slot in self._slots
        ]
        lr_scales, row_lr_scales = torch.tensor(scales, dtype=torch.float64).T
        return step_counts(self._slots, self._layout.max_rows), lr_scales, row_lr_scales

    @torch.no_grad()
    def _evaluate(self, learning: list[Slot]) -> tuple[dict[Slot, Mapping[str, Tensor]], Tensor]:
        """Evaluate each concept that is due on its evaluation batch.

        Returns those concepts, each with a copy of its parameters if the best are kept, and the denoising losses
        [slots]. Each concept has a pass of its own: mostly one is due at a time.
        """
        evaluated: dict[Slot, Mapping[str, Tensor]] = {}
        losses = torch.zeros(len(self._slots), device=self._backbone.device)
        for slot in learning:
            if not is_eval_step(slot.config, slot.step):
                continue
            if slot.eval_batch is None:
                slot.eval_batch = self._passes.draw_of(slot, "frozen", 0)
            index = self._passes.index([slot])
            losses[index] = self._passes.loss([slot], self._stacks.leaves(index), slot.eval_batch, PenaltyConfig())
            evaluated[slot] = slot.parameters(self._stacks.groups) if self._config.stop.keep_best else {}
        return evaluated, losses

    def _read_back(self, learning: list[Slot], checkpoint_steps: int, read_all: bool, on_step: OnStep | None) -> None:
        """Read the numbers of steps that are more than `steps_ahead` old; all of them where a decision needs them.

        A decision is to end, save or roll back a concept. A rule that may end a concept is asked at once: else the
        concept would go on for as many steps as its neighbours happen to be apart, and its result depend on them.
        """
        intervals = [steps for steps in (LAST_GOOD_EVERY_STEPS, checkpoint_steps) if steps]
        for slot in learning:
            read_all |= slot.stop_rule.due(slot.step) or any(slot.step % steps == 0 for steps in intervals)
        while len(self._readbacks) > (0 if read_all or any(slot.error for slot in learning) else self._steps_ahead):
            readback = self._readbacks.popleft()
            readback.finish()
            for slot in readback.slots:
                if on_step and not slot.error:
                    on_step(slot.concept, slot.curve[-1])

    def _is_done(self, slot: Slot) -> bool:
        return slot.stop_rule.due(slot.step) and slot.stop_rule.stops(slot.curve, slot.eval_losses)

    # A slot's begin and end.

    def _refill(self, next_assignment: NextAssignment, on_outcome: OnOutcome) -> bool:
        """Fill the free slots as far as there is work; return false if no concept is being learned and none will be."""
        while None in self._slots:
            is_idle = not any(self._slots)
            assignment = next_assignment(is_idle)
            if assignment is None:
                return not is_idle
            try:
                slot = self._begin(assignment, self._slots.index(None))
            except ConceptError as error:
                on_outcome(Outcome(assignment.concept, None, 0, curve_tensor([]), 0.0, str(error), kind=error.kind))
                continue
            if self._is_done(slot):  # resumed after its last step, or to take none
                on_outcome(self._end(slot))
        return True

    def _begin(self, assignment: Assignment, slot_index: int) -> Slot:
        """Put a concept in a slot. Raises ConceptError, leaving the slot free, if the assignment cannot be learned."""
        concept = assignment.concept
        views = assignment.views
        backbone = self._backbone
        assignment.check(self._layout)
        config, stop_rule = self._config, self._stop_rule
        if assignment.steps is not None:
            config = replace(config, steps=assignment.steps)
            stop_rule = stop_rule_from_config(config)
        state = assignment.state or SlotState.initial(
            self._layout.initial_parameters(concept, num_photos(views), seed=self._seed, start=assignment.start)
        )
        data = TrainingData.from_views(concept, views, config, backbone, self._image_features, self._knowledge)
        slot = Slot.at_state(state, index=slot_index, concept=concept, config=config, stop_rule=stop_rule, data=data)
        self._stacks.write(slot_index, state, class_vectors(concept, backbone))
        self._slots[slot_index] = slot
        return slot

    def _preview(self, slot: Slot) -> Preview:
        parameters = to_cpu(slot.parameters(self._stacks.groups))
        return Preview(slot.concept, slot.step, self.embedding(slot.concept, parameters, slot.step))

    def _end(self, slot: Slot) -> Outcome:
        """Free the slot; return the concept's embedding, or its error."""
        self._slots[slot.index] = None
        embedding = None
        if not slot.error:
            step = slot.best_eval.step if slot.best else slot.step
            embedding = self.embedding(slot.concept, to_cpu(slot.best or slot.parameters(self._stacks.groups)), step)
        return Outcome(
            concept=slot.concept,
            embedding=embedding,
            steps=len(slot.curve),
            curve=curve_tensor(slot.curve),
            seconds=time.perf_counter() - slot.started,
            error=slot.error,
            eval_losses=eval_tensor(slot.eval_losses),
            setbacks=slot.setbacks,
            kind=NUMERICS if slot.error else None,
        )
