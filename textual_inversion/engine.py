"""THE loop: several concepts learn their embedding rows in one batch; when one ends, its slot is refilled.

The only place in the project that steps an optimizer. See `Engine` for what is guaranteed about a concept's result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from textual_inversion.concept import Concept, LearnedEmbedding
from textual_inversion.config import InversionConfig
from textual_inversion.families.base import Backbone
from textual_inversion.initialise import initial_rows
from textual_inversion.latents import encode_views, sample
from textual_inversion.objective import Batch, objective, per_concept
from textual_inversion.optim import RowState, adamw_, clip_scales, gradient_norms
from textual_inversion.prompts import HOLE, encode_prompt, training_templates
from textual_inversion.rng import generator_for
from textual_inversion.slots import Assignment, Outcome, Slot, SlotState, curve_points, curve_tensor
from textual_inversion.stopping import Budget, StopRule
from textual_inversion.timesteps import uniform

__all__ = ["Assignment", "Engine", "Outcome", "SlotState", "learn"]

NextAssignment = Callable[[bool], Assignment | None]
OnOutcome = Callable[[Outcome], None]
OnCheckpoint = Callable[[Concept, SlotState], None]


class Engine:
    """Textual Inversion (Gal et al. 2022, Eq. 2) of several concepts at once, on one frozen backbone.

    Each slot holds one concept's rows, Adam moments and step. Samples of different concepts share forward and
    backward passes; nothing else is shared:

    - a loss is averaged over its concept's samples and summed over concepts, so gradients are those of the concept
      alone; clipping, Adam's bias correction and norm control are per slot;
    - every draw is seeded by (seed, concept id, step), never by the slot or the time;
    - every pass has the same shape, `slots_per_pass * batch_size` samples: missing concepts are made up with copies
      of a present one, whose gradient is dropped.

    **What is equal.** On a CPU `slots_per_pass` is 1: each concept has a pass of its own, so the arithmetic that
    makes its rows is the same operations on the same shapes whoever sits in the other slots. Its result is
    bit-for-bit the same alone, in company, in any order, in any slot, with any number of slots, and after any
    resume, given the same machine, library versions and number of torch threads. Elsewhere all slots share one pass:
    operations and shapes are again the same, but a concept's samples may stand elsewhere in the batch, and a
    library may sum a batch's parts in another order: equal to rounding, and bit-for-bit only where the library's
    kernels treat all samples of a batch alike. With another `slots` or `slots_per_pass` other kernels may be chosen:
    equal to rounding.
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
        read_every_steps: int | None = None,
    ) -> None:
        """`slots`: concepts learned at a time. `slots_per_pass`: how many of them share a forward and backward pass;
        None is 1 on a CPU, where sharing gains little, and all elsewhere. `max_vectors`: rows a slot has room for.
        `read_every_steps`: losses fetched at a time; None is 1 on a CPU, else 16, so that the host can run ahead."""
        if slots < 1:
            raise ValueError(f"slots = {slots}: must be 1 or more")
        on_cpu = backbone.device.type == "cpu"
        self._backbone, self._config, self._seed = backbone, config, seed
        self._stop_rule = stop_rule or Budget(config.steps)
        self._slots_per_pass = slots_per_pass or (1 if on_cpu else slots)
        self._read_every_steps = read_every_steps or (1 if on_cpu else 16)
        self._max_vectors = max_vectors
        self._slots: list[Slot | None] = [None] * slots
        self._unread: list[tuple[list[Slot], Tensor]] = []
        tables = backbone.token_tables
        self._mean_norms = {key: table.mean_norm() for key, table in tables.items()}
        self._rows = {
            key: RowState.zeros(slots, max_vectors, table.dim, backbone.device) for key, table in tables.items()
        }

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

        A bad assignment or a loss that is not finite ends that concept alone, with an error in its outcome.
        What the callbacks raise is raised here.
        """
        while self._refill(next_assignment, on_outcome):
            learning = [slot for slot in self._slots if slot]
            losses, grads = self._losses_and_gradients(learning)
            self._step(learning, losses, grads)
            self._read_if_due(learning, checkpoint_steps)
            for slot in learning:
                if slot.error or self._is_done(slot):
                    on_outcome(self._end(slot))
                elif on_checkpoint and checkpoint_steps and slot.step % checkpoint_steps == 0:
                    on_checkpoint(slot.concept, self._state(slot))

    # A step: for each pass sample, corrupt, predict, loss; then for all slots at once clip, step.

    def _losses_and_gradients(self, learning: list[Slot]) -> tuple[Tensor, dict[str, Tensor]]:
        """Each concept's loss [slots], and its gradient [slots, vectors, dim] per text encoder; zero where idle."""
        losses = torch.zeros(len(self._slots), device=self._backbone.device)
        grads = {key: torch.zeros_like(stack.rows) for key, stack in self._rows.items()}
        for first in range(0, len(learning), self._slots_per_pass):
            part = learning[first : first + self._slots_per_pass]
            places = [slot.place for slot in part]
            loss, gradients = self._pass(part)
            losses[places] = loss[: len(part)]
            for grad, gradient in zip(grads.values(), gradients, strict=True):
                grad[places] = gradient[: len(part)]
        return losses, grads

    def _pass(self, part: list[Slot]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One forward and backward pass, always of `slots_per_pass` concepts: this part's, made up with its first ->
        losses [concepts], and a gradient [concepts, vectors, dim] per text encoder."""
        missing = self._slots_per_pass - len(part)
        places = [slot.place for slot in part] + [part[0].place] * missing
        samples = [self._sample(slot) for slot in part]
        batch = self._join(samples + samples[:1] * missing)

        rows = {key: stack.rows[places].requires_grad_() for key, stack in self._rows.items()}
        terms = objective(self._backbone, batch, {key: tensor.flatten(0, 1) for key, tensor in rows.items()})
        loss = per_concept(terms, self._slots_per_pass)
        return loss.detach(), torch.autograd.grad(loss.sum(), list(rows.values()))

    def _sample(self, slot: Slot) -> Batch:
        """One concept's samples for its next step. The order of the draws is part of every result: do not change."""
        generator = generator_for(self._seed, slot.concept.concept_id, "step", slot.step)
        size, shape = self._config.batch_size, self._backbone.latent_shape
        view = torch.randint(len(slot.moments), (size,), generator=generator)
        eps = torch.randn(size, *shape, generator=generator)
        noise = torch.randn(size, *shape, generator=generator)
        timesteps, weight = uniform(size, len(self._backbone.alphas_cumprod), generator)
        template = torch.randint(len(slot.prompts), (size,), generator=generator)
        return Batch(
            latents=sample(slot.moments[self._put(view)], self._put(eps)),
            noise=self._put(noise),
            timesteps=self._put(timesteps),
            weight=self._put(weight),
            ids=slot.prompts[self._put(template)],
        )

    def _join(self, samples: Sequence[Batch]) -> Batch:
        """One batch of several concepts' samples; the i-th concept's row ids move to where its rows lie in the pass."""
        vocab_size = self._backbone.vocab_size
        ids = [
            torch.where(part.ids >= vocab_size, part.ids + i * self._max_vectors, part.ids)
            for i, part in enumerate(samples)
        ]
        return Batch(
            latents=torch.cat([part.latents for part in samples]),
            noise=torch.cat([part.noise for part in samples]),
            timesteps=torch.cat([part.timesteps for part in samples]),
            weight=torch.cat([part.weight for part in samples]),
            ids=torch.cat(ids),
        )

    @torch.no_grad()
    def _step(self, learning: list[Slot], losses: Tensor, grads: dict[str, Tensor]) -> None:
        """Move the rows of every concept whose loss and gradient are finite; the others' stay as they are."""
        steps = [0] * len(self._slots)
        for slot in learning:
            slot.step += 1
            steps[slot.place] = slot.step
        taken = self._put(torch.tensor(steps) > 0)
        grad_norms = gradient_norms(grads)
        sound = losses.isfinite() & grad_norms.isfinite()
        scale = clip_scales(grad_norms, self._config.max_grad_norm) if self._config.max_grad_norm else 1
        for key, stack in self._rows.items():
            adamw_(stack, grads[key] * scale, steps, taken & sound, self._mean_norms[key], self._config)
        norms = torch.stack([stack.rows.norm(dim=2).sum(1) for stack in self._rows.values()]).mean(0)
        self._unread.append((learning, torch.stack([losses, norms.where(sound, torch.nan)])))

    # The curve stays on the accelerator until somebody needs it.

    def _read_if_due(self, learning: list[Slot], checkpoint_steps: int) -> None:
        """Fetch the points not yet read, when there are many or when a slot is about to be judged or saved."""
        due = any(
            self._stop_rule.due(slot.step) or (checkpoint_steps and slot.step % checkpoint_steps == 0)
            for slot in learning
        )
        if not due and len(self._unread) < self._read_every_steps:
            return
        values = torch.stack([points for _, points in self._unread]).tolist()
        for (slots, _), (losses, norms) in zip(self._unread, values, strict=True):
            for slot in slots:
                slot.note(losses[slot.place], norms[slot.place] / slot.concept.num_vectors)
        self._unread.clear()

    def _is_done(self, slot: Slot) -> bool:
        return self._stop_rule.due(slot.step) and self._stop_rule.stops(slot.curve)

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
            except ValueError as error:
                on_outcome(Outcome(assignment.concept, None, 0, curve_tensor([]), 0.0, str(error)))
                continue
            if self._is_done(slot):  # resumed after its last step
                on_outcome(self._end(slot))
        return True

    def _begin(self, assignment: Assignment, place: int) -> Slot:
        """Put a concept in a slot. Raises ValueError, leaving the slot free, if the assignment cannot be learned."""
        concept = assignment.concept
        self._check(assignment)
        state = assignment.state or SlotState.beginning(
            initial_rows(
                concept, self._backbone, noise=self._config.init.noise, seed=self._seed, start=assignment.start
            )
        )
        slot = Slot(
            place=place,
            concept=concept,
            moments=assignment.views.moments.to(self._backbone.device, torch.float32),
            prompts=self._prompts(concept),
            step=state.step,
            curve=curve_points(state.curve),
            started=time.perf_counter(),
        )
        for key, stack in self._rows.items():
            stack.put(place, state.rows[key], state.exp_avg[key], state.exp_avg_sq[key])
        self._slots[place] = slot
        return slot

    def _check(self, assignment: Assignment) -> None:
        """Raise ValueError for what would fail later, or fail the neighbours too."""
        concept, moments, state = assignment.concept, assignment.views.moments, assignment.state
        if concept.num_vectors > self._max_vectors:
            raise ValueError(f"num_vectors {concept.num_vectors} is more than the {self._max_vectors} a slot can hold")
        wanted = (2, *self._backbone.latent_shape)
        if moments.ndim != 5 or moments.shape[0] == 0 or moments.shape[1:] != wanted:
            raise ValueError(f"moments have shape {tuple(moments.shape)}; this model needs [views, {wanted}]")
        if not moments.isfinite().all():
            raise ValueError("the photos' latents are not finite; check the photos and the autoencoder's precision")
        if state is None:
            return
        if state.step != len(state.curve):
            raise ValueError(f"the checkpoint has {len(state.curve)} curve points for {state.step} steps; delete it")
        shapes = {key: (concept.num_vectors, table.dim) for key, table in self._backbone.token_tables.items()}
        for part in (state.rows, state.exp_avg, state.exp_avg_sq):
            if {key: tensor.shape for key, tensor in part.items()} != shapes:
                raise ValueError("the checkpoint's rows do not fit this concept and model; delete it to start anew")

    def _prompts(self, concept: Concept) -> Tensor:
        """All of a concept's training prompts -> [templates, max_length] ids, its rows from `vocab_size` up."""
        ids = range(self._backbone.vocab_size, self._backbone.vocab_size + concept.num_vectors)
        templates = training_templates(concept, class_cue=self._config.class_cue)
        return self._put(torch.tensor([encode_prompt(text, {HOLE: ids}, self._backbone) for text in templates]))

    def _state(self, slot: Slot) -> SlotState:
        """A copy of a slot on the CPU."""
        parts = {key: stack.take(slot.place, slot.concept.num_vectors) for key, stack in self._rows.items()}
        return SlotState(
            step=slot.step,
            rows={key: rows for key, (rows, _, _) in parts.items()},
            exp_avg={key: exp_avg for key, (_, exp_avg, _) in parts.items()},
            exp_avg_sq={key: exp_avg_sq for key, (_, _, exp_avg_sq) in parts.items()},
            curve=curve_tensor(slot.curve),
        )

    def _end(self, slot: Slot) -> Outcome:
        """Free the slot; what it learned, or its error."""
        self._slots[slot.place] = None
        seconds = time.perf_counter() - slot.started
        curve = curve_tensor(slot.curve)
        if slot.error:
            return Outcome(slot.concept, None, len(curve), curve, seconds, slot.error)
        embedding = LearnedEmbedding(
            placeholder_token=slot.concept.placeholder_token,
            vectors=self._state(slot).rows,
            metadata={"step": str(slot.step), "initializer": slot.concept.initializer},
        )
        return Outcome(slot.concept, embedding, slot.step, curve, seconds)

    def _put(self, tensor: Tensor) -> Tensor:
        """To the backbone's device."""
        return tensor.to(self._backbone.device, non_blocking=True)


def learn(
    backbone: Backbone,
    concepts: Sequence[tuple[Concept, Sequence[Image.Image]]],
    config: InversionConfig,
    *,
    slots: int = 4,
    seed: int = 0,
) -> list[LearnedEmbedding]:
    """Learn every (concept, its pictures), in that order. Raises ValueError naming the first concept that failed."""
    outcomes: dict[str, Outcome] = {}
    waiting = iter(concepts)

    def next_assignment(_wait: bool) -> Assignment | None:
        for concept, pictures in waiting:
            return Assignment(concept, encode_views(backbone, pictures, config.augment, concept.concept_id, seed))
        return None

    def on_outcome(outcome: Outcome) -> None:
        if outcome.embedding is None:
            raise ValueError(f"concept {outcome.concept.concept_id!r}: {outcome.error}")
        outcomes[outcome.concept.concept_id] = outcome

    Engine(backbone, config, slots=min(slots, len(concepts)) or 1, seed=seed).run(next_assignment, on_outcome)
    return [e for c, _ in concepts if (e := outcomes[c.concept_id].embedding)]
