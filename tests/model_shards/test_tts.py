"""The talker, against the official codes, against stock Llama, and batched against alone."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model_shards import tts
from model_shards.config import RELEASED, TtsConfig, load_config
from model_shards.errors import ModelError
from model_shards.sampling import NO_CODE, Sampling, draw, keep_top_k, keep_top_p, penalise_repetition, shape_logits
from model_shards.tts import ChunkRequest, Talker, TalkerInput, TalkerState

PLACES = [Path(__file__).parents[up] / "shared" / "golden" for up in (2, 3)]
GOLDEN = Path(os.environ.get("OMNI_GOLDEN") or next((place for place in PLACES if place.is_dir()), PLACES[0]))
golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no golden data; OMNI_GOLDEN names its folder")

DUPLEX = Sampling(temperature=0.8, repetition_penalty=1.05)
TINY = TtsConfig(
    llm_dim=24,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_audio_tokens=50,
    num_text_tokens=100,
    audio_bos_token_id=90,
    text_eos_token_id=91,
)


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return load_file(GOLDEN / "tts.safetensors")


@pytest.fixture(scope="module")
def cases() -> dict[str, Any]:
    return json.loads((GOLDEN / "tts.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def duplex() -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((GOLDEN / "duplex.json").read_text(encoding="utf-8")), load_file(GOLDEN / "duplex.safetensors")


@pytest.fixture(scope="module")
def official() -> Talker:
    config = load_config(GOLDEN).tts
    assert config is not None
    with torch.device("meta"):
        talker = Talker(config)
    weights = load_file(GOLDEN / "model.safetensors")
    talker.load_state_dict({key: value for key, value in weights.items() if key.startswith("tts.")}, assign=True)
    return talker


@pytest.fixture
def tiny() -> Talker:
    torch.manual_seed(11)
    return Talker(TINY)


@pytest.fixture
def probs(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The distributions which codes are drawn from, as they come."""
    seen: list[Tensor] = []

    def watched(rows: Tensor, generators: list[torch.Generator | None]) -> list[int]:
        seen.append(rows.clone())
        return draw(rows, generators)

    monkeypatch.setattr(tts, "draw", watched)
    return seen


def unit(num_tokens: int, seed: int, end_of_turn: bool = False) -> TalkerInput:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, TINY.num_text_tokens, (num_tokens,), generator=generator)
    return TalkerInput(ids, torch.randn(num_tokens, TINY.llm_dim, generator=generator), end_of_turn)


def seeded(seed: int | None) -> torch.Generator | None:
    return None if seed is None else torch.Generator().manual_seed(seed)


@golden
def test_the_condition_is_the_official_one(official: Talker, tensors: dict[str, Tensor]) -> None:
    got = official.condition(tensors["proj.ids"], tensors["proj.hidden"])
    torch.testing.assert_close(got, tensors["proj.condition"], rtol=1e-4, atol=1e-5)


@golden
@pytest.mark.parametrize("name", ["chunk", "chunk_free", "chunk_sampled"])
def test_a_turn_gives_the_official_codes(
    name: str, official: Talker, tensors: dict[str, Tensor], cases: dict[str, Any], probs: list[Tensor]
) -> None:
    kw, state = cases[name]["kw"], TalkerState()
    sampling = Sampling(kw["temperature"][0], kw["repetition_penalty"])
    for index, row in enumerate(cases[name]["rows"]):
        assert state.next_position == row["text_start_pos"]
        state.generator = seeded(row["torch_manual_seed"])
        request = ChunkRequest(tensors[f"{name}.{index}.cond"], kw["min_new_tokens"], kw["max_new_token"])
        (spoken,) = official.generate_chunks([(state, request)], sampling)
        assert [*spoken.codes, spoken.last_draw] == row["sampled"]
        assert spoken.codes == row["tokens"]
        torch.testing.assert_close(torch.cat(probs), tensors[f"{name}.{index}.probs"], rtol=1e-4, atol=1e-5)
        probs.clear()
        assert state.kv is not None
        assert state.kv.shape[3] == row["kv_after"]
    torch.testing.assert_close(state.kv[None, 0, 0], tensors[f"{name}.final_k0"], rtol=1e-4, atol=1e-4)


@golden
@pytest.mark.parametrize("name", ["audio_off", "omni_basic"])
def test_a_duplex_session_says_the_official_codes(
    name: str, official: Talker, duplex: tuple[dict[str, Any], dict[str, Tensor]], probs: list[Tensor]
) -> None:
    traces, tensors = duplex
    state = TalkerState()
    for row in (row for row in traces[name]["units"] if row["tts"] is not None):
        assert state.next_position == row["tts"]["text_start_pos"]
        key = f"{name}.u{row['unit']}"
        ids = torch.tensor(row["tts_hidden_token_ids"], dtype=torch.int64)
        hidden = tensors.get(f"{key}.tts_hidden", torch.zeros(0, official.config.llm_dim))
        codes = official.generate([(state, TalkerInput(ids, hidden, row["result"]["end_of_turn"]))])
        assert codes == [row["tts"]["tokens"]]
        torch.testing.assert_close(probs[0][0], tensors[f"{key}.tts_probs_first"], rtol=1e-4, atol=1e-5)
        probs.clear()


