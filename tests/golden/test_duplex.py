"""The recorded duplex sessions, from samples and pixels to speech codes, unit by unit.

Rule: a session's input is the recorded sound and pictures, and from there everything is ours: mel, encoders, LLM and
talker. Whatever the recording knows on the way is compared, but never taken.

Two things the official session does are done by the test, because no stage of ours does them: it feeds a stray <unit>
when a window's sound is too short (ours waits before it feeds), and its talker keeps a turn's cache through a forced
listen (our stage forgets the turn).
"""

from __future__ import annotations

import functools
import itertools
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model_shards import decoding, duplex, tts
from model_shards.audio import AudioEncoder, AudioState
from model_shards.checkpoint import load_shard
from model_shards.context import SlidingWindow, WindowConfig
from model_shards.decoding import Choice, DecisionRule, SamplingConfig
from model_shards.duplex import DuplexConfig, DuplexEngine, DuplexSession, Prompt, UnitInput, UnitOutput
from model_shards.fold import fold
from model_shards.image import slice_image
from model_shards.kv_cache import KvCache, KvShape
from model_shards.llm import LanguageModel, SequenceInput
from model_shards.mel import StreamingMel, offline_mel
from model_shards.sampling import Sampling, draw
from model_shards.tokenizer import Tokenizer
from model_shards.tts import ChunkRequest, Spoken, Talker, TalkerInput, TalkerState
from model_shards.vision import VisionEncoder
from tests.support import golden
from tests.support.golden import cases, close, read_json, read_tensors

FILE = "duplex.safetensors"
TRACES: dict[str, Any] = read_json("duplex.json")
KEYS = frozenset(read_tensors(FILE))
UNITS = {f"{name}.u{unit['unit']}": (name, unit) for name, trace in TRACES.items() for unit in trace["units"]}
DECIDED = [key for key, (_, unit) in UNITS.items() if unit["prefill"]["success"]]
SPOKEN = [key for key, (_, unit) in UNITS.items() if unit["tts"] is not None]
DRAWN = [key for key, (_, unit) in UNITS.items() if "multinomial_draws" in unit]

PAGE_SIZE = 16
SAMPLING_NAMES = {
    "decode_mode": "mode",
    "text_repetition_penalty": "repetition_penalty",
    "text_repetition_window_size": "repetition_window",
}
WINDOW_NAMES = {
    "sliding_window_mode": "mode",
    "basic_window_high_tokens": "high_tokens",
    "basic_window_low_tokens": "low_tokens",
    "context_max_units": "max_units",
    "context_previous_max_tokens": "max_previous_tokens",
}
UNIT_KEYS = {"max_new_speak_tokens_per_chunk", "force_listen_override"}
CONTROL_STEPS = 2  # of the official loop's steps one is for <|speak|> and one for <|chunk_eos|>
SCENARIOS = ["together", "backwards", "coming and going"]


@functools.cache
def llm() -> LanguageModel:
    """Folded, as the product has it."""
    module = load_shard(golden.FOLDER, "llm")
    fold(module)
    return module


@functools.cache
def talker() -> Talker:
    """Folded, as the product has it."""
    module = load_shard(golden.FOLDER, "tts")
    fold(module)
    return module


@functools.cache
def ears() -> AudioEncoder:
    return load_shard(golden.FOLDER, "audio")


@functools.cache
def eyes() -> VisionEncoder:
    return load_shard(golden.FOLDER, "vision")


@functools.cache
def tokenizer() -> Tokenizer:
    loaded = Tokenizer.load(golden.FOLDER)
    loaded.bad_token_ids = tuple(read_json("tokenizer_cases.json")["bad_token_ids"])
    return loaded


def recorded(key: str) -> Tensor:
    return read_tensors(FILE)[key]


def is_stopped(unit: dict[str, Any]) -> bool:
    """Officially set_session_stop: nothing is taken and nothing is fed."""
    return not unit["prefill"]["success"] and not unit["prefill_feeds"]


def sampling_of(name: str, unit: dict[str, Any]) -> SamplingConfig:
    settings = TRACES[name]["gen_kw"] | unit["gen_kw_unit"]
    return SamplingConfig(**{SAMPLING_NAMES.get(k, k): v for k, v in settings.items() if k not in UNIT_KEYS})


def window_of(name: str) -> WindowConfig:
    settings = {key: value for key, value in TRACES[name]["caps"].items() if key != "force_listen_count"}
    marker = TRACES[name]["prepare"]["context_previous_marker"]
    return WindowConfig(previous_marker=marker, **{WINDOW_NAMES[key]: value for key, value in settings.items()})


def config_of(name: str, unit: dict[str, Any]) -> DuplexConfig:
    return DuplexConfig(
        sampling=sampling_of(name, unit),
        window=window_of(name),
        force_listen_count=TRACES[name]["caps"].get("force_listen_count", 0),
        listen_discards_speech=True,
    )


