"""control/restarts.py: a camera that comes under the name of one that was closed while it waited for a dead actor."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from graph.chunk import SessionId
from tests.support.actors import Batch, FakeCluster, of, sessions, started

A = SessionId("a")


class HoldingCluster(FakeCluster):
    """Answers to calls of one method are held back."""

    held = ""

    def finished(self, references: Sequence[Batch], timeout_s: float) -> Sequence[Batch]:
        free = [batch for batch in references if self.held not in {call.method for call in batch.calls}]
        if not free:
            self.clock.advance(timeout_s)
        return super().finished(free, timeout_s) if free else []


@pytest.mark.parametrize("held", ["resume_session", "listener", "reroute"])
def test_it_is_open_everywhere_whatever_was_under_way_for_the_one_before(tmp_path: Path, held: str):
    cluster = HoldingCluster()
    coordinator = started(cluster, tmp_path)
    coordinator.open_sessions(sessions("a"))
    cluster.held = held
    cluster.actors["tts.0"].is_dead = True
    for _ in range(20):
        coordinator.poll()
    coordinator.close_session(A)
    cluster.calls.clear()
    opened = coordinator.begin_to_open(sessions("a")[0], lambda: None)
    cluster.held = ""
    for _ in range(20):
        coordinator.poll()
    opened.result()
    assert A in cluster.actors["tts.0"].sessions
    last = {stage: method for method, stage, _ in cluster.calls if method in ("close_session", "open_sessions")}
    assert set(last.values()) == {"open_sessions"}, "none is closed after it was opened"
    assert len(of(cluster.calls, "open_sessions")) == len(last)
