"""What is told of the seeds of a scenario."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Final

from deploy.simulator.figures import Figures
from deploy.simulator.invariants import Violation
from deploy.simulator.scenarios import SCENARIOS, SimulateError
from graph.wording import listed

_SHARES: Final = ("on_time", "underruns")


@dataclass(frozen=True, slots=True)
class Report:
    """Many seeds of one scenario."""

    scenario: str
    seeds: tuple[int, int]
    violations: tuple[Violation, ...]
    simulated_s: float
    cpu_s: float
    figures: Figures

    def as_dict(self) -> dict[str, object]:
        return {
            "scenario": self.scenario,
            "seeds": f"{self.seeds[0]}:{self.seeds[1]}",
            "violations": [asdict(violation) for violation in self.violations],
            "simulated_s": round(self.simulated_s, 3),
            "cpu_s": round(self.cpu_s, 3),
            **self.figures.as_dict(),
        }

    def lines(self) -> list[str]:
        """For a person: how it went."""
        summary = {key: value for key, value in self.as_dict().items() if key != "violations"}
        return [f"{key:<28} {_shown(key, value)}" for key, value in summary.items()]

    @property
    def verdict(self) -> str:
        """One line: whether all held that must hold."""
        tried = f"{counted(self.figures.num_windows, 'window')} of {counted(self.seeds[1] - self.seeds[0], 'seed')}"
        if not self.violations:
            return f"all that must hold did hold ({tried})"
        rules = listed({violation.rule for violation in self.violations})
        return f"{counted(len(self.violations), 'violation')} ({rules}; {tried})"


def counted(number: int, what: str) -> str:
    """1 seed, 2 seeds."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def _shown(key: str, value: object) -> str:
    if value is None or value == {}:
        return "none"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {number}" for name, number in value.items())
    if isinstance(value, float):
        return f"{100 * value:.1f} %" if key in _SHARES else f"{round(value, 3):g}"
    return str(value)


def parse_seeds(text: str) -> range:
    """ "0:1000" or "7". Raises SimulateError."""
    first, colon, last = text.partition(":")
    try:
        seeds = range(int(first), int(last) if colon else int(first) + 1)
    except ValueError:
        raise SimulateError(f"--seeds {text}: expected FIRST:LAST or one number, like 0:1000") from None
    if not seeds or seeds[0] < 0:
        raise SimulateError(f"--seeds {text}: there are none in it")
    return seeds


def print_scenarios(as_json: bool) -> None:
    """What there is."""
    descriptions = {scenario.name: scenario.about for scenario in SCENARIOS.values()}
    if as_json:
        print(json.dumps([{"name": name, "about": about} for name, about in descriptions.items()], indent=2))
        return
    width = max(map(len, descriptions))
    for name, about in descriptions.items():
        print(f"{name:<{width}}  {about}")
