"""A function by shapes gives what it gave, and makes programs of those that come often only."""

import torch
from torch import Tensor

from model_shards.shapes import ByShape


def test_common_shapes_are_programs_and_others_are_called_as_they_are() -> None:
    seen: list[tuple[int, int]] = []

    def function(factor: int, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        seen.append((factor, len(x)))
        return x * factor, x.sum(dim=1) + y

    by_shape = ByShape(function, lambda _, x, y: x.shape[1] == 3, ladder=(2, 4))
    for factor, num_rows, num_columns in ((2, 1, 3), (2, 3, 3), (5, 1, 3), (2, 1, 7), (2, 5, 3)):
        x, y = torch.randn(num_rows, num_columns), torch.randn(num_rows)
        scaled, summed = by_shape(factor, x, y)
        torch.testing.assert_close(scaled, x * factor)
        torch.testing.assert_close(summed, x.sum(dim=1) + y)
    # Once when a program is made, on blank rows, and once when it is called, filled up to its batch size.
    assert seen == [(2, 2), (2, 2), (2, 4), (2, 4), (5, 2), (5, 2), (2, 1), (2, 5)]
