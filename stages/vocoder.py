"""Vocoder: speech codes become sound, 24 kHz, for all speaking sessions in shared forwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field

from graph.chunk import NS_PER_MS, NS_PER_S, Chunk, SessionId
from graph.costs import StageCost
from graph.kinds import attrs_of
from graph.sections import Seed, StageOptions
from graph.stage_type import Feedback, In, Out
from graph.tail import Ack, SpeechQueue
from graph.window import Unit
from stages.inference import inference
from stages.kinds import CODES, PLAYBACK, SPEECH
from stages.rates import CODES_PER_S, SPEECH_RATE_HZ
from stages.session import Session
from stages.stage import Site, Stage, StageError, moving, session_seed

if TYPE_CHECKING:
    import numpy as np
    import torch

    from model_shards.vocoder import Vocoder as VocoderModel
    from model_shards.vocoder import VocoderInput, VocoderState, Voice, VoiceCache

HELD_BACK_NS = 280 * NS_PER_MS
"""What the end of a turn adds to its last codes: 3 codes of look-ahead (120 ms) and 8 mel frames (160 ms)."""


@dataclass(slots=True)
class _Open:
    queue: SpeechQueue[Chunk]  # codes that the listener is not ready for
    vocoder: VocoderState
    text: str = ""  # of codes that were too few to sound; it is heard with the next ones


class VocoderOptions(StageOptions):
    """steps: Euler steps of the flow, at most the 16 that the official buffers hold; None: as the checkpoint says.

    dtype: of the net that makes sound of the mel, on a CPU; "auto": bfloat16 where the processor computes with it.
    resident: on a GPU, how many may speak at once by programs of fixed shapes; each takes memory of its own.
    """

    steps: int | None = Field(default=None, ge=1, le=16)
    resident: int = Field(default=16, ge=0, le=64)
    seed: Seed = 0


class Vocoder(Stage):
    """Speech codes to sound: at most one chunk per window and session, and only as far as TAIL allows."""

    codes = In(CODES)
    playback = Feedback(PLAYBACK)
    speech = Out(SPEECH)
    Options = VocoderOptions
    component = "vocoder"
    cost = StageCost(25 * NS_PER_MS, 5 * NS_PER_MS, spread=0.2)
    paced_by_listener = True

    @classmethod
    def load(cls, options: VocoderOptions, site: Site) -> Vocoder:
        """Raises StageError where the checkpoint holds no voice."""
        from model_shards.checkpoint import load_shard, load_voice
        from model_shards.fold import fold
        from model_shards.hift_net import freeze_net
        from stages.tensors import cpu_dtype, runtime

        where = runtime(site.device, "float32")  # as the official vocoder does
        model = load_shard(site.checkpoint, "vocoder", dtype=where.dtype, device=where.device)
        voice = load_voice(site.checkpoint)
        if voice is None:
            remedy = f"give it one: pipeline shards voice {site.checkpoint} --from speech.wav"
            lacks = f"{site.checkpoint} holds no voice (assets/token2wav/prompt.safetensors)"
            raise StageError(f"{site.name}: {lacks}; {remedy}")
        if options.steps is not None:
            model.config = dataclasses.replace(model.config, num_steps=options.steps)
        fold(model)
        if where.device == "cpu":
            freeze_net(model.hift, cpu_dtype(options.dtype))
        prepared = _prepared(model, voice)
        if where.device.startswith("cuda"):
            _make_fast(model, prepared, options)
        return cls(model, prepared, options.seed)

    def __init__(self, model: VocoderModel, voice: VoiceCache, seed: int) -> None:
        self._model = model
        self._voice = voice
        self._seed = seed
        self._open: dict[SessionId, _Open] = {}

    @property
    def runs_with(self) -> str:
        return self._model.runs_with

    @inference
    def open_session(self, session: Session) -> None:
        queue = SpeechQueue[Chunk](session.playback, lead_ns=session.lead_ns, window_ns=session.window_ns)
        state = self._model.open(self._voice, noise_seed=session_seed(self._seed, session.id))
        self._open[session.id] = _Open(queue, state)

    def close_session(self, session: SessionId) -> None:
        state = self._open.pop(session, None)
        if state is not None:
            self._model.reset(state.vocoder)

    def interrupt(self, session: SessionId, ack: Ack) -> list[Chunk]:
        state = self._open[session]
        state.queue.interrupted()
        state.text = ""
        self._model.reset(state.vocoder)
        return []

    def is_idle(self, unit: Unit) -> bool:
        return not (unit.of(self.codes) or self._open[unit.session].queue)

    def has_more_to_say(self, session: SessionId) -> bool:
        return bool(self._open[session].queue)

    @inference
    def process(self, units: list[Unit]) -> list[Chunk]:
        for unit in units:  # codes that can't sound are refused before anything has moved
            for said in unit.of(self.codes):
                self._model.check(said.arrays["codes"].tolist())
        with moving(lambda: self._start_anew(units)):
            speaking = [(unit, codes) for unit in units if (codes := self._next_codes(unit)) is not None]
            batch = [(self._open[unit.session].vocoder, _input(codes)) for unit, codes in speaking]
            waves = self._model.stream(batch)
        chunks = [self._say(unit, codes, wave) for (unit, codes), wave in zip(speaking, _on_host(waves), strict=True)]
        return [chunk for chunk in chunks if chunk is not None]

    def _start_anew(self, units: list[Unit]) -> None:
        """The turns that were sounding end here."""
        for unit in units:
            state = self._open[unit.session]
            state.text = ""
            self._model.reset(state.vocoder)

    def _next_codes(self, unit: Unit) -> Chunk | None:
        state = self._open[unit.session]
        for codes in unit.of(self.codes):
            state.queue.put(codes)
        return state.queue.take(lambda codes: _longest_ns(state.vocoder.codes, codes), unit.end_ns)

    def _say(self, unit: Unit, codes: Chunk, samples: np.ndarray) -> Chunk | None:
        state = self._open[unit.session]
        said = CODES.read(codes)
        state.text += said.text
        if len(samples) == 0:
            return None
        duration_ns = len(samples) * NS_PER_S // SPEECH_RATE_HZ
        state.queue.made(duration_ns, unit.end_ns)
        text, state.text = state.text, ""
        attrs = attrs_of(dataclasses.replace(said, text=text))
        return self.speech.chunk(unit.session, unit.start_ns, duration_ns, arrays={"samples": samples}, attrs=attrs)


@inference
def _prepared(model: VocoderModel, voice: Voice) -> VoiceCache:
    return model.prepare(voice)


@inference
def _make_fast(model: VocoderModel, voice: VoiceCache, options: VocoderOptions) -> None:
    """As a GPU wants it: float32 products and convolutions by tensor cores (TF32, in the whole process), and programs.

    All of them are made here, the largest batch first; later, no session waits for one.
    """
    import torch

    from model_shards.programs import ladder_to

    torch.set_float32_matmul_precision("high")
    if options.resident > 0:
        model.make_resident([voice], options.resident, ladder_to(options.batch))
        model.warm_up(voice)


def _on_host(waves: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """float32 samples each, by one copy for all."""
    if not waves:
        return []
    import torch

    samples = torch.cat(list(waves)).to(torch.float32).cpu()
    return [wave.numpy() for wave in torch.split(samples, [len(wave) for wave in waves])]


def _input(codes: Chunk) -> VocoderInput:
    from model_shards.vocoder import VocoderInput

    return VocoderInput(codes.arrays["codes"].tolist(), CODES.read(codes).end_of_turn)


def _longest_ns(held: Sequence[int], codes: Chunk) -> int:
    """What these codes can sound for: a whole second where the turn goes on, since silence fills it up.

    held: codes of an earlier call that have not sounded. Those looked ahead at are in HELD_BACK_NS already.
    """
    from model_shards.vocoder import LOOKAHEAD_CODES

    num_codes = len(codes.arrays["codes"]) + max(len(held) - LOOKAHEAD_CODES, 0)
    if not CODES.read(codes).end_of_turn:
        return max(num_codes * NS_PER_S // CODES_PER_S, NS_PER_S)
    return num_codes * NS_PER_S // CODES_PER_S + HELD_BACK_NS
