"""deploy/actor/clock.py, and the rule behind it: nothing is decided by the time of day."""

import re
from pathlib import Path

import pytest

from deploy.actor.clock import NUM_CLOCK_QUESTIONS, NodeClocks
from graph.chunk import NS_PER_S
from tests.support.actors import Clock

ROOT = Path(__file__).parents[3]
WALL_CLOCK = re.compile(r"time\.time(_ns)?\b|datetime\.(now|today|utcnow)|\.create_time\(|time\.(localtime|gmtime)\b")
TELLS_PEOPLE = {
    "graph/clock.py": "where all others read it, when a camera's last picture came for example; the simulator sets it",
    "deploy/run/state.py": "a process that is younger than the description of it is another one",
    "deploy/run/up.py": "when the pipeline was started, for the description of it",
}


def test_nothing_that_runs_asks_for_the_time_of_day() -> None:
    files = [path for floor in ("deploy", "graph", "stages") for path in (ROOT / floor).rglob("*.py")]
    assert len(files) > 50
    asking = {str(path.relative_to(ROOT)) for path in files if WALL_CLOCK.search(path.read_text(encoding="utf-8"))}
    assert asking - TELLS_PEOPLE.keys() == set(), "a step of the wall clock would change what they do"


def test_every_way_to_the_time_of_day_is_seen() -> None:
    asking = ("time.time()", "time.time_ns()", "datetime.now()", "field(default_factory=time.time)", "time.localtime()")
    assert all(WALL_CLOCK.search(text) for text in asking)
    assert not WALL_CLOCK.search("time.monotonic() + time.monotonic_ns() + time.process_time()")


def silent(timeout_s: float) -> int:
    raise TimeoutError


def test_a_machine_that_does_not_answer_keeps_the_difference_that_was_known() -> None:
    clock = Clock()
    clocks = NodeClocks("here", clock.now_ns)
    clocks.read("there", lambda timeout_s: clock.now_ns() + 7 * NS_PER_S)
    clocks.read("there", silent)
    assert (clocks.ahead_ns("there"), clocks.ahead_ns("here")) == (7 * NS_PER_S, 0)


def test_a_machine_of_which_nothing_is_known_and_that_does_not_answer_is_an_error() -> None:
    with pytest.raises(TimeoutError):
        NodeClocks("here", Clock().now_ns).read("there", silent)


def test_all_questions_to_a_machine_together_take_a_moment_only() -> None:
    clock, timeouts_s = Clock(), list[float]()

    def slow(timeout_s: float) -> int:
        timeouts_s.append(timeout_s)
        clock.advance(0.2)
        if timeout_s < 0.2:
            raise TimeoutError
        return clock.now_ns()

    NodeClocks("here", clock.now_ns).read("there", slow)
    assert len(timeouts_s) < NUM_CLOCK_QUESTIONS
    assert timeouts_s[0] == pytest.approx(0.5)