def prompt_of(name: str) -> Prompt:
    prepare = TRACES[name]["prepare"]
    prefix = tokenizer().encode(prepare["prefix_system_prompt"] or "")
    suffix = tokenizer().encode(prepare["suffix_system_prompt"] or "")
    if not prepare["ref_audio_samples"]:
        return Prompt(prefix, suffix)
    mel, lens = offline_mel([recorded("ref_audio")[: prepare["ref_audio_samples"]].numpy()])
    return Prompt(prefix, suffix, torch.cat(ears().encode_offline(mel, lens, ears().config.chunk_length_s)))


def num_tokens_of(name: str) -> int:
    """More than a session ever holds."""
    kinds = ("prefill_feeds", "generate_feeds", "finalize_feeds")
    feeds = [feed for unit in TRACES[name]["units"] for kind in kinds for feed in unit[kind] or ()]
    fed = sum(feed["len"] if feed["kind"] == "embeds" else len(feed["ids"]) for feed in feeds)
    return int(TRACES[name]["kv_after_prepare"]) + fed + 2 * duplex.MAX_GENERATED


@dataclass(slots=True)
class Player:
    """One session that lives through a recorded trace, from the step `joins` on, for at most `leaves` units."""

    name: str
    session: DuplexSession
    joins: int = 0
    leaves: int | None = None
    mel: StreamingMel = field(default_factory=StreamingMel)
    ears: AudioState = field(default_factory=AudioState)
    talker: TalkerState = field(default_factory=TalkerState)
    outcomes: list[Outcome] = field(default_factory=list)
    final_k: dict[int, Tensor] = field(default_factory=dict)

    @property
    def unit(self) -> dict[str, Any]:
        unit: dict[str, Any] = TRACES[self.name]["units"][len(self.outcomes)]
        return unit

    @property
    def is_over(self) -> bool:
        return len(self.outcomes) in (self.leaves, len(TRACES[self.name]["units"]))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a unit came to, as far as it is known in any company. output: None where no unit was run."""

    output: UnitOutput | None
    codes: list[int]
    kv_after_unit: int
    unit_lengths: list[int]
    previous_ids: list[int]


class Desk:
    """The official weights, one cache, and an engine per way of deciding."""

    def __init__(self, names: Sequence[str]) -> None:
        num_pages = sum(num_tokens_of(name) // PAGE_SIZE + 2 for name in names)
        self.cache = KvCache(KvShape.of(llm().config), num_pages, PAGE_SIZE)
        self._engines: dict[DuplexConfig, DuplexEngine] = {}

    def engine(self, config: DuplexConfig) -> DuplexEngine:
        if config not in self._engines:
            self._engines[config] = DuplexEngine(llm(), self.cache, tokenizer(), config)
        return self._engines[config]

    def sense(self, players: Sequence[Player]) -> list[UnitInput | None]:
        """What the players' next units see and hear, encoded in one batch; None where the sound is too short."""
        chunks = [self._hear(player) for player in players]
        sounds = iter(
            ears().encode([(p.ears, chunk) for p, heard in zip(players, chunks, strict=True) for chunk in heard])
        )
        pictures = [self._look(player.unit["inputs"]) for player in players]
        cells = iter(eyes().encode([cell for seen in pictures for picture in seen for cell in picture]))
        return [
            self._input(player, [[next(cells) for _ in picture] for picture in seen], [next(sounds) for _ in heard])
            for player, seen, heard in zip(players, pictures, chunks, strict=True)
        ]

    def stray_unit(self, session: DuplexSession) -> None:
        """Feed what the official session feeds before it finds the sound too short."""
        row = llm().embed(torch.tensor([tokenizer().special.unit]))
        llm()(self.cache, [SequenceInput(session.sequence, row)])

    def _hear(self, player: Player) -> list[Any]:
        inputs = player.unit["inputs"]
        if inputs["audio_samples"] is None:
            return []
        start = inputs["audio_offset"]
        return player.mel.push(recorded("audio")[start : start + inputs["audio_samples"]].numpy(), max_chunks=1)

    def _look(self, inputs: dict[str, Any]) -> list[list[Any]]:
        frames = [read_tensors("duplex_images.npz")[f"frame{index}"].numpy() for index in inputs["frames"] or ()]
        slices = replace(eyes().config.slices, max_slice_nums=inputs["max_slice_nums"])
        return [slice_image(frame, slices) for frame in frames]

    def _input(self, player: Player, images: list[list[Tensor]], sounds: list[Tensor]) -> UnitInput | None:
        if player.unit["inputs"]["audio_samples"] is not None and not sounds:
            return None
        settings = player.unit["gen_kw_unit"]
        most = settings.get("max_new_speak_tokens_per_chunk", duplex.MAX_TEXT_TOKENS + CONTROL_STEPS) - CONTROL_STEPS
        force = settings.get("force_listen_override", False)
        return UnitInput(images, sounds[0] if sounds else None, most, force)

    def outcome(self, player: Player, output: UnitOutput | None, codes: list[int]) -> Outcome:
        context = player.session.context
        lengths = [unit.length for unit in context.units]
        return Outcome(output, codes, context.sequence.length, lengths, list(context.previous_ids))

    def speak(self, speaking: Sequence[tuple[Player, UnitOutput]]) -> list[list[int]]:
        """The talker's codes for these units, in one batch; none for a unit that listens."""
        batch = [
            (player.talker, TalkerInput(torch.tensor(out.token_ids, dtype=torch.int64), out.hidden, out.end_of_turn))
            for player, out in speaking
            if not out.is_listen
        ]
        codes = iter(talker().generate(batch))
        return [[] if out.is_listen else next(codes) for _, out in speaking]

    def final_k(self, session: DuplexSession) -> dict[int, Tensor]:
        layers = range(llm().config.num_hidden_layers)
        return {layer: self.cache.read(session.sequence, layer)[0].transpose(0, 1) for layer in layers}


