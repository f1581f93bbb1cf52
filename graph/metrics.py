"""Every metric of the pipeline: declared once in `TABLE`, counted through small bound objects (served by exporter.py).

Rules: a name carries its unit; every label value comes from the configuration or from a closed set, never from a
session, a URL or a text. `Metrics.edge(…)`, `.stage(…)` and their like *bind* a set of labels: bind at start and keep
the object. Binding exports every series of it at 0 (so that rate() sees the first event), counting looks no label up.
A process exports only what it has bound, and dashboards sum over processes: both ends of an edge bind it.
"""

from collections import Counter as Counts
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from threading import Lock
from typing import Final, Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from graph.ledger import REASONS, Reason

# A bucket edge lies at every objective, so that its ratio is exact: 1.0 s is what a window may take.
# fmt: off
STAGE_BUCKETS_S: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 5.0,
)
LATENCY_BUCKETS_S: Final = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)
# fmt: on
COUNT_BUCKETS: Final = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)

MAX_CAMERAS: Final = 256
OTHER: Final = "other"  # the label value of whatever exceeds a bound

Kind = Literal["counter", "gauge", "histogram"]
Decision = Literal["listen", "speak"]
MediaTrack = Literal["video", "audio"]
MEDIA_TRACKS: Final[tuple[MediaTrack, ...]] = get_args(MediaTrack)


@dataclass(frozen=True, slots=True)
class Declaration:
    """A metric as Prometheus shows it. `name` ends with the unit, and with `_total` for a counter."""

    kind: Kind
    name: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


def _counter(name: str, help: str, *labels: str) -> Declaration:
    return Declaration("counter", name, help, labels)


def _gauge(name: str, help: str, *labels: str) -> Declaration:
    return Declaration("gauge", name, help, labels)


def _histogram(buckets: tuple[float, ...], name: str, help: str, *labels: str) -> Declaration:
    return Declaration("histogram", name, help, labels, buckets)


