"""deploy/evaluate/speech.py, and `pipeline shards voice`: what it says when something is missing."""

from __future__ import annotations

import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from deploy.cli.app import app
from deploy.evaluate.speech import SpeechError, read_speech


def write_wav(path: Path, seconds: float, rate_hz: int, channels: int = 1) -> Path:
    times = np.arange(round(seconds * rate_hz)) / rate_hz
    samples = np.repeat((8000 * np.sin(2 * np.pi * 440 * times)).astype(np.int16), channels)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate_hz)
        file.writeframes(samples.tobytes())
    return path


@pytest.mark.parametrize(("rate_hz", "channels"), [(16000, 1), (44100, 2), (8000, 1)])
def test_a_recording_of_any_rate_becomes_the_same_tone(tmp_path: Path, rate_hz: int, channels: int) -> None:
    speech = read_speech(write_wav(tmp_path / "tone.wav", 2.0, rate_hz, channels), 16000)
    assert speech.dtype == torch.float32
    assert abs(speech.shape[0] - 32000) <= 32
    middle = speech[8000:24000]
    tone = 8000 / 32768 * np.sqrt(0.5)
    assert float(middle.square().mean().sqrt()) == pytest.approx(tone, rel=0.02)
    assert int(torch.fft.rfft(middle).abs().argmax()) == 440


def test_what_is_no_recording_is_told(tmp_path: Path) -> None:
    (tmp_path / "noise.wav").write_bytes(b"noise" * 100)
    with pytest.raises(SpeechError, match=r"noise\.wav: not a recording which can be read"):
        read_speech(tmp_path / "noise.wav", 16000)
    with pytest.raises(SpeechError, match=r"absent\.wav: no such file"):
        read_speech(tmp_path / "absent.wav", 16000)


def voice(folder: Path, recording: Path) -> tuple[int, str]:
    """Exit code and talk."""
    result = CliRunner().invoke(app, ["shards", "voice", str(folder), "--from", str(recording)])
    assert "Traceback" not in result.stderr
    return result.exit_code, result.stderr


def test_a_voice_without_onnxruntime_exits_with_4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, talk = voice(tmp_path, write_wav(tmp_path / "tone.wav", 2.0, 16000))
    assert code == 4
    assert "pip install onnxruntime" in talk


def test_a_voice_for_a_checkpoint_without_the_files_says_which(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'omni-pipeline[voice]'")
    code, talk = voice(tmp_path, write_wav(tmp_path / "tone.wav", 2.0, 16000))
    assert code == 1
    assert "speech_tokenizer_v2_25hz.onnx: no such file" in talk


def test_a_voice_from_nothing_exits_with_1(tmp_path: Path) -> None:
    assert voice(tmp_path, tmp_path / "absent.wav") == (1, f"pipeline: {tmp_path / 'absent.wav'}: no such file\n")
