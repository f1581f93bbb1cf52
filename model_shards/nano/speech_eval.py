"""Stage "speech-eval": what an independent recogniser hears of nano's speech, link by link and as a whole.

It writes `scores.json` and, for the ear and the eye, a WAV of every sentence.
"""

from __future__ import annotations

import json
import wave
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from model_shards.nano.export import SpokenParts, speech_parts
from model_shards.nano.phrases import sentences
from model_shards.nano.recogniser import Recogniser, word_error_rate
from model_shards.nano.speech_codes import load_codes
from model_shards.nano.speech_data import Utterance, corpus_beside, held_out_sentences
from model_shards.nano.speech_pacing import SpokenTurn, SpokenUnit, on_time, turn_of
from model_shards.nano.speech_sizes import CODES_PER_UNIT
from model_shards.nano.teacher import RATE_HZ, Samples
from model_shards.nano.train_speech_talker import TurnRows
from model_shards.nano.vocabulary import build_tokenizer
from model_shards.tts import TalkerInput, TalkerState
from model_shards.vocoder import VocoderInput

_NOISE_SEED: Final = 1

Units = list[list[int]]
"""A turn's codes, unit by unit."""


def evaluate(folder: Path, minutes: float) -> None:
    """However long it takes. `folder`: beside the speech trainings."""
    parts, corpus, codes = speech_parts(folder.parent), corpus_beside(folder, "test"), load_codes(folder).test
    real = len(sentences())
    ears = {"real": Recogniser(sentences()), "novel": Recogniser([*sentences(), *held_out_sentences()])}
    chosen = {"real": corpus.utterances[:real], "novel": corpus.utterances[real:]}
    links: dict[str, Callable[[Utterance], Samples]] = {
        "teacher": lambda utterance: corpus.wave[utterance.samples].astype(np.float32) / np.float32(32768),
        "vocoder on true mel": lambda utterance: from_mel(parts, corpus.mel_of(utterance)),
        "flow and vocoder on true codes": lambda utterance: speak(parts, true_units(utterance, codes)),
        "talker, flow and vocoder": lambda utterance: speak(parts, say(parts, on_time(_turn(utterance, codes)))),
    }
    folder.mkdir(parents=True, exist_ok=True)
    scores = {}
    for name, link in links.items():
        for group, ear in ears.items():
            pairs = [(" ".join(u.words), ear.hear(link(u))) for u in chosen[group]]
            scores[f"{name}, {group}"] = word_error_rate(pairs)
            print(f"{name}, {group}: WER {scores[f'{name}, {group}']:.2%}", flush=True)
            print("\n".join(f"    {said!r} heard as {heard!r}" for said, heard in pairs if said != heard), flush=True)
    (folder / "scores.json").write_text(json.dumps(scores, indent=1), encoding="utf-8")


@torch.inference_mode()
def from_mel(parts: SpokenParts, mel: Tensor) -> Samples:
    """(frames, 80) through the vocoder's HiFT at once."""
    hift = parts.vocoder.hift
    generator = torch.Generator().manual_seed(_NOISE_SEED)
    (samples,), _ = hift.stream(mel.T[None], [hift.empty_cache()], [generator], last=True)  # type: ignore[list-item]
    return np.asarray(samples.numpy())


@torch.inference_mode()
def say(parts: SpokenParts, units: Sequence[SpokenUnit]) -> Units:
    """The talker's own codes for a turn's words, as it is driven at run time. It hears no hidden states, so any do."""
    state, rows = TalkerState(), TurnRows(build_tokenizer(), parts.talker)
    spoken: Units = []
    for unit in units:
        token_ids = torch.tensor(rows.token_ids(unit, unit is units[-1]), dtype=torch.int64)
        hidden = torch.ones(len(token_ids), parts.talker.config.llm_dim)
        spoken += parts.talker.generate([(state, TalkerInput(token_ids, hidden, end_of_turn=unit is units[-1]))])
    return spoken


@torch.inference_mode()
def speak(parts: SpokenParts, units: Units) -> Samples:
    """A turn's codes through the vocoder, second by second."""
    state = parts.vocoder.open(parts.voice, noise_seed=_NOISE_SEED)
    inputs = [VocoderInput(codes, end_of_turn=index + 1 == len(units)) for index, codes in enumerate(units)]
    return np.concatenate([parts.vocoder.stream([(state, new)])[0].numpy() for new in inputs])


def true_units(utterance: Utterance, codes: np.ndarray) -> Units:
    own = _own(utterance, codes)
    return [own[start : start + CODES_PER_UNIT] for start in range(0, len(own), CODES_PER_UNIT)]


def write_wav(file: Path, samples: Samples) -> None:
    """float32 at 24 kHz."""
    with wave.open(str(file), "wb") as opened:
        opened.setparams((1, 2, RATE_HZ, 0, "NONE", ""))
        opened.writeframes((np.clip(samples, -1, 1) * 32767).astype(np.int16).tobytes())


def _own(utterance: Utterance, codes: np.ndarray) -> list[int]:
    return [int(code) for code in codes[utterance.first_code : utterance.first_code + utterance.num_codes]]


def _turn(utterance: Utterance, codes: np.ndarray) -> SpokenTurn:
    return turn_of(utterance.words, utterance.starts_s, _own(utterance, codes))