TABLE: Final[tuple[Declaration, ...]] = (
    _histogram(STAGE_BUCKETS_S, "omni_stage_seconds", "Time of a batch, queued and computed.", "stage", "phase"),
    _histogram(COUNT_BUCKETS, "omni_stage_batch_units", "Units in a batch.", "stage"),
    _counter("omni_stage_cpu_seconds_total", "Processor time that a stage's own work took of its loop.", "stage"),
    _counter("omni_units_total", "Units a stage has processed.", "stage"),
    _counter("omni_stage_failures_total", "Units and hooks of sessions at which the stage has raised.", "stage"),
    _counter("omni_stage_unsaid_total", "Sessions that ended with something left to say, unheard.", "stage"),
    _counter("omni_stage_carried_total", "Chunks too late for their window, taken into the next unit.", "stage"),
    #
    _counter("omni_edge_accepted_total", "Chunks an edge took over from its sender.", "edge"),
    _counter("omni_edge_delivered_total", "Chunks an edge gave to its receiver.", "edge"),
    _counter("omni_edge_drops_total", "Chunks an edge dropped, by reason.", "edge", "reason"),
    _gauge("omni_edge_in_flight", "Chunks sent and not yet used up, as the sender's credit says.", "edge"),
    _gauge("omni_edge_queue_depth", "Chunks waiting on this edge.", "edge"),
    _gauge("omni_edge_queue_capacity", "Chunks an edge may hold: its credit limit.", "edge"),
    _histogram(STAGE_BUCKETS_S, "omni_edge_wait_seconds", "Time a chunk waited for credit.", "edge"),
    _histogram(LATENCY_BUCKETS_S, "omni_chunk_age_seconds", "From a chunk's end (event time) to delivery.", "edge"),
    _counter("omni_bus_bytes_total", "Bytes on the wire, headers included.", "edge", "direction"),
    _counter("omni_bus_invalid_total", "Messages the decoder refused, by reason.", "reason"),
    #
    _counter("omni_windows_total", "Windows finished, by outcome.", "camera", "outcome"),
    _histogram(LATENCY_BUCKETS_S, "omni_window_seconds", "From a window's end to its result at the sink.", "camera"),
    _counter("omni_window_missing_total", "To how many windows a stream gave nothing in time.", "camera", "stream"),
    _counter("omni_window_late_total", "Late windows, by the stage that made them late.", "camera", "stage"),
    _gauge("omni_shedding_level", "Steps of the shedding ladder which a session has taken.", "camera"),
    #
    _gauge("omni_playback_lead_seconds", "Speech received by the speaker and not yet heard.", "camera"),
    _counter("omni_playback_underruns_total", "Silences inside a turn because speech ran out.", "camera"),
    _counter("omni_playback_underrun_seconds_total", "Length of these silences.", "camera"),
    _counter("omni_speech_seconds_total", "Speech heard, as acknowledged by the sink.", "camera"),
    _counter("omni_speech_interrupted_total", "Turns cut short by barge-in.", "camera"),
    _gauge("omni_text_budget_tokens", "Text tokens TAIL allows in the current window.", "camera"),
    _gauge("omni_session_parked", "1 while nothing has been heard of the session's listener for 5 s.", "camera"),
    #
    _gauge("omni_camera_up", "1 while the camera delivers.", "camera"),
    _gauge("omni_camera_track_up", "1 while the camera delivers this track.", "camera", "track"),
    _gauge("omni_camera_last_frame_timestamp_seconds", "Unix time of the newest frame.", "camera"),
    _counter("omni_camera_frames_total", "Pictures taken from the camera, at its fps.", "camera"),
    _counter(
        "omni_camera_reconnects_total", "Times the camera was lost, or not found again, by reason.", "camera", "reason"
    ),
    _counter("omni_camera_gaps_total", "Holes, overlaps and clock jumps within the camera's media.", "camera"),
    _counter("omni_camera_bad_total", "Packets and pictures that could not be decoded.", "camera", "track"),
    #
    _gauge("omni_kv_cache_usage_ratio", "Share of the KV cache's pages in use, 0 to 1."),
    _counter("omni_tokens_total", "Tokens of text made by the LLM, and codes made by the TTS.", "kind"),
    _counter("omni_decisions_total", "Windows in which the model chose to listen or to speak.", "camera", "decision"),
    #
    _gauge("omni_sessions", "Sessions, by state.", "state"),
    _gauge("omni_replicas", "Replicas of a stage, by state.", "stage", "state"),
    _counter("omni_actor_restarts_total", "Actors started again, by reason.", "stage", "reason"),
    _gauge("omni_build_info", "1; its labels say what runs here.", "version", "model", "trained"),
    _counter("omni_scrape_failures_total", "Scrapes of a process by the gateway that failed.", "target"),
)

_BY_NAME: Final = {declared.name: declared for declared in TABLE}


class _ByReason:
    """One counter per value of its last label, each exported at 0. A value outside of the set counts as `other`."""

    def __init__(self, metrics: "Metrics", name: str, labels: tuple[str, ...], reasons: Iterable[str]) -> None:
        self._counters = {reason: metrics.counter(name, *labels, reason) for reason in (*reasons, OTHER)}

    def inc(self, reason: str) -> None:
        self._counters.get(reason, self._counters[OTHER]).inc()


class StageMetrics:
    def __init__(self, metrics: "Metrics", stage: str) -> None:
        self._queue = metrics.histogram("omni_stage_seconds", stage, "queue")
        self._compute = metrics.histogram("omni_stage_seconds", stage, "compute")
        self._batch_units = metrics.histogram("omni_stage_batch_units", stage)
        self._cpu = metrics.counter("omni_stage_cpu_seconds_total", stage)
        self._units = metrics.counter("omni_units_total", stage)
        self._carried = metrics.counter("omni_stage_carried_total", stage)
        self._failures = metrics.counter("omni_stage_failures_total", stage)
        self._unsaid = metrics.counter("omni_stage_unsaid_total", stage)

    def processed(self, num_units: int, queue_s: float, compute_s: float, cpu_s: float) -> None:
        """A batch left the stage. queue_s: from the arrival of its oldest unit to the start of compute_s, of which the
        loop's thread has computed for cpu_s itself."""
        self._queue.observe(queue_s)
        self._compute.observe(compute_s)
        self._batch_units.observe(num_units)
        self._cpu.inc(cpu_s)
        self._units.inc(num_units)

    def passed(self, num_units: int) -> None:
        """Units went through for which there was nothing to compute."""
        self._units.inc(num_units)

    def failed(self) -> None:
        """The stage has raised at a session's unit, or at another of its hooks."""
        self._failures.inc()

    def unsaid(self) -> None:
        """A session ended with something left to say, since its listener heard nothing."""
        self._unsaid.inc()

    def carried(self, num_chunks: int) -> None:
        """Chunks came after their window had left."""
        self._carried.inc(num_chunks)


