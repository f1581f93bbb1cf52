"""Round trip between two Ray actors: a chunk over the bus and a small one back, beside a Ray call with the same array.

Both actors are Ray actor processes with a real Bus and its metrics, as deploy/actor.py has them; the far one's loop
runs in a thread of its own while Ray's threads answer calls. One round trip at a time, hops and calls in turns of
a few each, so that both see the same noise; what lies in the arrays is touched on arrival; no garbage collection in
the timed part.

Options: OMNI_BENCH_REPETITIONS, the round trips per row (default: REPETITIONS).
"""

from __future__ import annotations

import gc
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry

from deploy import ray_environment
from deploy.bench import Row, command_of, less_is_better, option
from graph.bus import Arrival, Bus, EdgeRule, Receiver, Sender
from graph.chunk import Chunk, SessionId
from graph.credit import Limit
from graph.metrics import Metrics

NAME = "bus"
SIZES = {"1 KB": 1024, "100 KB": 100 * 1024, "1 MB": 1024 * 1024}
REPETITIONS = {"1 KB": 1000, "100 KB": 600, "1 MB": 300}
TURN = 20  # round trips of one kind before the next kind has its turn
NUM_WARM_UP_TURNS = 3
TRANSPORTS = {"ipc": None, "tcp": "127.0.0.1"}  # the address to listen on
SESSION = SessionId("bench")
QUANTILES = {"p50": 50, "p99": 99}


def run() -> list[Row]:
    """Rows for each transport and size: p50 and p99 beside both kinds of Ray call."""
    ray_environment.prepare(None)
    from deploy.cluster import connect

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="omni-bench-")))
        cluster = connect([], None, folder / "ray")
        stack.callback(cluster.close)
        rivals = stack.enter_context(Rivals(folder / "bus"))
        return [row for size in SIZES for row in _rows(size, measure(rivals, size, _repetitions(size)))]


@dataclass(slots=True)
class Samples:
    """Round trips in ns: over the bus by transport, by Ray from actor to actor, by Ray from the driver to an actor."""

    hops: dict[str, list[int]] = field(default_factory=lambda: {transport: [] for transport in TRANSPORTS})
    actor_calls: list[int] = field(default_factory=list)
    driver_calls: list[int] = field(default_factory=list)


def measure(rivals: Rivals, size: str, repetitions: int) -> Samples:
    """Round trips of one size, all kinds in turns."""
    for _ in range(NUM_WARM_UP_TURNS):
        rivals.take_turn(Samples(), SIZES[size], TURN)
    samples = Samples()
    for begin in range(0, repetitions, TURN):
        rivals.take_turn(samples, SIZES[size], min(TURN, repetitions - begin))
    return samples


def _repetitions(size: str) -> int:
    return int(option("REPETITIONS", str(REPETITIONS[size])))


def _rows(size: str, samples: Samples) -> list[Row]:
    calls = {
        f"Ray call actor to actor with the same {size} array, returns an int": samples.actor_calls,
        f"Ray call driver to actor with the same {size} array, returns an int": samples.driver_calls,
    }
    return [
        less_is_better(
            f"bus round trip over {transport}, {size} chunk there, small chunk back, {quantile}",
            _quantile_us(hops, percent),
            "us",
            f"{rival}, {quantile}",
            _quantile_us(times, percent),
            command_of(NAME),
        )
        for transport, hops in samples.hops.items()
        for rival, times in calls.items()
        for quantile, percent in QUANTILES.items()
    ]


def _quantile_us(times_ns: list[int], percent: int) -> float:
    return float(np.percentile(times_ns, percent)) / 1000


class Rivals:
    """The two actors, wired."""

    def __init__(self, directory: Path) -> None:
        import ray

        cloudpickle: Any = ray.cloudpickle
        cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the actors can't import tests/benchmarks
        actor: Any = ray.remote(num_cpus=0.25)
        self._far = actor(Far).remote(directory)
        self._near = actor(Near).remote(directory, self._far)
        there, back = self._ask(self._far.bind.remote()), self._ask(self._near.bind.remote())
        self._ask(self._near.connect.remote(there))
        self._ask(self._far.connect.remote(back))
        self._ask(self._far.start.remote())

    def __enter__(self) -> Rivals:
        return self

    def __exit__(self, *_: object) -> None:
        self._ask(self._far.stop.remote())
        self._ask(self._near.stop.remote())

    def take_turn(self, samples: Samples, num_bytes: int, count: int) -> None:
        """`count` round trips of each kind."""
        for transport, hops in samples.hops.items():
            hops += self._ask(self._near.hops.remote(transport, num_bytes, count))
        samples.actor_calls += self._ask(self._near.calls.remote(num_bytes, count))
        samples.driver_calls += ray_calls(self._far, num_bytes, count)

    @staticmethod
    def _ask(reference: Any) -> Any:
        import ray

        return ray.get(reference, timeout=120)


