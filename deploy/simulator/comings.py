"""Which sessions come to a simulated pipeline and when, what their listeners do, and which are closed by force and come
again under their names; and how many windows are due of each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from random import Random
from typing import Any, Final

from deploy.actor.plan import Call
from deploy.simulator.operator import Operator
from deploy.simulator.scenarios import Arrivals, Scenario
from deploy.simulator.world import World
from graph.chunk import NS_PER_MS, NS_PER_S, SessionId
from graph.spec import PipelineSpec
from stages.session import ListenerAction, Media, Session, View

VIEWS: Final = tuple(f"view{number}" for number in range(1, 16))
AWAY_NS: Final = 100 * NS_PER_MS  # for how long nobody has the name of a session that was closed by force, at most


class Comings:
    """The sessions of one seed.

    sessions: as they are, or will be. num_ended: windows of each that have come to their end.
    origins_ns: when event time 0 of each is, in the world's time, once it is known.
    """

    def __init__(self, spec: PipelineSpec, scenario: Scenario, rng: Random) -> None:
        self._spec, self._rng = spec, rng
        window_ns = spec.window.length_ns
        together = Arrivals(scenario.num_sessions, scenario.num_windows * window_ns)
        coming = [(begin_ns, a.until_ns) for a in scenario.arrivals or (together,) for begin_ns in a.begins_ns()]
        self._begins_ns = [begin_ns for begin_ns, _ in coming]  # from when the first ones do
        self._num_due = [(until_ns - begin_ns) // window_ns for begin_ns, until_ns in coming]
        self.sessions = [self._session(scenario, number, due) for number, due in enumerate(self._num_due)]
        self.last_ns = max(until_ns for _, until_ns in coming)  # from when the first ones come
        self.num_ended: Counter[SessionId] = Counter()
        self.origins_ns: dict[SessionId, int] = {}
        self._ended_before: Counter[SessionId] = Counter()  # of those that had the name before
        self._cut: set[SessionId] = set()  # whose sources were stopped, or which were closed by force

    def _session(self, scenario: Scenario, number: int, num_windows: int) -> Session:
        rng, window_ns = self._rng, self._spec.window.length_ns
        name = f"camera{number}"
        last_ns = max((num_windows - 3) * window_ns, NS_PER_S)
        actions: list[ListenerAction] = []
        if rng.random() < scenario.barges_in:
            actions.append(ListenerAction(rng.randint(NS_PER_S, last_ns), "barge_in"))
        if rng.random() < scenario.pauses:
            begin_ns = rng.randint(NS_PER_S, last_ns)
            actions.append(ListenerAction(begin_ns, "pause"))
            actions.append(ListenerAction(begin_ns + rng.randint(1, 3 * NS_PER_S), "resume"))
        return Session(
            SessionId(name),
            name,
            Media(self._views(scenario)),
            window_ns=window_ns,
            lateness_ns=self._spec.window.lateness_ns,
            lead_ns=self._spec.tail.lead_ns,
            delay_ns=self._spec.tail.delay_ns,
            duration_ns=num_windows * window_ns,
            pictures=self._spec.has_pictures,
            microphone=self._spec.has_sound,
            speech=self._spec.has_speech,
            listener=tuple(actions),
            ladder=self._spec.shedding.steps(),
        )

    def _views(self, scenario: Scenario) -> tuple[View, ...]:
        """Where a camera has several, the first of them is heard."""
        if scenario.most_views == 1:
            return (View("", "virtual"),)
        return tuple(View(name, "virtual") for name in ("", *VIEWS)[: self._rng.randint(1, scenario.most_views)])

    def start(self, world: World, operator: Operator) -> None:
        """Start the pipeline with those that come first, together, and let the others come."""
        first = [session for session, begin_ns in zip(self.sessions, self._begins_ns, strict=True) if begin_ns == 0]
        operator.start(first)
        for session, begin_ns in zip(self.sessions, self._begins_ns, strict=True):
            if begin_ns:
                operator.open_at(world.now_ns + begin_ns, session)

    def close_and_come_again(self, world: World, operator: Operator, number: int) -> None:
        """Close a session by force, if it is open; another one comes under its name."""
        before = self.sessions[number]
        away_ns = self._rng.randint(0, AWAY_NS)

        def closed() -> None:
            self.sessions[number] = replace(before, listener=())
            operator.open_at(world.now_ns + away_ns, self.sessions[number])

        operator.close(before.id, closed)

    def called(self, call: Call, ahead_ns: int) -> None:
        """An actor has done a call; its host's clock is ahead of the world's."""
        what: Any = call.arguments[1] if len(call.arguments) > 1 else None
        match call.method:
            case "begin_sessions":
                self.origins_ns |= {session: origin_ns - ahead_ns for session, origin_ns in what.items()}
            case "open_sessions":
                self._cut -= {plan.session.id for plan in what}
            case "end_session":
                self._cut.add(what)
            case "close_session":  # at all stages, before it may come again: the last one counts
                self._cut.add(what)
                self._ended_before[what] = self.num_ended[what]

    @property
    def num_due(self) -> int:
        """Windows, if all sessions run to their end."""
        return sum(self._num_due)

    def lacking(self) -> Iterator[tuple[SessionId, int, int]]:
        """The sessions of which windows have not come to their end that were due; how many have, and were."""
        for session, num_due in zip(self.sessions, self._num_due, strict=True):
            num_ended = self.num_ended[session.id] - self._ended_before[session.id]
            if num_ended < num_due and session.id not in self._cut:
                yield session.id, num_ended, num_due

    @property
    def cut(self) -> frozenset[SessionId]:
        """Whose sources were stopped, or which were closed by force, at any time."""
        return frozenset(self._cut) | self._ended_before.keys()
