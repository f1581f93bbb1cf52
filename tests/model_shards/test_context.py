"""What a session may forget, and that what it keeps is what it would have read."""

from typing import Any

import pytest
import torch
from torch import Tensor

from model_shards.config import LlmConfig
from model_shards.context import Context, SlidingWindow, UnitSpan, WindowConfig, is_due, units_to_drop
from model_shards.errors import ModelError
from model_shards.kv_cache import KvCache, KvCacheFull, KvSequence, KvShape
from model_shards.llm import LanguageModel, SequenceInput

CONFIG = LlmConfig(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
MARKER, SPECIAL_ID = [50, 51], 59
PREFIX, SUFFIX = [1, 2, 3, 4, 5], [6, 7]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(3)
    return LanguageModel(CONFIG).requires_grad_(False).eval()


class Desk:
    """A model, a cache, and one session whose units are `length` tokens that say `spoken`."""

    def __init__(self, model: LanguageModel, num_pages: int = 100, **window: Any) -> None:
        self.model = model
        self.cache = KvCache(KvShape.of(CONFIG), num_pages, page_size=4)
        self.window = SlidingWindow(WindowConfig(**window), model, self.cache, MARKER, {SPECIAL_ID})
        self.context = Context(prefix_length=len(PREFIX), suffix_ids=list(SUFFIX))
        self.feed(PREFIX + SUFFIX)

    def feed(self, ids: list[int]) -> Tensor:
        rows = self.model.embed(torch.tensor(ids))
        return self.model(self.cache, [SequenceInput(self.context.sequence, rows)])[0]

    def add_unit(self, length: int = 6, spoken: tuple[int, ...] = ()) -> None:
        self.feed([10 + (len(self.context.units) + index) % 30 for index in range(length)])
        self.context.units.append(UnitSpan(length, spoken))

    def slide(self) -> None:
        self.window.slide([self.context])


def test_without_a_window_everything_stays(model: LanguageModel):
    desk = Desk(model, mode="off", high_tokens=10, low_tokens=8)
    desk.add_unit()
    desk.slide()
    assert desk.context.sequence.length == 13


def test_basic_slides_above_high_and_not_at_high(model: LanguageModel):
    desk = Desk(model, high_tokens=19, low_tokens=15)
    desk.add_unit()
    desk.add_unit()
    assert units_to_drop(desk.window.config, desk.context) == 0
    desk.add_unit(length=1)
    assert units_to_drop(desk.window.config, desk.context) == 1


def test_a_unit_whose_end_is_still_to_be_fed_makes_the_window_due(model: LanguageModel):
    desk = Desk(model, high_tokens=19, low_tokens=15)
    desk.add_unit(length=11)
    assert [is_due(desk.window.config, desk.context, num_pending) for num_pending in (1, 2)] == [False, True]


def test_basic_forgets_whole_units_until_low_and_keeps_the_system_prompt(model: LanguageModel):
    desk = Desk(model, high_tokens=30, low_tokens=20)
    system = desk.cache.read(desk.context.sequence, 1)[0]
    for length in (6, 7, 8, 9):
        desk.add_unit(length)
    desk.slide()
    assert [unit.length for unit in desk.context.units] == [9]
    assert desk.context.sequence.length == 16
    assert torch.equal(desk.cache.read(desk.context.sequence, 1)[0][:7], system)


def test_basic_forgets_no_more_than_down_to_low(model: LanguageModel):
    desk = Desk(model, high_tokens=24, low_tokens=13)
    for _ in range(3):
        desk.add_unit(length=6)
    desk.slide()
    assert desk.context.sequence.length == 13


def test_basic_keeps_values_and_turns_keys_of_the_units_that_stay(model: LanguageModel):
    desk = Desk(model, high_tokens=30, low_tokens=20)
    for _ in range(4):
        desk.add_unit()
    values = desk.cache.read(desk.context.sequence, 1)[1][19:]
    desk.slide()
    unrotated = KvSequence()  # layer 0 knows no neighbours: its keys are those of the same tokens fed at this place
    ids = PREFIX + SUFFIX + [10 + (unit + index) % 30 for unit in (2, 3) for index in range(6)]
    model(desk.cache, [SequenceInput(unrotated, model.embed(torch.tensor(ids)))])
    assert torch.equal(desk.cache.read(desk.context.sequence, 1)[1][7:], values)
    torch.testing.assert_close(
        desk.cache.read(desk.context.sequence, 0)[0], desk.cache.read(unrotated, 0)[0], atol=1e-5, rtol=1e-4
    )


def test_an_endless_session_never_holds_more_than_high_and_a_unit(model: LanguageModel):
    desk = Desk(model, num_pages=13, high_tokens=40, low_tokens=20)
    for length in [12, 3, 9, 1, 12] * 40:
        desk.add_unit(length)
        desk.slide()
        assert desk.context.sequence.length <= 40
        units = sum(unit.length for unit in desk.context.units)
        assert desk.context.sequence.length == desk.context.system_length + units


def test_context_keeps_so_many_units_and_remembers_what_was_said(model: LanguageModel):
    desk = Desk(model, mode="context", max_units=2, max_previous_tokens=3)
    for spoken in [(), (20, SPECIAL_ID, 21), (22, 23), (), ()]:
        desk.add_unit(spoken=spoken)
        desk.slide()
    assert len(desk.context.units) == 2
    assert desk.context.previous_ids == [*MARKER, 21, 22, 23]
    assert desk.context.sequence.length == 7 + 5 + 12


def test_context_adds_no_marker_before_there_is_something_to_remember(model: LanguageModel):
    desk = Desk(model, mode="context", max_units=1)
    for _ in range(3):
        desk.add_unit()
        desk.slide()
    assert desk.context.previous_ids == [] and desk.context.sequence.length == 13


def test_context_reads_its_previous_text_as_if_it_had_always_been_there(model: LanguageModel):
    desk = Desk(model, mode="context", max_units=1)
    for spoken in [(20, 21), (22,), ()]:
        desk.add_unit(spoken=spoken)
        desk.slide()
    fresh = KvSequence()
    ids = [*PREFIX, *MARKER, 20, 21, 22, *SUFFIX]
    model(desk.cache, [SequenceInput(fresh, model.embed(torch.tensor(ids)))])
    for layer in range(CONFIG.num_hidden_layers):
        for ours, theirs in zip(
            desk.cache.read(desk.context.sequence, layer), desk.cache.read(fresh, layer), strict=True
        ):
            torch.testing.assert_close(ours[: len(ids)], theirs, atol=1e-5, rtol=1e-4)


def test_a_context_that_can_t_grow_stays_as_it_was(model: LanguageModel):
    desk = Desk(model, num_pages=3, mode="context", max_units=1)
    desk.add_unit(length=1, spoken=tuple(range(20, 30)))
    desk.add_unit(length=1)
    with pytest.raises(KvCacheFull):
        desk.slide()
    assert len(desk.context.units) == 2 and desk.context.previous_ids == [] and desk.context.sequence.length == 9


def test_sessions_slide_together_as_they_would_alone(model: LanguageModel):
    desks = [Desk(model, mode="context", max_units=1) for _ in range(2)]
    shared = Desk(model, mode="context", max_units=1)
    contexts = []
    for index, desk in enumerate(desks):
        shared.context = Context(prefix_length=len(PREFIX), suffix_ids=list(SUFFIX))
        shared.feed(PREFIX + SUFFIX)
        for target in (desk, shared):
            target.add_unit(spoken=tuple(range(20, 22 + index)))
            target.add_unit()
        contexts.append(shared.context)
        desk.slide()
    shared.window.slide(contexts)
    for desk, context in zip(desks, contexts, strict=True):
        assert context.previous_ids == desk.context.previous_ids
        ours, theirs = shared.cache.read(context.sequence, 1)[0], desk.cache.read(desk.context.sequence, 1)[0]
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "wrong", [{"mode": "round"}, {"low_tokens": 9000}, {"low_tokens": 0}, {"max_units": 0}, {"max_previous_tokens": 0}]
)
def test_windows_without_a_meaning_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ModelError, match=next(iter(wrong))):
        WindowConfig(**wrong)
