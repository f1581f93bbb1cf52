"""What is simulated: how many sessions, on what, and what goes wrong.

The costs are those of a released checkpoint on one GPU in round numbers; `pipeline simulate` is about order, credit and
time, not about one machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final, TypeVar

from deploy.simulator.world import Network
from graph.chunk import NS_PER_MS, NS_PER_S
from graph.costs import Profile, StageCost
from graph.credit import Limit
from graph.errors import GraphError
from graph.spec import PipelineSpec
from stages.kinds import CODES, SPEECH, TEXT

V = TypeVar("V")


class SimulateError(GraphError):
    """There is no such scenario, or the seeds or sizes make no sense."""


USUAL: Final = Network()
CALLS: Final = Network(NS_PER_MS, 0)
SLOW_CALLS: Final = Network(NS_PER_MS, 300 * NS_PER_MS)
POLL_NS: Final = 250 * NS_PER_MS  # as deploy/run/up.py; where nobody comes, goes or dies, there is little to see


def by_stage(spec: PipelineSpec, by_kind: Mapping[str, V]) -> dict[str, V]:
    """What is said of stages by the kind that they make, by their names in a pipeline."""
    return {
        name: by_kind[port.kind.name]
        for name, each in spec.types.items()
        for port in each.outputs.values()
        if port.kind.name in by_kind
    }


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Sessions that come one after the other, and go together."""

    num_sessions: int
    until_ns: int
    from_ns: int = 0
    every_ns: int = 0

    def begins_ns(self) -> list[int]:
        """When each of them comes."""
        return [self.from_ns + number * self.every_ns for number in range(self.num_sessions)]


@dataclass(frozen=True, slots=True)
class Scenario:
    """What happens in one seed.

    num_sessions, num_windows: that begin together and end together; or, where there are some, the arrivals.
    devices: what computes, and how many stages at once on it. costs: per stage; else as its class says; each_times: and
    a unit so many times that. token_ns: a decode step of all who speak. picture_ns: what a picture costs the LLM.
    talks: how likely a silent window begins a turn.
    credit, batch, phases: of every edge, stage and window; None: as described.
    network, acks, grants: how messages travel. calls: how those of the coordinator do, and their answers.
    poll_ns: how often it looks at its actors.
    barges_in, pauses, dies: how likely for each session, that its listener interrupts or pauses, that its camera gives
    nothing for a while. stalls: how likely for each actor, for at most longest_stall_ns. slow: by the kind that a stage
    makes, how many times slower it is for so long. drift_ppm: of each actor's clock, at most.
    steps: how likely each of two times that a host's wall clock is set to another hour.
    deaths: how often on average each actor that computes dies. hangs: how likely it hangs so long that it is taken for
    dead. replicas: of stages, by the kind that they make; else as described.
    returns: how likely each session is closed by force and comes again under its name. spoils: how likely a unit of a
    stage that computes is one at which it raises. interrupted: how likely the user ends the run in the middle.
    most_views: of a camera. view_comes: how likely a camera gets another view, which goes and comes again.
    """

    name: str
    about: str
    num_sessions: int = 4
    num_windows: int = 8
    arrivals: tuple[Arrivals, ...] = ()
    costs: Mapping[str, StageCost] = field(default_factory=dict)
    each_times: int = 1
    token_ns: int = 8 * NS_PER_MS
    picture_ns: int = 0
    talks: float = 0.3
    batch: int | None = None
    devices: Mapping[str, int] = field(default_factory=lambda: {"gpu": 5})
    phases: int | None = None
    credit: Limit | None = None
    network: Network = USUAL
    acks: Network = USUAL
    grants: Network = USUAL
    calls: Network = CALLS
    poll_ns: int = NS_PER_S
    barges_in: float = 0.0
    pauses: float = 0.0
    dies: float = 0.0
    stalls: float = 0.0
    longest_stall_ns: int = 500 * NS_PER_MS
    slow: Mapping[str, float] = field(default_factory=dict)
    drift_ppm: int = 0
    steps: float = 0.0
    deaths: float = 0.0
    hangs: float = 0.0
    replicas: Mapping[str, int] = field(default_factory=dict)
    returns: float = 0.0
    spoils: float = 0.0
    interrupted: float = 0.0
    most_views: int = 1
    view_comes: float = 0.0

    def priced(self, profile: Profile, spec: PipelineSpec) -> Scenario:
        """The same where stages cost what was measured. Raises ProfileError where one with a model was not."""
        costs = {name: profile.of(name) for name, each in spec.types.items() if each.has_model}
        return replace(self, costs=costs, token_ns=0, picture_ns=0)  # what is said and seen is in what was measured

    def sized(self, num_sessions: int | None, num_windows: int | None) -> Scenario:
        """The same with so many sessions and windows. Raises SimulateError where sessions come and go as they do."""
        if self.arrivals and (num_sessions or num_windows):
            raise SimulateError(
                f"{self.name}: sessions come and go in it as they do; --sessions and --windows don't apply"
            )
        return replace(
            self, num_sessions=num_sessions or self.num_sessions, num_windows=num_windows or self.num_windows
        )


