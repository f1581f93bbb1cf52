"""A real sound device beside the virtual listener, for `--speaker device`. Needs `sounddevice` and libportaudio2."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any

import numpy as np

from stages.rates import SPEECH_RATE_HZ
from stages.stage import MissingDependency, StageError
from stages.wav import OutputEvent


class SoundDevice:
    """Plays what is heard on the default output device, as it is heard; a full device buffer drops the rest.

    A device that is pulled out is told of once, as `speaker_lost` with its reason; the virtual listener goes on.
    """

    def __init__(self) -> None:
        try:
            import sounddevice
        except (ImportError, OSError) as error:
            raise MissingDependency(
                f"speaker: no sound device can be used ({error}); install libportaudio2 and "
                ".venv/bin/pip install -e '.[device]' in the checkout, or set stages.speaker.sink: virtual"
            ) from error
        self._failure: type[Exception] = sounddevice.PortAudioError
        try:
            self._stream: Any = sounddevice.OutputStream(samplerate=SPEECH_RATE_HZ, channels=1, dtype="float32")
            self._stream.start()
        except self._failure as error:
            raise StageError(
                f"speaker: no sound device opens at {SPEECH_RATE_HZ} Hz ({error}); set stages.speaker.sink: virtual"
            ) from error

    def write(self, at_ns: int, samples: np.ndarray) -> list[OutputEvent]:
        """Play now; the device's own clock paces it, so event time is not needed."""
        if self._stream is None:
            return []
        try:
            room = self._stream.write_available
            self._stream.write(np.ascontiguousarray(samples[:room, None], dtype=np.float32))
        except self._failure as error:
            self._close()
            return [OutputEvent("speaker_lost", {"reason": str(error)})]
        return []

    def advance(self, now_ns: int) -> list[OutputEvent]:
        return []

    def close(self, end_ns: int) -> None:
        self._close()

    def _close(self) -> None:
        """In a thread of its own: the driver of a device that was pulled out may hang, and the cameras go on."""
        stream, self._stream = self._stream, None
        if stream is not None:
            threading.Thread(target=self._end, args=(stream,), name="sound device", daemon=True).start()

    def _end(self, stream: Any) -> None:
        for last in (stream.stop, stream.close):
            with suppress(self._failure):
                last()
