"""The kinds of streams: what the stages here take and make.

| kind     | made by              | one chunk is                          | arrays                               |
|----------|----------------------|---------------------------------------|--------------------------------------|
| FRAMES   | camera               | a picture, when it was taken          | image uint8 [H, W, 3] RGB            |
| SOUND    | microphone           | the sound of one window               | samples float32 [n], 16 kHz mono     |
| IMAGE    | vision_encoder       | one picture, encoded                  | embeds [cells, queries, dim]         |
| AUDIO    | audio_encoder        | one window of sound, encoded          | embeds [tokens, dim]                 |
| TEXT     | llm                  | what is said in one window            | token_ids int64 [n], hidden [n, dim] |
| CODES    | tts                  | speech codes of one window            | codes int64 [n], 25 per second       |
| SPEECH   | vocoder              | speech of one window                  | samples float32 [n], 24 kHz mono     |
| PLAYBACK | speaker              | control: what was heard, shed level   | queue int64 [n, 2] ns                |
| EVENTS   | camera, llm, speaker | something worth telling (attrs: type) | -                                    |

Embeddings are float32, or bfloat16 carried as uint16 with the attribute dtype "bfloat16".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from graph.chunk import NS_PER_S
from graph.credit import Limit
from graph.kinds import Array, Kind, Nothing


@dataclass(frozen=True, slots=True)
class Picture:
    """age_s: how long it was on the screen when it was sampled."""

    age_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Embeds:
    """dtype: "bfloat16" where the embeddings are. role: of those that are no window's, such as the voice."""

    dtype: str | None = None
    role: str | None = None


@dataclass(frozen=True, slots=True)
class Said:
    """text: as it reads. turn_start, end_of_turn: whether a turn begins and ends with it. dtype: of hidden."""

    text: str = ""
    turn_start: bool = False
    end_of_turn: bool = False
    dtype: str | None = None


def continues_turn(all_said: Iterable[Said]) -> bool:
    """Does none of these begin or end a turn?"""
    return not any(said.turn_start or said.end_of_turn for said in all_said)


_FLOATS: Final = ("float32", "uint16")
_EIGHT_SECONDS: Final = Limit(8, 8 * NS_PER_S)
FRAMES: Final = Kind(
    "frames",
    Limit(4),
    {"image": Array(("uint8",), ("height", "width", 3))},
    Picture,
    stream="camera/{view}",
    when_full="drop_oldest",  # a live picture is worth less than the next one
    late="drop",
    is_raw=True,
    is_picture=True,
    is_sheddable=True,
)
SOUND: Final = Kind(
    "sound",
    _EIGHT_SECONDS,
    {"samples": Array(("float32",), ("samples",))},
    Nothing,
    stream="mic",
    is_raw=True,
    is_sound=True,
)
IMAGE: Final = Kind(
    "image",
    Limit(8),
    {"embeds": Array(_FLOATS, ("cells", "queries", "dim"))},
    Embeds,
    late="drop",
    is_picture=True,
)
AUDIO: Final = Kind("audio", Limit(8), {"embeds": Array(_FLOATS, ("tokens", "dim"))}, Embeds)
TEXT: Final = Kind(
    "text",
    _EIGHT_SECONDS,
    {"token_ids": Array(("int64",), ("tokens",)), "hidden": Array(_FLOATS, ("tokens", "dim"))},
    Said,
    is_fenced=True,
    tokens="token_ids",
)
CODES: Final = Kind(
    "codes", _EIGHT_SECONDS, {"codes": Array(("int64",), ("codes",))}, Said, is_fenced=True, tokens="codes"
)
SPEECH: Final = Kind("speech", _EIGHT_SECONDS, {"samples": Array(("float32",), ("samples",))}, Said, is_fenced=True)
PLAYBACK: Final[Kind[Nothing]] = Kind("playback", Limit(64), is_windowed=False, is_control=True)
# Whoever speaks or sees waits for no teller: it takes what comes at once, and if it can't, the oldest is counted.
EVENTS: Final[Kind[Nothing]] = Kind("events", Limit(256), {}, when_full="drop_oldest", is_windowed=False, is_event=True)
