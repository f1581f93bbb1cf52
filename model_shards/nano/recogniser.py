"""An independent ear: which sentence a recogniser hears in nano's speech, and how many words of it are wrong.

Rule: it is for measuring. pocketsphinx is imported only here and only when somebody measures.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np

from model_shards.errors import DependencyError
from model_shards.nano.teacher import RATE_HZ, Samples

_EAR_RATE_HZ: Final = 16_000


class Recogniser:
    """Hears one of `sentences`, whatever is said."""

    def __init__(self, sentences: Iterable[str]) -> None:
        """Raises DependencyError without pocketsphinx."""
        try:
            import pocketsphinx
        except ImportError as error:
            raise DependencyError(f"what is said is measured by pocketsphinx ({error}); pip install it") from error
        # Its second pass returns parts of sentences under a grammar, and its own beams lose right ones.
        self._decoder: Any = pocketsphinx.Decoder(
            lm=None, bestpath=False, beam=1e-60, wbeam=1e-40, samprate=_EAR_RATE_HZ, loglevel="FATAL"
        )
        grammar = "#JSGF V1.0;\ngrammar nano;\npublic <said> = " + " | ".join(sentences) + ";\n"
        self._decoder.add_jsgf_string("nano", grammar)
        self._decoder.activate_search("nano")

    def hear(self, samples: Samples) -> str:
        """samples: float32 at 24 kHz. Empty where no sentence fits."""
        slow = _slowed(np.pad(samples, RATE_HZ // 4))
        pcm = (np.clip(slow, -1, 1) * 32767).astype(np.int16).tobytes()
        self._decoder.start_utt()
        self._decoder.process_raw(pcm, full_utt=True)
        self._decoder.end_utt()
        hypothesis = self._decoder.hyp()
        return hypothesis.hypstr if hypothesis else ""


def word_errors(said: str, heard: str) -> int:
    """Words to replace, put in or leave out."""
    return _distance(said.split(), heard.split())


def word_error_rate(pairs: Sequence[tuple[str, str]]) -> float:
    """Of (said, heard) sentences, per word that was said."""
    return sum(word_errors(*pair) for pair in pairs) / sum(len(said.split()) for said, _ in pairs)


def _distance(left: list[str], right: list[str]) -> int:
    costs = list(range(len(right) + 1))
    for row, word in enumerate(left, start=1):
        diagonal, costs[0] = costs[0], row
        for column, other in enumerate(right, start=1):
            best = min(diagonal + (word != other), costs[column] + 1, costs[column - 1] + 1)
            diagonal, costs[column] = costs[column], best
    return costs[-1]


def _slowed(samples: Samples) -> Samples:
    """At 16 kHz."""
    padded = np.pad(samples, (0, -len(samples) % 3))
    num_samples = len(padded) // 3 * 2
    spectrum = np.fft.rfft(padded)[: num_samples // 2 + 1]
    return np.asarray(np.fft.irfft(spectrum, num_samples) * (2 / 3), dtype=np.float32)
