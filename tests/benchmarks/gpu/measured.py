"""Part 2: what a batch takes at each stage, beside its roofline; of that, a profile for `pipeline plan`.

Each stage is loaded as a pipeline loads it. `captured` is as it then runs, where it runs programs; `eager` is the same
kernel by kernel. Largest batches say what a GPU can, batches of one what a session alone waits for.
"""

from __future__ import annotations

import gc
import os
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from graph.chunk import NS_PER_MS, NS_PER_S, Chunk, SessionId
from graph.costs import Profile, StageCost, fit
from graph.window import Unit
from graph.wording import one_line
from model_shards.duplex import DuplexSession, OpenUnit, Prompt, UnitInput
from model_shards.kv_cache import KvShape
from model_shards.tts import TalkerInput, TalkerState
from model_shards.vocoder import VocoderInput, VocoderState
from stages.audio_encoder import AudioEncoder
from stages.catalog import BUILT_IN, stage_class
from stages.kinds import FRAMES, SOUND
from stages.session import Session
from stages.stage import Site
from stages.vision_encoder import VisionEncoder
from tests.benchmarks.gpu import roofline, timing
from tests.benchmarks.gpu.parts import Entry, Request
from tests.benchmarks.gpu.quantiles import percentiles
from tests.benchmarks.gpu.stages import PICTURE, TURN, room_for
from tests.benchmarks.gpu.weights import DECISION, MODELS, OBEYED, WORDS, drawn_checkpoint, drawn_sound, fill

BATCHES: Final = {"full": (1, 2, 4, 8, 16, 32, 64), "tiny": (1, 3)}
CONTEXTS: Final = {"full": (4096, 1024, 8192), "tiny": (256, 64)}
ROOM: Final = 768  # tokens of a session beside its context, and for a page that is not full
PICTURE_TOKENS: Final = 64
UNIT_ROWS: Final = 1 + 1 + PICTURE_TOKENS + 1 + 10  # its mark, the picture and its marks, the sound
NUM_UNITS: Final = 5
LIMIT_S: Final = {"full": 0.8, "tiny": 0.1}  # of a stage's calls with one batch size
BROKEN: Final = 3  # the process's exit code
STAGES: Final = ("llm", "tts", "vocoder", "vision_encoder", "audio_encoder")
Samples = dict[str, list[tuple[int, int]]]


@dataclass(frozen=True, slots=True)
class Work:
    """What one measurement is of. tokens: that go through a call, of all sessions; num_bytes: that it must read."""

    stage: str
    what: str
    batch: int
    dtype: torch.dtype
    num_bytes: float
    tokens: int = 0
    context: int | None = None


def measure(request: Request) -> Iterator[Entry]:
    samples: Samples = defaultdict(list)
    picture_ns = 0
    for name in (name for name in STAGES if name not in request.skip):
        yield "at", name
        if request.left_s < 2:
            yield "problem", {"at": name, "problem": "no time was left for it"}
            continue
        failed = False
        try:
            with torch.inference_mode():
                for key, value in MEASURED[name](request):
                    if key == "sample":
                        samples[name].append(value)
                    elif key == "picture_ns":
                        picture_ns = value
                    else:
                        yield key, value
        except Exception as error:
            failed = True
            traceback.print_exc()
            yield "problem", {"at": name, "problem": f"{type(error).__name__}: {one_line(str(error))}"}
        if samples:
            yield "profile", _profile(request, samples, picture_ns)
        if request.device == "cuda":
            if failed:  # it may have broken all that comes: another process goes on behind it
                sys.exit(BROKEN)
            gc.collect()
            torch.cuda.empty_cache()


def _profile(request: Request, samples: Samples, picture_ns: int) -> dict[str, Any]:
    """Of the stages that were measured so far, in the form that graph/costs.py reads."""
    import json

    costs: dict[str, StageCost] = {name: fit(pairs) for name, pairs in samples.items()}
    if "llm" in costs:
        costs["llm"] = replace(costs["llm"], picture_ns=picture_ns)
    machine: dict[str, object] = {"gpu": torch.cuda.get_device_name() if request.device == "cuda" else None}
    document: dict[str, Any] = json.loads(Profile(request.size, machine, os.cpu_count() or 1, costs).as_json())
    return document


