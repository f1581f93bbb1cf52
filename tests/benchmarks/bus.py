"""A hop between two Ray actors: a chunk over the bus (and a small one back), beside a Ray call with the same array.

Three comparisons, each in its own row: the hop, from send() until the far loop has the chunk, beside the call that
would carry it, from .remote() until its result is there; the hop beside the call's way there only; and both round
trips. Both actors are on one host and read one monotonic clock.

Both actors are Ray actor processes with a real Bus and its metrics, as actor/actor.py has them; the far one's loop
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
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry

from deploy.control import ray_environment
from deploy.evaluate.bench import Row, command_of, less_is_better, option
from graph.bus import Bus
from graph.chunk import Chunk, SessionId
from graph.credit import Limit
from graph.edge import Arrival, EdgeRule, Receiver, Sender
from graph.metrics import Metrics

NAME = "bus"
SIZES = {"1 KB": 1024, "100 KB": 100 * 1024, "1 MB": 1024 * 1024}
REPETITIONS = {"1 KB": 1000, "100 KB": 600, "1 MB": 300}
TURN = 20  # round trips of one kind before the next kind has its turn
NUM_WARM_UP_TURNS = 3
TRANSPORTS = {"ipc": None, "tcp": "127.0.0.1"}  # the address to listen on
SESSION = SessionId("bench")
QUANTILES = {"p50": 50, "p99": 99}
FILLING = 7


def run() -> list[Row]:
    """Rows for each transport and size: p50 and p99 beside both kinds of Ray call."""
    ray_environment.prepare(None)
    from deploy.control.cluster import connect

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="omni-bench-")))
        cluster = connect([], None, folder / "ray")
        stack.callback(cluster.close)
        rivals = stack.enter_context(Rivals(folder / "bus"))
        return [row for size in SIZES for row in _rows(size, measure(rivals, size, _repetitions(size)))]


@dataclass(frozen=True, slots=True)
class Trip:
    """One round trip: until the chunk or the call was there, and until the answer was back; ns."""

    there_ns: int
    back_ns: int


@dataclass(slots=True)
class Samples:
    """Trips over the bus by transport, and by Ray call from actor to actor."""

    hops: dict[str, list[Trip]] = field(default_factory=lambda: {transport: [] for transport in TRANSPORTS})
    calls: list[Trip] = field(default_factory=list)


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
    call_there, call_back = _times(samples.calls)
    rows = []
    for transport, hops in samples.hops.items():
        there, back = _times(hops)
        for what, ours, rival, theirs in (
            (f"hop, {transport}, {size}", there, "Ray actor call, to its result", call_back),
            (f"hop, {transport}, {size}", there, "Ray actor call, the way there", call_there),
            (f"round trip, {transport}, {size} there, small back", back, "Ray actor call, to its result", call_back),
        ):
            rows += [_row(what, ours, rival, theirs, quantile) for quantile in QUANTILES]
    return rows


def _row(what: str, ours: list[int], rival: str, theirs: list[int], quantile: str) -> Row:
    value, rival_value = (float(np.percentile(times, QUANTILES[quantile])) / 1000 for times in (ours, theirs))
    return less_is_better(f"{what}, {quantile}", value, "us", f"{rival}, {quantile}", rival_value, command_of(NAME))


def _times(trips: list[Trip]) -> tuple[list[int], list[int]]:
    return [trip.there_ns for trip in trips], [trip.back_ns for trip in trips]


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
        samples.calls += self._ask(self._near.calls.remote(num_bytes, count))

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
        self._receivers[transport].open_session(SESSION)
        return endpoint

    def _settle(self, arrival: Arrival) -> None:
        self._receivers[_transport_of(arrival)].deliver(arrival, 0.0)


class Far(End):
    """Answers every chunk and every call with the time at which it was there."""

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
        """What the rival calls; touches the array and returns the time, monotonic ns."""
        there_ns = time.monotonic_ns()
        assert array[-1] == FILLING
        return there_ns

    def _loop(self) -> None:
        while not self._stopping.is_set():
            for arrival in self._bus.wait(0.05):
                there_ns = self.take(arrival.chunk.arrays["samples"])
                reply = Chunk(SESSION, "text", arrival.chunk.start_ns, attrs={"there_ns": there_ns})
                self._senders[_transport_of(arrival)].send(reply)
                self._settle(arrival)


class Near(End):
    """Sends and takes the time."""

    def __init__(self, directory: Path, far: Any) -> None:
        super().__init__("near", directory)
        self._far = far
        gc.disable()

    def hops(self, transport: str, num_bytes: int, count: int) -> list[Trip]:
        """Trips over the bus."""
        array = _payload(num_bytes)
        return [self._hop(transport, Chunk(SESSION, "speech", n, arrays={"samples": array})) for n in range(count)]

    def calls(self, num_bytes: int, count: int) -> list[Trip]:
        """Trips by calls to the other actor."""
        import ray

        array, trips = _payload(num_bytes), []
        for _ in range(count):
            begin_ns = time.monotonic_ns()
            there_ns = ray.get(self._far.take.remote(array))
            trips.append(Trip(there_ns - begin_ns, time.monotonic_ns() - begin_ns))
        return trips

    def _hop(self, transport: str, chunk: Chunk) -> Trip:
        begin_ns = time.monotonic_ns()
        self._senders[transport].send(chunk)
        arrivals: list[Arrival] = []
        while not arrivals:
            arrivals = self._bus.wait(1.0)
        back_ns = time.monotonic_ns() - begin_ns
        there_ns = int(arrivals[0].chunk.attrs["there_ns"] or 0) - begin_ns
        self._settle(arrivals[0])
        return Trip(there_ns, back_ns)


def _payload(num_bytes: int) -> np.ndarray:
    return np.full(num_bytes, FILLING, np.uint8)


def _transport_of(arrival: Arrival) -> str:
    return arrival.edge.rpartition(".")[2]
