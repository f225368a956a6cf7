"""The denoiser draws every kind of scene by its share, and unnamed scenes with the features of their object."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from demo.latent_pool import SHARES, LatentPool, assemble, cumulative_probability, kind_of
from demo.objects import TRAINING
from demo.pool import Pool, UnnamedPool
from demo.tokenizer import make_tokenizer
from demo.unnamed import UNNAMED
from demo.world import STYLES, sample_scene

KINDS = ["plain"] * 3 + ["style"] * 7 + ["unnamed"] * 2 + ["view"] + ["pair"] * 4


def _share_of(kind: str, kinds: list[str]) -> float:
    probability = np.diff(cumulative_probability(kinds), prepend=0)
    return float(probability[np.asarray(kinds) == kind].sum())


def _latent_pool(kinds: list[str]) -> LatentPool:
    count = len(kinds)
    objects, features = torch.full((count,), -1), torch.zeros(0, 2)
    latents, ids = torch.zeros(count, 4, 8, 8), torch.zeros(count, 3, dtype=torch.int64)
    return LatentPool(latents, ids, objects, features, cumulative_probability(kinds))


def test_shares_sum_to_one() -> None:
    assert sum(SHARES.values()) == pytest.approx(1)


def test_every_kind_has_its_share_and_its_scenes_have_equal_parts() -> None:
    for kind, share in SHARES.items():
        assert _share_of(kind, KINDS) == pytest.approx(share)
    probability = np.diff(cumulative_probability(KINDS), prepend=0)
    assert probability[:3] == pytest.approx([SHARES["plain"] / 3] * 3)


def test_the_share_of_a_missing_kind_goes_to_the_others_in_proportion() -> None:
    kinds = [kind for kind in KINDS if kind not in ("unnamed", "view")]
    left = sum(share for kind, share in SHARES.items() if kind in kinds)
    for kind in set(kinds):
        assert _share_of(kind, kinds) == pytest.approx(SHARES[kind] / left)


def test_samples_follow_the_probability() -> None:
    rows = _latent_pool(KINDS).sample(20_000, np.random.default_rng(0))
    assert rows.dtype == torch.int64
    assert rows.min() == 0
    assert rows.max() == len(KINDS) - 1
    drawn = np.asarray(KINDS)[rows.numpy()]
    for kind, share in SHARES.items():
        assert (drawn == kind).mean() == pytest.approx(share, abs=0.02)


def test_the_ends_of_the_random_numbers_are_scenes() -> None:
    class Ends:
        def random(self, count: int) -> np.ndarray:
            return np.resize([0.0, np.nextafter(1, 0)], count)

    assert _latent_pool(KINDS).sample(2, Ends()).tolist() == [0, len(KINDS) - 1]  # type: ignore[arg-type]


def test_every_scene_of_the_world_has_a_kind() -> None:
    counts = dict.fromkeys(SHARES, 0)
    for index in range(2000):
        scene = sample_scene(TRAINING, np.random.default_rng((4, index)))
        kind = kind_of(scene.attributes, scene.names)
        counts[kind] += 1
        assert (kind == "pair") == (scene.second is not None)
        if kind == "style":
            assert scene.style in STYLES[1:]
        if kind == "plain":
            assert (scene.style, scene.views) == ("plain", ())
    assert counts.pop("unnamed") == 0
    assert min(counts.values()) > 100


def test_named_and_unnamed_scenes_are_put_together(tmp_path: Path) -> None:
    named = Pool(
        pictures=np.zeros((2, 8, 8, 3), np.uint8),
        captions=["a photo of a cat", "a cat in the snow"],
        names=[("cat",), ("cat",)],
        attributes=[("plain", "white", "", "", "", ""), ("plain", "snow", "", "", "", "")],
    )
    pictures = np.zeros((3, 8, 8, 3), np.uint8)
    texts = [f"a photo of a {UNNAMED}", f"a {UNNAMED} cat", f"the {UNNAMED}"]
    unnamed = UnnamedPool(pictures[:2], pictures, texts, np.asarray([0, 0, 1]))
    tokenizer = make_tokenizer(named.captions * 5, tmp_path, vocab_size=540)
    size = len(tokenizer)
    means = torch.arange(5.0)[:, None, None, None].expand(5, 4, 8, 8)
    features = torch.randn(2, 6)
    pool = assemble(named, means[:2], unnamed, means[2:], features, tokenizer)
    assert pool.latents[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert pool.objects.tolist() == [-1, -1, 0, 0, 1]
    assert ((pool.input_ids == size).sum(1) == torch.tensor([0, 0, 1, 1, 1])).all()
    assert torch.equal(pool.features, features)
    probability = np.diff(pool.cumulative, prepend=0)
    total = SHARES["plain"] + SHARES["unnamed"]
    assert probability[:2].sum() == pytest.approx(SHARES["plain"] / total)
