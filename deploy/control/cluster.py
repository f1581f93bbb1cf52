"""Ray, started or joined: the control plane of a pipeline."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from deploy.actor.actor import Actor, Node
from deploy.actor.plan import ActorPlan, Answer, Call
from deploy.actor.suspects import Work, note_path, read_note
from deploy.control.calls import ActorDied, CallError, CoordinatorError
from deploy.control.placement import PlacementError, Process, Resources, check_fits, num_cpus_for
from deploy.control.ray_errors import ray_reason
from deploy.process.children import descendants, no_descendants_left
from deploy.process.interrupts import signals_blocked
from deploy.process.masked_output import environment_without_secrets
from graph.secret import mask_urls

OBJECT_STORE_BYTES = 80 * 1024 * 1024  # no chunk goes through it; Ray's minimum is 75 MB
PLACEMENT_TIMEOUT_S = 60.0
KNOCK_TIMEOUT_S = 5.0


class RayActor(Actor):
    """An actor in a worker of Ray's."""

    def __init__(self, plan: ActorPlan) -> None:
        ip = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        super().__init__(plan, Node(ray.get_runtime_context().get_node_id(), ip))


@dataclass(slots=True)
class Cluster:
    """A Ray that was started here, in a folder of its own, or joined (folder None)."""

    folder: Path | None
    groups: list[PlacementGroup]
    others: frozenset[psutil.Process] = frozenset()  # children of ours that are none of Ray's
    strategies: dict[str, Any] = field(default_factory=dict)  # by the actor's name, where it is to run

    @property
    def node_id(self) -> str:
        """The node that we run on."""
        return str(ray.get_runtime_context().get_node_id())

    def place(self, processes: Iterable[Process], plans: Iterable[ActorPlan]) -> dict[str, Any]:
        """Create the actors; returns their handles by name, before they are up.

        Raises PlacementError when the cluster lacks resources, or has them but they stay taken.
        """
        processes = list(processes)
        nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        check_fits(processes, [node["Resources"] for node in nodes])
        elsewhere = [process for process in processes if not _stays_here(process)]
        group = self._reserve(elsewhere)
        handles: dict[str, Any] = {}
        for process, plan in zip(processes, plans, strict=True):
            if _stays_here(process):
                self.strategies[process.name] = NodeAffinitySchedulingStrategy(self.node_id, soft=False)
            else:
                self.strategies[process.name] = PlacementGroupSchedulingStrategy(group, elsewhere.index(process))
            handles[process.name] = self.replace(process, plan)
        return handles

    def replace(self, process: Process, plan: ActorPlan) -> Any:
        """Create an actor where one of its name was placed that has died; returns its handle, before it is up."""
        return _create(process, plan, self.strategies[process.name])

    # ---- calls -------------------------------------------------------------------------------------------------------

    def perform(self, handle: Any, calls: Sequence[Call]) -> Any:
        """See `deploy.control.calls.Transport`."""
        return handle.perform.remote(calls)

    def finished(self, references: Sequence[Any], timeout_s: float) -> Sequence[Any]:
        """All that are there, once one is; none when the time is over."""
        there, _ = ray.wait(list(references), num_returns=1, timeout=timeout_s)
        if there:
            there, _ = ray.wait(list(references), num_returns=len(references), timeout=0)
        return there

    def answers(self, name: str, reference: Any) -> Sequence[Answer]:
        """Raises ActorDied where the actor is gone, CallError where its loop has failed."""
        try:
            answers: Sequence[Answer] = ray.get(reference)
        except RayTaskError as error:
            raise CallError(f"{name}: {error.cause or ray_reason(error)}") from error
        except (RayActorError, OutOfMemoryError) as error:
            raise ActorDied(f"{name} has died: {ray_reason(error)}") from error
        except RayError as error:
            raise CoordinatorError(f"{name} does not answer: {ray_reason(error)}") from error
        return answers

    def clock_ns(self, handle: Any, timeout_s: float) -> int:
        """The monotonic clock of the actor's machine. Raises TimeoutError when there is no answer."""
        try:
            return int(ray.get(handle.clock.remote(), timeout=timeout_s))
        except RayError as error:
            raise TimeoutError(ray_reason(error)) from error

    def work_of(self, handle: Any, directory: Path, peer: str) -> Work:
        """What an actor works on, or did when it died; nothing where it is on another machine."""
        return read_note(note_path(directory, peer))

    def stop(self, handles: Iterable[Any], timeout_s: float) -> None:
        """Let actors close what they hold, all at once; who takes longer is left to `kill`."""
        calls = [handle.stop.remote() for handle in handles]
        if calls:
            ray.wait(calls, num_returns=len(calls), timeout=timeout_s)

    def kill(self, handle: Any) -> None:
        """Whether it lives or not."""
        ray.kill(handle)

    def close(self) -> None:
        """Give the placement back; shut Ray down if it is ours."""
        if self.folder is None:
            for group in self.groups:
                remove_placement_group(group)
            ray.shutdown()
            return
        with no_descendants_left(self.others):
            _kill_without_asking()
            ray.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)  # Ray leaves a socket and 60 files per run

    def _reserve(self, processes: list[Process]) -> PlacementGroup:
        group = placement_group([dict(process.resources) or {"CPU": 0.001} for process in processes], strategy="PACK")
        self.groups.append(group)
        if not group.wait(PLACEMENT_TIMEOUT_S):
            free = ray.available_resources()  # type: ignore[no-untyped-call]
            amounts = ", ".join(f"{free.get(kind, 0.0):g} {kind}" for kind in ("CPU", "GPU"))
            raise PlacementError(
                f"the cluster could hold the pipeline, but its resources are taken: {amounts} free; "
                "stop something, or wait and try again"
            )
        return group  # type: ignore[no-any-return]


