"""control/coordinator.py: whatever comes in between whatever, in the end every session is open once at every stage it
passes, and nobody holds one that is over. Actors die and hang, cameras come and go, answers take their time."""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from deploy.actor.plan import Call as Posted
from deploy.control.coordinator import Coordinator
from graph.chunk import SessionId
from tests.support.actors import Batch, FakeActor, FakeCluster, sessions, started

NUM_STEPS = 120
NUM_NAMES = 12
MODELS = ("llm.0", "llm.1", "tts.0", "vocoder.0", "vocoder.1", "audio_encoder.0", "audio_encoder.1", "vision_encoder.0")
MORTAL = (*MODELS, "media.0", "io.0")
REPLICAS = tuple(f"stages.{stage}.replicas=2" for stage in ("llm", "vocoder", "audio_encoder"))


class SlowCluster(FakeCluster):
    """Its actors answer after a while, each batch after another one."""

    def __init__(self, rng: Random) -> None:
        super().__init__()
        self._rng = rng
        self._due_s: dict[Batch, float] = {}

    def perform(self, handle: FakeActor, calls: Sequence[Posted]) -> Batch:
        batch = super().perform(handle, calls)
        self._due_s[batch] = self.clock.now_s + self._rng.choice([0.0, 0.01, 0.1, 0.5, 2.0])
        return batch

    def finished(self, references: Sequence[Batch], timeout_s: float) -> Sequence[Batch]:
        through = [batch for batch in references if batch.is_through and self._due_s[batch] <= self.clock.now_s]
        if not through:
            self.clock.advance(max(timeout_s, 0.001))
        return through


class Story:
    """What happens in one seed."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.rng = Random(seed)
        self.cluster = SlowCluster(self.rng)
        self.coordinator = started(self.cluster, folder, *REPLICAS)

    def step(self) -> None:
        getattr(self, self.rng.choice([*["come", "wait"] * 4, "go", "die", "hang", "resume", "resume"]))()
        self.coordinator.poll()

    def come(self) -> None:
        """Under a name that another one may have had before."""
        (session,) = sessions(f"camera{self.rng.randint(1, NUM_NAMES)}", microphone=self.rng.random() < 0.7)
        if session.id not in self.coordinator.sessions:
            self.coordinator.begin_to_open(session, lambda: None)

    def go(self) -> None:
        if self.coordinator.sessions:
            self.coordinator.close_session(self.rng.choice(self.coordinator.sessions))

    def die(self) -> None:
        self.cluster.actors[self.rng.choice(MORTAL)].is_dead = True

    def hang(self) -> None:
        actor = self.cluster.actors[self.rng.choice(MORTAL)]
        actor.is_stopped = True
        actor.full_at = actor.stages[0] if self.rng.random() < 0.3 else ""

    def resume(self) -> None:
        for actor in self.cluster.actors.values():
            actor.is_stopped, actor.full_at = False, ""

    def wait(self) -> None:
        for _ in range(self.rng.randint(0, 16)):
            self.coordinator.poll()
            self.cluster.clock.advance(0.25)

    def settle(self) -> None:
        """Nothing more happens; the pauses between tries are over, and whoever hung is up again."""
        self.resume()
        for _ in range(1000):
            self.coordinator.poll()
            self.cluster.clock.advance(0.25)
            self.resume()


def open_at(story: Story, stage: str) -> dict[int, set[SessionId]]:
    """By replica, what is open there."""
    actors = {name: actor for name, actor in story.cluster.actors.items() if stage in actor.stages}
    return {int(name.rpartition(".")[2]): set(actor.sessions) for name, actor in actors.items()}


def placed_at(coordinator: Coordinator, stage: str, replicas: Any) -> dict[int, set[SessionId]]:
    placements = coordinator._table.placements
    return {
        number: {name for name, each in placements.items() if each.replicas.get(stage) == number} for number in replicas
    }


@pytest.mark.parametrize("seed", range(20))
def test_in_the_end_every_session_is_open_once_where_it_is_placed_and_nowhere_else(seed: int, tmp_path: Path) -> None:
    story = Story(seed, tmp_path)
    for _ in range(NUM_STEPS):
        story.step()
    story.settle()
    assert (story.coordinator.problem, story.coordinator.is_busy) == ("", False)
    for stage in ("llm", "tts", "vocoder", "audio_encoder", "vision_encoder"):
        there = open_at(story, stage)
        assert there == placed_at(story.coordinator, stage, there), stage
        assert story.coordinator.load_of(stage) == [len(there[number]) for number in sorted(there)]
    assert open_at(story, "camera")[0] == set(story.coordinator.sessions)
    assert not any(p.absent or p.in_hand for p in story.coordinator._table.placements.values())