@golden
def test_sessions_in_one_batch_say_their_official_codes(
    official: Talker, duplex: tuple[dict[str, Any], dict[str, Tensor]]
) -> None:
    traces, tensors = duplex
    turns = {
        name: [row for row in traces[name]["units"] if row["tts"] is not None] for name in traces if name != "edges"
    }
    states = {name: TalkerState() for name in turns}
    for step in range(max(map(len, turns.values()))):
        rows = {name: units[step] for name, units in turns.items() if step < len(units)}
        limits = {name: (row["tts"]["min_new_tokens"], row["tts"]["max_new_token"]) for name, row in rows.items()}
        conditions = {name: tensors[f"{name}.u{row['unit']}.tts_condition"] for name, row in rows.items()}
        batch = [(states[name], ChunkRequest(conditions[name], *limits[name])) for name in rows]
        spoken = official.generate_chunks(batch, DUPLEX)
        assert [chunk.codes for chunk in spoken] == [row["tts"]["tokens"] for row in rows.values()]
        for name in [name for name, row in rows.items() if row["result"]["end_of_turn"]]:
            states[name].end_turn()


@golden
def test_penalty_and_warpers_are_the_official_ones(tensors: dict[str, Tensor]) -> None:
    penalised = penalise_repetition(tensors["rep.logits"], tensors["rep.history"], 1.3)
    torch.testing.assert_close(penalised, tensors["rep.out"])
    kept = keep_top_k(keep_top_p(tensors["rep.out"], 0.7), 20)
    torch.testing.assert_close(kept, tensors["rep.out_top_p0.7_top_k20"])


