"""The talker against stock Llama and plain formulas, and batched against alone. Official codes: tests/golden."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from model_shards import tts
from model_shards.config import RELEASED, TtsConfig
from model_shards.errors import ModelError
from model_shards.fold import fold
from model_shards.sampling import NO_CODE, Sampling, keep_top_k, keep_top_p, penalise_repetition, shape_logits
from model_shards.tts import ChunkRequest, Talker, TalkerInput, TalkerState

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


@pytest.fixture
def tiny() -> Talker:
    torch.manual_seed(11)
    return Talker(TINY)


def unit(num_tokens: int, seed: int, end_of_turn: bool = False) -> TalkerInput:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, TINY.num_text_tokens, (num_tokens,), generator=generator)
    return TalkerInput(ids, torch.randn(num_tokens, TINY.llm_dim, generator=generator), end_of_turn)


def seeded(seed: int | None) -> torch.Generator | None:
    return None if seed is None else torch.Generator().manual_seed(seed)


def test_a_condition_is_the_word_and_the_direction_in_which_it_is_said(tiny: Talker) -> None:
    ids, hidden, tower = torch.tensor([5, 0, 99]), torch.randn(3, TINY.llm_dim), tiny.tts
    first, second = tower.projector_semantic.linear1, tower.projector_semantic.linear2
    projected = (hidden @ first.weight.T + first.bias).relu() @ second.weight.T + second.bias
    manner = projected / projected.square().sum(-1, keepdim=True).sqrt()
    torch.testing.assert_close(tiny.condition(ids, hidden), tower.emb_text.weight[ids] + manner)


def test_the_head_is_torch_s_weight_norm(tiny: Talker) -> None:
    stock = nn.utils.parametrizations.weight_norm(nn.Linear(TINY.hidden_size, TINY.num_audio_tokens, bias=False))
    head = tiny.tts.head_code[0]
    head.load_state_dict({key: value * 1.5 for key, value in stock.state_dict().items()})
    stock.load_state_dict(head.state_dict())
    torch.testing.assert_close(head.weight(), stock.weight)


def test_likely_codes_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    logits = torch.randn(8, 40) * 3
    nucleus = transformers.TopPLogitsWarper(0.7, min_tokens_to_keep=3)(None, logits)
    torch.testing.assert_close(keep_top_p(logits, 0.7), nucleus)
    best = transformers.TopKLogitsWarper(5, min_tokens_to_keep=3)(None, logits)
    torch.testing.assert_close(keep_top_k(logits, 5), best)


def test_the_penalty_counts_every_occurrence_on_either_side_of_zero() -> None:
    logits, history = torch.tensor([[2.0, -2.0, 3.0, 1.0]]), torch.tensor([[0, 1, 0, 1, 2]])
    expected = torch.tensor([[2.0 / 1.5**2, -2.0 * 1.5**2, 3.0 / 1.5, 1.0]])
    torch.testing.assert_close(penalise_repetition(logits, history, 1.5), expected)


def test_a_unit_is_what_a_plain_loop_without_a_cache_gives(tiny: Talker) -> None:
    """Greedy, with penalty, EOS forbidden, and every step read from its beginning."""
    said, state = unit(6, 3), TalkerState(turn_start=False)
    rows = torch.cat([tiny.condition(said.token_ids, said.hidden), tiny.text_row(TINY.audio_bos_token_id)])
    codes: list[int] = []
    for _ in range(25):
        whole = torch.cat([rows, tiny.tts.emb_code[0](torch.tensor(codes, dtype=torch.int64))])
        causal = torch.ones(len(whole), len(whole), dtype=torch.bool).tril()
        kv = tiny.tts.model.new_cache(1, len(whole))
        hidden = tiny.tts.model(whole[None], torch.arange(len(whole))[None], kv, 0, causal)[0, -1]
        logits = F.linear(hidden, tiny.tts.head_code[0].weight()) / TINY.temperature
        for code in codes[-16:]:
            logits[code] *= TINY.repetition_penalty if logits[code] < 0 else 1 / TINY.repetition_penalty
        codes.append(int(logits[:-1].argmax()))
    assert tiny.generate([(state, said)]) == [codes]


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


@pytest.mark.parametrize("config", [TINY, dataclasses.replace(TINY, num_key_value_heads=4)])
def test_a_folded_talker_says_the_same(config: TtsConfig) -> None:
    torch.manual_seed(11)
    plain = Talker(config).requires_grad_(False).eval()
    folded = Talker(config).requires_grad_(False).eval()
    folded.load_state_dict(plain.state_dict())
    fold(folded)
    assert not hasattr(folded.tts.model.layers[0].self_attn, "k_proj")
    said = []
    for talker in (plain, folded):
        states = [TalkerState(seeded(seed)) for seed in (None, 1, 2)]
        turns = [talker.generate([(state, unit(3 + index, index)) for state in states[:index]]) for index in (1, 3, 2)]
        said.append((turns, [state.kv for state in states]))
    assert said[0][0] == said[1][0]
    torch.testing.assert_close(said[1][1], said[0][1])


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
