"""Audio encoder: one window of sound of many sessions in one forward, 10 embeddings per second."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from graph.chunk import NS_PER_S, Chunk, SessionId
from graph.streams import AUDIO, MIC, SOUND_RATE_HZ
from graph.window import Unit
from model_shards.audio import AudioEncoder as AudioModel
from model_shards.audio import AudioState
from model_shards.mel import MelChunk, StreamingMel, offline_mel
from stages.stage import Session, Stage, moving
from stages.tensors import to_arrays

VOICE_ROLE = "voice"
"""attrs["role"] of the chunk that carries the voice of the system prompt; it comes with a session's first window."""


@dataclass(slots=True)
class _Open:
    window_samples: int
    mel: StreamingMel = field(default_factory=StreamingMel)
    state: AudioState = field(default_factory=AudioState)
    voice_sent: bool = False


class AudioEncoder(Stage):
    """`mic` → `audio`: embeds [tokens, dim] per window.

    The encoder hears every window: a missing one as silence, so that its time axis holds, but nothing is told of it.
    voice: float32 samples, 16 kHz mono, or None; encoded once and sent to each session's LLM.
    """

    outputs = (AUDIO,)

    def __init__(self, model: AudioModel, voice: np.ndarray | None = None) -> None:
        self._model = model
        self._open: dict[SessionId, _Open] = {}
        self._voice = None if voice is None else self._encode_voice(voice)

    def open_session(self, session: Session) -> None:
        self._open[session.id] = _Open(session.window_ns * SOUND_RATE_HZ // NS_PER_S)

    def close_session(self, session: SessionId) -> None:
        self._open.pop(session, None)

    def peer_begins_anew(self, session: SessionId) -> None:
        self._open[session].voice_sent = False

    @torch.inference_mode()
    def process(self, units: list[Unit]) -> list[Chunk]:
        heard = [self._heard(unit) for unit in units]
        with moving(lambda: self._start_anew(units)):
            batch = [
                (unit, mel) for unit, samples in zip(units, heard, strict=True) for mel in self._push(unit, samples)
            ]
            embeds = self._model.encode([(self._open[unit.session].state, mel) for unit, mel in batch])
        chunks = [self._voice_chunk(unit) for unit in units if self._voice is not None]
        chunks += [_encoded(unit, e) for (unit, _), e in zip(batch, embeds, strict=True) if unit.of(MIC)]
        return [chunk for chunk in chunks if chunk is not None]

    def _start_anew(self, units: list[Unit]) -> None:
        """What was heard before is forgotten."""
        for unit in units:
            state = self._open[unit.session]
            state.mel, state.state = StreamingMel(), AudioState()

    def _push(self, unit: Unit, samples: np.ndarray) -> list[MelChunk]:
        return self._open[unit.session].mel.push(samples, max_chunks=1)

    def _heard(self, unit: Unit) -> np.ndarray:
        state = self._open[unit.session]
        samples = np.zeros(state.window_samples, np.float32)
        for chunk in unit.of(MIC):
            first = (chunk.start_ns - unit.start_ns) * SOUND_RATE_HZ // NS_PER_S
            piece = chunk.arrays["samples"][max(-first, 0) : state.window_samples - first]
            samples[max(first, 0) : max(first, 0) + len(piece)] = piece
        return samples

    def _voice_chunk(self, unit: Unit) -> Chunk | None:
        state = self._open[unit.session]
        if state.voice_sent or self._voice is None:
            return None
        state.voice_sent = True
        arrays, attrs = to_arrays("embeds", self._voice)
        return Chunk(unit.session, AUDIO, unit.start_ns, arrays=arrays, attrs={**attrs, "role": VOICE_ROLE})

    @torch.inference_mode()
    def _encode_voice(self, voice: np.ndarray) -> torch.Tensor:
        mel, lens = offline_mel([voice])
        device = next(self._model.parameters()).device
        return torch.cat(self._model.encode_offline(mel.to(device), lens, self._model.config.chunk_length_s))


def _encoded(unit: Unit, embeds: torch.Tensor) -> Chunk:
    arrays, attrs = to_arrays("embeds", embeds)
    return unit.emit(AUDIO, arrays=arrays, attrs=attrs)
