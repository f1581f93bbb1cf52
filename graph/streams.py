"""The streams: what travels under which name, in which dtype and shape. One file says it for all.

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


def camera_stream(name: str) -> str:
    """The stream of one camera's pictures."""
    return CAMERA_PREFIX + name


def is_raw(stream: str) -> bool:
    """True for what comes straight from a camera or a microphone."""
    return stream == MIC or stream.startswith(CAMERA_PREFIX)


def port_of(stream: str) -> str:
    """The port on which a stream leaves and enters a stage (graph/ports.py has the table)."""
    if stream == MIC:
        return "sound"
    return "frames" if stream.startswith(CAMERA_PREFIX) else stream
