"""What is told of sources while the pipeline runs: who is lost, who is back, and who never gave anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from deploy.actor.session_plan import StageSnapshot
from graph.chunk import SessionId
from stages.stage import SourceId, SourceReport


class SourceWatch:
    """Of all sessions of a run. tell: one line for the user."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._open: set[SessionId] = set()  # one that is refused has had sources for a while, and is not spoken of
        self._latest: dict[SourceId, SourceReport] = {}
        self._lost: set[SourceId] = set()  # told, and not back yet

    def opened(self, session: SessionId) -> None:
        """From now on its sources are watched; what was known of an earlier one of its name is over."""
        self._open.add(session)
        self._latest = {source: report for source, report in self._latest.items() if source.session != session}
        self._lost = {source for source in self._lost if source.session != session}

    def view_opened(self, source: SourceId) -> None:
        """What was known of an earlier view of its name is over."""
        self._latest.pop(source, None)
        self._lost.discard(source)

    def ended(self, session: SessionId) -> None:
        """Its last report has been seen, or it was refused."""
        self._open.discard(session)

    def saw(self, snapshots: Mapping[str, Mapping[str, StageSnapshot]]) -> None:
        """What the actors are doing, by actor and stage. A loss is told once, however often it is found again."""
        for stages in snapshots.values():
            for stage in stages.values():
                for source, report in stage.sources.items():
                    if source.session in self._open:
                        self._saw(source, report)

    def _saw(self, source: SourceId, report: SourceReport) -> None:
        before = self._latest.get(source, SourceReport())
        self._latest[source] = report
        if report.num_lost > before.num_lost and source not in self._lost:
            self._lost.add(source)
            self._tell(f"camera {source}: lost: {report.problem}")
        if report.is_up and source in self._lost:
            self._lost.discard(source)
            self._tell(f"camera {source}: delivers again")

    @property
    def unreported(self) -> Mapping[SourceId, str]:
        """The sources that never gave a picture or a sound, of which nothing was told yet, and why."""
        silent = {name: report.problem for name, report in self._latest.items() if not report.has_delivered}
        return {name: problem for name, problem in silent.items() if name not in self._lost}

    @property
    def is_all_silent(self) -> bool:
        """Is there not one source that gave anything?"""
        return bool(self._latest) and not any(report.has_delivered for report in self._latest.values())