class End:
    """One of the two actors: a bus with an edge in and an edge out per transport."""

    def __init__(self, name: str, directory: Path) -> None:
        self._name = name
        self._metrics = Metrics(CollectorRegistry())
        self._bus = Bus(name, directory)
        self._receivers: dict[str, Receiver] = {}
        self._senders: dict[str, Sender] = {}

    def bind(self) -> dict[str, str]:
        """Listen on every transport; returns the endpoints."""
        return {transport: self._bind(transport, address) for transport, address in TRANSPORTS.items()}

    def connect(self, endpoints: Mapping[str, str]) -> None:
        for transport, endpoint in endpoints.items():
            rule = EdgeRule(f"{self._name}.{transport}->other", Limit(8))
            self._senders[transport] = self._bus.connect(rule, endpoint, self._metrics.edge(rule.id))
            self._senders[transport].open_session(SESSION)

    def stop(self) -> None:
        self._bus.close()

    def _bind(self, transport: str, address: str | None) -> str:
        rule = EdgeRule(f"other->{self._name}.{transport}", Limit(8))
        self._receivers[transport], endpoint = self._bus.bind(rule, address, self._metrics.edge(rule.id))
        return endpoint

    def _settle(self, arrival: Arrival) -> None:
        self._receivers[_transport_of(arrival)].deliver(arrival, 0.0)


class Far(End):
    """Answers every chunk with a small one, and every call with an int."""

    def __init__(self, directory: Path) -> None:
        super().__init__("far", directory)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def start(self) -> None:
        gc.disable()
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()
        super().stop()

    def take(self, array: np.ndarray) -> int:
        """What the rival calls."""
        return int(array[-1])

    def _loop(self) -> None:
        while not self._stopping.is_set():
            for arrival in self._bus.wait(0.05):
                last = self.take(arrival.chunk.arrays["samples"])
                reply = Chunk(SESSION, "text", arrival.chunk.start_ns, attrs={"last": last})
                self._senders[_transport_of(arrival)].send(reply)
                self._settle(arrival)


class Near(End):
    """Sends and takes the time."""

    def __init__(self, directory: Path, far: Any) -> None:
        super().__init__("near", directory)
        self._far = far
        gc.disable()

    def hops(self, transport: str, num_bytes: int, count: int) -> list[int]:
        """Round trips over the bus, in ns."""
        array = _payload(num_bytes)
        return [self._hop(transport, Chunk(SESSION, "speech", n, arrays={"samples": array})) for n in range(count)]

    def calls(self, num_bytes: int, count: int) -> list[int]:
        """Round trips of calls to the other actor, in ns."""
        return ray_calls(self._far, num_bytes, count)

    def _hop(self, transport: str, chunk: Chunk) -> int:
        begin_ns = time.perf_counter_ns()
        self._senders[transport].send(chunk)
        arrivals: list[Arrival] = []
        while not arrivals:
            arrivals = self._bus.wait(1.0)
        elapsed_ns = time.perf_counter_ns() - begin_ns
        self._settle(arrivals[0])
        return elapsed_ns


def ray_calls(actor: Any, num_bytes: int, count: int) -> list[int]:
    """Round trips of calls to an actor from this process, in ns."""
    import ray

    array, times = _payload(num_bytes), []
    with _no_collection():
        for _ in range(count):
            begin_ns = time.perf_counter_ns()
            ray.get(actor.take.remote(array))
            times.append(time.perf_counter_ns() - begin_ns)
    return times


@contextmanager
def _no_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _payload(num_bytes: int) -> np.ndarray:
    return np.full(num_bytes, 7, np.uint8)


def _transport_of(arrival: Arrival) -> str:
    return arrival.edge.rpartition(".")[2]