def test_the_backbone_equals_stock_llama(tiny: Talker) -> None:
    transformers = pytest.importorskip("transformers")
    stock = transformers.LlamaModel(
        transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_hidden_layers=2,
            vocab_size=1,
        )
    ).eval()
    missing, extra = stock.load_state_dict(tiny.tts.model.state_dict(), strict=False)
    assert (missing, extra) == (["embed_tokens.weight"], [])
    x = torch.randn(1, 9, 32)
    expected = stock(inputs_embeds=x).last_hidden_state
    kv = tiny.tts.model.new_cache(batch=1, columns=9)
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    first = tiny.tts.model(x[:, :6], torch.arange(6)[None], kv, 0, causal[:6, :6])
    rest = tiny.tts.model(x[:, 6:], torch.arange(6, 9)[None], kv, 6, causal[6:])
    torch.testing.assert_close(torch.cat([first, rest], dim=1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", [None, 100])
def test_a_session_says_the_same_alone_and_in_any_batch(seed: int | None, tiny: Talker) -> None:
    seeds = [None if seed is None else seed + session for session in range(4)]
    alone, together = ([TalkerState(seeded(s)) for s in seeds] for _ in range(2))
    for step in range(5):
        # Sessions join one after the other; the second one ends its turn in the middle.
        units = [unit((3 * step + 5 * s) % 19, 10 * step + s, s == 1 and step == 3) for s in range(min(4, step + 1))]
        expected = [tiny.generate([(state, said)])[0] for state, said in zip(alone, units, strict=False)]
        assert tiny.generate(list(zip(together, units, strict=False))) == expected
        assert [s.next_position for s in together] == [s.next_position for s in alone]
    for one, many in zip(alone, together, strict=True):
        torch.testing.assert_close(many.kv, one.kv, rtol=1e-4, atol=1e-5)


def test_a_session_which_is_done_leaves_the_others_alone(tiny: Talker) -> None:
    requests = [ChunkRequest(torch.randn(4 + s, 32), 100, limit) for s, limit in enumerate([26, 3, 26, 11])]
    together, alone = ([TalkerState() for _ in requests] for _ in range(2))
    spoken = tiny.generate_chunks(list(zip(together, requests, strict=True)), DUPLEX)
    assert [len(chunk.codes) for chunk in spoken] == [25, 2, 25, 10]
    assert spoken == [
        tiny.generate_chunks([(state, request)], DUPLEX)[0] for state, request in zip(alone, requests, strict=True)
    ]
    for one, many in zip(alone, together, strict=True):
        torch.testing.assert_close(many.kv, one.kv, rtol=1e-4, atol=1e-5)


def test_eos_comes_only_where_a_turn_opens_or_closes(tiny: Talker, monkeypatch: pytest.MonkeyPatch) -> None:
    eos_first = torch.eye(TINY.num_audio_tokens)[-1:] * 1000
    monkeypatch.setattr(tts, "shape_logits", lambda *args: shape_logits(*args) + eos_first)
    state = TalkerState()
    lengths = [len(tiny.generate([(state, unit(3, step, end_of_turn=step == 3))])[0]) for step in range(5)]
    assert lengths == [0, 25, 25, 0, 0]


def test_the_cache_holds_the_conditions_and_the_codes_given_out(tiny: Talker) -> None:
    state = TalkerState()
    for step, num_tokens in enumerate([5, 0, 18]):
        codes = tiny.generate([(state, unit(num_tokens, step))])[0]
        assert len(codes) == 25 or step == 0
    assert state.kv is not None
    assert state.next_position == state.kv.shape[3]


def test_the_end_of_a_turn_forgets_it(tiny: Talker) -> None:
    state, fresh = TalkerState(), TalkerState()
    tiny.generate([(state, unit(4, 1))])
    tiny.generate([(state, unit(4, 2, end_of_turn=True))])
    assert (state.kv, state.next_position, state.turn_start) == (None, 0, True)
    assert tiny.generate([(state, unit(4, 3))]) == tiny.generate([(fresh, unit(4, 3))])


def test_a_turn_that_never_ends_stays_within_the_positions() -> None:
    torch.manual_seed(11)
    talker = Talker(dataclasses.replace(TINY, max_position_embeddings=100))
    state, lengths = TalkerState(), []
    for step in range(8):
        assert len(talker.generate([(state, unit(10, step))])[0]) == 25 or step == 0
        lengths.append(state.next_position)
    assert max(lengths) <= 100
    assert state.turn_start is False


def test_a_copied_session_goes_on_with_the_same_codes(tiny: Talker) -> None:
    state = TalkerState(seeded(5))
    tiny.generate([(state, unit(4, 1))])
    assert state.generator is not None
    twin = TalkerState(torch.Generator(), state.kv, state.next_position, state.turn_start)
    assert twin.generator is not None
    twin.generator.set_state(state.generator.get_state())
    assert tiny.generate([(twin, unit(4, 2))]) == tiny.generate([(state, unit(4, 2))])


def test_the_talker_runs_in_half_precision(tiny: Talker) -> None:
    state = TalkerState()
    tiny.bfloat16().generate([(state, unit(4, 1)), (TalkerState(seeded(1)), unit(9, 2))])
    assert len(tiny.generate([(state, unit(4, 3))])[0]) == 25
    assert state.kv is not None
    assert state.kv.dtype == torch.bfloat16


def test_a_session_comes_once_per_batch(tiny: Talker) -> None:
    state = TalkerState()
    with pytest.raises(ModelError, match="one after the other"):
        tiny.generate([(state, unit(1, 1)), (state, unit(1, 2))])


def test_nobody_speaks_in_an_empty_batch(tiny: Talker) -> None:
    assert tiny.generate([]) == []


def test_the_first_code_is_drawn_without_penalty() -> None:
    logits = torch.randn(2, 9)
    nothing = torch.zeros(2, 0, dtype=torch.int64)
    assert torch.equal(shape_logits(logits, nothing, Sampling(0.8, 2.0, 0.1, 1)), logits / 0.8)


def test_a_row_without_history_is_not_shaped_by_its_neighbours() -> None:
    logits, history = torch.randn(2, 9), torch.tensor([[NO_CODE, NO_CODE], [NO_CODE, 4]])
    shaped = shape_logits(logits, history, Sampling(0.8, 2.0, 0.1, 1))
    assert torch.equal(shaped[0], logits[0] / 0.8)
    assert torch.equal(shaped[1:], shape_logits(logits[1:], torch.tensor([[4]]), Sampling(0.8, 2.0, 0.1, 1)))


def test_the_penalty_forgets_after_16_codes() -> None:
    logits, history = torch.randn(1, 9), torch.tensor([[4] + [5] * 16])
    assert torch.equal(penalise_repetition(logits, history, 1.5)[0, 4], logits[0, 4])


def test_parameters_are_those_of_the_release() -> None:
    assert RELEASED.tts is not None
    with torch.device("meta"):
        talker = Talker(RELEASED.tts)
    unused = 32000 * RELEASED.tts.hidden_size  # tts.model.embed_tokens, which nobody reads
    assert sum(weight.numel() for weight in talker.parameters()) + unused == 347_696_290


@golden
def test_keys_are_those_of_the_checkpoint(official: Talker) -> None:
    keys = {key for key in load_file(GOLDEN / "model.safetensors") if key.startswith("tts.")}
    assert set(official.state_dict()) == keys - {"tts.model.embed_tokens.weight"}
