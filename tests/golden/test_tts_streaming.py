"""The talker outside duplex against TTSStreamingGenerator, with every attention type, and interleaved_generate."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from model_shards import tts
from model_shards.checkpoint import load_shard
from model_shards.fold import fold
from model_shards.sampling import Sampling, draw
from model_shards.tts import Talker, TalkerState
from model_shards.tts_streaming import Block, SpeechInput, SpeechState, SpeechStream, speak_interleaved
from tests.support import golden
from tests.support.golden import cases, close, read_json, read_tensors

FILE = "tts.safetensors"
CASES: dict[str, Any] = read_json("tts.json")
TURNS = {name: case for name, case in CASES.items() if isinstance(case, dict) and "attention_type" in case}
PIECES = {f"{name}.{index}": (name, index) for name, case in TURNS.items() for index in range(len(case["rows"]))}
WHOLE = [name for name, case in CASES.items() if name.startswith("interleaved.") and "tokens" in case]


@functools.cache
def talker() -> Talker:
    """Folded, as the product has it."""
    module = load_shard(golden.FOLDER, "tts")
    fold(module)
    return module


def stream_of(name: str) -> SpeechStream:
    case = TURNS[name]
    sampling = Sampling(case["temperature"], case["repetition_penalty"], case["top_p"], case["top_k"])
    return SpeechStream(talker(), case["attention_type"], sampling, case["chunk_size"])


@dataclass(frozen=True, slots=True)
class Ran:
    """One run of the backbone: `num` rows from `position` on, which saw `past` cached ones."""

    position: int
    num: int
    past: int


@dataclass(slots=True)
class Spoke:
    """What one piece of text came to. ran, probs, drawn: known for a session alone."""

    blocks: list[Block]
    chunk: tuple[int, int]  # rows of the condition, codes
    kv_len: int
    next_position: int
    num_waiting: int
    ran: list[Ran] = field(default_factory=list)
    probs: list[Tensor] = field(default_factory=list)
    drawn: list[int] = field(default_factory=list)


class Turn:
    """A session that speaks the pieces of a recorded turn."""

    def __init__(self, name: str, joins: int = 0) -> None:
        self.name, self.joins = name, joins
        self.state = SpeechState(TalkerState())
        self.pieces: list[Spoke] = []

    @property
    def is_over(self) -> bool:
        return len(self.pieces) == len(TURNS[self.name]["rows"])

    def piece(self) -> tuple[SpeechState, SpeechInput]:
        row = TURNS[self.name]["rows"][len(self.pieces)]
        rows = read_tensors(FILE)[f"{self.name}.{len(self.pieces)}.cond_no_bos"]
        assert len(rows) == row["cond_len"]
        return self.state, SpeechInput(rows, row["text_finished"])

    def note(self, blocks: list[Block]) -> Spoke:
        state = self.state
        assert state.last is not None and state.talker.kv is not None
        chunk = len(state.last.condition), len(state.last.codes)
        kv_len, position = state.talker.kv.shape[3], state.talker.next_position
        self.pieces.append(Spoke(blocks, chunk, kv_len, position, len(state.buffer)))
        return self.pieces[-1]


def speak(turns: Sequence[Turn], bystanders: Sequence[tuple[SpeechState, SpeechInput]] = ()) -> list[Spoke]:
    """The next piece of every turn, in one batch."""
    name = turns[0].name
    batch = [*bystanders, *(turn.piece() for turn in turns)]
    blocks = stream_of(name).speak(batch, TURNS[name]["max_new_token"])[len(bystanders) :]
    return [turn.note(said) for turn, said in zip(turns, blocks, strict=True)]


def speak_watched(turn: Turn) -> None:
    ran: list[Ran] = []
    probs: list[Tensor] = []
    drawn: list[int] = []

    def watched_draw(rows: Tensor, generators: Any) -> list[int]:
        probs.append(rows.clone())
        drawn.extend(draw(rows, generators))
        return drawn[-1:]

    def watched_run(_module: Any, args: tuple[Tensor, Tensor, Tensor, int, Tensor | None]) -> None:
        x, positions, _, column, mask = args
        # A row sees itself and what is cached; the first row of a run sees no other new one.
        past = column if mask is None else int(mask.flatten(0, -2)[0].sum()) - 1
        ran.append(Ran(int(positions[0, 0]), x.shape[1], past))

    def watched_step(codes: Tensor, positions: Tensor, kv: Tensor, column: Tensor, mask: Tensor) -> Tensor:
        ran.append(Ran(int(positions[0]), 1, int((mask[0] == 0).sum()) - 1))
        return step(codes, positions, kv, column, mask)

    hook, step = talker().tts.model.register_forward_pre_hook(watched_run), talker()._step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(talker(), "_step", watched_step)
        patch.setattr(tts, "draw", watched_draw)
        (spoke,) = speak([turn])
    hook.remove()
    spoke.ran, spoke.probs, spoke.drawn = ran, probs, drawn


@functools.cache
@torch.inference_mode()
def alone(name: str) -> Turn:
    turn = Turn(name)
    while not turn.is_over:
        speak_watched(turn)
    return turn


@functools.cache
@torch.inference_mode()
def together(name: str) -> list[Turn]:
    """The turn three times, each copy joining a piece later and the latest first, with a stranger in each batch."""
    turns, step = [Turn(name, joins) for joins in (2, 1, 0)], 0
    while going := [turn for turn in turns if not turn.is_over]:
        stranger = torch.randn(2 + 3 * step, talker().config.hidden_size)
        speak([turn for turn in going if turn.joins <= step], [(SpeechState(TalkerState()), SpeechInput(stranger))])
        step += 1
    return turns


def check_piece(spoke: Spoke, row: dict[str, Any]) -> None:
    assert [{"tokens": block.codes, "last": block.last} for block in spoke.blocks] == row["yields"]
    assert (spoke.kv_len, spoke.next_position) == (row["kv_len"], row["text_start_pos"])
    assert spoke.num_waiting == row["buffer_left"]


def check_final_k(turn: Turn) -> None:
    assert turn.state.talker.kv is not None
    close(turn.state.talker.kv[0, 0], read_tensors(FILE)[f"{turn.name}.final_k0"][0], rtol=1e-3, atol=1e-3)


@cases("tts.json", PIECES)
def test_a_piece_of_text_gives_the_official_codes(case: str):
    name, index = PIECES[case]
    turn, row = alone(name), TURNS[name]["rows"][index]
    check_piece(turn.pieces[index], row)
    assert turn.pieces[index].drawn == row["sampled"]
    chunks = [(chunk["condition_len"], chunk["audio_token_count"]) for chunk in row["chunk_info"]]
    assert [piece.chunk for piece in turn.pieces[: index + 1]] == chunks


@cases("tts.json", PIECES)
def test_codes_are_drawn_from_the_official_probabilities(case: str):
    name, index = PIECES[case]
    probs, row = alone(name).pieces[index].probs, TURNS[name]["rows"][index]
    close(probs[0], read_tensors(FILE)[f"{case}.probs_first"])
    close(probs[-1], read_tensors(FILE)[f"{case}.probs_last"])
    nearest = (torch.cat(probs).topk(2).values @ torch.tensor([1.0, -1.0])).min()
    assert nearest.item() == pytest.approx(row["min_margin"], abs=1e-3)


@cases("tts.json", PIECES)
def test_the_backbone_runs_where_it_officially_does(case: str):
    name, index = PIECES[case]
    ran, row = alone(name).pieces[index].ran, TURNS[name]["rows"][index]
    first, last = (Ran(row[call]["pos0"], row[call]["n"], row[call]["past"]) for call in ("first_call", "last_call"))
    assert (ran[0], ran[-1], len(ran)) == (first, last, row["n_calls"])


@cases("tts.json", [f"{name}.final_k0" for name in TURNS])
def test_a_turn_leaves_the_official_cache(case: str):
    check_final_k(alone(case.removesuffix(".final_k0")))


@cases("tts.json", TURNS)
def test_a_turn_in_company_gives_the_official_codes(case: str):
    for turn in together(case):
        for spoke, row in zip(turn.pieces, TURNS[case]["rows"], strict=True):
            check_piece(spoke, row)
        check_final_k(turn)


@cases("tts.json", WHOLE)
def test_a_whole_text_in_pieces_gives_the_official_codes(case: str):
    config = talker().config
    conditions = read_tensors(FILE).numbered("interleaved.cond")
    sampling = Sampling(config.temperature, config.repetition_penalty)
    with torch.inference_mode():
        codes = speak_interleaved(
            talker(),
            conditions,
            case.removeprefix("interleaved."),
            sampling,
            max_steps=CASES[case]["max_new_token_patched"],
        )
    assert codes == CASES[case]["tokens"]
