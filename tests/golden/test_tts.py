"""The talker against the official one: its parts, whole turns of chained calls, and a text spoken at once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model_shards import tts, tts_paged
from model_shards.checkpoint import load_shard
from model_shards.errors import ModelError
from model_shards.fold import fold
from model_shards.kv_cache import KvCache
from model_shards.sampling import Sampling, draw, keep_top_k, keep_top_p, penalise_repetition
from model_shards.tts import ChunkRequest, Talker, TalkerState
from model_shards.tts_paged import PagedTalker, shape_of
from model_shards.tts_streaming import SpeechStream, speak_interleaved
from tests.support import golden
from tests.support.golden import cases, close, read_json, read_tensors

FILE = "tts.safetensors"
CASES: dict[str, Any] = read_json("tts.json")
KEYS = list(read_tensors(FILE))
TURNS = {name: case for name, case in CASES.items() if isinstance(case, dict) and "kw" in case}
CALLS = {f"{name}.{index}": (name, index) for name, case in TURNS.items() for index in range(len(case["rows"]))}
LIKELIEST = [name for name, turn in TURNS.items() if all(row["torch_manual_seed"] is None for row in turn["rows"])]
FAILURES = [name for name, case in CASES.items() if isinstance(case, dict) and "error" in case]
SIZES = [name for name, value in CASES.items() if isinstance(value, int | float)]
WARPED = [key for key in KEYS if key.startswith("rep.out_")]
LEGACY = ["legacy_mask.allowed"] if "legacy_mask.allowed" in KEYS else []
MIN_STEPS = 50  # of a text spoken at once, by default (reference §5.3); too few to matter where it is cut off earlier


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@functools.cache
def talker() -> Talker:
    """Folded, as the product has it."""
    module = load_shard(golden.FOLDER, "tts")
    fold(module)
    return module


def recorded(key: str) -> Tensor:
    return read_tensors(FILE)[key]


def sampling_of(name: str) -> Sampling:
    kw = TURNS[name]["kw"]
    return Sampling(kw["temperature"][0], kw["repetition_penalty"])


def request_of(name: str, index: int) -> ChunkRequest:
    kw = TURNS[name]["kw"]
    return ChunkRequest(recorded(f"{name}.{index}.cond"), kw["min_new_tokens"], kw["max_new_token"])


def reseed(state: TalkerState, row: dict[str, Any]) -> None:
    seed = row["torch_manual_seed"]
    state.generator = None if seed is None else torch.Generator().manual_seed(seed)


@dataclass(frozen=True, slots=True)
class Called:
    """One call of the decoder for one session."""

    start: int
    codes: list[int]
    draws: list[int]
    kv_after: int
    next_position: int
    probs: Tensor | None = None  # of every draw; known for a session alone


class Turn:
    """A session that goes through the calls of a recorded turn."""

    def __init__(self, name: str, joins: int = 0) -> None:
        self.name, self.joins = name, joins
        self.state = TalkerState()
        self.calls: list[Called] = []

    @property
    def is_over(self) -> bool:
        return len(self.calls) == len(TURNS[self.name]["rows"])

    def request(self) -> tuple[TalkerState, ChunkRequest]:
        index = len(self.calls)
        reseed(self.state, TURNS[self.name]["rows"][index])
        return self.state, request_of(self.name, index)

    def note(self, start: int, codes: list[int], last_draw: int, probs: Tensor | None) -> None:
        assert self.state.kv is not None
        after = self.state.kv.shape[3], self.state.next_position
        self.calls.append(Called(start, codes, [*codes, last_draw], *after, probs))


def call(turns: Sequence[Turn], bystanders: Sequence[tuple[TalkerState, ChunkRequest]] = ()) -> None:
    """The next call of every turn, in one batch; they share their way of sampling."""
    starts = [turn.state.next_position for turn in turns]
    batch = [*bystanders, *(turn.request() for turn in turns)]
    with pytest.MonkeyPatch.context() as patch:
        seen: list[Tensor] = []
        patch.setattr(tts, "draw", lambda probs, generators: draw(seen.append(probs.clone()) or probs, generators))
        spoken = talker().generate_chunks(batch, sampling_of(turns[0].name))[len(bystanders) :]
    for turn, start, chunk in zip(turns, starts, spoken, strict=True):
        turn.note(start, chunk.codes, chunk.last_draw, torch.cat(seen) if len(batch) == 1 else None)


@functools.cache
@torch.inference_mode()
def alone(name: str) -> Turn:
    turn = Turn(name)
    while not turn.is_over:
        call([turn])
    return turn


@functools.cache
@torch.inference_mode()
def together(backwards: bool) -> list[Turn]:
    """Every turn twice, the second joining later, with whoever samples the same way and a stranger in each call."""
    turns = [Turn(name, copy) for copy in (0, 1) for name in TURNS]
    turns = turns[::-1] if backwards else turns
    step = 0
    while going := [turn for turn in turns if not turn.is_over]:
        ready = [turn for turn in going if turn.joins <= step]
        for sampling in dict.fromkeys(sampling_of(turn.name) for turn in ready):
            stranger = ChunkRequest(torch.randn(3 + 5 * step, talker().config.hidden_size), 0, 11 + step)
            call([turn for turn in ready if sampling_of(turn.name) == sampling], [(TalkerState(), stranger)])
        step += 1
    return turns


def check_call(called: Called, row: dict[str, Any]) -> None:
    assert called.draws == row["sampled"]
    assert called.codes == row["tokens"]
    assert (called.start, called.kv_after, len(called.draws)) == (
        row["text_start_pos"],
        row["kv_after"],
        row["n_steps"],
    )


def check_final_k(turn: Turn) -> None:
    assert turn.state.kv is not None
    close(turn.state.kv[0, 0], recorded(f"{turn.name}.final_k0")[0])


@cases("tts.json", ["proj.condition", "proj.projector_semantic", "proj.projector_spk"] if CASES else [])
def test_words_become_the_official_condition(case: str):
    ids, hidden, tower = recorded("proj.ids").long(), recorded("proj.hidden"), talker().tts
    ours = {
        "proj.condition": lambda: talker().condition(ids, hidden),
        "proj.projector_semantic": lambda: tower.projector_semantic(hidden),
        "proj.projector_spk": lambda: tower.projector_spk(hidden),
    }
    close(ours[case](), recorded(case))


def head_weight() -> Tensor:
    return talker().tts.head_code[0].weight()


@cases("tts.json", ["head_code.effective_weight"] if CASES else [])
def test_the_head_is_composed_officially(case: str):
    close(head_weight(), recorded(case))


@cases("tts.json", ["backbone"] if CASES else [])
def test_the_backbone_gives_the_official_hidden_states_and_logits(case: str):
    rows = recorded("proj.condition")
    hidden = run_backbone(rows, torch.ones(len(rows), len(rows), dtype=torch.bool).tril())
    close(hidden, recorded(f"{case}.hidden")[0])
    close(F.linear(hidden, head_weight()), recorded(f"{case}.logits")[0])


def run_backbone(rows: Tensor, mask: Tensor) -> Tensor:
    backbone = talker().tts.model
    kv = backbone.new_cache(1, len(rows))
    return backbone(rows[None], torch.arange(len(rows))[None], kv, 0, mask)[0]


@cases("tts.json", CALLS)
def test_a_call_gives_the_official_codes(case: str):
    name, index = CALLS[case]
    called, row = alone(name).calls[index], TURNS[name]["rows"][index]
    check_call(called, row)
    assert len(request_of(name, index).condition) == row["cond_len"]
    assert called.next_position == called.start + row["cond_len"] + len(row["tokens"])


@cases("tts.json", CALLS)
def test_codes_are_drawn_from_the_official_probabilities(case: str):
    name, index = CALLS[case]
    probs, row = alone(name).calls[index].probs, TURNS[name]["rows"][index]
    assert probs is not None
    close(probs, recorded(f"{case}.probs"))
    nearest = (probs.topk(2).values @ torch.tensor([1.0, -1.0])).min()
    drawn_greedily = row["torch_manual_seed"] is None  # otherwise the margin says nothing, and 1 was written down
    assert nearest.item() == pytest.approx(row["min_margin"], abs=1e-3) or not drawn_greedily


@cases("tts.json", [f"{name}.final_k0" for name in TURNS])
def test_a_turn_leaves_the_official_cache(case: str):
    check_final_k(alone(case.removesuffix(".final_k0")))


@pytest.mark.parametrize("backwards", [False, True], ids=["in order", "backwards"])
@cases("tts.json", TURNS)
def test_a_turn_in_company_gives_the_official_codes(case: str, backwards: bool):
    turns = [turn for turn in together(backwards) if turn.name == case]
    assert len(turns) == 2
    for turn in turns:
        for called, row in zip(turn.calls, TURNS[case]["rows"], strict=True):
            check_call(called, row)
        check_final_k(turn)


@cases("tts.json", LIKELIEST)
def test_in_pages_a_turn_gives_the_official_codes_and_cache(case: str, monkeypatch: pytest.MonkeyPatch):
    """Five codes per launch; in company."""
    monkeypatch.setattr(tts_paged, "duplex_sampling", lambda config: sampling_of(case))
    cache = KvCache(shape_of(talker().config), 300, page_size=16)
    pages = PagedTalker(talker(), cache, "sdpa", (1, 2))
    state, stranger = pages.new_state(None), pages.new_state(1)
    for index, row in enumerate(TURNS[case]["rows"]):
        start = state.next_position
        other = ChunkRequest(torch.randn(3 + index, talker().config.hidden_size), 0, 11 + index)
        *_, spoken = pages.generate_chunks([(stranger, other), (state, request_of(case, index))])
        after = state.sequence.length, state.next_position
        check_call(Called(start, spoken.codes, [*spoken.codes, spoken.last_draw], *after), row)
    close(cache.read(state.sequence, 0)[0].transpose(0, 1), recorded(f"{case}.final_k0")[0])


@pytest.mark.parametrize("company", [0, 3], ids=["alone", "in company"])
@cases("tts.json", ["generate"] if "generate" in CASES else [])
def test_a_text_spoken_at_once_gives_the_official_codes(case: str, company: int, monkeypatch: pytest.MonkeyPatch):
    official, config = CASES[case], talker().config
    seen: list[Tensor] = []
    monkeypatch.setattr(
        tts, "draw", lambda probs, generators: draw(seen.append(probs[-1:].clone()) or probs, generators)
    )
    request = ChunkRequest(recorded("generate.cond"), MIN_STEPS, official["n_steps"] + official["finished"])
    others = [ChunkRequest(torch.randn(2 + n, config.hidden_size), 0, 5 * n + 4) for n in range(company)]
    sampling = Sampling(config.temperature, config.repetition_penalty, config.top_p, config.top_k)
    *_, spoken = talker().generate_chunks([(TalkerState(), each) for each in [*others, request]], sampling)
    assert spoken.codes == official["tokens"]
    assert (spoken.last_draw == talker().eos) == official["finished"]
    close(torch.cat(seen), recorded("generate.probs"))
    nearest = (torch.cat(seen).topk(2).values @ torch.tensor([1.0, -1.0])).min()
    assert nearest.item() == pytest.approx(official["min_margin"], abs=1e-3)


@cases("tts.json", ["rep.out"] if "rep.out" in KEYS else [])
def test_repetition_is_penalised_officially(case: str):
    """By how much isn't written down: it is read off one code that came once, and has to explain all the others."""
    logits, history, official = (recorded(f"rep.{what}") for what in ("logits", "history", "out"))
    recent = history[0, -16:].tolist()
    once = next(code for code in recent if recent.count(code) == 1)
    ratio = (official[0, once] / logits[0, once]).item()
    close(penalise_repetition(logits, history.long(), max(ratio, 1 / ratio)), recorded(case), atol=1e-5, rtol=1e-5)


