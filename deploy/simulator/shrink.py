"""The simplest run in which something does not hold as it did not in a large one, and what happened in it.

Rule: a simpler scenario counts where the same rule is violated with the same seed, whenever and wherever.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from deploy.simulator.invariants import Violation
from deploy.simulator.report import Report
from deploy.simulator.scenarios import CALLS, USUAL, Scenario
from deploy.simulator.simulate import Simulation
from graph.spec import PipelineSpec

MAX_TRIES: Final = 100
LAST_LINES: Final = 40
"""Of what happened: a violation is mostly about what came just before it."""


@dataclass(frozen=True, slots=True)
class Shortest:
    """The simplest scenario that still fails, with its last events."""

    scenario: Scenario
    violation: Violation
    events: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        return {
            "size": self.size,
            "faults": faults_of(self.scenario),
            "seed": self.violation.seed,
            "rule": self.violation.rule,
            "what": self.violation.what,
            "events": list(self.events),
        }

    @property
    def size(self) -> str:
        """How many sessions, and for how long."""
        if arrivals := self.scenario.arrivals:
            return f"{sum(a.num_sessions for a in arrivals)} session(s) in {len(arrivals)} group(s)"
        return f"{self.scenario.num_sessions} session(s), {self.scenario.num_windows} window(s)"

    def lines(self) -> list[str]:
        """For a person."""
        faults = ", ".join(faults_of(self.scenario)) or "no faults"
        return [
            f"the simplest that fails: {self.size}, {faults}",
            *self.events,
            f"{self.violation.rule}: {self.violation.what}",
        ]


def shrink(spec: PipelineSpec, scenario: Scenario, violation: Violation) -> Shortest:
    """Make a scenario that fails as simple as it can be made in MAX_TRIES runs."""
    num_tries, simplest = 0, scenario
    candidates = _simpler(simplest)
    while num_tries < MAX_TRIES and (candidate := next(candidates, None)) is not None:
        num_tries += 1
        if _violation(Simulation(spec, candidate, violation.seed), violation.rule) is not None:
            simplest, candidates = candidate, _simpler(candidate)
    simulation = Simulation(spec, simplest, violation.seed, traced=True)
    reproduced = _violation(simulation, violation.rule)
    assert reproduced is not None, "a seed happens the same each time"
    return Shortest(simplest, reproduced, tuple(simulation.trace[-LAST_LINES:]))


def print_report(report: Report, shortest: Shortest | None, as_json: bool) -> None:
    """For a script, or for a person."""
    document = report.as_dict() | ({} if shortest is None else {"shortest": shortest.as_dict()})
    if as_json:
        print(json.dumps(document, indent=2))
        return
    for line in report.lines():
        print(line)
    for violation in report.violations:
        print(f"seed {violation.seed}, {violation.time_s:.3f} s: {violation.rule}: {violation.what}")
    for line in shortest.lines() if shortest else ():
        print(line)
    print(report.verdict)


def faults_of(scenario: Scenario) -> list[str]:
    """What goes wrong in it, by the fields of `Scenario`."""
    return [name for name, usual in _USUAL.items() if getattr(scenario, name) != usual]


_USUAL: Final[dict[str, object]] = {
    "network": USUAL,
    "acks": USUAL,
    "grants": USUAL,
    "calls": CALLS,
    "barges_in": 0.0,
    "pauses": 0.0,
    "dies": 0.0,
    "stalls": 0.0,
    "slow": {},
    "steps": 0.0,
    "deaths": 0.0,
    "hangs": 0.0,
    "replicas": {},
    "returns": 0.0,
    "spoils": 0.0,
    "most_views": 1,
    "view_comes": 0.0,
    "drift_ppm": 0,
    "phases": None,
    "credit": None,
}


def _simpler(scenario: Scenario) -> Iterator[Scenario]:
    """Large steps first."""
    if scenario.arrivals:
        yield replace(scenario, arrivals=(), num_sessions=sum(a.num_sessions for a in scenario.arrivals))
        for index, group in enumerate(scenario.arrivals):
            others = scenario.arrivals[:index], scenario.arrivals[index + 1 :]
            fewer = (replace(group, num_sessions=group.num_sessions // 2),) if group.num_sessions > 1 else ()
            for left in dict.fromkeys(((*others[0], *others[1]), (*others[0], *fewer, *others[1]))):
                if left:
                    yield replace(scenario, arrivals=left)
        return
    for name in ("num_sessions", "num_windows"):
        number = getattr(scenario, name)
        for smaller in dict.fromkeys((number // 2, number - 1)):
            if smaller >= 1:
                yield replace(scenario, **{name: smaller})
    for name, usual in _USUAL.items():
        if getattr(scenario, name) != usual:
            yield replace(scenario, **{name: usual})  # type: ignore[arg-type]


def _violation(simulation: Simulation, rule: str) -> Violation | None:
    simulation.run()
    return next((violation for violation in simulation.violations if violation.rule == rule), None)
