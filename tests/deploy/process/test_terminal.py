"""deploy/process/terminal.py: what is told costs nothing but the telling."""

import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from deploy.process import terminal
from deploy.process.terminal import MAX_WAITING, Teller


def read_all(descriptor: int) -> str:
    """Until nobody can write there any more."""
    with os.fdopen(descriptor, "rb") as pipe:
        return pipe.read().decode()


def test_lines_arrive_in_order():
    reading, writing = os.pipe()
    with Teller(writing, "utf-8") as teller:
        teller.tell("one")
        teller.tell("two")
    os.close(writing)
    assert read_all(reading) == "one\ntwo\n"


@pytest.mark.parametrize("path", ["/dev/full", "a reader that has gone", "a folder"])
def test_who_tells_never_fails(path: str, tmp_path: Path):
    reading, gone = os.pipe()
    os.close(reading)
    descriptors = {
        "/dev/full": lambda: os.open("/dev/full", os.O_WRONLY),
        "a reader that has gone": lambda: gone,
        "a folder": lambda: os.open(tmp_path, os.O_RDONLY),
    }
    with Teller(descriptors[path](), "utf-8") as teller:
        for number in range(100):
            teller.tell(f"line {number}")


def test_a_terminal_that_stands_still_holds_nobody_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(terminal, "STALLED_S", 0.05)
    master, slave = pty.openpty()
    termios.tcflow(slave, termios.TCOOFF)  # Ctrl-S
    with Teller(slave, "utf-8") as teller:
        for number in range(4 * MAX_WAITING):
            teller.tell(f"line {number}")
        assert teller._num_dropped > 0
    termios.tcflow(slave, termios.TCOON)
    os.close(master)


def test_what_was_dropped_is_told_when_there_is_room_again():
    reading, writing = os.pipe()
    teller = Teller(writing, "utf-8")
    for number in range(MAX_WAITING + 5):  # nobody writes yet
        teller.tell(f"line {number}")
    with teller:
        pass
    os.close(writing)
    text = read_all(reading)
    assert text.startswith("(5 lines were dropped here: nobody took them)\nline 0\n")
    assert text.endswith(f"line {MAX_WAITING - 1}\n")


def test_a_pipe_that_does_not_wait_gets_every_line():
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with Teller(writing, "utf-8") as teller:
        for number in range(20):
            teller.tell(str(number) + "x" * 10_000)
        got = b""
        while got.count(b"\n") < 20:
            got += os.read(reading, 1 << 16)
    assert [line.rstrip("x") for line in got.decode().splitlines()] == [str(number) for number in range(20)]


def test_what_an_encoding_lacks_is_told_by_its_number():
    reading, writing = os.pipe()
    with Teller(writing, "ascii") as teller:
        teller.tell("门 \udcff")
    os.close(writing)
    assert read_all(reading) == "\\u95e8 \\udcff\n"


CLOSED = """
import os, sys
for number in (0, 1, 2):
    os.close(number)
os.execv(sys.executable, [sys.executable, "-c", '''
import os, sys
from deploy.process.terminal import prepare_standard_files, tell
prepare_standard_files()
print("somewhere")
tell("somewhere")
file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
os.write(file, str(file).encode())
''', sys.argv[1]])
"""


def test_with_closed_standard_files_no_other_file_takes_their_numbers(tmp_path: Path):
    subprocess.run([sys.executable, "-c", CLOSED, str(tmp_path / "file")], check=True)
    assert int((tmp_path / "file").read_text()) > 2
