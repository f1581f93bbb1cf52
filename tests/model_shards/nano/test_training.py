"""A training goes on where it stood, with Muon beside AdamW, and keeps the average of its weights."""

from pathlib import Path

import torch
from torch import Tensor, nn

from model_shards.nano.training import Schedule, Training, load_averaged

SCHEDULE = Schedule(minutes=1e-4, rate=1e-2, warm_up_steps=1)


def module() -> nn.Module:
    torch.manual_seed(0)
    pair = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    pair[0].weight.by_muon = True  # type: ignore[union-attr]
    return pair


def train(folder: Path, schedule: Schedule) -> Training:
    trained = module()
    training = Training(folder, trained, schedule)

    def loss(step: int, passed: float) -> tuple[Tensor, dict[str, float]]:
        value: Tensor = trained(torch.ones(3, 4)).square().mean()
        return value, {}

    training.run(loss)
    return training


def test_a_training_goes_on_where_it_stood(tmp_path: Path):
    first = train(tmp_path, SCHEDULE)
    assert first.step > 0 and first.passed == 1.0
    again = train(tmp_path, Schedule(minutes=1e-2, rate=1e-2, warm_up_steps=1))
    assert again.step > first.step
    assert [type(optimizer).__name__ for optimizer in again.optimizers] == ["AdamW", "Muon"]


def test_what_is_kept_is_the_average(tmp_path: Path):
    training = train(tmp_path, SCHEDULE)
    loaded = load_averaged(tmp_path, module())
    assert all(map(torch.equal, loaded.parameters(), training.averaged.parameters()))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_the_rate_warms_up_stays_and_falls():
    schedule = Schedule(minutes=1, rate=1.0, warm_up_steps=10, constant=0.5, final=0.1)
    assert schedule.rate_at(0, 0.0) == 0.1
    assert schedule.rate_at(100, 0.5) == 1.0
    assert abs(schedule.rate_at(100, 1.0) - 0.1) < 1e-9
