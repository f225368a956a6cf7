"""Which concepts are held out, and which a step trains on."""

from __future__ import annotations

from collections import Counter

import pytest

from pipeline.encoder_training.schedule import concepts_of_step, shard, split_concepts, spread

NAMES = tuple(f"concept-{i}" for i in range(100))


def test_a_concept_that_is_held_out_stays_so_in_other_company() -> None:
    small, large = split_concepts(NAMES[:50], 0.2), split_concepts(NAMES, 0.2)
    assert set(small.held_out) == set(large.held_out) & set(NAMES[:50])
    assert 10 < len(large.held_out) < 30
    assert sorted((*large.trained, *large.held_out)) == sorted(NAMES)
    assert set(large.held_out) < set(split_concepts(NAMES, 0.3).held_out)


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_one_concept_at_least_is_on_either_side(share: float) -> None:
    split = split_concepts(["a", "b"], share)
    assert (len(split.trained), len(split.held_out)) == (1, 1)


def test_one_concept_is_too_few() -> None:
    with pytest.raises(ValueError, match="1 usable concepts are too few to train an encoder; give at least 2"):
        split_concepts(["a"], 0.5)


def test_an_epoch_takes_each_concept_once_in_an_order_of_its_own() -> None:
    epochs = [[each for step in range(25) for each in concepts_of_step(NAMES, 3, 25 * e + step, 4)] for e in (0, 1)]
    assert all(sorted(epoch) == sorted(NAMES) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert concepts_of_step(NAMES, 4, 0, 4) != epochs[0][:4]  # another seed
    assert concepts_of_step(NAMES, 3, 7, 4) == epochs[0][28:32]  # any step, without those before


def test_more_concepts_asked_for_than_there_are() -> None:
    assert Counter(concepts_of_step(NAMES[:3], 0, 5, 8)).keys() == set(NAMES[:3])
    assert len(concepts_of_step(NAMES[:3], 0, 5, 8)) == 8


def test_shards_are_equal_parts_of_the_step() -> None:
    chosen = concepts_of_step(NAMES, 0, 0, 12)
    shards = [shard(chosen, rank, 3) for rank in range(3)]
    assert [len(each) for each in shards] == [4, 4, 4]
    assert sorted(each for part in shards for each in part) == sorted(chosen)


def test_a_few_of_many_concepts_are_spread_over_them() -> None:
    assert spread(NAMES, 4) == [NAMES[0], NAMES[25], NAMES[50], NAMES[75]]
    assert spread(NAMES[:3], 4) == list(NAMES[:3])
