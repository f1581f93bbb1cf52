"""deploy/clock.py, and the rule behind it: nothing is decided by the time of day."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
WALL_CLOCK = re.compile(r"time\.time(_ns)?\b|datetime\.(now|today|utcnow)|\.create_time\(|time\.(localtime|gmtime)\b")
TELLS_PEOPLE = {
    "deploy/measure.py": "when a camera's last picture came, which Prometheus compares with its own clock",
    "deploy/state.py": "a process that is younger than the description of it is another one",
    "deploy/up.py": "when the pipeline was started, for the description of it",
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
