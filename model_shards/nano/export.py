"""Trainings become a checkpoint folder in the official layout.

Rule: what is written is what the official classes load: every part is checked against the config by name and shape. A
part whose training has not begun is left out, and so is its component from what can be loaded.

    python -m model_shards.nano.export ../nano-training model_shards/nano/checkpoint
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from safetensors.torch import save
from torch import Tensor

from model_shards.checkpoint import PREFIXES, VOCODER_FOLDER, Component, build, build_hollow, save_voice
from model_shards.config import ModelConfig
from model_shards.errors import ModelError
from model_shards.init import new_folder, official_config, vocoder_sizes
from model_shards.nano import sizes
from model_shards.nano.speech_codes import load_codes
from model_shards.nano.speech_data import corpus_beside
from model_shards.nano.speech_sizes import talker_config, vocoder_config
from model_shards.nano.train_speech_flow import stored_voice
from model_shards.nano.training import load_averaged_tensors
from model_shards.nano.vocabulary import build_tokenizer
from model_shards.tts import Talker
from model_shards.vocoder import Vocoder, Voice

TRAININGS: Final[Mapping[Component, tuple[str, ...]]] = {
    "vision": ("vision",),
    "audio": ("audio",),
    "llm": ("llm",),
    "tts": ("speech-talker",),
    "vocoder": ("speech-flow", "speech-vocoder"),
}
_VOCODER_PARTS: Final = {"speech-flow": "flow.", "speech-vocoder": "hift."}
_HELD_AS: Final[Mapping[Component, str]] = {"llm": "llm.", "vision": "encoder.", "audio": "encoder."}


@dataclass(frozen=True, slots=True)
class SpokenParts:
    """Nano's speech, as it is used."""

    talker: Talker
    vocoder: Vocoder
    voice: Voice


def nano_config(silence_code: int) -> ModelConfig:
    tokenizer = build_tokenizer()
    return ModelConfig(
        llm=sizes.llm_config(len(tokenizer)),
        vision=sizes.VISION,
        audio=sizes.AUDIO,
        tts=talker_config(tokenizer),
        vocoder=vocoder_config(silence_code),
        generation=sizes.GENERATION,
        nano=True,
    )


def speech_parts(folder: Path) -> SpokenParts:
    """What the speech trainings in `folder` have come to."""
    beside = folder / "speech-eval"
    codes = load_codes(beside)
    config = nano_config(codes.silence)
    modules = {}
    for component in ("tts", "vocoder"):
        modules[component] = build(component, config)
        modules[component].load_state_dict(part(folder, component, config))
        modules[component].eval().requires_grad_(False)
    talker, vocoder = modules["tts"], modules["vocoder"]
    assert isinstance(talker, Talker) and isinstance(vocoder, Vocoder)
    return SpokenParts(talker, vocoder, stored_voice(codes, corpus_beside(beside)))


def part(folder: Path, component: Component, config: ModelConfig) -> dict[str, Tensor]:
    """A component's tensors by official name, contiguous float32; empty where a training of it hasn't begun.

    A training may hold more (heads, which are thrown away). Raises ModelError when
    something is missing or has another shape.
    """
    trained: dict[str, Tensor] = {}
    for name in TRAININGS[component]:
        if not (folder / name / "state.pt").is_file():
            return {}
        tensors = load_averaged_tensors(folder / name)
        if name in _VOCODER_PARTS:
            trained |= {_VOCODER_PARTS[name] + key: tensor for key, tensor in tensors.items()}
        else:
            held = _HELD_AS.get(component, "")
            trained |= {key.removeprefix(held): tensor for key, tensor in tensors.items()}
    expected = build_hollow(component, config).state_dict()
    wrong = [key for key, like in expected.items() if key not in trained or trained[key].shape != like.shape]
    if wrong:
        raise ModelError(f"{folder}: {component} lacks, or has in another shape: {', '.join(wrong[:8])}")
    return {key: trained[key].float().contiguous() for key in expected}


def export(folder: Path, out: Path) -> None:
    """Write the trainings in `folder` as the checkpoint `out`, which appears whole or not at all.

    Raises ModelError when `out` exists and is not empty, or a part doesn't fit the config.
    """
    beside = folder / "speech-eval"
    codes = load_codes(beside)
    config = nano_config(codes.silence)
    parts = {component: part(folder, component, config) for component in PREFIXES}
    with new_folder(out) as made:
        build_tokenizer().save(made)
        _write_json(made / "config.json", official_config(config))
        main = {key: tensor for name in ("vision", "audio", "llm", "tts") for key, tensor in parts[name].items()}
        _write_tensors(made / "model.safetensors", main)
        (made / VOCODER_FOLDER).mkdir(parents=True)
        assert config.vocoder is not None
        _write_json(made / VOCODER_FOLDER / "config.json", vocoder_sizes(config.vocoder))
        for prefix in ("flow", "hift"):
            tensors = {key: tensor for key, tensor in parts["vocoder"].items() if key.startswith(f"{prefix}.")}
            _write_tensors(made / VOCODER_FOLDER / f"{prefix}.safetensors", tensors)
        save_voice(made, stored_voice(codes, corpus_beside(beside)))


def _write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """In half precision, which is half the bytes: the same six minutes gave the same transcript, word for word."""
    file.write_bytes(save({key: tensor.half() for key, tensor in tensors.items()}, metadata={"format": "pt"}))


def _write_json(file: Path, content: Mapping[str, object]) -> None:
    file.write_text(json.dumps(content, indent=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model_shards.nano.export", description=__doc__)
    parser.add_argument("trainings", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    export(args.trainings, args.out)


if __name__ == "__main__":
    main()