def connect(processes: Iterable[Process], address: str | None, folder: Path) -> Cluster:
    """Join the cluster at `address`, or start a Ray of our own in `folder`, which only this machine uses.

    folder: short, for Ray's sockets lie in it (a socket's path has 107 bytes); its parent is ours alone, for Ray lets
    everybody write to the folder itself.
    The environment must have been prepared (deploy/control/ray_environment.py) before Ray was imported.
    Raises PlacementError when there is no cluster at the address.
    """
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    _mute()
    _keep_signals()
    if address:
        try:
            _knock(address)
            with _as_children_shall_be(folder.parent):
                ray.init(address=address, **quiet)
        except Exception as error:  # Ray raises what it likes, also none but `Exception`
            raise PlacementError(
                f"no Ray cluster can be joined at {mask_urls(address)}: {ray_reason(error)}"
            ) from error
        return Cluster(folder=None, groups=[])
    cluster = Cluster(folder, groups=[], others=descendants())
    try:
        with _as_children_shall_be(folder.parent), environment_without_secrets():
            ray.init(
                address="local",
                num_cpus=num_cpus_for(processes, os.cpu_count() or 1),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _node_ip_address="127.0.0.1",
                _temp_dir=str(folder),
                **quiet,
            )
    except BaseException as error:
        cluster.close()
        if isinstance(error, Exception):  # Ray raises what it likes, also none but `Exception`
            raise PlacementError(f"Ray does not start: {ray_reason(error)}") from error
        raise
    return cluster


@contextlib.contextmanager
def _as_children_shall_be(folder: Path) -> Iterator[None]:
    """Ray's processes and workers inherit the working folder and import from it: not the user's, then.

    They inherit which signals are blocked, too. What ends `up` comes to the whole group from a terminal, to every
    process from systemd, and Ray dies of it within a second, before anything could be brought to its end.
    """
    with signals_blocked(), contextlib.chdir(folder):
        yield


def _mute() -> None:
    """Ray prints to stdout when an actor dies, whatever `log_to_driver` says; that, the coordinator tells."""
    ray._private.worker.print_to_stdstream = lambda data, ignore_prefix: None  # where it no longer is, nothing happens


def _keep_signals() -> None:
    """Ray takes SIGTERM when it starts, and exits with 15: it is taken care of (deploy/process/interrupts.py)."""
    ray._private.utils.set_sigterm_handler = lambda handler: None  # where it no longer is, nothing happens


def _kill_without_asking() -> None:
    """Ray's own processes take no SIGTERM (see above), for which `ray.shutdown()` would wait a second each."""
    if (node := getattr(ray._private.worker, "_global_node", None)) is not None:
        kill = node.kill_all_processes
        node.kill_all_processes = lambda **how: kill(**{**how, "allow_graceful": False})


def _knock(address: str) -> None:
    """Raises OSError when nobody listens there: Ray would try for minutes. `auto` is left to Ray."""
    if address.startswith("ray://"):
        raise ValueError("start `pipeline up` on a node of the cluster and give --address HOST:PORT")
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_TIMEOUT_S).close()


def _create(process: Process, plan: ActorPlan, strategy: Any) -> Any:
    resources: Resources = process.resources
    custom = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
    return (
        ray.remote(RayActor)
        .options(
            num_cpus=resources.get("CPU", 0),
            num_gpus=resources.get("GPU", 0),
            resources=custom or None,
            max_concurrency=8,
            max_restarts=0,
            scheduling_strategy=strategy,
        )
        .remote(plan)
    )


def _stays_here(process: Process) -> bool:
    return process.is_local and not (process.resources.keys() - {"CPU", "GPU"})
