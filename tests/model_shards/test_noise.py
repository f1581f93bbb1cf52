"""Numbers of a session's own, drawn for all sessions at once."""

import torch

from model_shards.noise import uniform, waits

MASK = (1 << 64) - 1


def mixed(state: int) -> int:
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def test_a_number_is_the_hash_of_its_session_draw_and_place() -> None:
    seeds, draws = [0, 5, (1 << 56) - 1], [0, 1, 700]
    numbers = uniform(torch.tensor(seeds), torch.tensor(draws), torch.arange(4))
    gamma = 0x9E3779B97F4A7C15
    for row, (seed, number) in enumerate(zip(seeds, draws, strict=True)):
        own = mixed((seed + number * gamma) & MASK)
        hashed = [mixed((own + place * gamma) & MASK) >> 41 for place in range(4)]
        assert numbers[row].tolist() == [(bits + 0.5) * 2.0**-23 for bits in hashed]


def test_numbers_are_spread_evenly_whatever_they_are_of() -> None:
    """Over places, over draws and over seeds: each tenth of (0, 1) has its share (100 000 numbers, 5 sigmas: 475)."""
    line, zeros = torch.arange(100_000), torch.zeros(100_000, dtype=torch.int64)
    over = [
        uniform(zeros[:1], zeros[:1], line).flatten(),
        uniform(zeros, line, zeros[:1]).flatten(),
        uniform(line, zeros, zeros[:1]).flatten(),
    ]
    for numbers in over:
        assert numbers.min() > 0 and numbers.max() < 1
        assert (torch.histc(numbers, 10, 0, 1) - 10_000).abs().max() < 475
        assert numbers.diff().sign().sum().abs() < 1000, "no trend"


def test_the_largest_of_probabilities_over_waits_is_drawn_from_them() -> None:
    probs, num = torch.tensor([0.5, 0.0, 0.2, 0.3]), 40_000
    drawn = (probs / waits(torch.full((num,), 7), torch.arange(num), torch.arange(4))).argmax(-1)
    shares = torch.bincount(drawn, minlength=4) / num
    assert shares[1] == 0
    torch.testing.assert_close(shares, probs, rtol=0, atol=0.0125)  # 5 sigmas