# ---- one measurement -------------------------------------------------------------------------------------------------


def _measured(request: Request, work: Work, call: Callable[[], Any]) -> Iterator[Entry]:
    """As it is loaded, and kernel by kernel where that differs; the former is the profile's."""
    timing.forget_peak(request.device)
    limit_s = LIMIT_S[request.size]
    with timing.Counted() as counted:
        shipped = timing.times_ms(call, request.device, limit_s)
    has_programs = counted.num_calls > 0 and request.device == "cuda"
    with timing.without_programs(request.device):
        operations = roofline.num_operations(call)
    yield "stages_measured[]", _row(work, "captured" if has_programs else "eager", shipped, operations, request.device)
    if has_programs:
        try:
            with timing.without_programs(request.device):
                eager = timing.times_ms(call, request.device, limit_s)
            yield "stages_measured[]", _row(work, "eager", eager, operations, request.device)
        except Exception as error:  # it ships captured: what else it can't costs nothing
            yield (
                "problem",
                {"at": work.stage, "problem": f"{work.what}, eager: {type(error).__name__}: {one_line(str(error))}"},
            )
    for ms in shipped:
        yield "sample", (work.batch, round(ms * NS_PER_MS))


def _row(work: Work, how: str, times_ms: list[float], operations: float, device: str) -> dict[str, Any]:
    best_ms = roofline.roofline_ms(work.num_bytes, operations, work.dtype)
    p50 = float(np.median(times_ms))
    return {
        "stage": work.stage,
        "what": work.what,
        "how": how,
        "batch": work.batch,
        "context": work.context,
        "dtype": str(work.dtype).removeprefix("torch."),
        "ms": percentiles(times_ms),
        "calls": len(times_ms),
        "gbytes": round(work.num_bytes / 1e9, 3),
        "tflop": round(operations / 1e12, 4),
        "roofline_ms": None if best_ms is None else round(best_ms, 4),
        "times_roofline": None if not best_ms else round(p50 / best_ms, 2),
        "per_s": round(1000 * (work.tokens or work.batch) / p50, 1),
        "peak_gib": timing.peak_gib(device),
    }


def loaded(request: Request, name: str, **said: Any) -> Any:
    """A stage as a pipeline loads it, with drawn weights."""
    cls = stage_class(BUILT_IN[name])
    said = {"device": request.device, "batch": BATCHES[request.size][-1], **said}
    options = cls.Options.model_validate({**room_for(name, said["batch"]), **said})
    torch.manual_seed(0)
    with drawn_checkpoint(request.size), torch.inference_mode(mode=False):  # as a stage is loaded, too
        return cls.load(options, Site(name, Path(request.size), request.device))


def opened(stage: Any, number: int) -> Any:
    """A session that is open there: the stage's own state of it."""
    session = SessionId(f"s{number}")
    stage.open_session(Session(session, session))
    return stage._open[session]


def _module_of(model: Any) -> nn.Module:
    """The weights, or those of what is built around them."""
    parts = (model, *(vars(model).values()))
    return next(part for part in parts if isinstance(part, nn.Module))


def _weights_of(model: Any) -> Tensor:
    return next(_module_of(model).parameters())


# ---- encoders --------------------------------------------------------------------------------------------------------


def _vision(request: Request) -> Iterator[Entry]:
    stage = loaded(request, "vision_encoder")
    weight = _weights_of(stage._model)
    read = roofline.num_bytes("vision", MODELS[request.size], weight.dtype)
    noise = np.random.default_rng(0).integers(0, 256, (*PICTURE, 3), np.uint8)
    for batch in BATCHES[request.size]:
        units = [
            _unit(f"s{n}", 0, Chunk(SessionId(f"s{n}"), FRAMES.name, 0, arrays={"image": noise})) for n in range(batch)
        ]
        work = Work("vision_encoder", "pictures", batch, weight.dtype, read)
        yield from _within(request, work, partial(stage.process, units))


