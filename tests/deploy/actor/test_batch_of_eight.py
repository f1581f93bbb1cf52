"""A stage that goes wrong for one of eight cameras, in one batch with the seven others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import numpy as np
import pytest

from graph.chunk import Chunk, SessionId
from graph.window import Unit
from stages import kinds
from stages.llm import Llm
from tests.support.house import SOUND, SPOKEN, Echo, House, ManualClock
from tests.support.streams import outputs
from tests.support.units import session

NAMES = [f"c{number}" for number in range(8)]
BAD = "c3"
NUM_WINDOWS = 6
Make = Callable[[Unit], Chunk]


def words(unit: Unit, count: int = 2) -> dict[str, np.ndarray]:
    return {"token_ids": np.full(count, unit.index), "hidden": np.zeros((count, 4), np.float32)}


class Speaks(Echo):
    """Says two words in each window; for one camera what a test wants."""

    def __init__(self, bad: Make, at: Callable[[int], bool]) -> None:
        super().__init__()
        self._bad, self._at = bad, at

    def process(self, units: list[Unit]) -> list[Chunk]:
        made = [self._bad(unit) if self._is_bad(unit) else Llm.text.over(unit, arrays=words(unit)) for unit in units]
        self.batches.append([(unit.session, unit.index) for unit in units])
        return made

    def _is_bad(self, unit: Unit) -> bool:
        return unit.session == BAD and self._at(unit.index)


def raises(unit: Unit) -> Chunk:
    raise ValueError(f"what {unit.session} shows")


def of_no_port(unit: Unit) -> Chunk:
    return Chunk(unit.session, "words", unit.start_ns, arrays=words(unit))


def of_another_dtype(unit: Unit) -> Chunk:
    return Llm.text.over(unit, arrays=words(unit) | {"hidden": np.zeros((2, 4), np.float64)})


def without_an_array(unit: Unit) -> Chunk:
    return Llm.text.over(unit, arrays={"token_ids": np.zeros(2, np.int64)})


def with_a_wrong_attribute(unit: Unit) -> Chunk:
    return Llm.text.over(unit, arrays=words(unit), attrs={"txt": "hello"})


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def build(clock: ManualClock) -> Iterator[Callable[[Speaks], House]]:
    built: list[House] = []

    def make(stage: Speaks) -> House:
        house = House({"llm": stage}, (SOUND, SPOKEN), clock=clock)
        built.append(house)
        for name in NAMES:
            own = outputs(name, [SPOKEN], {"text": kinds.TEXT})
            house.receivers[SPOKEN].open_session(SessionId(name))
            house.runners["llm"].open_session(house.plan("llm", session(name), outputs=own))
            house.runners["llm"].begin_session(SessionId(name), 0)
        return house

    yield make
    for house in built:
        house.__exit__()


def run(house: House, lost: Collection[int] = range(NUM_WINDOWS)) -> list[Chunk]:
    """All windows of all cameras; returns what was said. lost: windows of the bad one in which it says nothing."""
    said: list[Chunk] = []
    for index in range(NUM_WINDOWS):
        for name in NAMES:
            house.window(name, index)
        house.runners["llm"].step()
        said += [chunk for chunk in house.arrivals(15 if index in lost else 16) if not chunk.is_control]
    return said


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (raises, "ValueError: what c3 shows"),
        (of_no_port, "stage llm has no output 'words'; it has: text"),
        (of_another_dtype, "array 'hidden' is float64 [2, 4]; it must be float32 or uint16 [tokens, dim]"),
        (without_an_array, "array 'hidden' is missing; it must be float32 or uint16 [tokens, dim]"),
        (with_a_wrong_attribute, "'txt': text has no such attribute; it has text, turn_start, end_of_turn, dtype"),
    ],
)
def test_one_that_is_always_bad_is_given_up_and_the_others_say_all_they_had_to(build, bad: Make, reason: str):
    house = build(Speaks(bad, at=lambda index: True))
    said = run(house)
    assert sorted({chunk.session for chunk in said}) == [name for name in NAMES if name != BAD]
    assert len(said) == 7 * NUM_WINDOWS
    (given_up,) = house.runners["llm"].snapshot().given_up.items()
    assert given_up[0] == BAD and reason in given_up[1]
    assert house.account(SPOKEN).accepted == 7 * NUM_WINDOWS, "what no receiver would take costs no credit"


def test_one_that_is_bad_now_and_then_loses_those_windows_only(build):
    house = build(Speaks(raises, at=lambda index: index in (1, 4)))
    said = run(house, lost={1, 4})
    assert len(said) == 8 * NUM_WINDOWS - 2
    assert house.runners["llm"].snapshot().given_up == {}


class AnswersAll(Echo):
    """Of scope pipeline: tells all that are open in each batch."""

    scope = "pipeline"

    def process(self, units: list[Unit]) -> list[Chunk]:
        return [Chunk(SessionId(name), "text", units[0].start_ns, arrays=words(units[0])) for name in sorted(self.open)]


def test_a_stage_of_scope_pipeline_may_answer_any_session_that_is_open(clock: ManualClock):
    with House({"llm": AnswersAll()}, (SOUND, SPOKEN), clock=clock) as house:
        for name in ("door", "yard"):
            house.open(name)
        house.receivers[SPOKEN].open_session(SessionId("yard"))
        house.window("door", 0)
        house.runners["llm"].step()
        said = [chunk.session for chunk in house.arrivals(3) if not chunk.is_control]
    assert said == ["door", "yard"]
