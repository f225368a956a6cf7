"""Choose the concepts that are held out and those of each step, by concept ids, seed and step alone.

Neither choice depends on the number of workers, on the order in which Ray Data delivers rows or on where a training was
resumed, so that none of them changes what is learned.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from textual_inversion.rng import generator_for, seed_for

_HASH_RANGE = 2**63


@dataclass(frozen=True, slots=True)
class Split:
    """Concept ids, sorted."""

    trained: tuple[str, ...]
    held_out: tuple[str, ...]


def split_concepts(concept_ids: Iterable[str], held_out_share: float) -> Split:
    """Hold out the concepts whose hash lies in the first `held_out_share` of its range, and at least one.

    Raises ValueError for fewer than two concepts.
    """
    hashes = {concept_id: seed_for(0, concept_id, "held out") for concept_id in concept_ids}
    if len(hashes) < 2:
        raise ValueError(
            f"{len(hashes)} usable concepts are too few to train an encoder; give at least 2, better 1,000"
        )
    held_out = {concept_id for concept_id, value in hashes.items() if value < held_out_share * _HASH_RANGE}
    held_out = held_out or {min(hashes, key=lambda concept_id: hashes[concept_id])}
    if len(held_out) == len(hashes):
        held_out.remove(max(hashes, key=lambda concept_id: hashes[concept_id]))
    return Split(tuple(sorted(hashes.keys() - held_out)), tuple(sorted(held_out)))


def concepts_of_step(concept_ids: Sequence[str], seed: int, step: int, size: int) -> list[str]:
    """Return the `size` concepts of a step, counted from 0; all are different, unless there are fewer concepts.

    Each epoch goes once through all concepts in an order of its own; those that do not fill a step at its end are
    left out. With fewer concepts than `size`, every step repeats them.
    """
    steps_per_epoch = max(1, len(concept_ids) // size)
    epoch, place = divmod(step, steps_per_epoch)
    generator = generator_for(seed, "", "epoch", epoch)
    order = torch.randperm(len(concept_ids), generator=generator).tolist()
    return [concept_ids[order[i % len(order)]] for i in range(place * size, (place + 1) * size)]


def spread(concept_ids: Sequence[str], most: int) -> list[str]:
    """Return at most `most` of the concepts, spread evenly over them."""
    count = min(most, len(concept_ids))
    return [concept_ids[i * len(concept_ids) // count] for i in range(count)]


def shard(concept_ids: Sequence[str], rank: int, num_workers: int) -> list[str]:
    """Return the part of a step's concepts that one of the workers trains on."""
    return list(concept_ids[rank::num_workers])