class EdgeMetrics:
    """The sender calls `accepted`, `waited`, `in_flight`, `sent`; the receiver `delivered`, `queue`, `received`."""

    def __init__(self, metrics: "Metrics", edge: str) -> None:
        self._accepted = metrics.counter("omni_edge_accepted_total", edge)
        self._delivered = metrics.counter("omni_edge_delivered_total", edge)
        self._drops = {reason: metrics.counter("omni_edge_drops_total", edge, reason) for reason in REASONS}
        self._in_flight = metrics.gauge("omni_edge_in_flight", edge)
        self._depth = metrics.gauge("omni_edge_queue_depth", edge)
        self._capacity = metrics.gauge("omni_edge_queue_capacity", edge)
        self._wait = metrics.histogram("omni_edge_wait_seconds", edge)
        self._age = metrics.histogram("omni_chunk_age_seconds", edge)
        self._sent = metrics.counter("omni_bus_bytes_total", edge, "sent")
        self._received = metrics.counter("omni_bus_bytes_total", edge, "received")

    def accepted(self, num_chunks: int = 1) -> None:
        self._accepted.inc(num_chunks)

    def delivered(self, age_s: float) -> None:
        """One chunk reached its receiver, age_s after its end in event time."""
        self._delivered.inc()
        self._age.observe(age_s)

    def dropped(self, reason: Reason, num_chunks: int = 1) -> None:
        self._drops[reason].inc(num_chunks)

    def waited(self, wait_s: float) -> None:
        """One chunk got its credit after wait_s; 0 counts, too."""
        self._wait.observe(wait_s)

    def in_flight(self, num_chunks: int) -> None:
        self._in_flight.set(num_chunks)

    def queue(self, depth: int, capacity: int) -> None:
        """Chunks waiting at this end, and how many the edge may hold."""
        self._depth.set(depth)
        self._capacity.set(capacity)

    def sent(self, num_bytes: int) -> None:
        self._sent.inc(num_bytes)

    def received(self, num_bytes: int) -> None:
        self._received.inc(num_bytes)


class BusMetrics:
    def __init__(self, metrics: "Metrics", reasons: Iterable[str]) -> None:
        self._invalid = _ByReason(metrics, "omni_bus_invalid_total", (), reasons)

    def invalid(self, reason: str) -> None:
        """A message was refused before use."""
        self._invalid.inc(reason)


class CameraMetrics:
    def __init__(self, metrics: "Metrics", camera: str, reasons: Iterable[str]) -> None:
        self._up = metrics.gauge("omni_camera_up", camera)
        self._last_frame = metrics.gauge("omni_camera_last_frame_timestamp_seconds", camera)
        self._frames = metrics.counter("omni_camera_frames_total", camera)
        self._reconnects = _ByReason(metrics, "omni_camera_reconnects_total", (camera,), reasons)
        self._gaps = metrics.counter("omni_camera_gaps_total", camera)
        self._track_up = {track: metrics.gauge("omni_camera_track_up", camera, track) for track in MEDIA_TRACKS}
        self._bad = {track: metrics.counter("omni_camera_bad_total", camera, track) for track in MEDIA_TRACKS}

    def up(self, delivers: bool) -> None:
        self._up.set(delivers)

    def frame(self, unix_s: float) -> None:
        """A frame was decoded at that wall-clock time."""
        self._frames.inc()
        self._last_frame.set(unix_s)

    def reconnected(self, reason: str) -> None:
        self._reconnects.inc(reason)

    def delivers(self, tracks: Collection[str]) -> None:
        """These tracks come, and no others."""
        for track, gauge in self._track_up.items():
            gauge.set(track in tracks)

    def gaps(self, num_gaps: int) -> None:
        """So many holes, overlaps and clock jumps more."""
        self._gaps.inc(num_gaps)

    def bad(self, track: MediaTrack, num_items: int) -> None:
        """So many packets or pictures more could not be decoded."""
        self._bad[track].inc(num_items)


