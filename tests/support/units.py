"""Windows as a stage gets them, made by hand."""

from collections import defaultdict

import numpy as np

from graph.chunk import NS_PER_S, Chunk, ChunkType, SessionId
from graph.tail import Ack
from graph.window import Unit
from stages.rates import SPEECH_RATE_HZ
from stages.session import Session
from tests.support.sessions import make_session
from tests.support.streams import AUDIO, CODES, IMAGE, SPEECH, TEXT, inputs

DOOR = SessionId("door")


def session(name: str = "door", **fields: object) -> Session:
    """A session in virtual time with nothing to write to, unless told otherwise."""
    usual = {"source": f"test://pattern?name={name}", "paced": False}
    return make_session(name, **(usual | fields))


def unit(name: str, index: int, *chunks: Chunk) -> Unit:
    """Window `index` of a session, with these chunks in their order."""
    by_stream: dict[str, list[Chunk]] = defaultdict(list)
    for chunk in chunks:
        by_stream[chunk.stream].append(chunk)
    streams = {stream: tuple(own) for stream, own in by_stream.items()}
    closed_by = next(iter(streams), "text")
    start_ns, taken = index * NS_PER_S, inputs(*streams)
    return Unit(SessionId(name), index, start_ns, start_ns + NS_PER_S, streams, closed_by=closed_by, inputs=taken)


def image(name: str, start_ns: int, embeds: np.ndarray) -> Chunk:
    """An encoded picture: [cells, queries, dim]."""
    return Chunk(SessionId(name), IMAGE, start_ns, arrays={"embeds": embeds})


def audio(name: str, index: int, embeds: np.ndarray, **attrs: object) -> Chunk:
    """An encoded window of sound: [tokens, dim]."""
    return Chunk(SessionId(name), AUDIO, index * NS_PER_S, NS_PER_S, arrays={"embeds": embeds}, attrs=attrs)


def text(name: str, index: int, ids: list[int], hidden: np.ndarray, **attrs: object) -> Chunk:
    """What is said in a window."""
    arrays = {"token_ids": np.array(ids, np.int64), "hidden": hidden}
    return Chunk(SessionId(name), TEXT, index * NS_PER_S, NS_PER_S, arrays=arrays, attrs=attrs)


def codes(name: str, index: int, codes: list[int], **attrs: object) -> Chunk:
    """Speech codes of a window."""
    arrays = {"codes": np.array(codes, np.int64)}
    return Chunk(SessionId(name), CODES, index * NS_PER_S, NS_PER_S, arrays=arrays, attrs=attrs)


def speech(name: str, index: int, samples: np.ndarray, said: str = "", end_of_turn: bool = False) -> Chunk:
    """Speech of a window, 24 kHz."""
    attrs = {"text": said, "end_of_turn": end_of_turn}
    duration_ns = len(samples) * NS_PER_S // SPEECH_RATE_HZ
    arrays = {"samples": samples.astype(np.float32)}
    return Chunk(SessionId(name), SPEECH, index * NS_PER_S, duration_ns, arrays=arrays, attrs=attrs)


def ack(at_s: float, heard_s: float = 0.0, received_s: float = 0.0, through_s: float = 0.0, **more: int) -> Ack:
    """What a listener says, in seconds."""
    times = (round(s * NS_PER_S) for s in (at_s, heard_s, received_s, through_s))
    return Ack(*times, **more)


def of_kind(chunks: list[Chunk], kind: ChunkType) -> list[Chunk]:
    return [chunk for chunk in chunks if chunk.type is kind]
