"""The streams and their kinds: what travels under which name, in which dtype and shape. One file says it for all.

| stream        | made by             | one chunk is                          | arrays                               |
|---------------|---------------------|---------------------------------------|--------------------------------------|
| camera/<name> | camera              | a picture, when it was taken          | image uint8 [H, W, 3] RGB            |
| mic           | microphone          | the sound of one window               | samples float32 [n], 16 kHz mono     |
| image         | vision_encoder      | one picture, encoded                  | embeds [cells, queries, dim]         |
| audio         | audio_encoder       | one window of sound, encoded          | embeds [tokens, dim]                 |
| text          | llm                 | what is said in one window            | token_ids int64 [n], hidden [n, dim] |
| codes         | tts                 | speech codes of one window            | codes int64 [n], 25 per second       |
| speech        | vocoder             | speech of one window                  | samples float32 [n], 24 kHz mono     |
| playback      | speaker             | control: what was heard, shed level   | queue int64 [n, 2] ns                |
| events        | camera, llm, speaker | something worth telling (attrs: type) | -                                    |

Embeddings are float32, or bfloat16 carried as uint16 with attrs["dtype"] = "bfloat16".
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from graph.credit import Limit
from graph.kinds import Kind

MIC = "mic"
IMAGE = "image"
AUDIO = "audio"
TEXT = "text"
CODES = "codes"
SPEECH = "speech"
PLAYBACK = "playback"
EVENTS = "events"

CAMERA_PREFIX = "camera/"

SOUND_RATE_HZ = 16_000
SPEECH_RATE_HZ = 24_000
CODES_PER_S = 25


_EIGHT_SECONDS: Final = Limit(8, 8_000_000_000)
_KINDS: Final = (
    # A live picture is worth less than the next one.
    Kind("frames", Limit(4), "drop_oldest", "drop", is_raw=True, is_picture=True, is_sheddable=True),
    Kind("sound", _EIGHT_SECONDS, is_raw=True),
    Kind("image", Limit(8), late="drop", is_picture=True),
    Kind("audio", Limit(8)),
    Kind("text", _EIGHT_SECONDS, is_fenced=True),
    Kind("codes", _EIGHT_SECONDS, is_fenced=True),
    Kind("speech", _EIGHT_SECONDS, is_fenced=True),
    Kind("playback", Limit(64), is_windowed=False, is_control=True),
    # Whoever speaks or sees waits for no teller: it takes what comes at once, and if it can't, the oldest is counted.
    Kind("events", Limit(256), "drop_oldest", is_windowed=False),
)
KINDS: Final = {kind.name: kind for kind in _KINDS}


def camera_stream(name: str) -> str:
    """The stream of one camera's pictures."""
    return CAMERA_PREFIX + name


def stream_of(kind: Kind, camera: str) -> str:
    """The name under which a stream of this kind travels in a session with this camera."""
    return {"frames": camera_stream(camera), "sound": MIC}.get(kind.name, kind.name)


@lru_cache(maxsize=4096)
def kind_of(stream: str) -> Kind:
    """What travels under this name; a name that is not in the table is a kind of its own."""
    name = "sound" if stream == MIC else "frames" if stream.startswith(CAMERA_PREFIX) else stream
    return KINDS.get(name) or Kind(name, Limit(8))
