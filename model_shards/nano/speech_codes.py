"""The corpora in speech codes, as the trained speech tokenizer gives them; computed once, by the first who asks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from model_shards.nano.speech_data import Corpus, corpus_beside
from model_shards.nano.train_speech_codes import Autoencoder, codes_of, prompt_mel
from model_shards.nano.training import load_averaged

Codes = npt.NDArray[np.int16]

_FILE: Final = "codes.npz"


@dataclass(frozen=True, slots=True)
class CorpusCodes:
    """corpus, test: of every utterance, one after the other (see `Utterance.first_code`). silence: of endless silence.
    prompt: what the voice's prompt says."""

    corpus: Codes
    test: Codes
    silence: int
    prompt: tuple[int, ...]


def trained_autoencoder(folder: Path) -> Autoencoder:
    """`folder`: of a training beside `speech-codes`."""
    model = load_averaged(folder.parent / "speech-codes", Autoencoder())
    assert isinstance(model, Autoencoder)
    return model


def load_codes(folder: Path) -> CorpusCodes:
    """`folder`: of a training beside `speech-codes`, which must be over: nobody learns codes twice."""
    file = folder.parent / "speech-codes" / _FILE
    if not file.is_file():
        _write_codes(folder, file)
    with np.load(file) as stored:
        prompt = tuple(int(code) for code in stored["prompt"])
        return CorpusCodes(stored["corpus"], stored["test"], int(stored["silence"]), prompt)


@torch.inference_mode()
def _write_codes(folder: Path, file: Path) -> None:
    model, corpus = trained_autoencoder(folder), corpus_beside(folder)
    np.savez(
        file,
        corpus=_codes(model, corpus),
        test=_codes(model, corpus_beside(folder, "test")),
        silence=codes_of(model.silence()).numpy(),
        prompt=codes_of(model.prompt(prompt_mel(corpus))).numpy(),
    )


def _codes(model: Autoencoder, corpus: Corpus) -> Codes:
    pieces = [model.tokenizer.codes(corpus.mel_of(utterance)).numpy() for utterance in corpus.utterances]
    return np.concatenate(pieces).astype(np.int16)
