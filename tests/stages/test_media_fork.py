"""stages/media/fork.py and stages/media/fork_server.py: decoders are forked, and each is a process of its own."""

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from stages.media.fork import FORK, REPORT, ForkServer
from stages.media.fork_server import Forks
from stages.media.reader import Ended, Failed, Frame, MediaError, MediaItem, MediaReader
from tests.support.media import Clip, times
from tests.support.reading import request

PATIENCE_S = 20.0


@pytest.fixture
def server() -> Iterator[ForkServer]:
    started = ForkServer()
    yield started
    started.close()


def reader_of(server: ForkServer, source: object = "test://pattern") -> MediaReader:
    return MediaReader(request(source, want_audio=False), fork_server=server)


def read_frame(reader: MediaReader) -> Frame:
    """The next frame."""
    while not isinstance(item := reader.read(PATIENCE_S), Frame):
        assert item is not None and not isinstance(item, (Ended, Failed)), item
    return item


def read_end(reader: MediaReader) -> MediaItem:
    while not isinstance(item := reader.read(PATIENCE_S), (Ended, Failed)):
        assert item is not None
    return item


def server_of(server: ForkServer) -> psutil.Process:
    assert server.pid is not None
    return psutil.Process(server.pid)


def decoder_of(reader: MediaReader) -> psutil.Process:
    assert reader.pid is not None
    return psutil.Process(reader.pid)


# --- one decoder --------------------------------------------------------------------------------------------------


def test_the_fork_server_has_one_thread_and_no_file_when_decoders_run(server):
    with reader_of(server) as reader:
        read_frame(reader)
        assert server_of(server).num_threads() == 1
        assert server_of(server).open_files() == []


def test_a_decoder_holds_nothing_of_the_fork_server_or_of_other_decoders(server):
    with reader_of(server) as first, reader_of(server) as second:
        read_frame(first)
        read_frame(second)
        links = [str(link.readlink()) for link in Path(f"/proc/{second.pid}/fd").iterdir()]
    kinds = sorted(link.partition(":")[0] for link in links)
    assert kinds == ["/dev/null", "/dev/null", "anon_inode", "pipe", "pipe"], links


def test_a_decoder_leads_a_session_of_its_own(server):
    with reader_of(server) as reader:
        read_frame(reader)
        assert os.getsid(decoder_of(reader).pid) == os.getpgid(decoder_of(reader).pid) == reader.pid


def test_a_decoder_that_ends_is_reaped_and_its_status_is_known(server, tmp_path):
    path = Clip(tmp_path / "clip.mp4").video(times(1)).write()
    process = server.fork(PATIENCE_S)
    process.stdin.close()  # before there was an order
    select_end(process.stdout.fileno())
    with reader_of(server, path) as reader:  # the fork server has looked since
        assert isinstance(read_end(reader), Ended)
    assert process.poll() == 1
    assert not [child for child in server_of(server).children() if child.pid == process.pid]


def select_end(fd: int) -> None:
    """Until the other end of a pipe is closed."""
    os.set_blocking(fd, True)
    assert os.read(fd, 1) == b""


def test_many_threads_may_ask_at_once_for_the_first_decoders(server):
    readers = [reader_of(server) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(MediaReader.start, readers))
    with contextlib.ExitStack() as stack:
        for reader in readers:
            stack.callback(reader.close)
        assert len({reader.pid for reader in readers}) == 8
        assert len({decoder_of(reader).ppid() for reader in readers}) == 1
        for reader in readers:
            read_frame(reader)


def test_a_decoder_that_crashes_costs_no_other_one(server):
    with reader_of(server) as crashing, reader_of(server) as other:
        read_frame(crashing)
        decoder_of(crashing).send_signal(signal.SIGSEGV)
        failure = read_end(crashing)
        assert isinstance(failure, Failed) and "SIGSEGV" in failure.message
        read_frame(other)


# --- the fork server dies, hangs, or has nothing to do ------------------------------------------------------------


