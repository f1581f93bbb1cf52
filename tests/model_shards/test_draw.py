"""Drawing a code is torch's own multinomial, row by row."""

import pytest
import torch
from torch import Tensor

from model_shards.errors import ModelError
from model_shards.sampling import draw


def rows(num: int, choices: int) -> Tensor:
    """Probabilities of which half the choices have none."""
    probs = torch.rand(num, choices, generator=torch.Generator().manual_seed(choices)) ** 4
    probs[:, ::2] = 0.0
    return probs / probs.sum(dim=-1, keepdim=True)


@pytest.mark.parametrize("choices", [2, 5, 730, 20_000])
def test_a_row_is_drawn_as_torch_draws_it_alone(choices: int) -> None:
    ours, stock = ([torch.Generator().manual_seed(seed) for seed in range(3)] for _ in range(2))
    probs = rows(3, choices)
    for _ in range(20):
        alone = [int(torch.multinomial(row, 1, generator=each)) for row, each in zip(probs, stock, strict=True)]
        assert draw(probs, ours) == alone
    assert all(torch.equal(one.get_state(), other.get_state()) for one, other in zip(ours, stock, strict=True))


def test_a_row_without_a_generator_is_its_likeliest_choice_and_the_rows_stay_as_they_are() -> None:
    probs = rows(2, 9)
    before = probs.clone()
    assert draw(probs, [None, torch.Generator().manual_seed(0)])[0] == int(probs[0].argmax())
    assert torch.equal(probs, before)


@pytest.mark.parametrize("generator", [None, torch.Generator().manual_seed(0)])
def test_what_is_no_number_is_refused(generator: torch.Generator | None) -> None:
    probs = rows(2, 9)
    probs[1, 3] = torch.nan
    with pytest.raises(ModelError, match="no numbers"):
        draw(probs, [None, generator])