@cases("tts.json", WARPED)
def test_unlikely_codes_are_left_out_officially(case: str):
    top_p, top_k = (part.lstrip("topk_") for part in case.removeprefix("rep.out_").split("_top_"))
    kept = keep_top_k(keep_top_p(recorded("rep.out"), float(top_p)), int(top_k))
    close(kept, recorded(case))


@cases("tts.json", SIZES)
def test_the_config_says_what_the_official_talker_was_built_with(case: str):
    config = talker().config
    ours = {
        "num_audio_tokens": config.num_audio_tokens,
        "eos": talker().eos,
        "audio_bos_token_id": config.audio_bos_token_id,
        "text_eos_token_id": config.text_eos_token_id,
        "token_window_size": config.sliding_window_tokens,
        "chunk_window_size": config.window_size,
        "recomputed_chunks": config.recomputed_chunks,
        "rope_theta": config.rope_theta,
    }
    assert ours[case] == CASES[case]


@cases("tts.json", FAILURES)
def test_what_the_official_talker_can_t_do_is_refused_with_words(case: str):
    """`interleaved.X` was asked to speak a whole text with attention X, anything else is a mode of its own."""
    whole, _, attention = case.rpartition(".")
    sampling = Sampling(talker().config.temperature, talker().config.repetition_penalty)
    with pytest.raises(ModelError, match=attention):
        if whole:
            speak_interleaved(talker(), [recorded("interleaved.cond0")], attention, sampling)
        else:
            SpeechStream(talker(), attention, sampling)


@cases("tts.json", LEGACY)
def test_the_backbone_honours_the_mask_of_the_legacy_mode(case: str):
    """No mode of ours draws this mask (its only user fails officially, too), but it is one that the backbone can take:
    all rows at once under it are the rows one by one, each seeing no other columns than the mask allows."""
    allowed = recorded(case).bool()
    rows = torch.randn(len(allowed), talker().config.hidden_size, generator=torch.Generator().manual_seed(0))
    assert not allowed.triu(1).any()
    backbone = talker().tts.model
    kv = backbone.new_cache(1, len(rows))
    one_by_one = [
        backbone(rows[None, at : at + 1], torch.tensor([[at]]), kv, at, allowed[at : at + 1, : at + 1])[0]
        for at in range(len(rows))
    ]
    close(run_backbone(rows, allowed), torch.cat(one_by_one))


def test_keys_are_those_of_the_checkpoint():
    keys = {key for key in read_tensors("model.safetensors") if key.startswith("tts.")}
    assert set(load_shard(golden.FOLDER, "tts").state_dict()) == keys - {"tts.model.embed_tokens.weight"}
