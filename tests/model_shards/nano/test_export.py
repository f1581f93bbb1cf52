"""What is exported is what the official classes load."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from model_shards.checkpoint import COMPONENTS, build, inspect, load_ref_audio, load_shard, load_voice
from model_shards.config import load_config
from model_shards.errors import ModelError
from model_shards.nano.export import export, nano_config
from model_shards.nano.speech_data import nano_silence
from model_shards.nano.speech_sizes import NUM_CODES, PROMPT_CODES
from model_shards.nano.train_speech_codes import PROMPT_SENTENCE
from model_shards.tokenizer import Tokenizer

SILENCE = 78


@pytest.fixture
def trainings(tmp_path: Path) -> Path:
    """Trainings of everything, as they stand before their first step."""
    config, folder = nano_config(SILENCE), tmp_path / "trainings"
    modules = {name: build(name, config) for name in COMPONENTS}
    modules["llm"] = nn.ModuleDict({"llm": modules["llm"]})  # as its training holds it, beside its heads
    vocoder = modules.pop("vocoder")
    for name, module in (*modules.items(), ("speech-flow", vocoder.flow), ("speech-vocoder", vocoder.hift)):
        save_training(folder / {"tts": "speech-talker"}.get(name, name), module)
    write_speech_data(folder)
    return folder


def save_training(folder: Path, module: nn.Module) -> None:
    folder.mkdir(parents=True)
    torch.save({"averaged": module.state_dict()}, folder / "state.pt")


def write_speech_data(folder: Path) -> None:
    """A corpus of the prompt's sentence, a second of silence."""
    corpus = folder / "speech-data" / "corpus"
    corpus.mkdir(parents=True)
    row = {"words": PROMPT_SENTENCE.split(), "starts_s": [0.0] * 6, "first_code": 0, "num_codes": 25}
    (corpus / "utterances.json").write_text(json.dumps([row]), encoding="utf-8")
    np.save(corpus / "wave.npy", np.zeros(24_000, dtype=np.int16))
    np.save(corpus / "mel.npy", nano_silence(50).numpy().astype(np.float16))
    np.save(corpus / "f0.npy", np.zeros(50, dtype=np.float16))
    none, prompt = np.zeros(0, dtype=np.int16), np.arange(PROMPT_CODES)
    (folder / "speech-codes").mkdir()
    np.savez(folder / "speech-codes" / "codes.npz", corpus=none, test=none, silence=np.array(SILENCE), prompt=prompt)


def test_every_component_loads(trainings: Path, tmp_path: Path):
    export(trainings, tmp_path / "nano")
    for component in COMPONENTS:
        load_shard(tmp_path / "nano", component)
    voice = load_voice(tmp_path / "nano")
    assert voice is not None
    assert voice.prompt_tokens.tolist() == list(range(PROMPT_CODES))
    assert load_ref_audio(tmp_path / "nano") is None


def test_the_config_is_read_as_it_was_meant(trainings: Path, tmp_path: Path):
    export(trainings, tmp_path / "nano")
    config = load_config(tmp_path / "nano")
    assert config == nano_config(SILENCE)
    assert not config.official
    assert config.vocoder is not None
    assert config.vocoder.flow.vocab_size == NUM_CODES
    assert len(Tokenizer.load(tmp_path / "nano")) == config.llm.vocab_size


def test_heads_and_the_name_of_a_training_are_left_out(trainings: Path, tmp_path: Path):
    file = trainings / "audio" / "state.pt"
    tensors = torch.load(file)["averaged"]
    renamed = {f"encoder.{key}": tensor for key, tensor in tensors.items()}
    torch.save({"averaged": renamed | {"head.weight": torch.zeros(3)}}, file)
    export(trainings, tmp_path / "nano")
    load_shard(tmp_path / "nano", "audio")


def test_weights_are_kept_in_half_precision(trainings: Path, tmp_path: Path):
    export(trainings, tmp_path / "nano")
    assert {dtype for info in inspect(tmp_path / "nano") for dtype in info.dtypes} == {"float16"}


def test_a_part_that_is_not_trained_is_left_out(trainings: Path, tmp_path: Path):
    (trainings / "llm" / "state.pt").unlink()
    export(trainings, tmp_path / "nano")
    load_shard(tmp_path / "nano", "tts")
    with pytest.raises(ModelError, match="holds no tensors of 'llm'"):
        load_shard(tmp_path / "nano", "llm")


def test_a_part_of_another_shape_is_told(trainings: Path, tmp_path: Path):
    file = trainings / "speech-talker" / "state.pt"
    tensors = torch.load(file)["averaged"]
    torch.save({"averaged": tensors | {"tts.emb_text.weight": torch.zeros(2, 2)}}, file)
    with pytest.raises(ModelError, match=r"tts lacks, or has in another shape: tts\.emb_text\.weight"):
        export(trainings, tmp_path / "nano")
    assert not (tmp_path / "nano").exists()
