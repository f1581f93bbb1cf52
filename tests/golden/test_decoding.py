"""The decision rule against StreamDecoder.decode: which token, from which probabilities, and what is remembered."""

import json
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor

from model_shards import decoding
from model_shards.decoding import Choice, DecisionRule, SamplingConfig
from model_shards.sampling import draw
from model_shards.tokenizer import Tokenizer
from tests.support import golden
from tests.support.golden import cases, close, read_json, read_tensors

RECORDED: dict[str, Any] = read_json("llm.json")["decode_rule"]
CASES = {f"decode_rule.{case['case']}": case for case in RECORDED["cases"]}
OUR_NAMES = {"text_repetition_penalty": "repetition_penalty", "text_repetition_window_size": "repetition_window"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(golden.FOLDER)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, list[int]]]:
    """Probabilities and tokens of every draw, as they come."""
    seen: list[tuple[Tensor, list[int]]] = []

    def watched(probs: Tensor, generators: list[torch.Generator]) -> list[int]:
        tokens = draw(probs, generators)
        seen.append((probs.clone(), tokens))
        return tokens

    monkeypatch.setattr(decoding, "draw", watched)
    return seen


def rule_of(case: dict[str, Any], tokenizer: Tokenizer) -> DecisionRule:
    config = SamplingConfig(**{OUR_NAMES.get(name, name): value for name, value in case["kw"].items()})
    return DecisionRule(config, tokenizer.special, RECORDED["forbidden"])


def logits_of(name: str) -> Tensor:
    return read_tensors("llm.safetensors")[f"{name}.logits"].flatten()


def generator_of(case: dict[str, Any]) -> torch.Generator:
    return torch.Generator().manual_seed(case["torch_manual_seed"])


def choose_alone(name: str, tokenizer: Tokenizer) -> Choice:
    case = CASES[name]
    rule = rule_of(case, tokenizer)
    return rule.choose(logits_of(name)[None], [case["history"]], [generator_of(case)])[0]


@cases("llm.json", CASES)
def test_the_official_token_is_chosen(case: str, tokenizer: Tokenizer):
    recorded, choice = CASES[case], choose_alone(case, tokenizer)
    assert choice.token == recorded["result"]
    remembered = [*recorded["history"], *[choice.token] * choice.counts]
    after = recorded["generated_tokens_after"]
    assert remembered[-len(after) :] == after


@cases("llm.json", [name for name, case in CASES.items() if case["n_multinomial_calls"]])
def test_it_is_drawn_from_the_official_probabilities(case: str, tokenizer: Tokenizer, drawn: Any):
    choose_alone(case, tokenizer)
    recorded = CASES[case]
    assert [token for _, tokens in drawn for token in tokens] == recorded["multinomial_results"]
    assert len(drawn) == recorded["n_multinomial_calls"]
    close(drawn[-1][0][0], read_tensors("llm.safetensors")[f"{case}.final_probs"].flatten())


@cases("llm.json", CASES)
def test_the_same_token_is_chosen_among_other_sessions(case: str, tokenizer: Tokenizer):
    """All recorded cases are in the batch; those of other settings bring their logits and history only."""
    rule, rows = rule_of(CASES[case], tokenizer), torch.stack([logits_of(name) for name in CASES])
    histories = [recorded["history"] for recorded in CASES.values()]
    for order in (range(len(CASES)), range(len(CASES) - 1, -1, -1)):
        generators = [generator_of(recorded) for recorded in CASES.values()]
        picked = rule.choose(rows[list(order)], [histories[i] for i in order], [generators[i] for i in order])
        place = list(order).index(list(CASES).index(case))
        assert picked[place] == choose_alone(case, tokenizer)
        assert picked[place].token == CASES[case]["result"]


def test_cases_of_the_same_settings_are_right_all_at_once(tokenizer: Tokenizer):
    groups: dict[str, list[str]] = defaultdict(list)
    for name, case in CASES.items():
        groups[json.dumps(case["kw"])].append(name)
    for names in groups.values():
        together = [CASES[name] for name in names]
        choices = rule_of(together[0], tokenizer).choose(
            torch.stack([logits_of(name) for name in names]),
            [case["history"] for case in together],
            [generator_of(case) for case in together],
        )
        assert [choice.token for choice in choices] == [case["result"] for case in together]


def test_the_tokens_with_a_meaning_are_the_official_ones(tokenizer: Tokenizer):
    special = tokenizer.special
    official = (RECORDED["chunk_eos_id"], RECORDED["turn_eos_id"], RECORDED["listen_id_attr"])
    assert (special.chunk_eos, special.turn_eos, special.im_end) == official
    forbidden = {special.tts_pad, *read_json("tokenizer_cases.json")["bad_token_ids"]}
    assert forbidden <= set(RECORDED["forbidden"]) <= forbidden | {special.chunk_eos}