def _audio(request: Request) -> Iterator[Entry]:
    stage = loaded(request, "audio_encoder")
    weight = _weights_of(stage._model)
    read = roofline.num_bytes("audio", MODELS[request.size], weight.dtype)
    sound = drawn_sound(16_000).numpy()
    for batch in BATCHES[request.size]:
        names = [f"s{n}" for n in range(batch)]
        for number in range(batch):
            opened(stage, number)
        index = count()

        def call(names: list[str] = names, index: Iterator[int] = index) -> None:
            stage.process([_second(name, next_index, sound) for next_index in [next(index)] for name in names])

        yield from _within(request, Work("audio_encoder", "seconds", batch, weight.dtype, read), call)
        _close(stage, batch)


def _second(name: str, index: int, sound: np.ndarray) -> Unit:
    start_ns = index * NS_PER_S
    chunk = Chunk(SessionId(name), SOUND.name, start_ns, NS_PER_S, arrays={"samples": sound})
    return _unit(name, index, chunk)


def _unit(name: str, index: int, chunk: Chunk) -> Unit:
    port = VisionEncoder.frames if chunk.stream == FRAMES.name else AudioEncoder.sound
    chunks = {port.name: (chunk,)}
    return Unit(SessionId(name), index, index * NS_PER_S, (index + 1) * NS_PER_S, chunks)


def _within(request: Request, work: Work, call: Callable[[], Any]) -> Iterator[Entry]:
    """While there is time; what doesn't fit into memory costs itself only."""
    if request.left_s < 2 * LIMIT_S[request.size]:
        return
    try:
        yield from _measured(request, work, call)
    except torch.cuda.OutOfMemoryError as error:
        problem = f"{work.what}, batch {work.batch}: out of memory: {str(error).splitlines()[0]}"
        yield "problem", {"at": work.stage, "problem": problem}
        torch.cuda.empty_cache()


# ---- talker and vocoder ----------------------------------------------------------------------------------------------


def _tts(request: Request) -> Iterator[Entry]:
    """A second in mid-turn: 25 codes each, of a turn of one to three seconds."""
    stage = loaded(request, "tts")
    model, weight = stage._model, _weights_of(stage._model)
    config = MODELS[request.size].tts
    assert config is not None
    steps = 26  # the condition's rows, then 25 codes
    read = steps * roofline.num_bytes("tts", MODELS[request.size], weight.dtype)
    ids = torch.tensor(list(WORDS.encode()), device=request.device)
    hidden = torch.randn(len(WORDS), config.llm_dim, device=request.device, dtype=weight.dtype)
    for batch in BATCHES[request.size]:
        states = [opened(stage, number).talker for number in range(batch)]
        num_calls = count()

        def call(states: list[TalkerState] = states, num_calls: Iterator[int] = num_calls) -> Any:
            if next(num_calls) % (TURN - 1) == 0:
                for state in states:
                    state.end_turn()
                    state.turn_start = False
            return model.generate([(state, TalkerInput(ids, hidden)) for state in states])

        yield from _within(request, Work("tts", "25 codes", batch, weight.dtype, read, 25 * batch), call)
        _close(stage, batch)


def _vocoder(request: Request) -> Iterator[Entry]:
    """A second of speech each, in mid-turn."""
    stage = loaded(request, "vocoder")
    model, weight = stage._model, _weights_of(stage._model)
    once, step = (roofline.num_bytes("vocoder", MODELS[request.size], weight.dtype, of) for of in ("", "flow.decoder"))
    read = once + (model.config.num_steps - 1) * step
    codes = [n * 37 % model.config.flow.vocab_size for n in range(25)]
    for batch in BATCHES[request.size]:
        states: list[VocoderState] = [opened(stage, number).vocoder for number in range(batch)]
        num_calls = count()

        def call(states: list[VocoderState] = states, num_calls: Iterator[int] = num_calls) -> Any:
            if next(num_calls) % TURN == 0:
                for state in states:
                    model.reset(state)
            return [wave.cpu() for wave in model.stream([(state, VocoderInput(codes)) for state in states])]

        yield from _within(request, Work("vocoder", "a second", batch, weight.dtype, read, batch), call)
        _close(stage, batch)