# ----------------------------------------------------------------------------------------------------------------------
# A session alone: everything which the recording knows.


@dataclass(slots=True)
class Watch:
    """What goes by while a session runs."""

    fed: list[tuple[int, Tensor]] = field(default_factory=list)  # position, embeddings
    decided: list[tuple[DecisionRule, Tensor, list[int], Choice]] = field(default_factory=list)
    drawn: list[tuple[Tensor, int]] = field(default_factory=list)
    requested: list[tuple[ChunkRequest, int, int]] = field(default_factory=list)  # with the cache before and after
    sounded: list[Tensor] = field(default_factory=list)  # what codes were drawn from

    def feed(self, _module: Any, args: tuple[KvCache, list[SequenceInput]]) -> None:
        """Note what is appended; what a window reads again is not fed by the session."""
        self.fed += [(item.sequence.length, item.embeds) for item in args[1] if item.start is None]


@dataclass(slots=True)
class Seen:
    """One unit of a session alone."""

    watch: Watch
    outcome: Outcome | None = None
    kv_after_prefill: int = 0
    kv_after_generate: int = 0
    pending_logits: Tensor | None = None
    ended: duplex.OpenUnit | None = None
    num_frames: int = 0  # in the ears' cache
    num_waiting: int = 0  # samples
    num_units: int = 0
    turn_open: bool = False
    system_length: int = 0
    next_position: tuple[int, int] = (0, 0)  # the talker's, before and after
    num_forgotten: int = 0  # tokens, since the session began


class Alone(Desk):
    """One session that goes through a trace in the official order: each unit is fed to its end at once."""

    def __init__(self, name: str, patch: pytest.MonkeyPatch) -> None:
        super().__init__([name])
        self.watch = Watch()
        self._look_on(patch)
        hook = llm().register_forward_pre_hook(lambda *args: self.watch.feed(*args))
        units = TRACES[name]["units"]
        engine = self.engine(config_of(name, units[0]))
        self.player = Player(name, engine.new_session(seed=0))
        engine.begin([(self.player.session, prompt_of(name))])
        self.prompt_fed = self.watch.fed
        self.system_length = self.player.session.context.system_length
        self.seen: list[Seen] = []
        self.num_forgotten = 0
        for _ in units:
            self.watch = Watch()
            self.seen.append(self._unit())
        hook.remove()

    def _look_on(self, patch: pytest.MonkeyPatch) -> None:
        desk, generate_chunks = self, talker().generate_chunks

        class WatchedRule(DecisionRule):
            def choose(self, logits: Tensor, recent: Any, generators: Any) -> list[Choice]:
                before = [list(tokens) for tokens in recent]
                choices = super().choose(logits, recent, generators)
                desk.watch.decided += [(self, *row) for row in zip(logits.clone(), before, choices, strict=True)]
                return choices

        def watched_draw(probs: Tensor, generators: Any) -> list[int]:
            tokens = draw(probs, generators)
            desk.watch.drawn += list(zip(probs.clone(), tokens, strict=True))
            return tokens

        def watched_codes(probs: Tensor, generators: Any) -> list[int]:
            desk.watch.sounded += list(probs.clone())
            return draw(probs, generators)

        def watched_chunks(batch: Any, sampling: Sampling, window: int | None = None) -> list[Spoken]:
            before = [_length(state) for state, _ in batch]
            spoken = generate_chunks(batch, sampling, window)
            desk.watch.requested += [
                (request, past, _length(state)) for (state, request), past in zip(batch, before, strict=True)
            ]
            return spoken

        patch.setattr(duplex, "DecisionRule", WatchedRule)
        patch.setattr(decoding, "draw", watched_draw)
        patch.setattr(tts, "draw", watched_codes)
        patch.setattr(talker(), "generate_chunks", watched_chunks)

    def _unit(self) -> Seen:
        player, session = self.player, self.player.session
        seen = Seen(self.watch, next_position=(player.talker.next_position,) * 2)
        unit = self.sense([player])[0] if not is_stopped(player.unit) else None
        if unit is not None:
            self._decide(seen, unit)
        elif not is_stopped(player.unit):
            self.stray_unit(session)
        context = session.context
        seen.num_forgotten, seen.system_length = self.num_forgotten, context.system_length
        seen.num_frames, seen.num_waiting = player.ears.num_frames, len(player.mel.snapshot().pending)
        seen.num_units, seen.turn_open = session.num_units, session.turn_open
        if seen.outcome is None:
            seen.outcome = self.outcome(player, None, [])
            seen.kv_after_prefill = seen.kv_after_generate = session.sequence.length
        player.outcomes.append(seen.outcome)
        return seen

    def _decide(self, seen: Seen, unit: UnitInput) -> None:
        player, session = self.player, self.player.session
        engine = self.engine(config_of(player.name, player.unit))
        session.generator.manual_seed(player.unit.get("torch_manual_seed", 0))
        (opened,) = engine.prefill([(session, unit)])
        seen.ended, seen.kv_after_prefill = opened, session.sequence.length
        seen.pending_logits = llm().logits(opened.last_hidden)[0]
        while opened.ending is None:
            engine.decode_step([opened])
        output = engine.close(opened)
        # Ours feeds the <|turn_eos|> of a cut turn with the rest of the unit's end.
        seen.kv_after_generate = session.sequence.length + output.turn_cut
        before = session.sequence.length + len(session.ending)
        engine.finalize([session])
        self.num_forgotten += before - session.sequence.length
        (codes,) = self.speak([(player, output)])
        seen.outcome = self.outcome(player, output, codes)
        seen.next_position = (seen.next_position[0], player.talker.next_position)


