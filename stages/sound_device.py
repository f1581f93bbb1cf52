"""A real sound device beside the virtual listener, for `--speaker device`. Needs `sounddevice` and libportaudio2."""

from __future__ import annotations

from typing import Any

import numpy as np

from graph.streams import SPEECH_RATE_HZ
from stages.stage import StageError


class SoundDevice:
    """Plays what is heard on the default output device, as it is heard; a full device buffer drops the rest."""

    def __init__(self) -> None:
        try:
            import sounddevice
        except (ImportError, OSError) as error:
            raise StageError(
                f"speaker: no sound device can be used ({error}); install libportaudio2 and "
                ".venv/bin/pip install -e '.[device]' in the checkout, or set stages.speaker.sink: virtual"
            ) from error
        try:
            self._stream: Any = sounddevice.OutputStream(samplerate=SPEECH_RATE_HZ, channels=1, dtype="float32")
            self._stream.start()
        except sounddevice.PortAudioError as error:
            raise StageError(
                f"speaker: no sound device opens at {SPEECH_RATE_HZ} Hz ({error}); set stages.speaker.sink: virtual"
            ) from error

    def write(self, at_ns: int, samples: np.ndarray) -> None:
        """Play now; the device's own clock paces it, so event time is not needed."""
        room = self._stream.write_available
        self._stream.write(np.ascontiguousarray(samples[:room, None], dtype=np.float32))

    def close(self, end_ns: int) -> None:
        self._stream.stop()
        self._stream.close()
