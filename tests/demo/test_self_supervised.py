"""The training of the self-supervised ResNet: its views, its loss, and the directory that it writes."""

from __future__ import annotations

from math import log
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from demo import self_supervised
from demo.loop import Budget
from demo.self_supervised import Views, contrastive_loss, train_self_supervised, white_ground
from textual_inversion.extractors import load_extractor

SIDE = 64


def views() -> Views:
    return Views(torch.Generator().manual_seed(0), torch.device("cpu"))


def test_ground_is_the_white_that_touches_the_border() -> None:
    picture = np.full((1, SIDE, SIDE, 3), 255, np.uint8)
    picture[0, 10:50, 10:50] = 40
    picture[0, 20:30, 20:30] = 255  # white inside the object
    found = white_ground(picture)[0]
    assert found[:10].all()
    assert not found[10:50, 10:50].any()
    assert not white_ground(picture[:, 10:, 10:50]).any()  # two white corners


def test_every_view_faces_the_pictures_way() -> None:
    ramp = torch.linspace(-1, 1, SIDE).expand(8, 3, SIDE, SIDE)
    for area in ((0.15, 0.5), (0.6, 1.0)):
        seen = views().crop(ramp, torch.zeros(8, SIDE, SIDE, dtype=torch.bool), area, 32)
        assert seen.shape == (8, 3, 32, 32)
        assert seen.abs().max() <= 1
        assert (seen[..., 24:].mean((1, 2, 3)) > seen[..., :8].mean((1, 2, 3))).all()


def test_a_new_ground_shows_only_where_there_was_ground() -> None:
    red = torch.tensor([1.0, -1, -1])[:, None, None].expand(16, 3, SIDE, SIDE)
    is_ground = torch.zeros(16, SIDE, SIDE, dtype=torch.bool)
    is_ground[:, :, : SIDE // 2] = True
    grounded = views()._new_grounds(red, is_ground)
    assert torch.equal(grounded[..., SIDE // 2 :], red[..., SIDE // 2 :])
    assert 4 <= sum(not torch.equal(after, before) for after, before in zip(grounded, red, strict=True)) <= 15


def test_an_erased_part_is_a_square() -> None:
    pictures = torch.rand(5, 3, SIDE, SIDE)
    differs = (views().erase_part(pictures) != pictures).any(1)
    assert differs.sum((1, 2)).tolist() == [144] * 5
    assert (differs.any(1).sum(1) == 12).all()


def test_loss_is_small_for_the_own_picture_and_grows_with_altered_copies_that_look_alike() -> None:
    own = torch.eye(4)
    loss, accuracy = contrastive_loss(own.repeat(2, 1), own, -own)
    assert loss < 0.01
    assert accuracy == 1
    alike, _ = contrastive_loss(own.repeat(2, 1), own, own)
    assert alike == pytest.approx(log(2), abs=0.01)
    wrong, accuracy = contrastive_loss(own.roll(1, 0), own, -own)
    assert wrong > 5
    assert accuracy == 0


def test_training_writes_an_extractor_and_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_supervised, "_BATCH", 4)
    pictures = np.random.default_rng(0).integers(0, 256, (6, SIDE, SIDE, 3), dtype=np.uint8)

    def features(folder: str, *steps: int) -> torch.Tensor:
        for until in steps:
            train_self_supervised(
                pictures, tmp_path / folder, tmp_path / f"{folder}.ckpt",
                budget=Budget(steps=until), device=torch.device("cpu"), seed=0,
            )  # fmt: skip
        return load_extractor(str(tmp_path / folder), "cpu").images([Image.fromarray(each) for each in pictures])

    two = features("whole", 2)
    assert two.shape == (6, 160)
    assert (tmp_path / "whole/model.safetensors").stat().st_size < 2.5e6
    torch.testing.assert_close(features("parts", 1, 2), two, rtol=0, atol=0.1)  # the budget sets the learning rate
    assert torch.load(tmp_path / "parts.ckpt", weights_only=False)["step"] == 2
