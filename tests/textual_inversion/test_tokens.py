"""The token table against a resized `nn.Embedding`, bit for bit."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from textual_inversion.tokens import TokenTable

VOCAB, DIM, ROWS = 50, 16, 3


@pytest.fixture
def table() -> TokenTable:
    return TokenTable(torch.randn(VOCAB, DIM, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(1))


def test_output_and_gradient_equal_a_resized_embedding(table: TokenTable, rows: torch.Tensor) -> None:
    resized = nn.Embedding.from_pretrained(torch.cat([table.weight, rows]), freeze=False)
    rows = rows.clone().requires_grad_()
    ids = torch.randint(VOCAB + ROWS, (4, 9), generator=torch.Generator().manual_seed(2))
    upstream = torch.randn(4, 9, DIM, generator=torch.Generator().manual_seed(3))

    with table.reading(rows):
        vectors = table(ids)
    (vectors * upstream).sum().backward()
    expected = resized(ids)
    (expected * upstream).sum().backward()

    assert torch.equal(vectors, expected)
    assert torch.equal(rows.grad, resized.weight.grad[VOCAB:])
    assert table.weight.grad is None
    assert not table.weight.requires_grad


def test_without_rows_only_the_vocabulary_is_known(table: TokenTable, rows: torch.Tensor) -> None:
    known = torch.tensor([[0, VOCAB - 1]])
    assert torch.equal(table(known), table.weight[known])
    with table.reading(rows):
        table(torch.tensor([[VOCAB]]))
    with pytest.raises(ValueError, match=f"token id {VOCAB} is not in the vocabulary"):
        table(torch.tensor([[VOCAB]]))


def test_rows_in_use_belong_to_the_thread(table: TokenTable, rows: torch.Tensor) -> None:
    seen: list[str] = []

    def other_thread() -> None:
        try:
            table(torch.tensor([[VOCAB]]))
        except ValueError as error:
            seen.append(str(error))

    with table.reading(rows):
        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
    assert len(seen) == 1


def test_the_vocabularys_mean_deviation_and_norm(table: TokenTable) -> None:
    assert table.mean_norm == pytest.approx(sum(v.norm().item() for v in table.weight) / VOCAB)
    assert torch.equal(table.mean, table.weight.mean(0))
    assert torch.equal(table.deviation, table.weight.std(0))
