"""stages/sound_device.py: a device that may be missing, closed to us, or pulled out."""

import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from stages.sound_device import SoundDevice
from stages.stage import MissingDependency, StageError
from stages.wav import OutputEvent


class PortAudioError(Exception):
    """sounddevice has one of this name."""


class FakeStream:
    """An OutputStream with room for 100 samples per call, until it is pulled out."""

    def __init__(self, **_: object) -> None:
        self.write_available = 100
        self.played = 0
        self.gone = False
        self.closed = threading.Event()

    def start(self) -> None: ...

    def write(self, samples: np.ndarray) -> None:
        self._check()
        self.played += len(samples)

    def stop(self) -> None:
        self._check()

    def close(self) -> None:
        self.closed.set()

    def _check(self) -> None:
        if self.gone:
            raise PortAudioError("Device unavailable")


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> FakeStream:
    """The stream that the next SoundDevice opens."""
    made = FakeStream()
    fake = SimpleNamespace(PortAudioError=PortAudioError, OutputStream=lambda **_: made)
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    return made


def test_what_the_device_has_no_room_for_is_dropped(stream: FakeStream):
    device = SoundDevice()
    assert device.write(0, np.zeros(240)) == []
    device.close(0)
    assert stream.played == 100
    assert stream.closed.wait(10)


def test_a_device_that_is_pulled_out_is_told_of_once(stream: FakeStream):
    device = SoundDevice()
    stream.gone = True
    events = [event for at_ns in range(3) for event in device.write(at_ns, np.zeros(240))]
    device.close(3)
    assert events == [OutputEvent("speaker_lost", {"reason": "Device unavailable"})]
    assert stream.closed.wait(10)


def test_a_driver_that_hangs_holds_nobody_up(stream: FakeStream, monkeypatch: pytest.MonkeyPatch):
    go_on = threading.Event()
    monkeypatch.setattr(stream, "stop", go_on.wait)
    device = SoundDevice()
    device.close(0)
    assert not stream.closed.is_set()
    go_on.set()
    assert stream.closed.wait(10)


def test_a_device_that_does_not_open_is_no_missing_dependency(stream: FakeStream, monkeypatch: pytest.MonkeyPatch):
    stream.gone = True
    monkeypatch.setattr(stream, "start", stream.stop)
    with pytest.raises(StageError, match="no sound device opens at 24000 Hz") as caught:
        SoundDevice()
    assert not isinstance(caught.value, MissingDependency)


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(MissingDependency, match="install libportaudio2"):
        SoundDevice()