def _close(stage: Any, num_sessions: int) -> None:
    for number in range(num_sessions):
        stage.close_session(SessionId(f"s{number}"))


# ---- the LLM ---------------------------------------------------------------------------------------------------------


class Talk:
    """Sessions of one context that read a unit and speak."""

    def __init__(self, stage: Any, batch: int, context: int, device: str) -> None:
        self._engine, self._cache = stage._engine, stage._cache
        self.batch, self.context = batch, context
        width = stage._engine._model.config.hidden_size
        weight = _weights_of(stage._engine._model)
        picture = torch.randn(PICTURE_TOKENS, width, device=device, dtype=weight.dtype)
        heard = torch.randn(10, width, device=device, dtype=weight.dtype)
        heard[:, DECISION] = OBEYED
        self._picture, self._heard = picture, heard
        self._sessions: list[DuplexSession] = []

    def begin(self) -> None:
        """Every session begins anew, with its context."""
        self.end()
        self._sessions = [self._engine.new_session(n) for n in range(self.batch)]
        self._engine.begin([(session, Prompt([0])) for session in self._sessions])
        for session in self._sessions:
            fill(self._cache, session, self.context)

    def prefill(self, num_pictures: int = 1) -> list[OpenUnit]:
        """The first unit of every session that has begun."""
        unit = UnitInput(tuple([self._picture] for _ in range(num_pictures)), self._heard)
        units: list[OpenUnit] = self._engine.prefill([(session, unit) for session in self._sessions])
        return units

    def decode(self, units: list[OpenUnit]) -> None:
        """A step of all of them."""
        self._engine.decode_step(units)

    def end(self) -> None:
        for session in self._sessions:
            self._engine.end(session)
        self._sessions = []


def _llm(request: Request) -> Iterator[Entry]:
    config = MODELS[request.size].llm
    per_token = KvShape.of(config).bytes_per_token(torch.bfloat16 if request.device == "cuda" else torch.float32)
    kv_bytes = BATCHES[request.size][-1] * (max(CONTEXTS[request.size]) + 2 * ROOM) * per_token
    if request.device == "cuda":  # weights come first
        left = torch.cuda.mem_get_info()[0] - 2 * 9e9 - 8e9 if request.size == "full" else 4e9
        kv_bytes = min(kv_bytes, max(int(left), 1 << 30))
    high = max(CONTEXTS[request.size]) + ROOM
    window = {"mode": "basic", "high": high, "low": high - 100}  # so that none slides
    said = {"kv_memory": f"{(int(kv_bytes) >> 20) + 1}MiB", "context": window, "force_listen": 0}
    stage = loaded(request, "llm", **said)
    weights = roofline.num_bytes("llm", MODELS[request.size], _weights_of(stage._engine._model).dtype)
    yield "llm_runs_with", getattr(stage, "runs_with", "sdpa attention")
    for context in CONTEXTS[request.size]:
        for batch in BATCHES[request.size]:
            if batch * stage._cache.pages_for(context + ROOM) > stage._cache.num_pages:
                problem = f"{batch} sessions of {context} tokens don't fit into {int(kv_bytes) >> 30} GiB"
                yield "problem", {"at": "llm", "problem": problem}
            elif request.left_s > 2 * LIMIT_S[request.size]:
                talk = Talk(stage, batch, context, request.device)
                yield from _spared(
                    talk, f"{batch} sessions of {context}", _llm_at(request, stage, talk, weights, per_token)
                )
    yield from _pictures(request, stage)


def _spared(talk: Talk, what: str, entries: Iterator[Entry]) -> Iterator[Entry]:
    """What doesn't fit into memory costs itself only."""
    try:
        yield from entries
    except torch.cuda.OutOfMemoryError as error:
        yield "problem", {"at": "llm", "problem": f"{what}: out of memory: {one_line(str(error))}"}
    finally:
        talk.end()