def _length(state: TalkerState) -> int:
    return 0 if state.kv is None else state.kv.shape[3]


@functools.cache
@torch.inference_mode()
def alone(name: str) -> Alone:
    with pytest.MonkeyPatch.context() as patch:
        return Alone(name, patch)


def seen_in(case: str) -> tuple[Seen, str, dict[str, Any]]:
    name, unit = UNITS[case]
    return alone(name).seen[unit["unit"]], name, unit


def tolerance_of(name: str, unit: dict[str, Any]) -> float:
    """The README's: 1e-4, and 1e-3 late in a trace (here: its second half) or once the cache was re-indexed."""
    units = TRACES[name]["units"]
    slid = any(earlier["window"]["unit_ids"][:1] != [0] for earlier in units[: unit["unit"]])
    return 1e-3 if slid or 2 * unit["unit"] >= len(units) else 1e-4


def near(actual: Tensor, key: str, tolerance: float) -> None:
    close(actual, recorded(key), rtol=tolerance, atol=tolerance)


def tokens_of(rows: Tensor) -> list[int | None]:
    """The tokens whose embeddings these are; None for what is no token's."""
    same = (rows[:, None] == llm().llm.model.embed_tokens.weight).all(-1)
    return [int(row.nonzero()[0]) if row.any() else None for row in same]


def flatten(fed: Sequence[tuple[int, Tensor]]) -> tuple[list[int], Tensor]:
    """Positions and embeddings of everything fed."""
    positions = [position + index for position, rows in fed for index in range(len(rows))]
    return positions, torch.cat([rows for _, rows in fed]) if fed else torch.zeros(0, llm().config.hidden_size)


def check_fed(fed: Sequence[tuple[int, Tensor]], feeds: Sequence[dict[str, Any]], tolerance: float) -> None:
    """Ours is fed in fewer and larger feeds; row by row it is the same."""
    positions, rows = flatten(fed)
    tokens = tokens_of(rows)
    assert len(rows) == sum(feed["len"] if feed["kind"] == "embeds" else len(feed["ids"]) for feed in feeds)
    at = 0
    for feed in feeds:
        length = feed["len"] if feed["kind"] == "embeds" else len(feed["ids"])
        assert positions[at : at + length] == list(range(feed["pos"], feed["pos"] + length))
        if feed["kind"] == "ids":
            assert tokens[at : at + length] == feed["ids"]
        else:
            near(rows[at : at + length], feed["tensor"], tolerance)
        at += length


def margin_of(logits: Tensor) -> float:
    first, second = logits.topk(2).values.tolist()
    return float(first - second)


