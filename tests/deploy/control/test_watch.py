"""deploy/control/watch.py: who is waited for is said seldom; memory_limit.py: who takes too much fails."""

import subprocess
import sys

from deploy.control.watch import Waiting
from tests.support.actors import Clock

GREEDY = """
import resource
from deploy.process.memory_limit import lift_memory_limit, limit_memory
limit_memory(64 << 20)
try:
    bytearray(128 << 20)
except MemoryError:
    print("no room", end="")
bytearray(16 << 20)
lift_memory_limit()
bytearray(128 << 20)
"""


def test_what_is_waited_for_is_said_after_five_seconds_and_after_twice_as_many_each_time():
    lines: list[str] = []
    clock = Clock()
    waiting = Waiting("load", lines.append, clock)
    for _ in range(48):
        waiting.look(["llm.0", "tts.0"])
        clock.advance(0.25)
    assert lines == ["  waiting for llm.0, tts.0 to load (5 s)", "  waiting for llm.0, tts.0 to load (10 s)"]


def test_a_process_gets_as_much_memory_as_it_may_take_and_no_more():
    result = subprocess.run([sys.executable, "-c", GREEDY], capture_output=True, text=True, check=True)
    assert result.stdout == "no room"
