"""What is told of the seeds of a scenario."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from deploy.simulator.figures import Figures
from deploy.simulator.invariants import Violation
from deploy.simulator.scenarios import SCENARIOS, SimulateError


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
    told = {scenario.name: scenario.about for scenario in SCENARIOS.values()}
    if as_json:
        print(json.dumps([{"name": name, "about": about} for name, about in told.items()], indent=2))
        return
    for name, about in told.items():
        print(f"{name:<16} {about}")