def _llm_at(request: Request, stage: Any, talk: Talk, weights: int, per_token: int) -> Iterator[Entry]:
    """As it is loaded; with the first of the contexts kernel by kernel, too, where that differs."""
    is_first = talk.context == CONTEXTS[request.size][0]
    with timing.Counted() as counted:
        shipped = _units(request, talk)
    has_programs = counted.num_calls > 0 and request.device == "cuda"
    yield from _llm_rows(request, stage, talk, "captured" if has_programs else "eager", shipped, weights, per_token)
    if has_programs and is_first:
        try:
            with timing.without_programs(request.device):
                eager = _units(request, talk)
            yield from _llm_rows(request, stage, talk, "eager", eager, weights, per_token)
        except Exception as error:  # it ships captured: what else it can't costs nothing
            yield (
                "problem",
                {"at": "llm", "problem": f"batch {talk.batch}, eager: {type(error).__name__}: {one_line(str(error))}"},
            )
    for ms in shipped.wholes if is_first else ():
        yield "sample", (talk.batch, round(ms * NS_PER_MS))


def _llm_rows(
    request: Request, stage: Any, talk: Talk, how: str, spoken: Spoken, weights: int, per_token: int
) -> Iterator[Entry]:
    """A prefill gives no logits: the head is not read for it."""
    model = stage._engine._model
    config, dtype = model.config, _weights_of(model).dtype
    head = roofline.num_bytes("llm", MODELS[request.size], dtype, "llm.lm_head")
    seen = talk.batch * talk.context
    attention = 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers * talk.context
    for what, times, tokens, unread in (
        ("prefill of a unit", spoken.prefills, UNIT_ROWS, head),
        ("decode step", spoken.decodes, 1, 0),
    ):
        read, products = weights - unread + seen * per_token, 2 * (weights - unread) / dtype.itemsize
        work = Work("llm", what, talk.batch, dtype, read, tokens * talk.batch, talk.context)
        yield "stages_measured[]", _row(work, how, times, (products + attention) * tokens * talk.batch, request.device)


@dataclass(slots=True)
class Spoken:
    """ms of prefills, of decode steps, and of whole units that speak."""

    prefills: list[float]
    decodes: list[float]
    wholes: list[float]


def _units(request: Request, talk: Talk) -> Spoken:
    """The first unit warms up."""
    timing.forget_peak(request.device)
    spoken, units = Spoken([], [], []), list[OpenUnit]()
    until_s = time.monotonic() + LIMIT_S[request.size]
    for turn in range(1 + NUM_UNITS):

        def prefill() -> None:
            units[:] = talk.prefill()

        talk.begin()
        took = [timing.timed_ms(prefill, request.device)]
        while all(unit.ending is None for unit in units):
            took.append(timing.timed_ms(partial(talk.decode, units), request.device))
        if turn:
            spoken.prefills.append(took[0])
            spoken.decodes += took[1:]
            spoken.wholes.append(sum(took))
        if turn and time.monotonic() > until_s:
            break
    return spoken


def _pictures(request: Request, stage: Any) -> Iterator[Entry]:
    """What each picture of a window beyond its first one costs."""
    context, cache = CONTEXTS[request.size][0], stage._cache
    batch = min(16, BATCHES[request.size][-1], cache.num_free_pages // cache.pages_for(context + ROOM))
    if not batch or request.left_s < 2 * LIMIT_S[request.size]:
        return
    talk = Talk(stage, batch, context, request.device)

    def unit(num_pictures: int) -> None:
        talk.begin()
        talk.prefill(num_pictures)

    limit_s = LIMIT_S[request.size]
    one, three = (float(np.median(timing.times_ms(partial(unit, n), request.device, limit_s, 5))) for n in (1, 3))
    talk.end()
    yield "picture_ns", max(round((three - one) / 2 / batch * NS_PER_MS), 0)


MEASURED: Final[dict[str, Callable[[Request], Iterator[Entry]]]] = {
    "llm": _llm,
    "tts": _tts,
    "vocoder": _vocoder,
    "vision_encoder": _vision,
    "audio_encoder": _audio,
}