def test_decoders_outlive_their_fork_server_and_the_next_one_gets_another(server, tmp_path):
    path = Clip(tmp_path / "clip.mp4").video(times(8)).write()
    with reader_of(server, path) as before:
        read_frame(before)
        server_of(server).kill()
        assert isinstance(read_end(before), Ended)
        first = server.pid
        with reader_of(server, path) as after:
            read_frame(after)
        assert server.pid != first


def test_a_decoder_that_is_killed_after_its_fork_server_is_a_failure_all_the_same(server):
    with reader_of(server) as reader:
        read_frame(reader)
        server_of(server).kill()
        decoder_of(reader).kill()
        failure = read_end(reader)
    assert isinstance(failure, Failed) and failure.kind == "crashed"


def test_a_fork_server_that_hangs_is_given_up_and_the_next_decoder_gets_another(server):
    with reader_of(server) as reader:
        read_frame(reader)
        server_of(server).suspend()
        with pytest.raises(TimeoutError):
            server.fork(0.05)
        read_frame(reader)
        with reader_of(server) as next_one:
            read_frame(next_one)


def test_a_fork_server_may_take_its_time_to_start(server):
    """It imports FFmpeg, which takes seconds on a busy machine: the source that waits for it is not slow."""
    server.fork(timeout_s=0.001).kill()


def test_a_source_says_so_when_no_decoder_could_be_forked(server):
    reader = MediaReader(request("test://pattern"), fork_server=server, open_timeout_s=0.05)
    with reader_of(server):
        server_of(server).suspend()
        with pytest.raises(MediaError, match="no decoder could be started: its fork server does not answer"):
            reader.start()


def test_the_number_of_a_failed_fork_reaches_the_owner(monkeypatch):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    reports, report_to = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def refuse() -> int:
        raise OSError(errno.EAGAIN, "no more processes")

    monkeypatch.setattr(os, "fork", refuse)
    with ours, theirs, reports, report_to:
        socket.send_fds(ours, [FORK], [report_to.fileno()] * 3)
        Forks(theirs, -1, idle_s=0.0).serve()
        assert REPORT.unpack(reports.recv(REPORT.size)) == (-errno.EAGAIN,)


def test_a_fork_server_that_nobody_wants_ends():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        Forks(theirs, -1, idle_s=0.0).serve()


# --- the owner dies -----------------------------------------------------------------------------------------------

OWNER = """
import sys, time
from stages.media.reader import MediaReader, MediaRequest
from stages.media.fork import FORK_SERVER
reader = MediaReader(MediaRequest('test://pattern', 1.0, 200704, True, True, 10**9, None))
reader.start()
print(FORK_SERVER.pid, reader.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("without_server", [False, True])
def test_all_end_with_an_owner_that_is_killed(without_server):
    environment = os.environ | {"PYTHONPATH": "."}
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, env=environment) as owner:
        assert owner.stdout is not None
        server, decoder = (psutil.Process(int(pid)) for pid in owner.stdout.readline().split())
        if without_server:
            server.kill()
        owner.kill()
        owner.wait()
    gone, alive = psutil.wait_procs([server, decoder], timeout=PATIENCE_S)
    assert not alive
    assert len(gone) == 2


def test_a_decoder_that_hangs_does_not_outlive_its_owner():
    environment = os.environ | {"PYTHONPATH": "."}
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, env=environment) as owner:
        assert owner.stdout is not None
        server, decoder = (psutil.Process(int(pid)) for pid in owner.stdout.readline().split())
        decoder.suspend()
        owner.kill()
        owner.wait()
    _, alive = psutil.wait_procs([server, decoder], timeout=PATIENCE_S)
    assert not alive


def test_closing_ends_the_fork_server_and_what_is_left_of_its_decoders():
    server = ForkServer()
    process = server.fork(PATIENCE_S)
    forking, decoder = server_of(server), psutil.Process(process.pid)
    server.close()
    assert not forking.is_running()
    assert not decoder.is_running()
