"""deploy/run/checkpoints.py: what a checkpoint lacks is switched off; what does not fit is refused with words."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest

from deploy.run.checkpoints import (
    MAX_DIFFERENCES_SHOWN,
    OF_THE_ROOM,
    UNTRAINED,
    Checkpoint,
    CheckpointError,
    cache_folder,
    open_checkpoint,
)
from graph.spec import PipelineSpec
from model_shards.config import ModelConfig, Quantization
from model_shards.errors import ModelError
from model_shards.init import TINY
from tests.support.specs import parse_spec
from tests.support.tiny import Tiny

MINIMAL = "version: 1\nmodel: tiny\ncameras: {test: {source: 'test://pattern'}}\n"


def spec(*overrides: str) -> PipelineSpec:
    return parse_spec(MINIMAL, "pipeline.yaml", overrides)


def checkpoint(config: ModelConfig = TINY, **bytes_of: int) -> Checkpoint:
    return Checkpoint(Path("/models/some"), config, bytes_of)


def lacking(**parts: None) -> Checkpoint:
    return checkpoint(dataclasses.replace(TINY, **parts))


def test_a_whole_checkpoint_changes_nothing():
    requested = spec()
    assert checkpoint().fit(requested) is requested


@pytest.mark.parametrize(
    ("part", "off"),
    [
        ("vision", {"vision_encoder", "camera"}),
        ("audio", {"audio_encoder", "microphone"}),
        ("tts", {"tts", "vocoder", "speaker"}),
        ("vocoder", {"tts", "vocoder", "speaker"}),
    ],
)
def test_what_a_checkpoint_lacks_is_switched_off_with_what_then_has_nothing_to_do(part: str, off: set[str]):
    requested = spec()
    fitted = lacking(**{part: None}).fit(requested)
    assert requested.stages.keys() - fitted.stages.keys() == off
    assert not off & {stage for edge in fitted.edges for stage in (edge.source.stage, edge.target.stage)}


def test_the_official_switches_of_a_checkpoint_are_obeyed(tiny: Tiny, tmp_path: Path):
    # Given: a checkpoint whose config says that it neither sees nor speaks.
    folder = shutil.copytree(tiny.path, tmp_path / "deaf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"init_vision": False, "init_tts": False}))
    requested = spec(f"model={folder}")
    fitted = open_checkpoint(requested, lambda line: None).fit(requested)
    assert set(fitted.stages) == {"microphone", "audio_encoder", "llm", "events"}


def test_a_stage_that_is_off_already_stays_off():
    fitted = lacking(vision=None).fit(spec("stages.vision_encoder.replicas=0"))
    assert "vision_encoder" not in fitted.stages


def test_windows_of_another_length_than_the_model_s_are_refused():
    with pytest.raises(CheckpointError, match=r"window.length is 2s, .*windows of 1s; set window.length: 1s"):
        checkpoint().fit(spec("window.length=2s"))


def test_float32_for_an_llm_in_4_bits_is_refused():
    llm = dataclasses.replace(TINY.llm, quantization=Quantization(4, 64))
    small = checkpoint(dataclasses.replace(TINY, llm=llm))
    assert small.fit(spec()) == spec()
    with pytest.raises(CheckpointError, match=r"the LLM of .* is in 4 bits in groups of 64, .*; set stages.llm.dtype"):
        small.fit(spec("stages.llm.dtype=float32"))


def test_a_model_that_does_not_hear_takes_any_window():
    assert lacking(audio=None).fit(spec("window.length=2s")).window.length_ns == 2_000_000_000


def machine(root: Path, free_bytes: int) -> Path:
    (root / "proc").mkdir()
    (root / "proc" / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable:   {free_bytes // 1024} kB\n")
    return root


def test_too_little_memory_is_said_with_both_numbers(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"needs about (19|20)\.\d GB of memory .* and 2\.0 GB are free; take a"):
        checkpoint(llm=18_000_000_000).check_memory(spec(), machine(tmp_path, 2_000_000_000))


def test_a_kv_cache_that_would_fill_the_machine_is_refused_with_what_to_set(tmp_path: Path):
    root = machine(tmp_path, 24 << 30)
    with pytest.raises(
        CheckpointError, match=r"KV cache .* 68\.7 GB.*set stages.llm.kv_memory to at most (\d+MiB)"
    ) as caught:
        checkpoint(llm=1).check_memory(spec("stages.llm.kv_memory=64GiB"), root)
    fits = re.search(r"at most (\w+)", str(caught.value))
    assert fits is not None
    checkpoint(llm=1).check_memory(spec(f"stages.llm.kv_memory={fits[1]}"), root)


def test_a_container_s_limit_is_the_one_that_counts(tmp_path: Path):
    root = machine(tmp_path, 64 << 30)
    (root / "sys/fs/cgroup").mkdir(parents=True)
    (root / "proc/self").mkdir()
    (root / "proc/self/cgroup").write_text("0::/\n")
    (root / "sys/fs/cgroup/memory.max").write_text(f"{2 << 30}\n")
    (root / "sys/fs/cgroup/memory.current").write_text("0\n")
    with pytest.raises(CheckpointError, match=r"2\.1 GB are free within this container's limit of 2\.1 GB"):
        checkpoint(llm=1 << 30).check_memory(spec(), root)


def test_speech_without_a_voice_is_refused_before_anything_starts():
    with pytest.raises(CheckpointError, match=r"holds no voice .*pipeline shards voice"):
        checkpoint().check_tensors(spec())


def test_the_tiny_checkpoint_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lines: list[str] = []
    first = open_checkpoint(spec(), lines.append)
    again = open_checkpoint(spec(), lines.append)
    assert first.path == again.path == cache_folder() / "tiny"
    assert lines == [f"making the tiny checkpoint in {first.path}", *[f"model tiny: {UNTRAINED}"] * 2]
    assert set(first.bytes_of) == {"vision_encoder", "audio_encoder", "llm", "tts", "vocoder"}
    assert not first.trained


def test_nano_is_what_is_shipped_and_its_line_says_what_it_knows(tiny: Tiny, tmp_path: Path):
    folder = shutil.copytree(tiny.path, tmp_path / "trained")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"untrained": False, "nano": True}))
    lines: list[str] = []
    opened = open_checkpoint(spec(f"model={folder}"), lines.append)
    assert opened.trained
    assert lines == [f"model {folder}: {OF_THE_ROOM}"]


def test_weights_count_in_the_type_they_are_computed_with():
    def sizes(*overrides: str) -> dict[str, int]:
        return open_checkpoint(spec("model=nano", *overrides), lambda line: None).bytes_of

    usual, small = sizes(), sizes("stages.llm.dtype=bfloat16", "stages.vision_encoder.device=cuda")
    assert usual["llm"] == 2 * small["llm"] > 5_000_000
    assert usual["vision_encoder"] == 2 * small["vision_encoder"]
    assert usual["vocoder"] == small["vocoder"] > 2 * 6_000_000  # its file has 2 bytes for each


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path):
    with pytest.raises(ModelError, match=r"config\.json"):
        open_checkpoint(spec(f"model={tmp_path}"), lambda line: None)


def test_a_checkpoint_that_claims_to_be_the_released_one_is_compared_with_it(tiny: Tiny, tmp_path: Path):
    folder = shutil.copytree(tiny.path, tmp_path / "claims")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"untrained": False}))
    lines: list[str] = []
    open_checkpoint(spec(f"model={folder}"), lines.append)
    assert lines[:3] == [
        f"model {folder}",
        f"not as released: llm.vocab_size is {TINY.llm.vocab_size}, released: 151748",
        "not as released: llm.hidden_size is 128, released: 4096",
    ]
    assert len(lines) == 1 + MAX_DIFFERENCES_SHOWN + 1
    assert re.fullmatch(r"not as released: \d+ more", lines[-1])


def test_without_a_home_the_variable_to_set_is_named(monkeypatch: pytest.MonkeyPatch):
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)  # as in a container that runs under another user's number
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(CheckpointError, match=r"HOME is not set.* set XDG_CACHE_HOME to a folder"):
        cache_folder()


@pytest.mark.parametrize("value", ["", "relative", "~/cache"])
def test_a_cache_that_is_no_whole_path_is_the_home_s(monkeypatch: pytest.MonkeyPatch, value: str):
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_folder() == Path("/home/me/.cache/omni-pipeline")
