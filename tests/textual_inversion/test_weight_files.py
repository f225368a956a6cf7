"""Headers, samples of values and damage of safetensors files, read without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from textual_inversion.weight_files import missing_parts, not_finite, read_header, read_index, read_metadata

SMALL = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.ones(4, dtype=torch.float16)}


def saved(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, path, metadata={"made by": "a test"})
    return path


def with_header(path: Path, header: Any, body: bytes = b"") -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


def test_a_header_says_where_each_tensor_lies(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.safetensors", SMALL)
    header = read_header(path)
    assert {name: (each.dtype, each.shape) for name, each in header.items()} == {
        "a.weight": ("F32", (2, 3)),
        "b.bias": ("F16", (4,)),
    }
    entry = header["a.weight"]
    stored = path.read_bytes()[entry.start : entry.start + entry.num_bytes]
    assert np.array_equal(np.frombuffer(stored, "<f4"), np.arange(6))
    assert read_metadata(path) == {"made by": "a test"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no safetensors file"),
        (b"short", "no safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "pointer of Git LFS.*git lfs pull"),
        (b"\xff" * 100, "no safetensors file"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"x\.safetensors is .*{reason}"):
        read_header(path)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_length_is_refused(tmp_path: Path, change: int) -> None:
    path = saved(tmp_path / "x.safetensors", SMALL)
    path.write_bytes((path.read_bytes() + b"?")[: path.stat().st_size + change])
    with pytest.raises(ValueError, match="bytes where its header speaks of"):
        read_header(path)


@pytest.mark.parametrize(
    "header", [[1], {"a": 3}, {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, "x"]}}, {"a": {"shape": [1]}}]
)
def test_a_damaged_header_is_refused(tmp_path: Path, header: Any) -> None:
    with pytest.raises(ValueError, match="has a damaged header"):
        read_header(with_header(tmp_path / "x.safetensors", header))


def test_an_index_names_the_file_of_each_tensor(tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "1.safetensors"}}))
    assert read_index(path) == {"a": "1.safetensors"}
    for text in ("{}", "[]", "{", '{"weight_map": 3}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="is no index of weight files"):
            read_index(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_found_in_every_precision(
    tmp_path: Path, dtype: torch.dtype, value: float
) -> None:
    good = torch.tensor([0.0, -0.0, -1.0, torch.finfo(dtype).max, torch.finfo(dtype).min, 1e-7], dtype=dtype)
    bad = good.clone()
    bad[3] = value
    path = saved(tmp_path / "x.safetensors", {"good": good, "bad": bad, "ids": torch.tensor([-1])})
    assert not_finite(read_header(path)) == ["bad"]


def test_layers_of_a_kind_have_the_same_weights() -> None:
    whole = [f"encoder.layers.{i}.{part}.weight" for i in range(3) for part in ("mlp.fc1", "mlp.fc2")]
    whole += [f"up.{i}.resnets.{j}.{part}.weight" for i in range(2) for j in range(2) for part in ("conv1", "conv2")]
    whole += ["up.0.resnets.1.conv_shortcut.weight"]
    whole += [f"up.{i}.attentions.0.transformer_blocks.{j}.ff.weight" for i in range(2) for j in range(i + 1)]
    whole += [f"up.{i}.attentions.0.{part}.weight" for i in range(2) for part in ("norm", "proj_in")]
    assert missing_parts(whole) == []
    lacking = [
        "encoder.layers.2.mlp.fc1.weight",
        "up.0.attentions.0.norm.weight",
        "up.1.resnets.0.conv2.weight",
    ]
    assert missing_parts(name for name in whole if name not in lacking) == lacking
