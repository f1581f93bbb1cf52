"""A program gives what its function gave, for any sizes."""

import pytest
import torch
from torch import Tensor

from model_shards.errors import ModelError
from model_shards.programs import Captured, frozen


def test_a_frozen_function_gives_and_writes_the_same_for_any_sizes() -> None:
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))

    def function(x: Tensor, kept: Tensor, column: Tensor) -> Tensor:
        y = torch.nn.functional.linear(x, weight).view(x.shape[0], 2, -1)
        kept.index_copy_(1, column, y[:, :1, :])
        return kept.sum(dim=1)

    program = frozen(function, (torch.ones(2, 3), torch.zeros(2, 3, 2), torch.tensor([1])))
    with torch.inference_mode():
        for num_rows, num_columns in ((1, 1), (2, 3), (5, 7)):
            x, column = torch.randn(num_rows, 3), torch.tensor([num_columns - 1])
            ours, stock = (torch.ones(num_rows, num_columns, 2) for _ in range(2))
            torch.testing.assert_close(program(x, ours, column), function(x, stock, column))
            torch.testing.assert_close(ours, stock)


class _Remembering:
    """Adds up what it is given into places of a memory of its own; place 0 is for blank rows."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.memory = torch.zeros(9, device=device)
        self.program = Captured(self.add, self.blank, ladder=(1, 2, 4))

    def add(self, places: Tensor, amounts: Tensor) -> tuple[Tensor, ...]:
        self.memory.index_add_(0, places, amounts)
        return self.memory[places], amounts * 2

    def blank(self, size: int) -> tuple[Tensor, ...]:
        return torch.zeros(size, dtype=torch.int64, device=self.device), torch.zeros(size, device=self.device)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_captured_function_touches_nothing_but_its_rows(device: str) -> None:
    ours, stock = _Remembering(device), torch.zeros(9)
    ours.program.capture()
    for places in ([1, 2, 3], [4], [5, 6, 7, 8], [1, 8], [3]):
        at, amounts = torch.tensor(places), torch.rand(len(places))
        stock[at] += amounts
        sums, doubled = ours.program(at.to(device), amounts.to(device))
        torch.testing.assert_close(sums.cpu(), stock[at])
        torch.testing.assert_close(doubled.cpu(), amounts * 2)
        torch.testing.assert_close(ours.memory.cpu(), stock)


def test_the_next_call_overwrites_the_results_of_the_last() -> None:
    program = Captured(lambda x: (x + 1,), lambda size: (torch.zeros(size),), ladder=(2,))
    (first,) = program(torch.tensor([1.0, 2.0]))
    program(torch.tensor([5.0]))
    assert first.tolist() == [6.0, 1.0]


def test_a_batch_that_is_larger_than_the_ladder_is_refused() -> None:
    program = Captured(lambda x: (x + 1,), lambda size: (torch.zeros(size),), ladder=(1, 2))
    with pytest.raises(ModelError, match="3 rows; programs were made for at most 2"):
        program(torch.zeros(3))