@cases("duplex.json", [f"{name}.prepare" for name in TRACES])
def test_the_system_prompt_is_fed_officially(case: str):
    name = case.removesuffix(".prepare")
    replay, trace = alone(name), TRACES[name]
    check_fed(replay.prompt_fed, trace["prepare_feeds"], 1e-4)
    assert sum(len(rows) for _, rows in replay.prompt_fed) == trace["kv_after_prepare"]
    assert replay.system_length == trace["system_preserve_length"]


@cases("duplex.json", UNITS)
def test_a_unit_is_fed_officially(case: str):
    """What it sees and hears, through our encoders, and what it says."""
    seen, _, unit = seen_in(case)
    fed = [feed for kind in ("prefill_feeds", "generate_feeds", "finalize_feeds") for feed in unit[kind] or ()]
    check_fed(seen.watch.fed, fed, 1e-4)
    said = flatten(seen.watch.fed)[1][unit["kv_after_prefill"] - (fed[0]["pos"] if fed else unit["kv_after_prefill"]) :]
    assert tokens_of(said) == unit["total_ids_unit"]


@cases("duplex.json", UNITS)
def test_a_unit_takes_the_official_sound(case: str):
    seen, _, unit = seen_in(case)
    assert seen.num_frames == unit["whisper_kv"]
    assert seen.num_waiting == unit["prefill"]["audio_buffer_len_after"]
    assert seen.num_units == unit["prefill"]["audio_chunk_idx_after"]


@cases("duplex.json", UNITS)
def test_a_session_holds_what_it_officially_holds(case: str):
    seen, name, unit = seen_in(case)
    outcome, window = seen.outcome, unit["window"]
    assert outcome is not None
    assert seen.kv_after_prefill == unit["kv_after_prefill"]
    assert seen.kv_after_generate == unit["kv_after_generate"]
    assert outcome.kv_after_unit == unit["kv_after_unit"]
    assert outcome.unit_lengths == window["unit_lengths"]
    assert list(range(seen.num_units - len(outcome.unit_lengths), seen.num_units)) == window["unit_ids"]
    assert seen.system_length == window["system_preserve_length"]
    assert outcome.previous_ids == window["previous_token_ids"]
    # Officially the offset counts what "basic" forgot, and nothing reads it.
    forgotten = {"off": 0, "context": 0, "basic": seen.num_forgotten}[window_of(name).mode]
    assert forgotten == window["position_offset"]


@cases("duplex.json", [key for key, (_, unit) in UNITS.items() if unit["window"]["previous_text"]])
def test_the_previous_text_is_what_was_said(case: str):
    seen, name, unit = seen_in(case)
    marker, window = tokenizer().encode(window_of(name).previous_marker), unit["window"]
    assert seen.outcome is not None
    ids = seen.outcome.previous_ids
    assert (ids[: len(marker)], len(ids)) == (marker, window["previous_content_length"])
    # Officially joined from texts, unit by unit; characters cut between two units may read differently there.
    official = window["previous_text"]
    text = tokenizer().decode(ids[len(marker) :], skip_special=True)
    assert text == official or duplex.REPLACEMENT in official


@cases("duplex.json", DECIDED)
def test_a_unit_decides_officially(case: str):
    seen, _, unit = seen_in(case)
    ended, (result, pending) = seen.ended, (unit["result"], unit["pending_finalize"])
    assert seen.outcome is not None and seen.outcome.output is not None and ended is not None
    output, decode = seen.outcome.output, tokenizer().decode
    assert [choice.token for *_, choice in seen.watch.decided] == [step["token"] for step in unit["decode_steps"]]
    assert (output.is_listen, output.end_of_turn) == (result["is_listen"], result["end_of_turn"])
    assert seen.num_units == result["current_time"]
    assert len(ended.token_ids) == result["n_tokens"]
    # Not output.text: there, half a character waits for its other half.
    assert decode(output.token_ids, skip_special=True) == result["text"]
    assert decode(ended.token_ids, skip_special=True) == pending["generated_text"]
    assert (ended.token_ids, ended.is_listen) == (pending["total_ids_in_unit"], pending["is_listen"])
    assert ended.ending is not None and ended.ending[-1] == pending["terminator_id"]
    assert output.num_sampled == len(unit["decode_steps"])


@cases("duplex.json", UNITS)
def test_a_turn_stays_open_as_long_as_it_officially_does(case: str):
    seen, _, unit = seen_in(case)
    assert seen.turn_open != unit["current_turn_ended"]


@cases("duplex.json", DECIDED)
def test_a_unit_decides_from_the_official_logits(case: str):
    seen, name, unit = seen_in(case)
    tolerance = tolerance_of(name, unit)
    assert seen.pending_logits is not None
    near(seen.pending_logits, f"{case}.pending_logits", tolerance)
    if f"{case}.step_logits" in KEYS:
        near(torch.stack([logits for _, logits, *_ in seen.watch.decided]), f"{case}.step_logits", tolerance)
    official = [margin for step in unit["decode_steps"] for margin in step["argmax_margins"]]
    assert margins_of(case, unit) == pytest.approx(official, rel=2 * tolerance, abs=2 * tolerance)  # of two logits


