"""The duplex loop: order of tokens, turns, budgets, and sessions that don't feel each other."""

from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from torch import Tensor

from model_shards.config import LlmConfig
from model_shards.context import WindowConfig
from model_shards.decoding import SamplingConfig
from model_shards.duplex import DuplexConfig, DuplexEngine, DuplexSession, Prompt, UnitInput, UnitOutput
from model_shards.errors import ModelError
from model_shards.kv_cache import KvCache, KvCacheFull, KvShape
from model_shards.llm import LanguageModel, SequenceInput
from model_shards.tokenizer import ADDED_TOKENS, Tokenizer, build_backend
from tests.support.kernels import reference_kernel

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENIZER = Tokenizer(
    build_backend({text: index for index, text in enumerate([*ALPHABET, "<unk>"])}, [], ["<unk>", *ADDED_TOKENS])
)
S = TOKENIZER.special
HIDDEN = 32
LLM = LlmConfig(
    vocab_size=len(TOKENIZER),
    hidden_size=HIDDEN,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
PROMPT = Prompt(TOKENIZER.encode("<|im_start|>system\nSee.\n<|audio_start|>"), [S.audio_end, S.im_end])


class Recorder(LanguageModel):
    """A real model that notes what is fed, and says what the script says: one token per session and step."""

    def __init__(self) -> None:
        super().__init__(LLM)
        self.script: list[list[int]] = []
        self.num_forwards = 0
        self.fed: dict[int, list[Tensor]] = {}

    def forward(self, cache: KvCache, batch: Sequence[SequenceInput]) -> list[Tensor]:
        hidden = super().forward(cache, batch)
        self.num_forwards += bool(batch)
        for item in batch:
            self.fed.setdefault(id(item.sequence), []).append(item.embeds)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        if not self.script:
            return super().logits(hidden)
        tokens = self.script.pop(0)
        assert len(tokens) == len(hidden)
        return torch.nn.functional.one_hot(torch.tensor(tokens), LLM.vocab_size) * 50.0


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Random weights whose head likes the tokens with which a unit is made."""
    torch.manual_seed(11)
    model = LanguageModel(LLM)
    state = {name: torch.randn_like(value) * 0.3 for name, value in model.state_dict().items()}
    state |= {name: value + 1.0 for name, value in state.items() if "norm" in name}
    for token in (S.listen, S.speak, S.chunk_eos, S.turn_eos):
        state["llm.lm_head.weight"][token] *= 2.0
    return state


class Desk:
    """An engine over a small model; by default greedy, and nothing forced."""

    def __init__(self, weights: dict[str, Tensor], num_pages: int = 400, captured: bool = False, **config: Any) -> None:
        """captured: its decode steps are programs of fixed shapes, with a ragged kernel."""
        self.model = Recorder().requires_grad_(False)
        self.model.load_state_dict(weights)
        self.cache = KvCache(KvShape.of(LLM), num_pages, page_size=8)
        settings_ = {"force_listen_count": 0, "sampling": SamplingConfig(mode="greedy")} | config
        self.engine = DuplexEngine(self.model, self.cache, TOKENIZER, DuplexConfig(**settings_))
        if captured:
            self.engine.capture(max_tokens=400, max_sessions=4, kernel=reference_kernel)

    def session(self, seed: int = 0) -> DuplexSession:
        session = self.engine.new_session(seed)
        self.engine.begin([(session, PROMPT)])
        fed = self.model.fed[id(session.sequence)]
        if len(fed[0]) < len(PROMPT):  # it has the prefix of another one
            fed.insert(0, self.model.embed(torch.tensor(PROMPT.prefix_ids)))
        return session

    def step(self, session: DuplexSession, script: list[int], **unit: Any) -> UnitOutput:
        """One unit in which the model wants the tokens of the script."""
        self.model.script = [[token] for token in script]
        output = self.engine.step([(session, UnitInput(audio=sound(), **unit))])[0]
        self.model.script = []
        return output

    def fed_ids(self, session: DuplexSession) -> list[int | None]:
        """Everything fed to a session so far; None stands for an embedding which is no token's."""
        rows = torch.cat(self.model.fed[id(session.sequence)])
        same = (rows[:, None] == self.model.llm.model.embed_tokens.weight).all(-1)
        return [int(row.nonzero()[0]) if row.any() else None for row in same]


def sound(seed: int = 0, num: int = 10) -> Tensor:
    return torch.randn(num, HIDDEN, generator=torch.Generator().manual_seed(seed))


def said(text: str) -> list[int]:
    return [S.speak, *TOKENIZER.encode(text)]


def test_a_unit_is_fed_in_omni_flow_order(weights: dict[str, Tensor]):
    desk = Desk(weights)
    session = desk.session()
    picture = [sound(index, num=64) for index in range(3)]
    desk.model.script = [[S.listen]]
    desk.engine.step([(session, UnitInput([picture, picture[:1]], sound()))])
    desk.engine.finalize([session])
    cells = [S.image, *[None] * 64, S.image_end, *[S.slice, *[None] * 64, S.slice_end] * 2]
    unit = [S.unit, *cells, S.image, *[None] * 64, S.image_end, *[None] * 10, S.listen, S.unit_end]
    assert desk.fed_ids(session) == [*PROMPT.prefix_ids, *PROMPT.suffix_ids, *unit]


def test_the_reference_voice_stands_between_prefix_and_suffix(weights: dict[str, Tensor]):
    desk = Desk(weights)
    session = desk.engine.new_session(0)
    desk.engine.begin([(session, Prompt(PROMPT.prefix_ids, PROMPT.suffix_ids, sound(num=4)))])
    assert desk.fed_ids(session) == [*PROMPT.prefix_ids, None, None, None, None, *PROMPT.suffix_ids]
    assert session.context.system_length == session.sequence.length


def pages_of(*sessions: DuplexSession) -> list[list[int]]:
    return [list(session.sequence.pages) for session in sessions]


VOICED = Prompt(PROMPT.prefix_ids, PROMPT.suffix_ids, sound(num=9))
PREFIX_PAGES = VOICED.prefix_length // 8


def begun(desk: Desk, *prompts: Prompt) -> list[DuplexSession]:
    sessions = [desk.engine.new_session(0) for _ in prompts]
    desk.engine.begin(list(zip(sessions, prompts, strict=True)))
    return sessions


@pytest.mark.parametrize("at_once", [True, False])
def test_sessions_that_begin_alike_have_the_full_pages_of_the_prefix_in_common(
    weights: dict[str, Tensor], at_once: bool
):
    desk = Desk(weights)
    first, second = begun(desk, VOICED, VOICED) if at_once else [begun(desk, VOICED)[0] for _ in range(2)]
    assert PREFIX_PAGES >= 2
    ours, theirs = pages_of(first, second)
    assert ours[:PREFIX_PAGES] == theirs[:PREFIX_PAGES]
    assert not set(ours[PREFIX_PAGES:]) & set(theirs[PREFIX_PAGES:])
    assert desk.engine.num_saved_pages == PREFIX_PAGES
    assert [len(rows) for rows in desk.model.fed[id(second.sequence)]] == [len(VOICED.suffix_ids)]
    alone = begun(other := Desk(weights), VOICED)[0]
    for layer in range(LLM.num_hidden_layers):
        for shared, own in zip(
            desk.cache.read(second.sequence, layer), other.cache.read(alone.sequence, layer), strict=True
        ):
            assert torch.equal(shared[: VOICED.prefix_length], own[: VOICED.prefix_length])
            torch.testing.assert_close(shared, own, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "other",
    [
        Prompt(PROMPT.prefix_ids, PROMPT.suffix_ids, sound(1, num=9)),
        Prompt([*PROMPT.prefix_ids, S.audio_end], PROMPT.suffix_ids, sound(num=9)),
        PROMPT,
    ],
    ids=["another voice", "another text", "no voice"],
)
def test_sessions_that_begin_otherwise_have_nothing_in_common(weights: dict[str, Tensor], other: Prompt):
    desk = Desk(weights)
    ours, theirs = pages_of(*begun(desk, VOICED, other))
    assert not set(ours) & set(theirs) and desk.engine.num_saved_pages == 0


def test_a_prefix_stays_as_long_as_a_session_with_it_does(weights: dict[str, Tensor]):
    desk = Desk(weights)
    first, second = begun(desk, VOICED, VOICED)
    kept = desk.cache.read(second.sequence, 1)[0]
    desk.engine.end(first)
    filler = begun(desk, PROMPT)[0]
    desk.step(filler, [S.listen])
    assert torch.equal(desk.cache.read(second.sequence, 1)[0], kept)
    third = begun(desk, VOICED)[0]
    assert pages_of(third)[0][:PREFIX_PAGES] == pages_of(second)[0][:PREFIX_PAGES]
    for session in (second, third, filler):
        desk.engine.end(session)
    assert desk.cache.num_used_pages == 0 and desk.engine.num_saved_pages == 0


def test_where_a_prompt_finds_no_page_no_session_of_the_batch_has_begun(weights: dict[str, Tensor]):
    desk = Desk(weights, num_pages=2 * desk_pages() - PREFIX_PAGES - 1)
    sessions = [desk.engine.new_session(0) for _ in range(2)]
    with pytest.raises(KvCacheFull):
        desk.engine.begin([(session, VOICED) for session in sessions])
    assert desk.cache.num_used_pages == 0 and pages_of(*sessions) == [[], []]
    desk.engine.begin([(sessions[0], VOICED)])


def desk_pages() -> int:
    return -(-len(VOICED) // 8)


@pytest.mark.parametrize("mode", ["basic", "context"])
def test_sessions_with_a_prefix_in_common_say_and_keep_what_each_would_alone(weights: dict[str, Tensor], mode: str):
    """Through units and slides of their windows; each has another sound, so that a wrong write would be seen."""
    window = WindowConfig(mode=mode, high_tokens=90, low_tokens=60, max_units=2, max_previous_tokens=6)  # type: ignore[arg-type]
    together = Desk(weights, window=window)
    sessions = begun(together, *[VOICED] * 3)
    desks = [Desk(weights, window=window) for _ in sessions]
    alone = [begun(desk, VOICED)[0] for desk in desks]
    for index in range(8):
        units = [UnitInput(audio=sound(10 * index + n)) for n in range(3)]
        ours = together.engine.step(list(zip(sessions, units, strict=True)))
        theirs = [desk.engine.step([(s, unit)])[0] for desk, s, unit in zip(desks, alone, units, strict=True)]
        assert [unit.token_ids for unit in ours] == [unit.token_ids for unit in theirs]
        for desk, session, mine in zip(desks, alone, sessions, strict=True):
            torch.testing.assert_close(
                together.cache.read(mine.sequence, 1)[0], desk.cache.read(session.sequence, 1)[0], atol=1e-4, rtol=1e-3
            )
    pages = pages_of(*sessions)
    assert len({tuple(each[:PREFIX_PAGES]) for each in pages}) == 1, "the prefix has stayed where it was"
    rest = [page for each in pages for page in each[PREFIX_PAGES:]]
    assert len(set(rest)) == len(rest)


def test_a_spoken_unit_gives_the_talker_all_but_its_first_and_last_token(weights: dict[str, Tensor]):
    desk = Desk(weights)
    session = desk.session()
    output = desk.step(session, [*said("hi"), S.turn_eos, S.chunk_eos])
    assert output.token_ids == [*TOKENIZER.encode("hi"), S.turn_eos]
    assert output.text == "hi"
    assert (output.is_listen, output.turn_start, output.end_of_turn, output.num_sampled) == (False, True, True, 5)


def test_hidden_states_are_those_at_the_tokens_own_positions(weights: dict[str, Tensor]):
    desk = Desk(weights)
    session = desk.session()
    output = desk.step(session, [*said("hi"), S.chunk_eos])
    rows = torch.cat(desk.model.fed[id(session.sequence)])
    fresh = desk.engine.new_session(0)
    want = desk.model(desk.cache, [SequenceInput(fresh.sequence, rows)])[0][-2:]
    torch.testing.assert_close(output.hidden, want, atol=1e-5, rtol=1e-4)


def test_a_listening_unit_says_nothing(weights: dict[str, Tensor]):
    output = (desk := Desk(weights)).step(desk.session(), [S.listen])
    assert (output.is_listen, output.token_ids, output.text, output.end_of_turn) == (True, [], "", False)
    assert output.hidden.shape == (0, HIDDEN)


def test_a_turn_goes_over_many_units_and_can_t_listen_before_its_end(weights: dict[str, Tensor]):
    desk = Desk(weights)
    session = desk.session()
    first = desk.step(session, [*said("a"), S.chunk_eos])
    middle = desk.step(session, [S.speak, S.listen, S.chunk_eos])
    last = desk.step(session, [*said("b"), S.turn_eos, S.chunk_eos])
    after = desk.step(session, [S.listen])
    assert [output.turn_start for output in (first, middle, last)] == [True, False, False]
    assert [output.end_of_turn for output in (first, middle, last)] == [False, False, True]
    assert middle.token_ids == [S.tts_bos]
    assert after.is_listen


def test_what_is_sampled_counts_as_sampled_even_where_another_token_is_fed(weights: dict[str, Tensor]):
    desk = Desk(weights)
    session = desk.session()
    desk.step(session, [S.speak, S.listen, S.chunk_eos])
    assert list(session.recent) == [S.speak, S.listen]


def test_the_budget_bounds_the_text(weights: dict[str, Tensor]):
    desk = Desk(weights, max_text_chars=None)
    session = desk.session()
    output = desk.step(session, said("abcdefgh"), max_text_tokens=3)
    assert (output.text, output.num_sampled) == ("abc", 4)
    assert session.ending == [S.chunk_eos, S.unit_end]


def test_the_budget_is_never_above_18(weights: dict[str, Tensor]):
    output = (desk := Desk(weights)).step(desk.session(), said("a" * 30), max_text_tokens=99)
    assert len(output.token_ids) == 18


def test_no_budget_inside_a_turn_lets_the_speech_run_on(weights: dict[str, Tensor]):
    desk = Desk(weights)
    session = desk.session()
    desk.step(session, [*said("a"), S.chunk_eos])
    output = desk.step(session, [], max_text_tokens=0)
    assert (output.is_listen, output.token_ids, output.end_of_turn, output.num_sampled) == (False, [], False, 0)
    assert session.speaking and session.ending == [S.chunk_eos, S.unit_end]


def test_no_budget_outside_a_turn_listens(weights: dict[str, Tensor]):
    desk = Desk(weights)
    session = desk.session()
    assert desk.step(session, [], max_text_tokens=-3).is_listen
    assert session.ending == [S.listen, S.unit_end]


def test_a_unit_in_which_nothing_was_seen_or_heard_asks_the_model_nothing(weights: dict[str, Tensor]):
    desk = Desk(weights)
    output = desk.engine.step([(desk.session(), UnitInput())])[0]
    assert output.is_listen and output.num_sampled == 0


def test_text_stops_before_28_characters(weights: dict[str, Tensor]):
    desk = Desk(weights, max_text_chars=5)
    session = desk.session()
    output = desk.step(session, said("abcdefgh"))
    assert output.text == "abcd"
    desk.engine.finalize([session])
    assert desk.fed_ids(session)[-6:] == [*TOKENIZER.encode("abcd"), S.chunk_eos, S.unit_end]


def test_a_token_too_long_to_be_said_opens_the_model_s_turn_but_not_the_talker_s(weights: dict[str, Tensor]):
    desk = Desk(weights, max_text_chars=5)
    session = desk.session()
    output = desk.step(session, [*said("abcd"), S.turn_eos, *TOKENIZER.encode("e")])
    assert (output.text, output.end_of_turn) == ("abcd", True)
    assert session.turn_open and not session.speaking
    assert desk.step(session, [S.speak, S.listen, S.chunk_eos]).token_ids == [S.tts_bos]


def test_barge_in_closes_the_turn_and_listens(weights: dict[str, Tensor]):
    desk = Desk(weights)
    session = desk.session()
    desk.step(session, [*said("a"), S.chunk_eos])
    output = desk.step(session, [], force_listen=True)
    after = desk.step(session, [*said("b"), S.chunk_eos])
    assert (output.is_listen, output.turn_cut, output.token_ids) == (True, True, [])
    assert (after.turn_start, after.turn_cut) == (True, False)
    desk.engine.finalize([session])
    ids = desk.fed_ids(session)
    assert ids[ids.index(S.turn_eos) : ids.index(S.turn_eos) + 4] == [S.turn_eos, S.listen, S.unit_end, S.unit]


def test_forced_listening_outside_a_turn_cuts_nothing(weights: dict[str, Tensor]):
    output = (desk := Desk(weights)).step(desk.session(), [], force_listen=True)
    assert output.is_listen and not output.turn_cut


def test_the_first_units_of_a_session_listen(weights: dict[str, Tensor]):
    desk = Desk(weights, force_listen_count=2)
    session = desk.session()
    outputs = [desk.step(session, script) for script in ([], [], [*said("a"), S.chunk_eos])]
    assert [output.is_listen for output in outputs] == [True, True, False]


@pytest.mark.parametrize(("discards", "token_ids"), [(False, [*TOKENIZER.encode("a"), S.turn_eos]), (True, [])])
def test_speech_before_listen_is_heard_unless_the_official_loop_is_wanted(
    weights: dict[str, Tensor], discards: bool, token_ids: list[int]
):
    desk = Desk(weights, listen_discards_speech=discards)
    output = desk.step(desk.session(), [*said("a"), S.turn_eos, S.listen])
    assert (output.token_ids, output.is_listen, output.end_of_turn) == (token_ids, discards, not discards)


def test_a_turn_that_ends_with_the_first_token_still_ends_for_the_talker(weights: dict[str, Tensor]):
    desk = Desk(weights)
    session = desk.session()
    desk.step(session, [*said("a"), S.chunk_eos])
    output = desk.step(session, [S.turn_eos, S.listen])
    assert (output.is_listen, output.token_ids, output.end_of_turn) == (False, [], True)


def test_a_chunk_that_ends_outside_a_turn_is_no_turn(weights: dict[str, Tensor]):
    desk = Desk(weights)
    session = desk.session()
    output = desk.step(session, [S.chunk_eos])
    assert not (output.is_listen or output.turn_start or output.end_of_turn or session.speaking)


def test_a_character_cut_in_two_waits_for_its_other_half(weights: dict[str, Tensor]):
    desk = Desk(weights)
    session = desk.session()
    ids = TOKENIZER.encode("你")
    first = desk.step(session, [S.speak, *TOKENIZER.encode("a"), *ids[:2], S.chunk_eos])
    second = desk.step(session, [S.speak, *ids[2:], S.turn_eos, S.chunk_eos])
    assert (first.text, second.text) == ("a", "你")


def test_half_a_character_at_the_end_of_a_turn_is_not_kept_for_the_next(weights: dict[str, Tensor]):
    desk = Desk(weights)
    session = desk.session()
    output = desk.step(session, [S.speak, TOKENIZER.encode("你")[0], S.turn_eos, S.chunk_eos])
    assert output.text == "\N{REPLACEMENT CHARACTER}" and session.cut_ids == []


def test_the_end_of_a_unit_needs_no_forward_of_its_own(weights: dict[str, Tensor]):
    desk = Desk(weights)
    session = desk.session()
    before = desk.model.num_forwards
    for _ in range(4):
        desk.step(session, [S.listen])
    assert desk.model.num_forwards == before + 4


def test_finalizing_early_changes_nothing_but_the_number_of_forwards(weights: dict[str, Tensor]):
    desk = Desk(weights)
    early, late = desk.session(), desk.session()
    for script in ([*said("a"), S.chunk_eos], [*said("b"), S.turn_eos, S.chunk_eos], [S.listen]):
        desk.step(early, script)
        desk.engine.finalize([early])
        desk.step(late, script)
    desk.engine.finalize([late])
    assert desk.fed_ids(early) == desk.fed_ids(late)
    assert early.context.units == late.context.units
    ours, theirs = desk.cache.read(early.sequence, 1)[0], desk.cache.read(late.sequence, 1)[0]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_windows_that_were_held_back_are_units_in_which_it_listened_and_cost_no_forward(weights: dict[str, Tensor]):
    desk = Desk(weights)
    one_by_one, merged = desk.session(), desk.session()
    for script, seed in (([*said("a"), S.turn_eos, S.chunk_eos], 0), ([S.listen], 1)):
        desk.model.script = [[token] for token in script]
        desk.engine.step([(one_by_one, UnitInput(audio=sound(seed)))])
    desk.step(merged, [*said("a"), S.turn_eos, S.chunk_eos])
    before = desk.model.num_forwards
    script = [*said("b"), S.chunk_eos]
    ours = desk.step(merged, script, before=(UnitInput(audio=sound(1)),))
    assert desk.model.num_forwards == before + len(script)  # the last one is not fed
    theirs = desk.step(one_by_one, script)
    assert (ours.token_ids, ours.text, ours.turn_start) == (theirs.token_ids, theirs.text, theirs.turn_start)
    desk.engine.finalize([one_by_one, merged])
    assert desk.fed_ids(merged) == desk.fed_ids(one_by_one)
    assert merged.context.units == one_by_one.context.units
    assert merged.num_units == one_by_one.num_units
    torch.testing.assert_close(ours.hidden, theirs.hidden, atol=1e-5, rtol=1e-4)


def random_unit(seed: int, session: int, unit: int) -> UnitInput:
    draw = torch.Generator().manual_seed(1000 * seed + 50 * session + unit)
    picture = [[torch.randn(64, HIDDEN, generator=draw)]] if unit % 3 == session % 3 else []
    number = int(torch.randint(20, (1,), generator=draw))
    return UnitInput(picture, torch.randn(10, HIDDEN, generator=draw), number, force_listen=number == 7)


SLIDING = WindowConfig("basic", high_tokens=230, low_tokens=120)


@pytest.mark.parametrize("captured", [False, True])
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000), mode=st.sampled_from(["greedy", "sampling"]), data=st.data())
def test_a_session_says_the_same_alone_and_in_any_company(
    weights: dict[str, Tensor], captured: bool, seed: int, mode: str, data: st.DataObject
):
    sampling = SamplingConfig(mode=cast(Any, mode), temperature=3.0, top_k=0, top_p=0.0)
    desk = Desk(weights, captured=captured, sampling=sampling, window=SLIDING)
    crowd, single = [desk.session(seed + i) for i in range(4)], [desk.session(seed + i) for i in range(4)]
    heard: list[list[UnitOutput]] = [[] for _ in crowd]
    num_units = 6
    while pending := [index for index in range(4) if len(heard[index]) < num_units]:
        ready = data.draw(st.lists(st.sampled_from(pending), unique=True, min_size=1))
        units = [(crowd[index], random_unit(seed, index, len(heard[index]))) for index in ready]
        for index, output in zip(ready, desk.engine.step(units), strict=True):
            heard[index].append(output)
    for index, session in enumerate(single):
        for unit, output in enumerate(heard[index]):
            alone = desk.engine.step([(session, random_unit(seed, index, unit))])[0]
            assert (alone.token_ids, alone.is_listen, alone.text) == (output.token_ids, output.is_listen, output.text)
            torch.testing.assert_close(alone.hidden, output.hidden, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("mode", ["greedy", "sampling"])
def test_a_captured_step_gives_what_the_model_gives(weights: dict[str, Tensor], mode: Any):
    """Which token comes next and its hidden states, while sessions take turns and windows slide."""
    sampling = SamplingConfig(mode=mode, temperature=3.0)
    desks = [Desk(weights, captured=captured, window=SLIDING, sampling=sampling) for captured in (True, False)]
    desks[1].engine = DuplexEngine(desks[1].model, desks[1].cache, TOKENIZER, desks[1].engine.config, on_device=True)
    sessions = [[desk.session(seed) for seed in range(3)] for desk in desks]
    num_words = 0
    for unit in range(8):
        going = range(unit % 3, 3)
        ours, theirs = (
            desk.engine.step([(own[k], random_unit(5, k, unit)) for k in going])
            for desk, own in zip(desks, sessions, strict=True)
        )
        for one, other in zip(ours, theirs, strict=True):
            assert (one.token_ids, one.is_listen, one.text) == (other.token_ids, other.is_listen, other.text)
            torch.testing.assert_close(one.hidden, other.hidden, atol=1e-4, rtol=1e-3)
            num_words += len(one.token_ids)
    assert num_words > 20
    assert [s.num_draws for s in sessions[0]] == [s.num_draws for s in sessions[1]]


def test_a_decision_that_a_unit_s_end_leaves_over_was_never_made(weights: dict[str, Tensor]):
    desk = Desk(weights, captured=True, sampling=SamplingConfig(temperature=3.0))
    session = desk.session()
    outputs = [desk.engine.step([(session, random_unit(3, 0, unit))])[0] for unit in range(8)]
    assert session.num_draws == sum(output.num_sampled for output in outputs) > 8


def test_a_captured_step_touches_no_page_of_others(weights: dict[str, Tensor]):
    desk = Desk(weights, captured=True)
    session, bystander = desk.session(1), desk.session(2)
    before = desk.cache.read(bystander.sequence, 0)
    for unit in range(4):
        desk.engine.step([(session, random_unit(4, 0, unit))])
    for kept, now in zip(before, desk.cache.read(bystander.sequence, 0), strict=True):
        assert torch.equal(kept, now)
    desk.engine.end(session)
    desk.engine.end(bystander)
    assert desk.cache.num_used_pages == 1, "of the blank rows"


def test_a_captured_step_refuses_what_it_was_not_made_for(weights: dict[str, Tensor]):
    desk = Desk(weights)
    desk.engine.capture(max_tokens=64, max_sessions=2, kernel=reference_kernel)
    crowd = [desk.session(seed) for seed in range(3)]
    with pytest.raises(ModelError, match="3 rows; programs were made for at most 2"):
        desk.engine.step([(session, random_unit(6, 1, 3)) for session in crowd])
    with pytest.raises(ModelError, match=r"a sequence of \d+ pages; decode steps were made for at most 8"):
        desk.step(crowd[0], said("hello, how are you"), images=[[sound(num=64)]])


@pytest.mark.parametrize("mode", ["basic", "context"])
def test_an_endless_session_stays_within_its_promise_and_leaves_nothing_behind(weights: dict[str, Tensor], mode: Any):
    window = WindowConfig(mode, high_tokens=200, low_tokens=120, max_units=3, max_previous_tokens=20)
    desk = Desk(weights, window=window, max_unit_tokens=77)
    session, bystander = desk.session(), desk.session()
    bound = desk.engine.max_session_tokens(len(PROMPT))
    used_by_bystander = len(bystander.sequence.pages)
    assert bound is not None
    for unit in range(40):
        desk.engine.step([(session, random_unit(1, 0, unit))])
        assert len(session.sequence.pages) <= desk.cache.pages_for(bound)
    desk.engine.end(session)
    assert desk.cache.num_used_pages == used_by_bystander


def test_without_pages_no_unit_begins_and_a_later_try_goes_on(weights: dict[str, Tensor]):
    desk = Desk(weights, num_pages=14)
    first, second = desk.session(), desk.session()
    blocker = desk.engine.new_session(0)
    desk.cache.reserve([(blocker.sequence, 8 * (desk.cache.num_free_pages - 5))])
    units = [(first, random_unit(2, 0, 1)), (second, random_unit(2, 1, 2))]
    with pytest.raises(KvCacheFull):
        desk.engine.step(units)
    assert [s.sequence.length for s in (first, second)] == [len(PROMPT)] * 2
    desk.engine.end(blocker)
    assert len(desk.engine.step(units)) == 2


def test_a_unit_that_is_too_large_is_refused_before_any_has_begun(weights: dict[str, Tensor]):
    desk = Desk(weights, max_unit_tokens=50)
    session = desk.session()
    for too_large in (
        UnitInput([[sound(num=64)]], sound()),
        UnitInput(audio=sound(num=20), before=(UnitInput(audio=sound(num=30)),)),
    ):
        with pytest.raises(ModelError, match="max_unit_tokens is 50"):
            desk.engine.step([(session, too_large)])
    assert session.sequence.length == len(PROMPT)


def test_a_prompt_that_fills_the_window_is_refused(weights: dict[str, Tensor]):
    desk = Desk(weights, window=WindowConfig(high_tokens=20, low_tokens=10))
    with pytest.raises(ModelError, match="no room"):
        desk.session()
