"""model_shards/voice.py: features against plain formulas, and a whole voice through small ONNX graphs."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model_shards.errors import DependencyError, ModelError
from model_shards.vocoder import mel_spectrogram
from model_shards.voice import FBANK_BINS, SPEAKER_FILE, TOKENIZER_FILE, fbank, fit_frames, make_voice

RATE_HZ = 16000


def speech(seconds: float, rate_hz: int = RATE_HZ) -> Tensor:
    """A vowel that rises, over a little noise."""
    times = np.arange(round(seconds * rate_hz)) / rate_hz
    noise = 0.01 * np.random.default_rng(0).standard_normal(times.shape)
    return torch.from_numpy((0.3 * np.sin(2 * np.pi * (200 + 40 * times) * times) + noise).astype(np.float32))


def kaldi_fbank(samples: Tensor) -> np.ndarray[Any, Any]:
    """Kaldi's definition, frame by frame and filter by filter, in double precision."""

    def mel(hz: float) -> float:
        return 1127.0 * math.log(1.0 + hz / 700.0)

    signal = samples.double().numpy()
    step = (mel(8000.0) - mel(20.0)) / (FBANK_BINS + 1)
    window = np.array([(0.5 - 0.5 * math.cos(2 * math.pi * i / 399)) ** 0.85 for i in range(400)])
    rows = []
    for start in range(0, len(signal) - 400 + 1, 160):
        frame = signal[start : start + 400] - signal[start : start + 400].mean()
        emphasised = [frame[i] - 0.97 * frame[max(0, i - 1)] for i in range(400)]
        power = np.abs(np.fft.rfft(emphasised * window, 512)) ** 2
        row = []
        for index in range(FBANK_BINS):
            left, middle, right = (mel(20.0) + step * (index + i) for i in range(3))
            energy = 0.0
            for k in range(256):
                at = mel(k * RATE_HZ / 512)
                if left < at < right:
                    weight = (at - left) / (middle - left) if at <= middle else (right - at) / (right - middle)
                    energy += weight * power[k]
            row.append(math.log(max(energy, 1.1920929e-07)))
        rows.append(row)
    return np.array(rows)


def test_the_filter_bank_is_kaldi_s() -> None:
    samples = speech(0.2)
    torch.testing.assert_close(fbank(samples), torch.from_numpy(kaldi_fbank(samples)).float(), atol=2e-3, rtol=1e-3)


def test_a_second_has_98_frames_and_silence_is_the_floor() -> None:
    features = fbank(torch.zeros(RATE_HZ))
    assert features.shape == (98, 80)
    assert torch.all(features == math.log(torch.finfo(torch.float32).eps))


def test_a_mel_is_cut_or_its_last_frame_repeated() -> None:
    mel = torch.arange(6.0).reshape(3, 2)
    assert fit_frames(mel, 2).tolist() == [[0, 1], [2, 3]]
    assert fit_frames(mel, 5).tolist() == [[0, 1], [2, 3], [4, 5], [4, 5], [4, 5]]


@pytest.mark.parametrize("seconds", [0.5, 17.5])
def test_too_little_and_too_much_speech_is_refused(tmp_path: Path, seconds: float) -> None:
    with pytest.raises(ModelError, match=rf"{seconds} s of speech; a voice is made from 1 to 17 s"):
        make_voice(tmp_path, speech(seconds), speech(seconds, 24000))


def test_without_onnxruntime_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DependencyError, match="pip install onnxruntime"):
        make_voice(tmp_path, speech(1), speech(1, 24000))


# --- with onnxruntime ---------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder with graphs that have the inputs and outputs of the released ones."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'omni-pipeline[voice]'")
    onnx = pytest.importorskip("onnx", reason="the graphs are written with the onnx package: pip install onnx")
    float32, int32, int64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT32, onnx.TensorProto.INT64
    node, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info

    def write(name: Path, nodes: list[Any], inputs: list[Any], output: Any, constants: dict[str, Any]) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        stored = [onnx.numpy_helper.from_array(array, key) for key, array in constants.items()]
        graph = onnx.helper.make_graph(nodes, "graph", inputs, [output], stored)
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
        onnx.save(model, tmp_path / name)

    # Codes: every fourth frame's mean over the mels, in thousandths, up to the length that was told.
    write(
        TOKENIZER_FILE,
        [
            node("Cast", ["length"], ["end"], to=int64),
            node("ReduceMean", ["feats"], ["mean"], axes=[1], keepdims=0),
            node("Slice", ["mean", "begin", "end", "axis", "stride"], ["some"]),
            node("Mul", ["some", "thousand"], ["scaled"]),
            node("Abs", ["scaled"], ["positive"]),
            node("Cast", ["positive"], ["codes"], to=int32),
        ],
        [value("feats", float32, [1, 128, "frames"]), value("length", int32, [1])],
        value("codes", int32, [1, "codes"]),
        {"begin": np.array([0]), "axis": np.array([1]), "stride": np.array([4]), "thousand": np.float32(1000)},
    )
    # Speaker: the largest of each feature, mixed.
    write(
        SPEAKER_FILE,
        [
            node("ReduceMax", ["features"], ["largest"], axes=[1], keepdims=0),
            node("MatMul", ["largest", "mix"], ["embedding"]),
        ],
        [value("features", float32, [1, "frames", 80])],
        value("embedding", float32, [1, 192]),
        {"mix": np.eye(80, 192, dtype=np.float32)},
    )
    return tmp_path


def test_a_voice_has_25_codes_a_second_their_mel_and_a_speaker(checkpoint: Path) -> None:
    voice = make_voice(checkpoint, speech(2), speech(2, 24000))
    assert (voice.prompt_tokens.shape, voice.prompt_tokens.dtype) == ((50,), torch.int32)
    assert (voice.prompt_mel.shape, voice.spk_emb.shape) == ((1, 100, 80), (1, 192))
    torch.testing.assert_close(voice.prompt_mel[0], mel_spectrogram(speech(2, 24000))[:100])


def test_the_speaker_is_told_by_features_without_their_mean(checkpoint: Path) -> None:
    features = fbank(speech(2))
    expected = (features - features.mean(dim=0)).max(dim=0).values
    torch.testing.assert_close(make_voice(checkpoint, speech(2), speech(2, 24000)).spk_emb[0, :80], expected)


@pytest.mark.parametrize("name", [TOKENIZER_FILE, SPEAKER_FILE])
def test_missing_and_damaged_graphs_are_named(checkpoint: Path, name: Path) -> None:
    (checkpoint / name).write_bytes(b"no graph")
    with pytest.raises(ModelError, match=rf"{name.name}: not an ONNX file that can be run"):
        make_voice(checkpoint, speech(1), speech(1, 24000))
    (checkpoint / name).unlink()
    with pytest.raises(ModelError, match=rf"{name.name}: no such file"):
        make_voice(checkpoint, speech(1), speech(1, 24000))


def test_a_graph_with_other_inputs_is_refused(checkpoint: Path) -> None:
    (checkpoint / TOKENIZER_FILE).write_bytes((checkpoint / SPEAKER_FILE).read_bytes())
    with pytest.raises(ModelError, match=r"an ONNX graph with the inputs features can't be run"):
        make_voice(checkpoint, speech(1), speech(1, 24000))
