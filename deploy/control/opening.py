"""How sessions open: at every stage they pass; then the time of all begins, sources last.

Rule: all of them are open in the end, or none is. Whatever fails while they open, an actor's death and its silence
included, costs them and nobody else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from deploy.control.calls import CoordinatorError, Reply, Steps
from deploy.control.fleet import Living
from deploy.control.restarts import Tools
from deploy.control.routing import session_plan
from deploy.control.sessions import Placement
from graph.chunk import NS_PER_S, SessionId
from stages.session import Session, View
from stages.stage import StageError

SILENT_S = 2.0  # a batch takes a window at most where a stage keeps up; no new session goes to who is silent for two


class Openings:
    """Opens and closes sessions."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    def open(
        self, sessions: Sequence[Session], limit_s: float, opened: Callable[[], None] = lambda: None
    ) -> Reply[None]:
        """Begin to open sessions; the reply says when all are open, or why none is (StageError).

        limit_s: within which every actor is to have answered. opened: called when all are open.
        """
        done: Reply[None] = Reply("")
        self._tools.procedures.begin(self._open(sessions, done, opened), limit_s)
        return done

    def close(self, session: SessionId) -> None:
        """End a session at once; what is under way is dropped and counted. Nobody waits for it."""
        placement = self._tools.table.placements.pop(session, None)
        opened = placement.opened if placement else []
        for stage in (stage for stage in self._tools.spec.wiring.upstream_first if stage in opened):
            living = self._at(placement, stage) if placement else None
            if living is not None:  # else it holds nothing any more
                living.line.post("close_session", stage, session)

    def add_view(
        self, session: SessionId, view: View, limit_s: float, opened: Callable[[], None] = lambda: None
    ) -> Reply[None]:
        """Begin to let a session have another view; the reply says when it has, or why not (StageError)."""
        done: Reply[None] = Reply("")
        self._tools.procedures.begin(self._add_view(session, view, done, opened), limit_s)
        return done

    def remove_view(self, session: SessionId, view: str) -> None:
        """Let a session have one view less. Stages behind its source hear of it on the edges."""
        placement = self._tools.table.placements.get(session)
        if placement is not None:
            placement.session = placement.session.without_view(view)
            placement.removed_views.add(view)
            for stage in self._showing(placement):
                if (living := self._at(placement, stage)) is not None:
                    living.line.post("remove_view", stage, session, view)

    def _add_view(self, session: SessionId, view: View, done: Reply[None], opened: Callable[[], None]) -> Steps[None]:
        placement = self._tools.table.placements.get(session)
        try:
            if placement is None or not placement.is_open:
                raise CoordinatorError(f"session {session} has ended")
            placement.session = placement.session.with_view(
                self._from_now_on(placement, view)
            )  # for a replacement, too
            living = [(stage, self._at(placement, stage)) for stage in self._showing(placement)]
            added = [each.line.post("add_view", stage, session, view) for stage, each in living if each is not None]
            placement.removed_views.discard(view.name)
            yield added
            for reply in added:
                reply.result()
        except Exception as error:
            if placement is not None:
                placement.session = placement.session.without_view(view.name)
                placement.removed_views.add(view.name)
            done.fail(StageError(str(error)) if isinstance(error, CoordinatorError) else error)
        else:
            opened()
            done.answer(None)

    def _from_now_on(self, placement: Placement, view: View) -> View:
        """A file that is added begins with the next window."""
        window_ns = placement.session.window_ns
        now_ns = round(self._tools.now_s() * NS_PER_S) - placement.origin_ns
        return replace(view, from_ns=(max(now_ns, 0) // window_ns + 1) * window_ns)

    def _showing(self, placement: Placement) -> list[str]:
        """The stages at which a session's views are streams of their own."""
        types = self._tools.spec.types
        return [stage for stage in placement.opened if any(port.many for port in types[stage].outputs.values())]

    def _open(self, sessions: Sequence[Session], done: Reply[None], opened: Callable[[], None]) -> Steps[None]:
        tools = self._tools
        try:
            tools.table.enter(sessions, self._candidates)
            placements = [tools.table.placements[session.id] for session in sessions]
            used = yield from self._open_at_all(sessions)
            yield from self._begin(sessions)
            if not all(tools.fleet.has(living) for living in used):
                raise CoordinatorError("an actor has died meanwhile")
        except Exception as error:
            for session in sessions:
                self.close(session.id)
            done.fail(StageError(str(error)) if isinstance(error, CoordinatorError) else error)
        else:
            for placement in placements:
                placement.is_open, placement.since = True, tools.fleet.num_reports
            opened()
            done.answer(None)

    def _candidates(self, stage: str) -> list[int]:
        """The replicas of a stage that live; those that answer, if there are such."""
        living = self._tools.fleet.of(stage)
        answering = [each for each in living if each.line.silent_s < SILENT_S]
        return [each.process.replica for each in answering or living]

    def _open_at_all(self, sessions: Sequence[Session]) -> Steps[list[Living]]:
        """At all at once: nothing is sent before their time begins."""
        used: list[Living] = []
        opened: list[Reply[None]] = []
        for stage in self._tools.spec.wiring.downstream_first:
            for living, here in self._by_replica(stage, sessions):
                plans = [session_plan(self._tools.spec, stage, p.session, p.replicas, p.incarnation) for p in here]
                for placement in here:
                    placement.opened.append(stage)  # before it is, for one of them may fail
                opened.append(living.line.post("open_sessions", stage, plans))
                used.append(living)
        yield opened
        for reply in opened:
            reply.result()
        return used

    def _begin(self, sessions: Sequence[Session]) -> Steps[None]:
        self._tools.fleet.read_clocks()
        origins_ns = self._tools.table.next_origins_ns(sessions)
        wiring = self._tools.spec.wiring
        takers = [stage for stage in wiring.downstream_first if stage not in wiring.sources]
        begun = self._ask_to_begin(takers, sessions, origins_ns)
        yield begun
        for one in sessions:  # one after the other: each starts a decoder, which takes its actor a while
            begun += (last := self._ask_to_begin(wiring.sources, [one], origins_ns))
            yield last
        for reply in begun:
            reply.result()

    def _ask_to_begin(
        self, stages: Iterable[str], sessions: Sequence[Session], origins_ns: Mapping[SessionId, int]
    ) -> list[Reply[None]]:
        """Let the sessions' clocks run at these stages. origins_ns: on our monotonic clock."""
        begun: list[Reply[None]] = []
        for stage in stages:
            for living, here in self._by_replica(stage, sessions):
                theirs_ns = {p.session.id: self._tools.fleet.origin_ns(living, origins_ns[p.session.id]) for p in here}
                begun.append(living.line.post("begin_sessions", stage, theirs_ns))
        return begun

    def _by_replica(self, stage: str, sessions: Iterable[Session]) -> list[tuple[Living, list[Placement]]]:
        """Which of the sessions pass a stage, and at which replica. Raises CoordinatorError where one is gone."""
        here: dict[int, list[Placement]] = {}
        for session in sessions:
            placement = self._tools.table.placements.get(session.id)
            if placement is None:
                raise CoordinatorError("it was closed meanwhile")
            if stage in placement.replicas:
                here.setdefault(placement.replicas[stage], []).append(placement)
        return [(self._living(stage, replica), placements) for replica, placements in sorted(here.items())]

    def _living(self, stage: str, replica: int) -> Living:
        living = self._tools.fleet.replica(stage, replica)
        if living is None:
            raise CoordinatorError(f"{stage}.{replica} has died and is being started again")
        return living

    def _at(self, placement: Placement, stage: str) -> Living | None:
        return None if stage in placement.absent else self._tools.fleet.replica(stage, placement.replicas[stage])
