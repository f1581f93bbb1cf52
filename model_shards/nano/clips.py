"""The spoken requests that nano ships with, so that its room needs nothing installed. Needs no torch.

They are kept in 8 bits (mu-law, as telephones do): 38 dB of signal over noise at any level.
`python -m model_shards.nano.clips` speaks them again, which needs espeak-ng.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from model_shards.nano.phrases import REQUEST_WORDING, REQUESTS
from model_shards.nano.sounds import Bank, Samples
from model_shards.nano.voices import EVALUATION, ROOM, Voice, say

Cast = Literal["room", "evaluation"]

CLIPS_FILE: Final = Path(__file__).parent / "clips.npz"
_MU: Final = 255.0


def load_bank(cast: Cast) -> Bank:
    """The shipped clips of who speaks in `synthetic://` ("room") or when nano is judged ("evaluation")."""
    with np.load(CLIPS_FILE) as file:
        packed = {name: file[name] for name in file.files if name.startswith(f"{cast}/")}
    return Bank({request: [_expand(packed[name]) for name in packed if f"/{request}/" in name] for request in REQUESTS})


def write_clips(path: Path = CLIPS_FILE) -> None:
    """Let both casts speak every request."""
    casts: tuple[tuple[Cast, tuple[Voice, ...]], ...] = (("room", ROOM), ("evaluation", EVALUATION))
    packed = {
        f"{cast}/{request}/{number}": _compress(say(voice, REQUEST_WORDING[request]))
        for cast, voices in casts
        for number, voice in enumerate(voices)
        for request in REQUESTS
    }
    np.savez_compressed(path, allow_pickle=False, **packed)


def _compress(samples: Samples) -> npt.NDArray[np.int8]:
    """Mu-law of what lies in [-1, 1]."""
    level = np.sign(samples) * np.log1p(_MU * np.abs(samples)) / np.log1p(_MU)
    packed: npt.NDArray[np.int8] = np.rint(127 * level).astype(np.int8)
    return packed


def _expand(packed: npt.NDArray[np.int8]) -> Samples:
    level = packed.astype(np.float32) / 127
    samples: Samples = (np.sign(level) * np.expm1(np.abs(level) * np.log1p(_MU)) / _MU).astype(np.float32)
    return samples


if __name__ == "__main__":
    write_clips()
