"""Part 4, a rival: the official loop's way. One process, one session, one piece after the other, kernel by kernel.

Each window: its picture is encoded, then its sound; the LLM reads the unit's mark and the picture, then the sound, then
decides, token by token; what it said is closed with a forward of its own; the talker makes 25 codes, the vocoder a
second. How many sessions one GPU serves so is reckoned: as many as their windows fit into a second.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

import numpy as np
import torch

from model_shards.audio import AudioState
from model_shards.duplex import DuplexSession, Prompt, UnitInput
from model_shards.image import slice_image
from model_shards.llm import SequenceInput
from model_shards.mel import StreamingMel
from model_shards.tts import TalkerInput
from model_shards.vocoder import VocoderInput
from tests.benchmarks.gpu import timing
from tests.benchmarks.gpu.measured import loaded, opened
from tests.benchmarks.gpu.parts import Entry, Request
from tests.benchmarks.gpu.quantiles import percentiles
from tests.benchmarks.gpu.stages import CONTEXT_TOKENS, PICTURE, TURN
from tests.benchmarks.gpu.weights import DECISION, OBEYED, drawn_sound, fill

NUM_WINDOWS: Final = {"full": 24, "tiny": 14}
NUM_WARM_UP: Final = 4
SHARES: Final = (0.05, 0.25, 0.5)
SOUND_TOKENS: Final = 10


class PieceByPiece:
    """A language model that is given a unit in two pieces: up to its picture, and its sound."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.embed, self.logits, self.config, self.attention = model.embed, model.logits, model.config, model.attention

    def __call__(self, cache: Any, batch: Sequence[SequenceInput]) -> list[torch.Tensor]:
        return [torch.cat([self._piece(cache, item.sequence, p) for p in self._pieces(item.embeds)]) for item in batch]

    @staticmethod
    def _pieces(embeds: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (embeds[:-SOUND_TOKENS], embeds[-SOUND_TOKENS:]) if len(embeds) > 2 * SOUND_TOKENS else (embeds,)

    def _piece(self, cache: Any, sequence: Any, embeds: torch.Tensor) -> torch.Tensor:
        hidden: list[torch.Tensor] = self._model(cache, [SequenceInput(sequence, embeds)])
        return hidden[0]


class Loop:
    """One session, whose stages all live here."""

    def __init__(self, request: Request) -> None:
        self._device = request.device
        self._vision = loaded(request, "vision_encoder")._model
        self._audio = loaded(request, "audio_encoder")._model
        kv_memory = "2GiB" if request.size == "full" else "64MiB"
        llm = loaded(request, "llm", batch=1, kv_memory=kv_memory, force_listen=0)
        self._engine = llm._engine
        self._engine._model = PieceByPiece(self._engine._model)
        tts, vocoder = loaded(request, "tts", batch=1), loaded(request, "vocoder", batch=1)
        self._talker, self._talk = tts._model, opened(tts, 0).talker
        self._vocoder, self._spoken = vocoder._model, opened(vocoder, 0).vocoder
        self._mel, self._heard = StreamingMel(), AudioState()
        self._sound = drawn_sound(16_000).numpy()
        self._picture = np.random.default_rng(0).integers(0, 256, (*PICTURE, 3), np.uint8)
        self._session: DuplexSession = self._engine.new_session(0)
        self._engine.begin([(self._session, Prompt([0]))])
        fill(llm._cache, self._session, CONTEXT_TOKENS[request.size])

    def window(self, speaks: bool) -> int:
        """From the picture to the second of speech, where it speaks; returns how many samples that has."""
        picture = self._vision.encode(slice_image(self._picture, replace(self._vision.config.slices, max_slice_nums=1)))
        (mel,) = self._mel.push(self._sound, max_chunks=1)
        (heard,) = self._audio.encode([(self._heard, mel)])
        heard = heard.clone()
        heard[:, DECISION] = OBEYED if speaks else -OBEYED
        (said,) = self._engine.step([(self._session, UnitInput([list(picture)], heard))])
        self._engine.finalize([self._session])
        if said.is_listen:
            return 0
        ids = torch.tensor(said.token_ids, device=self._device)
        (codes,) = self._talker.generate([(self._talk, TalkerInput(ids, said.hidden, said.end_of_turn))])
        (wave,) = self._vocoder.stream([(self._spoken, VocoderInput(codes, said.end_of_turn))])
        return len(wave.cpu())


def measure(request: Request) -> Iterator[Entry]:
    listened: list[float] = []
    spoken: list[float] = []
    made: list[int] = []  # samples
    with torch.inference_mode(), timing.without_programs(request.device):
        loop = Loop(request)

        def window(speaks: bool) -> None:
            made.append(loop.window(speaks))

        for index in range(NUM_WINDOWS[request.size]):
            speaks = index % (2 * TURN) < TURN
            took = timing.timed_ms(partial(window, speaks), request.device)
            if index >= NUM_WARM_UP and index % TURN:  # the first of a turn, and the one that ends it, are others
                (spoken if speaks else listened).append(took)
            if request.left_s < 2:
                break
    if listened and spoken:
        yield "sequential", _figures(listened, spoken) | {"seconds_spoken": round(sum(made) / 24_000, 1)}
    else:
        yield "problem", {"problem": "no time was left for a window of each sort"}


def _figures(listened: list[float], spoken: list[float]) -> dict[str, Any]:
    listen_ms, speak_ms = float(np.median(listened)), float(np.median(spoken))
    served = {str(share): int(1000 // (share * speak_ms + (1 - share) * listen_ms)) for share in SHARES}
    return {
        "listening_ms": percentiles(listened, digits=2),
        "speaking_ms": percentiles(spoken, digits=2),
        "sessions_served": served,
    }