@cases("duplex.json", DRAWN)
def test_a_unit_draws_officially(case: str):
    seen, name, unit = seen_in(case)
    assert [token for _, token in seen.watch.drawn] == unit["multinomial_draws"]
    if f"{case}.multinomial_probs" in KEYS:
        near(
            torch.stack([probs for probs, _ in seen.watch.drawn]), f"{case}.multinomial_probs", tolerance_of(name, unit)
        )


@cases("duplex.json", DECIDED)
def test_the_talker_is_given_the_official_words(case: str):
    seen, name, unit = seen_in(case)
    assert seen.outcome is not None and seen.outcome.output is not None
    output, tolerance = seen.outcome.output, tolerance_of(name, unit)
    assert output.token_ids == unit["tts_hidden_token_ids"]
    if f"{case}.tts_hidden" in KEYS:
        near(output.hidden, f"{case}.tts_hidden", tolerance)
    conditions = [request.condition for request, *_ in seen.watch.requested]
    assert len(conditions) == (unit["tts"] is not None)
    for condition in conditions:
        near(condition, f"{case}.tts_condition", tolerance)


@cases("duplex.json", SPOKEN)
def test_the_talker_says_the_official_codes(case: str):
    seen, name, unit = seen_in(case)
    official, ((request, before, after),) = unit["tts"], seen.watch.requested
    assert seen.outcome is not None
    assert seen.outcome.codes == official["tokens"]
    assert len(seen.outcome.codes) == unit["result"]["n_tts_tokens"]
    assert seen.next_position == (official["text_start_pos"], unit["tts_text_start_pos_after"])
    assert (request.min_steps, request.max_steps) == (official["min_new_tokens"], official["max_new_token"])
    assert (before, after) == (official["kv_before"], official["kv_after"])
    assert len(seen.watch.sounded) == official["n_sampled"]
    near(seen.watch.sounded[0], f"{case}.tts_probs_first", tolerance_of(name, unit))
    margin = min(margin_of(probs) for probs in seen.watch.sounded)
    assert margin == pytest.approx(official["min_margin"], abs=1e-3)


@cases("duplex.json", [f"{name}.end" for name in TRACES])
def test_a_session_ends_officially(case: str):
    name = case.removesuffix(".end")
    replay, trace = alone(name), TRACES[name]
    said = [token for seen in replay.seen for token in generated(seen) if token != tokenizer().special.speak]
    assert said == trace["res_ids"]
    assert tokenizer().decode(said, skip_special=False) == trace["generated_text"]
    assert "".join(map(written, replay.seen)) == trace["session_schema"]
    check_final_k(name, replay.final_k(replay.player.session))


