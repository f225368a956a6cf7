"""THE loop: several concepts learn their embedding rows in one batch; when one ends, its slot is refilled.

The only place in the project that steps an optimizer. See `Engine` for what is guaranteed about a concept's result.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from textual_inversion.concept import Concept
from textual_inversion.config import InversionConfig, PenaltyConfig
from textual_inversion.errors import NUMERICS, ConceptError
from textual_inversion.families.base import Backbone
from textual_inversion.initialise import class_vectors
from textual_inversion.knowledge import KnowledgePreservation, read_captions
from textual_inversion.objective import Batch, Trained, join, objective, per_concept
from textual_inversion.optim import adamw_, clip_scales, control_norms, gradient_norms, riemannian_
from textual_inversion.parameters import Layout, num_photos
from textual_inversion.rng import generator_for
from textual_inversion.slots import (
    GOOD_EVERY_STEPS,
    Assignment,
    Outcome,
    PendingReadback,
    Slot,
    SlotState,
    curve_points,
    curve_tensor,
    eval_points,
    eval_tensor,
    on_cpu,
)
from textual_inversion.stopping import StopRule, is_eval_step, stop_rule_from_config
from textual_inversion.timesteps import sampler
from textual_inversion.training_data import ImageFeatures, material
from textual_inversion.transfer import start_readback, to_device

__all__ = ["Assignment", "Engine", "Outcome", "SlotState"]

NextAssignment = Callable[[bool], Assignment | None]
OnOutcome = Callable[[Outcome], None]
OnCheckpoint = Callable[[Concept, SlotState], None]


class Engine:
    """Textual Inversion (Gal et al. 2022, Eq. 2) of several concepts at once, on one frozen backbone.

    Each slot holds one concept's parameters (`parameters.Layout`), Adam moments and step. Samples of different
    concepts share forward and backward passes; nothing else is shared:

    - a loss is averaged over its concept's samples and summed over concepts, so gradients are those of the concept
      alone; clipping, Adam's bias correction and norm control are per slot;
    - every draw is seeded by (seed, concept id, step), never by the slot or the time;
    - every pass of a step has the same shape, `slots_per_pass * batch_size` samples: missing concepts are made up with
      copies of a present one, whose gradient is dropped; a look at a frozen batch is a pass of one concept.

    **What is equal.** The arithmetic that makes a concept's rows is the same operations on the same shapes whoever
    sits in the other slots; only the place of its samples in the batch may be another. On a CPU with one torch thread
    the kernels treat all places alike (tried with 2, 4 and 8 concepts of 1 and 4 samples, torch 2.13): a result is
    bit-for-bit the same alone, in company, in any order, in any slot and after any resume, given the same machine,
    library versions and `slots_per_pass`. With more threads, or on a GPU, a library may sum a batch's parts in another
    order: equal to rounding. So it is with another `slots_per_pass`, for which other kernels may be chosen. With 1 a
    concept has passes of its own and nothing depends on places at all.
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
        """`slots`: concepts learned at a time. `slots_per_pass`: how many of them share a forward and backward pass;
        None is all. `max_vectors`: rows a placeholder may stand for. `steps_ahead`: which the host
        may be while losses are on their way to it; None is 0 on a CPU, else 16. `image_features`: what `penalties.clip`
        compares pictures by. Raises ValueError if the configuration does not go with the model."""
        if slots < 1:
            raise ValueError(f"slots = {slots}: must be 1 or more")
        if config.penalties.clip and image_features is None:
            raise ValueError(f"penalties.clip = {config.penalties.clip}: needs a CLIP; name one as `extractor`")
        self._backbone, self._config, self._seed = backbone, config, seed
        self._stop_rule = stop_rule or stop_rule_from_config(config)
        self._slots_per_pass = slots_per_pass or slots
        default = 0 if backbone.device.type == "cpu" else 16
        self._steps_ahead = default if steps_ahead is None else steps_ahead
        self._image_features = image_features if config.penalties.clip else None
        self._knowledge = None
        if config.penalties.knowledge:
            self._knowledge = KnowledgePreservation(backbone, read_captions(config.penalties.captions))
        self._sampler = sampler(config.timesteps, backbone.alphas_cumprod)
        self._layout = Layout.of(backbone, config, max_vectors)
        self._slots: list[Slot | None] = [None] * slots
        self._unread: deque[PendingReadback] = deque()
        # the few numbers that say who sits where are the same at nearly every step
        self._sent = lru_cache(maxsize=256)(lambda numbers: to_device(torch.tensor(numbers), backbone.device))
        self._save_all = False
        self._stop_requested = threading.Event()
        self.steps_taken = 0
        """By all its concepts together."""
        self._groups = self._layout.groups(slots)
        self._rows = {key: self._groups[key] for key in backbone.token_tables}
        # what the penalties hold rows to
        self._start = {key: torch.zeros_like(group.values) for key, group in self._rows.items()}
        self._class_vector = {key: torch.zeros_like(group.values[:, :1]) for key, group in self._rows.items()}

    def run(
        self,
        next_assignment: NextAssignment,
        on_outcome: OnOutcome,
        on_checkpoint: OnCheckpoint | None = None,
        checkpoint_steps: int = 0,
    ) -> None:
        """Learn whatever `next_assignment` hands out, until it has nothing for an engine that is idle.

        next_assignment(wait): asked for each free slot. None with `wait` false means nothing yet; `wait` is true
            only when no concept is being learned, and None then ends the run.
        on_outcome: called once for each assignment, in the order they end.
        on_checkpoint: called every `checkpoint_steps` of a concept's own steps, with a copy of its state.

        After a loss that is not finite its concept goes on from its last good state at a lower rate (`Slot.goes_back`);
        if that is no help, or the assignment bad, it ends alone, with an error in its outcome. What the callbacks raise
        is raised here. After `stop`, every concept still in a slot goes to `on_checkpoint` instead of `on_outcome`.
        """
        is_stopped = self._stop_requested.is_set()
        while not is_stopped and self._refill(next_assignment, on_outcome):
            learning = [slot for slot in self._slots if slot]
            losses, grads = self._losses_and_gradients(learning)
            norms = self._step(learning, losses, grads)
            looked, eval_losses = self._look(learning)
            self._unread.append(
                PendingReadback(learning, looked, start_readback(torch.stack([losses, norms, eval_losses])))
            )
            is_stopped = self._stop_requested.is_set()
            asked, self._save_all = self._save_all or is_stopped, False
            self._read(learning, checkpoint_steps, asked)
            for slot in learning:
                went_back = slot.goes_back(self._groups)
                if not went_back and (slot.error or self._is_done(slot)):
                    on_outcome(self._end(slot))
                elif on_checkpoint and (asked or (checkpoint_steps and slot.step % checkpoint_steps == 0)):
                    on_checkpoint(slot.concept, slot.state(self._groups))
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

    def losses(self) -> list[float]:
        """The last loss read of each concept in a slot. May be asked on any thread."""
        return [slot.curve[-1].loss for slot in self._slots if slot and slot.curve]

    # A step: for each pass sample, corrupt, predict, loss; then for all slots at once clip, step.

    def _losses_and_gradients(self, learning: list[Slot]) -> tuple[Tensor, dict[str, Tensor]]:
        """Each concept's loss [slots], and its gradient [slots, vectors, dim] per parameter; zero where idle."""
        losses = torch.zeros(len(self._slots), device=self._backbone.device)
        grads = {name: torch.zeros_like(group.values) for name, group in self._groups.items()}
        for part in self._passes(learning):
            places = self._places(part)
            loss, gradients = self._pass(part)
            losses[places] = loss[: len(part)]
            for grad, gradient in zip(grads.values(), gradients, strict=True):
                grad[places] = gradient[: len(part)]
        return losses, grads

    def _passes(self, slots: list[Slot]) -> list[list[Slot]]:
        return [slots[first : first + self._slots_per_pass] for first in range(0, len(slots), self._slots_per_pass)]

    def _pass(self, part: list[Slot]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One forward and backward pass -> losses [concepts], and a gradient [concepts, vectors, dim] per parameter."""
        part = self._made_up(part)
        places = self._places(part)
        values = {name: group.values[places].requires_grad_() for name, group in self._groups.items()}
        drawn = {slot: self._samples(slot, "step", slot.step) for slot in dict.fromkeys(part)}
        batch = join([drawn[slot] for slot in part], self._backbone.vocab_size, self._layout.max_rows)
        loss = self._objective(part, values, batch, self._config.penalties)
        return loss.detach(), torch.autograd.grad(loss.sum(), list(values.values()))

    def _places(self, part: Sequence[Slot]) -> Tensor:
        """[concepts] their indices in the stacks; on the device, as an index from the host would be waited for."""
        return self._sent(tuple(slot.place for slot in part))

    def _made_up(self, part: list[Slot]) -> list[Slot]:
        """Always `slots_per_pass` concepts: this part's, made up with its first."""
        return part + part[:1] * (self._slots_per_pass - len(part))

    def _objective(self, part: list[Slot], values: dict[str, Tensor], batch: Batch, penalties: PenaltyConfig) -> Tensor:
        """The loss of each concept [concepts] at these parameters, on a batch of theirs."""
        places, own = self._places(part), self._own(part)
        trained = Trained(
            rows={key: values[key] for key in self._rows},
            start={key: stack[places] for key, stack in self._start.items()},
            class_vector={key: stack[places] for key, stack in self._class_vector.items()},
            own=own,
            adapters=self._layout.adapters(values, batch.ids, own),
        )
        terms = objective(
            self._backbone,
            batch,
            trained,
            penalties,
            min_snr_gamma=self._config.timesteps.min_snr_gamma,
            image_features=self._image_features,
        )
        return per_concept(terms, len(part))

    def _samples(self, slot: Slot, purpose: str, step: int) -> Batch:
        """One concept's samples for this purpose at this step."""
        generator = generator_for(self._seed, slot.concept.concept_id, purpose, step)
        size, shape = self._config.batch_size, self._backbone.latent_shape
        return slot.material.draw(generator, size, step, shape, self._sampler)

    @torch.no_grad()
    def _step(self, learning: list[Slot], losses: Tensor, grads: dict[str, Tensor]) -> Tensor:
        """Move the parameters of every concept whose loss and gradient are finite; the others' stay as they are. The
        mean norm of each concept's rows [slots], or NaN where they stay."""
        own = self._own(self._slots)
        for slot in learning:
            slot.step += 1
        self.steps_taken += len(learning)
        row_ages = [self._row_ages(slot) for slot in self._slots]
        rates = [slot.rate if slot else 1.0 for slot in self._slots]
        grad_norms = gradient_norms(grads)
        sound = losses.isfinite() & grad_norms.isfinite()
        scale = clip_scales(grad_norms, self._config.max_grad_norm) if self._config.max_grad_norm else 1
        for name, group in self._groups.items():
            grad = grads[name] * scale
            if name in self._rows and self._config.optimizer == "riemannian":
                direction = control_norms(self._class_vector[name], "sphere", 1.0) * own[..., None]
                riemannian_(group, grad, row_ages, rates, sound, direction, self._config.direction_prior)
            else:
                ages = row_ages if name in self._rows else [[slot.step if slot else 0] for slot in self._slots]
                adamw_(group, grad, ages, rates, sound, self._config)
        norms = torch.stack([(group.values.norm(dim=2) * own).sum(1) for group in self._rows.values()]).mean(0)
        return (norms / own.sum(1).clamp(min=1)).where(sound, torch.nan)

    def _row_ages(self, slot: Slot | None) -> list[int]:
        """`optim.Ages` of a slot's rows: one for all, unless they join one by one."""
        step = slot.step if slot else 0
        if slot is None or not self._config.progressive:
            return [step] * (self._layout.max_rows if self._config.progressive else 1)
        own = [max(0, step - joins) for joins in slot.material.joins]
        return own + [step] * (self._layout.max_rows - len(own))

    def _own(self, slots: Sequence[Slot | None]) -> Tensor:
        """[slots, rows] 1 for the rows of each concept's placeholder that its prompts use, 0 for all others."""
        active = self._sent(tuple(slot.material.active_vectors(slot.step) if slot else 0 for slot in slots))
        return (torch.arange(self._layout.max_rows, device=active.device) < active[:, None]).float()

    @torch.no_grad()
    def _look(self, learning: list[Slot]) -> tuple[dict[Slot, Mapping[str, Tensor]], Tensor]:
        """Those concepts that are due, with copies of their parameters if these may be the best; and the denoising loss
        of each on its frozen batch [slots]. Mostly one is due at a time: so each has a pass of its own."""
        looked: dict[Slot, Mapping[str, Tensor]] = {}
        losses = torch.zeros(len(self._slots), device=self._backbone.device)
        for slot in learning:
            if not is_eval_step(self._config, slot.step):
                continue
            if slot.frozen is None:
                slot.frozen = self._samples(slot, "frozen", 0)
            places = self._places([slot])
            values = {name: group.values[places] for name, group in self._groups.items()}
            losses[places] = self._objective([slot], values, slot.frozen, PenaltyConfig())
            looked[slot] = slot.parameters(self._groups) if self._config.stop.keep_best else {}
        return looked, losses

    # What a step and its looks came to is on its way to the host while the next ones are taken.

    def _read(self, learning: list[Slot], checkpoint_steps: int, at_once: bool) -> None:
        """Note what has arrived of earlier steps; all of it when a slot is about to be judged, saved or set back.

        A rule that may end a concept is not kept waiting for its looks: the concept would go on meanwhile, for as many
        steps as its neighbours happen to be apart, and what is returned may not depend on them.
        """
        every = [steps for steps in (GOOD_EVERY_STEPS, checkpoint_steps) if steps]
        steps = [slot.step for slot in learning]
        due = at_once or any(self._stop_rule.due(step) or any(step % n == 0 for n in every) for step in steps)
        while len(self._unread) > (0 if due or any(slot.error for slot in learning) else self._steps_ahead):
            self._unread.popleft().note()

    def _is_done(self, slot: Slot) -> bool:
        return self._stop_rule.due(slot.step) and self._stop_rule.stops(slot.curve, slot.eval_losses)

    # A slot's life: begin, save, end.

    def _refill(self, next_assignment: NextAssignment, on_outcome: OnOutcome) -> bool:
        """Fill the free slots as far as there is work; false when none is being learned and none will come."""
        while None in self._slots:
            idle = not any(self._slots)
            assignment = next_assignment(idle)
            if assignment is None:
                return not idle
            try:
                slot = self._begin(assignment, self._slots.index(None))
            except ConceptError as error:
                on_outcome(Outcome(assignment.concept, None, 0, curve_tensor([]), 0.0, str(error), kind=error.kind))
                continue
            if self._is_done(slot):  # resumed after its last step
                on_outcome(self._end(slot))
        return True

    def _begin(self, assignment: Assignment, place: int) -> Slot:
        """Put a concept in a slot. Raises ConceptError, leaving the slot free, if the assignment cannot be learned."""
        concept, views = assignment.concept, assignment.views
        assignment.check(self._layout)
        state = assignment.state or SlotState.beginning(
            self._layout.beginning(concept, num_photos(views), seed=self._seed, start=assignment.start)
        )
        slot = Slot(
            place=place,
            concept=concept,
            material=material(concept, views, self._config, self._backbone, self._image_features, self._knowledge),
            num_vectors={name: len(tensor) for name, tensor in state.parameters.items()},
            start=state.start,
            step=state.step,
            curve=curve_points(state.curve),
            eval_losses=eval_points(state.eval_losses),
            best=state.best,
            setbacks=state.setbacks,
            good=state.good or state,
            started=time.perf_counter(),
        )
        state.into(self._groups, place)
        for key, vector in class_vectors(concept, self._backbone).items():
            self._class_vector[key][place] = to_device(vector, self._backbone.device)
            self._start[key][place] = 0
            self._start[key][place, : len(state.start[key])] = to_device(state.start[key], self._backbone.device)
        self._slots[place] = slot
        return slot

    def _end(self, slot: Slot) -> Outcome:
        """Free the slot; what it learned, or its error."""
        self._slots[slot.place] = None
        seconds = time.perf_counter() - slot.started
        curve, eval_losses = curve_tensor(slot.curve), eval_tensor(slot.eval_losses)
        if slot.error:
            return Outcome(
                slot.concept, None, len(curve), curve, seconds, slot.error, eval_losses, slot.setbacks, NUMERICS
            )
        step = slot.best_eval.step if slot.best else slot.step
        embedding = self._layout.embedding(
            slot.concept,
            on_cpu(slot.best or slot.parameters(self._groups)),
            {"step": str(step), "initializer": slot.concept.initializer},
        )
        return Outcome(slot.concept, embedding, slot.step, curve, seconds, None, eval_losses, slot.setbacks)
