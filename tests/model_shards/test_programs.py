"""A frozen function gives what it gave, for any sizes."""

import torch
from torch import Tensor

from model_shards.programs import frozen


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
