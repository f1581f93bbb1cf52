"""The names under which streams travel, and plans of how a test's stages take and make them."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from deploy.actor.session_plan import Output
from graph.kinds import Kind, Late
from graph.window import Input
from stages import kinds

MIC = "mic"
IMAGE = "image"
AUDIO = "audio"
TEXT = "text"
CODES = "codes"
SPEECH = "speech"
PLAYBACK = "playback"
EVENTS = "events"
EVERY = (
    kinds.FRAMES,
    kinds.SOUND,
    kinds.IMAGE,
    kinds.AUDIO,
    kinds.TEXT,
    kinds.CODES,
    kinds.SPEECH,
    kinds.PLAYBACK,
    kinds.EVENTS,
)
# As they are, but for what their chunks hold: a test's are small.
KINDS = {kind.name: replace(kind, arrays=None, attributes=None) for kind in EVERY}
SOURCES = {"frames": "camera", "sound": "microphone"}


def camera_stream(name: str) -> str:
    """The stream of one camera's pictures."""
    return f"camera/{name}"


def stream_of(kind: Kind, camera: str) -> str:
    """The name under which a stream of this kind travels in a session with this camera."""
    return (kind.stream or kind.name).format(view=camera)


def kind_of(stream: str) -> Kind:
    """What travels under this name; a name that is no kind's is a kind of its own."""
    name = "sound" if stream == MIC else "frames" if stream.startswith("camera/") else stream
    return KINDS.get(name) or Kind(name)


def inputs(*streams: str, late: Late | None = None, **late_of: Late) -> dict[str, Input]:
    """How a stage takes these streams. late: of all of them; late_of: of single ones; else as their kinds have it."""
    return {stream: input_of(stream, late_of.get(stream, late)) for stream in (*streams, *late_of)}


def input_of(stream: str, late: Late | None = None, edge: str = "", source: str = "") -> Input:
    kind = kind_of(stream)
    return Input(kind.name, kind, edge, source, late=late or kind.late, is_original=kind.is_raw)


def outputs(camera: str, edges: Iterable[str] = (), kinds: Mapping[str, Kind] = KINDS) -> dict[str, Output]:
    """All that a test's stage may make, on these edges of its. kinds: by port."""
    edges = list(edges)
    return {
        name: Output(stream_of(kind, camera), kind, tuple(edge for edge in edges if f".{name}->" in edge))
        for name, kind in kinds.items()
    }
