"""deploy/control/ray_errors.py: whatever Ray says, its user reads one line with the cause, and no secret."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectStoreFullError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RaySystemError,
    RayTaskError,
    RpcError,
    RuntimeEnvSetupError,
    WorkerCrashedError,
)

from deploy.control import cluster
from deploy.control.placement import PlacementError
from deploy.control.ray_errors import MAX_REASON, ray_reason
from graph.secret import KNOWN

# As Ray 2.5x says it, shortened.
LOW_MEMORY = """2 worker(s) were killed due to the node running low on memory. \
Memory on the node (IP: 127.0.0.1, ID: f71964b5) was 2.92GB used / 23.54GB limit (0.123861)
OOM kill reason: Memory usage 3130781696B exceeded threshold of 1263825536B (5.0% of 25276510208B limit)
Object store memory usage: [- objects spillable: 0
- bytes spillable: 0
Top 10 memory users: PID\tMEM(GB)\tCOMMAND
31855\t0.23\tpython pipeline up --camera door=rtsp://admin:Hunter2@10.0.0.7/live
Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/"""
# And as Ray 2.x did before.
LOW_MEMORY_BEFORE = """Task was killed due to the node running low on memory.
Memory on the node (IP: 10.0.0.5, ID: ab) where the task (actor ID: cd, name=Actor.__init__, pid=1, memory used=0.4GB) \
was running was 22.1GB / 23.54GB (0.95), which exceeds the memory usage threshold of 0.95. Ray killed this worker"""
DEAD = """The actor died unexpectedly before finishing this task.
\tclass_name: Actor
\tactor_id: 00ff
\tpid: 4711
\tnamespace: 1234
\tip: 127.0.0.1
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail:"""
DIED = f"""{DEAD} Worker \
unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) it was killed"""
CREATION = """The actor died because of an error raised in its creation task, \x1b[36mray::Actor.__init__()\x1b[39m \
(pid=4711, ip=127.0.0.1)
  File "actor.py", line 50, in __init__
    check_packages()
deploy.process.packages.PackageCollision: two packages called 'graph'"""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OutOfMemoryError(LOW_MEMORY), "low on memory: 2.92 of 23.5 GB were taken, and Ray's limit is 5%"),
        (OutOfMemoryError(LOW_MEMORY_BEFORE), "low on memory: 22.1 of 23.5 GB were taken, and Ray's limit is 95%"),
        (RayActorError("ab", LOW_MEMORY), "low on memory"),
        (RayActorError("ab", DIED), "its process has ended without a word: killed from outside, out of memory, or"),
        (RayActorError("ab", f"{DEAD} Worker exits with an exit code 3."), "has ended itself, with exit code 3"),
        (RayActorError("ab", f"{DEAD} Worker exits unexpectedly by a signal. It was"), "ended without a word"),
        (RayActorError("ab", CREATION), "deploy.process.packages.PackageCollision: two packages called 'graph'"),
        (ActorDiedError(), "The actor died unexpectedly before finishing this task"),
        (ActorUnavailableError("unavailable\nthe actor is temporarily unavailable", b"0" * 16), "can't be reached"),
        (GetTimeoutError("Get timed out: some object(s) not ready."), "has not answered in time"),
        (LocalRayletDiedError(), "raylet"),
        (WorkerCrashedError(), "its process has died"),
        (NodeDiedError("a node\ndied"), "left the cluster"),
        (ObjectStoreFullError("full\nof objects"), "object store is full"),
        (RpcError("failed to connect to GCS\nat 127.0.0.1:1"), "control process (GCS)"),
        (RaySystemError("System error: Failed to connect to GCS. timed out"), "control process (GCS)"),
        (RuntimeEnvSetupError("no such\npackage"), "Failed to set up runtime environment"),
        (RayTaskError("f", "Traceback (most recent call last):\n  File x\nValueError: odd", ValueError("odd")), "odd"),
        (Exception("The current node timed out during startup. This could happen because\nsome"), "not up within"),
        (ConnectionError("Could not find any running Ray instance.\nPlease specify"), "any running Ray instance"),
        (RayError(""), "RayError"),
    ],
)
def test_a_failure_of_ray_is_one_line_with_its_cause(error: BaseException, reason: str) -> None:
    line = ray_reason(error)
    assert reason in line
    assert len(line.splitlines()) == 1
    assert len(line) <= MAX_REASON + 1
    assert "Hunter2" not in line


def test_no_known_secret_comes_with_rays_words() -> None:
    KNOWN.add("Hunter2/xyzzy")
    assert "Hunter2" not in ray_reason(RaySystemError("it said Hunter2/xyzzy, and rtsp://me:Hunter2@10.0.0.7"))


@pytest.mark.parametrize("error", [Exception, RuntimeError, AssertionError, KeyError])
def test_a_ray_that_does_not_start_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def init(**_: object) -> None:  # the real one can't be made to time out
        (tmp_path / "ray").mkdir()
        raise error("The current node timed out during startup. This could happen because\nof much")

    monkeypatch.setattr(cluster.ray, "init", init)
    with pytest.raises(PlacementError, match="Ray does not start: it was not up within its 30 s") as caught:
        cluster.connect([], None, tmp_path / "ray")
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "ray").exists()
