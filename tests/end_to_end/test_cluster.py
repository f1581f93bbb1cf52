"""A pipeline whose stages are split over two nodes, with two replicas of a stateless and of a stateful stage, of which
one is killed on the way."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import pytest

from graph.ledger import REASONS
from tests.support import two_nodes
from tests.support.pipeline import Place, Run

pytestmark = pytest.mark.ray

SESSIONS = ("door", "garage", "yard")
NUM_WINDOWS = 12
ON_A = ("vision_encoder", "audio_encoder", "vocoder")
ON_B = ("llm", "tts")
# Two stages that nothing in the pipeline knows of: one on the way of the pictures, one beside it, across the nodes.
OUTSIDE = (
    "stages.motion.use=omni_outside.motion:MotionGate",
    "stages.motion.threshold=-1",
    "stages.motion.inputs={frames: camera.frames}",
    "stages.motion.resources={b: 0.1}",
    "stages.vision_encoder.inputs={frames: motion.moving}",
    "stages.counter.use=omni_outside.counter:Counter",
    "stages.counter.inputs={frames: camera.frames}",
    "stages.counter.resources={b: 0.1}",
)
PLACEMENT = [
    *(f"stages.{stage}.resources={{a: 0.1}}" for stage in ON_A),
    *(f"stages.{stage}.resources={{b: 0.1}}" for stage in ON_B),
    "stages.vision_encoder.replicas=2",
    "stages.llm.replicas=2",
    *OUTSIDE,
]
# Ray of both nodes, of the pipeline that joins them, and of whoever asks: without token, on the loopback.
RAY = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


class TwoNodes:
    """A cluster in a process of its own, so that the tests never import Ray."""

    def __init__(self, place: Place) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(two_nodes.__file__)],
            env={**place.environment, **RAY},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.address = self._read()
        self.free = self.free_resources()

    def free_resources(self) -> dict[str, float]:
        """What nobody uses now."""
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)
        return dict(json.loads(self._read()))

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@dataclass(frozen=True, slots=True)
class SplitRun:
    run: Run
    status: dict[str, Any]
    tcp: set[tuple[str, str]]  # (sender, receiver) of every TCP connection between two actors
    sockets: set[str]  # names of ipc sockets
    is_free_again: bool


@pytest.fixture(scope="module")
def split(place: Place) -> Iterator[SplitRun]:
    nodes = TwoNodes(place)
    try:
        cameras = [text for i, name in enumerate(SESSIONS) for text in ("--camera", f"{name}=test://pattern?seed={i}")]
        sets = [text for value in PLACEMENT for text in ("--set", value)]
        process = place.start(
            "up", *cameras, *sets, "--for", f"{NUM_WINDOWS}s", "--address", nodes.address, "--out", "run", **RAY
        )
        place.wait_for_window(1)
        status = json.loads(place.run("ps", "--json").stdout)
        tcp = connections({row["pid"]: row["process"] for row in status["stages"]})
        sockets = {path.name for path in place.tmp.glob("omni-*/*/bus/*")}
        place.wait_for_window(3)
        psutil.Process(next(row["pid"] for row in status["stages"] if row["process"] == "llm.1")).kill()
        run = place.finish(process)
        yield SplitRun(run, status, tcp, sockets, nodes.free_resources() == nodes.free)
    finally:
        nodes.stop()
    shutil.rmtree(place.tmp / "ray")  # the cluster's own
    assert place.leftovers() == []


def connections(names: dict[int, str]) -> set[tuple[str, str]]:
    """TCP connections between these processes, as (who connected, who listens)."""
    of = {name: psutil.Process(pid).net_connections("tcp") for pid, name in names.items()}
    listening = {c.laddr.port: name for name, own in of.items() for c in own if c.status == psutil.CONN_LISTEN}
    return {
        (name, listening[c.raddr.port])
        for name, own in of.items()
        for c in own
        if c.status == psutil.CONN_ESTABLISHED and c.raddr.port in listening and c.laddr.port not in listening
    }


def test_a_pipeline_over_two_nodes_runs_to_its_end(split: SplitRun) -> None:
    assert split.run.returncode == 0, split.run.stderr
    for session in SESSIONS:
        windows = split.run.windows(session)
        assert [window["index"] for window in windows] == list(range(NUM_WINDOWS))
        assert all(window["missing"] == [] for window in windows) or split.run.events(session, "recovered")


def test_stages_of_other_packages_run_on_the_nodes_where_their_resources_are(split: SplitRun) -> None:
    node_of = {row["process"]: row["node_id"] for row in split.status["stages"]}
    assert node_of["motion.0"] == node_of["counter.0"] == node_of["llm.0"] != node_of["vision_encoder.0"]
    for session in SESSIONS:
        counted = split.run.events(session, "counted")
        assert [event["window"] for event in counted] == list(range(NUM_WINDOWS))
        assert len(split.run.events(session, "motion")) == sum(event["pictures"] for event in counted)


def test_sessions_of_a_replica_that_dies_go_on_at_the_other_one(split: SplitRun) -> None:
    recovered = {session: split.run.events(session, "recovered") for session in SESSIONS}
    (count,) = [row["sessions"] for row in split.status["stages"] if row["process"] == "llm.1"]
    assert sum(map(bool, recovered.values())) == count
    assert {event["actor"] for events in recovered.values() for event in events} == {"llm.1"}
    assert all(split.run.windows(session)[-1]["missing"] == [] for session in SESSIONS)


def test_every_edge_between_the_nodes_is_exact(split: SplitRun) -> None:
    for edge, account in split.run.ledger().items():
        assert account["in_flight"] == 0, edge
        assert account["accepted"] == account["delivered"] + sum(account["dropped"][reason] for reason in REASONS), edge


def test_each_stage_runs_where_its_resources_are(split: SplitRun) -> None:
    node_of = {row["process"]: row["node_id"] for row in split.status["stages"]}
    (node_a,) = {node_of[f"{stage}.0"] for stage in ON_A}
    (node_b,) = {node_of[f"{stage}.0"] for stage in ON_B}
    assert node_a != node_b
    assert node_of["vision_encoder.1"] == node_a and node_of["llm.1"] == node_b


def test_edges_between_nodes_are_tcp_and_edges_within_one_are_ipc(split: SplitRun) -> None:
    encoders = {"vision_encoder.0", "vision_encoder.1", "audio_encoder.0"}
    for llm in ("llm.0", "llm.1"):
        assert {(encoder, llm) for encoder in encoders} <= split.tcp
        assert (llm, "tts.0") not in split.tcp
        assert not any(name.startswith(f"{llm}-") for name in split.sockets)
    assert ("tts.0", "vocoder.0") in split.tcp
    assert any(name.startswith("tts.0-") for name in split.sockets)


@pytest.mark.parametrize("stage", ["vision_encoder", "llm"])
def test_sessions_are_spread_over_replicas(split: SplitRun, stage: str) -> None:
    counts = [row["sessions"] for row in split.status["stages"] if row["stage"] == stage]
    assert sorted(counts) == [1, 2]


def test_a_joined_cluster_gets_everything_back(split: SplitRun) -> None:
    assert split.is_free_again


def test_an_address_where_no_cluster_is_is_told(place: Place) -> None:
    run = place.run("up", "--camera", "door=test://pattern", "--address", "127.0.0.1:9", **RAY)
    assert run.returncode == 1
    (line, *_) = [line for line in run.stderr.splitlines() if line.startswith("pipeline: ")]
    assert line.startswith("pipeline: no Ray cluster can be joined at 127.0.0.1:9")