class WindowMetrics:
    def __init__(self, metrics: "Metrics", camera: str, streams: Iterable[str], stages: Iterable[str]) -> None:
        self._on_time = metrics.counter("omni_windows_total", camera, "on_time")
        self._late = metrics.counter("omni_windows_total", camera, "late")
        self._seconds = metrics.histogram("omni_window_seconds", camera)
        self._missing = _ByReason(metrics, "omni_window_missing_total", (camera,), streams)
        self._late_stage = _ByReason(metrics, "omni_window_late_total", (camera,), stages)
        self._level = metrics.gauge("omni_shedding_level", camera)

    def finished(self, latency_s: float, late_stage: str | None = None) -> None:
        """A window's result is at the sink, latency_s after the window's end. late_stage: which stage made it late."""
        self._seconds.observe(latency_s)
        if late_stage is None:
            self._on_time.inc()
        else:
            self._late.inc()
            self._late_stage.inc(late_stage)

    def missing(self, stream: str) -> None:
        """A window closed without anything from this stream, or before it was through with it."""
        self._missing.inc(stream)

    def shedding(self, level: int) -> None:
        """So many steps of the shedding ladder are taken now."""
        self._level.set(level)


class PlaybackMetrics:
    def __init__(self, metrics: "Metrics", camera: str) -> None:
        self._lead = metrics.gauge("omni_playback_lead_seconds", camera)
        self._underruns = metrics.counter("omni_playback_underruns_total", camera)
        self._underrun_s = metrics.counter("omni_playback_underrun_seconds_total", camera)
        self._speech_s = metrics.counter("omni_speech_seconds_total", camera)
        self._interrupted = metrics.counter("omni_speech_interrupted_total", camera)

    def lead(self, unheard_s: float) -> None:
        self._lead.set(unheard_s)

    def heard(self, speech_s: float) -> None:
        self._speech_s.inc(speech_s)

    def underrun(self, silence_s: float) -> None:
        """Speech ran out inside a turn, for silence_s."""
        self._underruns.inc()
        self._underrun_s.inc(silence_s)

    def interrupted(self) -> None:
        self._interrupted.inc()


class TurnMetrics:
    """What the LLM does for one camera."""

    def __init__(self, metrics: "Metrics", camera: str) -> None:
        self._budget = metrics.gauge("omni_text_budget_tokens", camera)
        self._parked = metrics.gauge("omni_session_parked", camera)
        self._listen = metrics.counter("omni_decisions_total", camera, "listen")
        self._speak = metrics.counter("omni_decisions_total", camera, "speak")

    def text_budget(self, num_tokens: int) -> None:
        self._budget.set(num_tokens)

    def parked(self, parked: bool) -> None:
        self._parked.set(parked)

    def decided(self, decision: Decision) -> None:
        (self._speak if decision == "speak" else self._listen).inc()


class LlmMetrics:
    def __init__(self, metrics: "Metrics") -> None:
        self._usage = metrics.gauge("omni_kv_cache_usage_ratio")

    def kv_cache_usage(self, ratio: float) -> None:
        """Share of KV cache pages in use, 0 to 1."""
        self._usage.set(ratio)


class TokenMetrics:
    def __init__(self, metrics: "Metrics", kinds: Iterable[str]) -> None:
        self._tokens = {kind: metrics.counter("omni_tokens_total", kind) for kind in kinds}

    def add(self, kind: str, num_tokens: int) -> None:
        self._tokens[kind].inc(num_tokens)


class CoordinatorMetrics:
    def __init__(self, metrics: "Metrics", stages: Iterable[str], restart_reasons: Iterable[str]) -> None:
        self._metrics = metrics
        reasons = tuple(restart_reasons)
        self._restarts = {s: _ByReason(metrics, "omni_actor_restarts_total", (s,), reasons) for s in stages}

    def sessions(self, state: str, num_sessions: int) -> None:
        self._metrics.gauge("omni_sessions", state).set(num_sessions)

    def replicas(self, stage: str, state: str, num_replicas: int) -> None:
        self._metrics.gauge("omni_replicas", stage, state).set(num_replicas)

    def restarted(self, stage: str, reason: str) -> None:
        self._restarts[stage].inc(reason)


