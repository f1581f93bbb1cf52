"""Audio encoder: one window of sound of many sessions in one forward, 10 embeddings per second."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from graph.chunk import NS_PER_MS, NS_PER_S, Chunk, SessionId
from graph.costs import StageCost
from graph.sections import StageOptions
from graph.stage_type import In, Out
from graph.window import Unit
from stages.inference import inference
from stages.kinds import AUDIO, SOUND
from stages.rates import SOUND_RATE_HZ
from stages.session import Session
from stages.stage import Site, Stage, moving

if TYPE_CHECKING:
    import torch

    from model_shards.audio import AudioEncoder as AudioModel
    from model_shards.audio import AudioState
    from model_shards.mel import MelChunk, StreamingMel

VOICE_ROLE = "voice"
"""attrs["role"] of the chunk that carries the voice of the system prompt; it comes with a session's first window."""


@dataclass(slots=True)
class _Open:
    window_samples: int
    mel: StreamingMel
    state: AudioState
    voice_sent: bool = False


class AudioOptions(StageOptions):
    """resident: on a GPU, how many sessions are encoded by programs of fixed shapes; each takes memory of its own."""

    resident: int = Field(default=16, ge=0, le=256)


class AudioEncoder(Stage):
    """Sound to embeddings: embeds [tokens, dim] per window.

    The encoder hears every window: a missing one as silence, so that its time axis holds, but nothing is told of it.
    voice: float32 samples, 16 kHz mono, or None; encoded once and sent to each session's LLM.
    """

    sound = In(SOUND)
    audio = Out(AUDIO)
    Options = AudioOptions
    component = "audio"
    cost = StageCost(6 * NS_PER_MS, 1 * NS_PER_MS, spread=0.2)

    @classmethod
    def load(cls, options: AudioOptions, site: Site) -> AudioEncoder:
        from model_shards.checkpoint import load_ref_audio, load_shard
        from model_shards.programs import ladder_to
        from stages.tensors import runtime

        where = runtime(site.device, options.dtype)
        voice = load_ref_audio(site.checkpoint)
        model = load_shard(site.checkpoint, "audio", dtype=where.dtype, device=where.device)
        if where.device.startswith("cuda") and options.resident > 0:
            inference(model.make_resident)(options.resident, ladder_to(options.batch))
        return cls(model, None if voice is None else voice.numpy())

    def __init__(self, model: AudioModel, voice: np.ndarray | None = None) -> None:
        self._model = model
        self._open: dict[SessionId, _Open] = {}
        self._voice = None if voice is None else self._encode_voice(voice)

    @property
    def runs_with(self) -> str:
        return self._model.runs_with

    def open_session(self, session: Session) -> None:
        window_samples = session.window_ns * SOUND_RATE_HZ // NS_PER_S
        self._open[session.id] = _Open(window_samples, _no_mel(), self._model.open())

    def close_session(self, session: SessionId) -> None:
        state = self._open.pop(session, None)
        if state is not None:
            self._model.close(state.state)

    def downstream_replaced(self, session: SessionId) -> None:
        self._open[session].voice_sent = False

    @inference
    def process(self, units: list[Unit]) -> list[Chunk]:
        heard = [self._heard(unit) for unit in units]
        with moving(lambda: self._start_anew(units)):
            batch = [
                (unit, mel) for unit, samples in zip(units, heard, strict=True) for mel in self._push(unit, samples)
            ]
            embeds = self._model.encode([(self._open[unit.session].state, mel) for unit, mel in batch])
        chunks = [self._voice_chunk(unit) for unit in units if self._voice is not None]
        chunks += [self._encoded(unit, e) for (unit, _), e in zip(batch, embeds, strict=True) if unit.of(self.sound)]
        return [chunk for chunk in chunks if chunk is not None]

    def _start_anew(self, units: list[Unit]) -> None:
        """What was heard before is forgotten."""
        for unit in units:
            state = self._open[unit.session]
            state.mel = _no_mel()
            state.state.reset()

    def _push(self, unit: Unit, samples: np.ndarray) -> list[MelChunk]:
        return self._open[unit.session].mel.push(samples, max_chunks=1)

    def _heard(self, unit: Unit) -> np.ndarray:
        state = self._open[unit.session]
        samples = np.zeros(state.window_samples, np.float32)
        for chunk in unit.of(self.sound):
            first = (chunk.start_ns - unit.start_ns) * SOUND_RATE_HZ // NS_PER_S
            piece = chunk.arrays["samples"][max(-first, 0) : state.window_samples - first]
            samples[max(first, 0) : max(first, 0) + len(piece)] = piece
        return samples

    def _voice_chunk(self, unit: Unit) -> Chunk | None:
        from stages.tensors import to_arrays

        state = self._open[unit.session]
        if state.voice_sent or self._voice is None:
            return None
        state.voice_sent = True
        arrays, attrs = to_arrays("embeds", self._voice)
        return self.audio.chunk(unit.session, unit.start_ns, arrays=arrays, attrs={**attrs, "role": VOICE_ROLE})

    def _encoded(self, unit: Unit, embeds: torch.Tensor) -> Chunk:
        from stages.tensors import to_arrays

        arrays, attrs = to_arrays("embeds", embeds)
        return self.audio.over(unit, arrays=arrays, attrs=attrs)

    @inference
    def _encode_voice(self, voice: np.ndarray) -> torch.Tensor:
        import torch

        from model_shards.mel import offline_mel

        mel, lens = offline_mel([voice])
        device = next(self._model.parameters()).device
        return torch.cat(self._model.encode_offline(mel.to(device), lens, self._model.config.chunk_length_s))


def _no_mel() -> StreamingMel:
    from model_shards.mel import StreamingMel

    return StreamingMel()