@cases("duplex.json", [f"{name}.margins" for name in TRACES])
def test_no_decision_was_nearer_to_a_tie_than_officially(case: str):
    name = case.removesuffix(".margins")
    trace, seen = TRACES[name], alone(name).seen
    codes = [margin_of(probs) for one in seen for probs in one.watch.sounded]
    assert min(codes) == pytest.approx(trace["min_tts_prob_margin"], abs=1e-3)
    words = [margin for key, (of, unit) in UNITS.items() if of == name for margin in margins_of(key, unit)]
    assert min(words, default=None) == pytest.approx(trace["min_llm_argmax_margin"], abs=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# Sessions in company: the same decisions, words and codes.


class Company(Desk):
    """Sessions of all traces on one cache, each step in the same forwards: ears, eyes, LLM and talker.

    The engine has no window, and every trace's own window slides its sessions afterwards. Ways of deciding that differ
    share the prefill; their tokens are chosen by one engine each.
    """

    def __init__(self, joins: Sequence[tuple[str, int, int | None]], seed: int | None) -> None:
        super().__init__([name for name, *_ in joins])
        self.windows = {name: self._window(window_of(name)) for name in TRACES}
        self.players = [Player(name, self._any_engine().new_session(0), *when) for name, *when in joins]
        self._order = None if seed is None else random.Random(seed)

    def run(self) -> None:
        step = 0
        while not all(player.is_over for player in self.players):
            joining = [player for player in self.players if player.joins == step]
            self._any_engine().begin([(player.session, prompt_of(player.name)) for player in joining])
            self._step(self._ready(step))
            for player in (player for player in self.players if player.is_over and not player.final_k):
                player.final_k = self.final_k(player.session)
                self._any_engine().end(player.session)
            step += 1

    def _any_engine(self) -> DuplexEngine:
        return self.engine(DuplexConfig(window=WindowConfig(mode="off"), force_listen_count=0))

    def _window(self, config: WindowConfig) -> SlidingWindow:
        marker = tokenizer().encode(config.previous_marker)
        return SlidingWindow(config, llm(), self.cache, marker, tokenizer().special_ids)

    def _ready(self, step: int) -> list[Player]:
        ready = [player for player in self.players if player.joins <= step and not player.is_over]
        if self._order is None:
            return ready
        return self._order.sample(ready, self._order.randint(0, len(ready)))

    def _step(self, players: Sequence[Player]) -> None:
        stopped = [player for player in players if is_stopped(player.unit)]
        running = [player for player in players if not is_stopped(player.unit)]
        inputs = list(zip(running, self.sense(running), strict=True))
        for player in [player for player, unit in inputs if unit is None]:
            self.stray_unit(player.session)
            stopped.append(player)
        decided = self._decide([(player, unit) for player, unit in inputs if unit is not None])
        for (player, output), codes in zip(decided, self.speak(decided), strict=True):
            player.outcomes.append(self.outcome(player, output, codes))
        for player in stopped:
            player.outcomes.append(self.outcome(player, None, []))

    def _decide(self, inputs: Sequence[tuple[Player, UnitInput]]) -> list[tuple[Player, UnitOutput]]:
        engine, players = self._any_engine(), [player for player, _ in inputs]
        batch = [(player.session, self._forced(player, unit)) for player, unit in inputs]
        for player in players:
            player.session.generator.manual_seed(player.unit.get("torch_manual_seed", 0))
        opened = engine.prefill(batch)
        groups: dict[SamplingConfig, list[duplex.OpenUnit]] = defaultdict(list)
        for player, unit in zip(players, opened, strict=True):
            groups[sampling_of(player.name, player.unit)].append(unit)
        for sampling, units in groups.items():
            decider = self.engine(replace(engine.config, sampling=sampling, listen_discards_speech=True))
            while going := [unit for unit in units if unit.ending is None]:
                decider.decode_step(going)
        closing = self.engine(replace(engine.config, listen_discards_speech=True))
        outputs = [closing.close(unit) for unit in opened]
        engine.finalize([player.session for player in players])
        for name, window in self.windows.items():
            window.slide([player.session.context for player in players if player.name == name])
        return list(zip(players, outputs, strict=True))

    def _forced(self, player: Player, unit: UnitInput) -> UnitInput:
        count = TRACES[player.name]["caps"].get("force_listen_count", 0)
        return replace(unit, force_listen=unit.force_listen or player.session.num_units < count)


class Steps(Desk):
    """Two sessions of a trace, the second joining later, as a pipeline runs them: by `DuplexEngine.step` alone.

    A unit's end is fed with the next unit's prefill, and the windows slide when they are due.
    """

    def __init__(self, name: str) -> None:
        super().__init__([name, name])
        first = self.engine(config_of(name, TRACES[name]["units"][0]))
        self.players = [Player(name, first.new_session(0), joins) for joins in (0, 2)]
        first.begin([(player.session, prompt_of(name)) for player in self.players])

    def run(self) -> None:
        for step in range(self.players[-1].joins + len(TRACES[self.players[0].name]["units"])):
            for player in [player for player in self.players if player.joins <= step and not player.is_over]:
                player.session.generator.manual_seed(player.unit.get("torch_manual_seed", 0))
            self._step([player for player in self.players if player.joins <= step and not player.is_over])
        for player in self.players:
            self.engine(config_of(player.name, TRACES[player.name]["units"][0])).finalize([player.session])
            player.final_k = self.final_k(player.session)

    def _step(self, players: Sequence[Player]) -> None:
        running = [player for player in players if not is_stopped(player.unit)]
        sensed = dict(zip(map(id, running), self.sense(running), strict=True))
        ready = [player for player in players if sensed.get(id(player)) is not None]
        outputs: dict[int, UnitOutput] = {}
        for config in {config_of(player.name, player.unit): None for player in ready}:
            chosen = [player for player in ready if config_of(player.name, player.unit) == config]
            batch = [(player.session, unit) for player in chosen if (unit := sensed[id(player)]) is not None]
            outputs |= dict(zip(map(id, chosen), self.engine(config).step(batch), strict=True))
        codes = dict(zip(map(id, ready), self.speak([(player, outputs[id(player)]) for player in ready]), strict=True))
        for player in running:
            if sensed[id(player)] is None:
                self.engine(config_of(player.name, player.unit)).finalize([player.session])
                self.stray_unit(player.session)
        for player in players:
            player.outcomes.append(self.outcome(player, outputs.get(id(player)), codes.get(id(player), [])))


@functools.cache
@torch.inference_mode()
def company(scenario: str) -> Company:
    names = list(TRACES)
    joins: list[tuple[str, int, int | None]] = [(name, 0, None) for name in names]
    if scenario == "backwards":
        joins.reverse()
    if scenario == "coming and going":
        # Each trace three times: from the start, later, and later still and only for half of its units.
        halves = {name: len(TRACES[name]["units"]) // 2 for name in names}
        joins += [(name, 3 + index, None) for index, name in enumerate(names)]
        joins += [(name, 2 * index, halves[name]) for index, name in enumerate(names)]
    together = Company(joins, seed=0 if scenario == "coming and going" else None)
    together.run()
    return together


@functools.cache
@torch.inference_mode()
def steps(name: str) -> Steps:
    both = Steps(name)
    both.run()
    return both


def generated(seen: Seen) -> list[int | None]:
    """The tokens that a unit chose and fed."""
    num_fed = 0 if seen.ended is None else seen.ended.num_fed
    positions, rows = flatten(seen.watch.fed)
    first = next((index for index, at in enumerate(positions) if at == seen.kv_after_prefill), len(rows))
    return tokens_of(rows[first : first + num_fed])


def written(seen: Seen) -> str:
    """Everything fed in a unit, as the official session writes it down; a stray <unit> isn't."""
    special, text, before = tokenizer().special, "", None
    tokens = tokens_of(flatten(seen.watch.fed)[1]) if seen.ended is not None else []
    for is_token, run in itertools.groupby(tokens, key=lambda token: token is not None):
        part = list(run)
        kind = "img" if before in (special.image, special.slice) else "audio"
        text += tokenizer().decode(part, skip_special=False) if is_token else f"[{kind}_embed_{len(part)}]"
        before = part[-1]
    return text


def margins_of(case: str, unit: dict[str, Any]) -> list[float]:
    """Ours, of the choices whose margins were recorded."""
    seen, _, _ = seen_in(case)
    margins: list[float] = []
    for (rule, logits, recent, _), step in zip(seen.watch.decided, unit["decode_steps"], strict=True):
        shaped = rule.shape(logits[None].float(), [recent])[0]
        margins += [margin_of(logits), margin_of(shaped)][: len(step["argmax_margins"])]
    return margins


def check_final_k(name: str, keys: dict[int, Tensor]) -> None:
    for layer, ours in keys.items():
        if f"{name}.final_k.{layer}" in KEYS:
            near(ours[None], f"{name}.final_k.{layer}", 1e-3)


def check_said(outcome: Outcome, name: str, unit: dict[str, Any]) -> None:
    """What a unit says, where it was run."""
    key, tolerance, output = f"{name}.u{unit['unit']}", tolerance_of(name, unit), outcome.output
    assert (output is not None) == unit["prefill"]["success"]
    if output is None:
        return
    assert (output.is_listen, output.end_of_turn) == (unit["result"]["is_listen"], unit["result"]["end_of_turn"])
    assert output.token_ids == unit["tts_hidden_token_ids"]
    assert output.num_sampled == len(unit["decode_steps"])
    assert outcome.codes == (unit["tts"]["tokens"] if unit["tts"] else [])
    if f"{key}.tts_hidden" in KEYS:
        near(output.hidden, f"{key}.tts_hidden", tolerance)
    if f"{key}.tts_condition" in KEYS:
        said = talker().condition(torch.tensor(output.token_ids, dtype=torch.int64), output.hidden)
        near(
            torch.cat([said, talker().text_row(talker().config.audio_bos_token_id)]), f"{key}.tts_condition", tolerance
        )


@pytest.mark.parametrize("scenario", SCENARIOS)
@cases("duplex.json", TRACES)
def test_a_session_in_company_is_the_official_one(case: str, scenario: str):
    players = [player for player in company(scenario).players if player.name == case]
    assert players
    for player in players:
        units = TRACES[case]["units"]
        assert len(player.outcomes) == (player.leaves or len(units))
        for outcome, unit in zip(player.outcomes, units, strict=False):
            check_said(outcome, case, unit)
            assert outcome.kv_after_unit == unit["kv_after_unit"]
            assert outcome.unit_lengths == unit["window"]["unit_lengths"]
            assert outcome.previous_ids == unit["window"]["previous_token_ids"]
        if player.leaves is None:
            check_final_k(case, player.final_k)


@pytest.mark.parametrize("scenario", SCENARIOS)
@cases("duplex.json", ["pages"] if TRACES else [])
def test_sessions_that_left_give_all_their_pages_back(case: str, scenario: str):
    assert company(scenario).cache.num_used_pages == 0


@cases("duplex.json", TRACES)
def test_a_session_in_a_pipeline_is_the_official_one(case: str):
    for player in steps(case).players:
        for outcome, unit in zip(player.outcomes, TRACES[case]["units"], strict=True):
            check_said(outcome, case, unit)
        context, last = player.session.context, TRACES[case]["units"][-1]
        assert context.sequence.length == last["kv_after_unit"]
        assert [unit.length for unit in context.units] == last["window"]["unit_lengths"]
        check_final_k(case, player.final_k)