class Metrics:
    """The metrics of one process, in `registry`. Bound objects may be used from any thread.

    A camera beyond the first `MAX_CAMERAS` is counted under the name `other`.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._lock = Lock()
        self._families: dict[str, Counter | Gauge | Histogram] = {}
        self._labels: dict[str, str] = {}  # by camera
        self._holders: Counts[str] = Counts()  # by camera: how many stages have its session open

    def stage(self, stage: str) -> StageMetrics:
        return StageMetrics(self, stage)

    def edge(self, edge: str) -> EdgeMetrics:
        return EdgeMetrics(self, edge)

    def bus(self, invalid_reasons: Iterable[str] = ()) -> BusMetrics:
        return BusMetrics(self, invalid_reasons)

    def camera(self, camera: str, reconnect_reasons: Iterable[str] = ()) -> CameraMetrics:
        return CameraMetrics(self, self._camera_label(camera), reconnect_reasons)

    def windows(self, camera: str, streams: Iterable[str], stages: Iterable[str]) -> WindowMetrics:
        return WindowMetrics(self, self._camera_label(camera), streams, stages)

    def playback(self, camera: str) -> PlaybackMetrics:
        return PlaybackMetrics(self, self._camera_label(camera))

    def turns(self, camera: str) -> TurnMetrics:
        return TurnMetrics(self, self._camera_label(camera))

    def llm(self) -> LlmMetrics:
        return LlmMetrics(self)

    def tokens(self, kinds: Iterable[str]) -> TokenMetrics:
        return TokenMetrics(self, kinds)

    def coordinator(self, stages: Iterable[str], restart_reasons: Iterable[str] = ()) -> CoordinatorMetrics:
        return CoordinatorMetrics(self, stages, restart_reasons)

    def build_info(self, version: str, model: str, trained: bool) -> None:
        """Say what runs here. trained: False for random weights."""
        self.gauge("omni_build_info", version, model, str(trained).lower()).set(1)

    def hold_camera(self, camera: str) -> None:
        """A stage of this process has opened the camera's session: its series stay until as many have let it go."""
        with self._lock:
            self._holders[camera] += 1

    def release_camera(self, camera: str) -> None:
        """A stage has closed it; with the last one its series end, and its name is free for another."""
        with self._lock:
            self._holders[camera] -= 1
            if self._holders[camera] <= 0:
                del self._holders[camera]
                self._forget(camera)

    def _forget(self, camera: str) -> None:
        label = self._labels.pop(camera, None)
        if label is None or label in self._labels.values():  # not bound; or others share it, who are `other`
            return
        for declared in TABLE:
            if "camera" in declared.labels and declared.name in self._families:
                self._families[declared.name].remove_by_labels({"camera": label})

    def counter(self, name: str, *labels: str) -> Counter:
        """The series of a declared counter. KeyError for a name that `TABLE` doesn't have."""
        series = self._series(name, labels)
        assert isinstance(series, Counter), name
        return series

    def gauge(self, name: str, *labels: str) -> Gauge:
        series = self._series(name, labels)
        assert isinstance(series, Gauge), name
        return series

    def histogram(self, name: str, *labels: str) -> Histogram:
        series = self._series(name, labels)
        assert isinstance(series, Histogram), name
        return series

    def _series(self, name: str, labels: tuple[str, ...]) -> Counter | Gauge | Histogram:
        with self._lock:
            if name not in self._families:
                self._families[name] = _family(_BY_NAME[name], self._registry)
            family = self._families[name]
        return family.labels(*labels) if labels else family

    def _camera_label(self, camera: str) -> str:
        with self._lock:
            if camera not in self._labels:
                is_full = len(set(self._labels.values()) - {OTHER}) >= MAX_CAMERAS
                self._labels[camera] = OTHER if is_full else camera
            return self._labels[camera]


def _family(declared: Declaration, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    name, text, labels = declared.name, declared.help, declared.labels
    if declared.kind == "counter":
        return Counter(name, text, labels, registry=registry)
    if declared.kind == "gauge":
        return Gauge(name, text, labels, registry=registry)
    return Histogram(name, text, labels, registry=registry, buckets=declared.buckets)