LOADS: Final = {"1x": (0, 20), "2x": (20, 80), "4x": (80, 140), "1x again": (140, 180)}
"""Of the overload, from when until when, in seconds."""
OVERLOAD: Final = (
    Arrivals(8, until_ns=180 * NS_PER_S),
    Arrivals(8, until_ns=140 * NS_PER_S, from_ns=20 * NS_PER_S, every_ns=4 * NS_PER_S),
    Arrivals(16, until_ns=140 * NS_PER_S, from_ns=80 * NS_PER_S, every_ns=2 * NS_PER_S),
)
DAY_S: Final = 120  # five seconds for an hour
DIURNAL: Final = (
    Arrivals(20, until_ns=DAY_S * NS_PER_S),
    *(
        # All of the others come between 6 and 12:20, and go group by group between 16:20 and 22.
        Arrivals(
            10, until_ns=(110 - 4 * group) * NS_PER_S, from_ns=(30 + 4 * group) * NS_PER_S, every_ns=400 * NS_PER_MS
        )
        for group in range(8)
    ),
)
_STEADY: Final = Scenario("steady", "nothing goes wrong", num_sessions=4, num_windows=8)
_STORM: Final = replace(
    _STEADY,
    name="storm",
    about="all of it at once, on clocks that drift by up to 200 ppm and are set to other hours",
    network=Network(100_000, 50 * NS_PER_MS, refused=0.01),
    acks=Network(100_000, 400 * NS_PER_MS, lost=0.05, doubled=0.05),
    grants=Network(100_000, 50 * NS_PER_MS, doubled=0.1),
    barges_in=0.5,
    pauses=0.5,
    dies=0.3,
    stalls=0.3,
    longest_stall_ns=1500 * NS_PER_MS,
    slow={TEXT.name: 5.0},
    phases=7,
    drift_ppm=200,
    steps=0.3,
    calls=SLOW_CALLS,
)
SCENARIOS: Final[Mapping[str, Scenario]] = MappingProxyType(
    {
        scenario.name: scenario
        for scenario in (
            _STEADY,
            replace(
                _STEADY,
                name="burst",
                about="more sessions at once than one batch takes",
                num_sessions=20,
                num_windows=6,
            ),
            replace(
                _STEADY,
                name="lossy-acks",
                about="acks take up to 400 ms and one in a hundred is lost; grants come twice; listeners interrupt",
                acks=Network(100_000, 400 * NS_PER_MS, lost=0.01),
                grants=Network(100_000, 20 * NS_PER_MS, doubled=0.1),
                barges_in=0.5,
                pauses=0.3,
            ),
            replace(
                _STEADY,
                name="tight",
                about="one chunk of credit on every edge, links that are full now and then, one device for all stages",
                credit=Limit(1),
                network=Network(100_000, 5 * NS_PER_MS, refused=0.05),
                grants=Network(100_000, 20 * NS_PER_MS, doubled=0.2),
                devices={"gpu": 1},
                barges_in=0.3,
            ),
            replace(_STEADY, name="stalled-camera", about="cameras give nothing for seconds", dies=0.7, stalls=0.2),
            replace(
                _STEADY,
                name="slow-tts",
                about="the TTS is 20 times slower for two seconds",
                slow={CODES.name: 20.0},
                longest_stall_ns=2000 * NS_PER_MS,
                barges_in=0.3,
            ),
            _STORM,
            replace(
                _STORM,
                name="squall",
                about="a small storm, of which many seeds can be tried",
                num_sessions=2,
                num_windows=5,
                barges_in=0.6,
                deaths=0.1,
                hangs=0.01,
                returns=0.1,
                poll_ns=POLL_NS,
            ),
            replace(
                _STORM,
                name="views",
                about="a small storm over cameras of up to four views, which die apart, come and go",
                num_sessions=2,
                num_windows=8,
                most_views=4,
                view_comes=0.7,
                dies=0.4,
                deaths=0.2,
                returns=0.1,
                poll_ns=POLL_NS,
            ),
            replace(
                _STEADY,
                name="kill-storm",
                about="what computes dies once on average; LLM and vocoder have another beside them",
                num_sessions=6,
                num_windows=20,
                network=Network(100_000, 5 * NS_PER_MS),
                acks=Network(100_000, 100 * NS_PER_MS, lost=0.01),
                barges_in=0.2,
                pauses=0.2,
                deaths=1.0,
                calls=Network(NS_PER_MS, 50 * NS_PER_MS),
                replicas={TEXT.name: 2, SPEECH.name: 2},
                poll_ns=POLL_NS,
                drift_ppm=200,
            ),
            replace(
                _STEADY,
                name="hangs",
                about="what computes hangs for so long that it is taken for dead, and another one takes its place",
                num_sessions=3,
                num_windows=40,
                acks=Network(100_000, 100 * NS_PER_MS, lost=0.01),
                hangs=0.2,
                calls=SLOW_CALLS,
                replicas={TEXT.name: 2},
                poll_ns=POLL_NS,
                drift_ppm=200,
            ),
            replace(
                _STEADY,
                name="comings-and-goings",
                about="cameras are closed while their chunks flow, and come again at once under the same names",
                num_sessions=6,
                num_windows=12,
                credit=Limit(2),
                network=Network(100_000, 50 * NS_PER_MS),
                grants=Network(100_000, 200 * NS_PER_MS, doubled=0.2),
                barges_in=0.3,
                stalls=0.5,
                returns=0.8,
                poll_ns=POLL_NS,
                drift_ppm=200,
            ),
            replace(
                _STEADY,
                name="bad-units",
                about="one unit in twenty is one at which a stage raises; some sessions are given up",
                num_windows=20,
                network=Network(100_000, 5 * NS_PER_MS),
                barges_in=0.3,
                spoils=0.05,
                poll_ns=POLL_NS,
            ),
            replace(
                _STEADY,
                name="interrupted",
                about="the user ends the run in the middle, while what computes is slow, stalls or has died",
                num_windows=16,
                barges_in=0.2,
                stalls=0.5,
                longest_stall_ns=8 * NS_PER_S,
                slow={TEXT.name: 5.0, CODES.name: 20.0},
                deaths=0.2,
                calls=SLOW_CALLS,
                poll_ns=POLL_NS,
                interrupted=1.0,
            ),
            Scenario(
                "overload",
                "one device that serves 10 sessions; 8 come, from 20 s on 8 more, from 80 s on 16 more; 24 go at 140 s",
                arrivals=OVERLOAD,
                each_times=4,
                picture_ns=8 * NS_PER_MS,
                batch=64,
                phases=2,  # as on a GPU with such batches
                devices={"gpu": 1},
            ),
            Scenario(
                "diurnal",
                "a device and its cameras in a day of 120 s: 20 at night, 100 at noon; 100 seeds are 10 000 cameras",
                arrivals=DIURNAL,
                batch=64,
                phases=2,
                barges_in=0.1,
                dies=0.05,
                drift_ppm=200,
            ),
        )
    }
)


def find_scenario(name: str) -> Scenario:
    """Raises SimulateError when there is none of that name."""
    if name not in SCENARIOS:
        raise SimulateError(f"no scenario {name!r}; there are: {', '.join(SCENARIOS)}")
    return SCENARIOS[name]
