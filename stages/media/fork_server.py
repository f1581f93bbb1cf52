"""The process that decoders are forked from: `python -m stages.media.fork_server` has imported all that they need.

A forked decoder starts within a tenth of the time of a Python of its own, and shares with the others the memory of what
is imported. It is a process of its own all the same: with its limits, its lifeline, a session and a death of its own.

Each request is one message on the socket at stdin, with three descriptors: where the decoder's order comes from (its
lifeline), where its items go, and the socket on which its owner hears its process id, and in the end its exit status.
The order itself, with its passwords, goes from the owner to the decoder; this process never sees it.

Rules. One thread, for a fork copies no other one, but its locks. Nothing of a source is touched here: what can be
corrupted is a decoder. Whoever is forked keeps no descriptor but its own.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import select
import signal
import socket
import time
from itertools import pairwise
from typing import Final, NoReturn

import model_shards.nano.synthetic
import stages.media.pictures
from stages.media.fork import FORK, NUM_DESCRIPTORS, REPORT
from stages.media.process import run_decoder

IDLE_S: Final = 60.0  # without a decoder; longer than a lost camera waits until it is looked for again
OWNER_GONE_S: Final = 2.0  # for decoders to end by themselves, whose owner has closed the socket
KILLED_S: Final = 1.0  # for the kernel to end a killed one, unless that hangs in a driver or on a dead disk
MAX_DESCRIPTORS: Final = 1 << 20

_PRELOADED: Final = (model_shards.nano.synthetic, stages.media.pictures)  # which decoders import where they need them


class Forks:
    """The decoders that were forked here and have not ended, by the descriptor of their process."""

    def __init__(self, requests: socket.socket, owner: int, idle_s: float = IDLE_S) -> None:
        """owner: the pidfd of the process that the decoders belong to."""
        self._requests = requests
        self._owner = owner
        self._idle_s = idle_s
        self._poll = select.poll()
        self._poll.register(requests, select.POLLIN)
        self._children: dict[int, tuple[int, socket.socket]] = {}  # pidfd to process id, and who is told of its end

    def serve(self) -> None:
        """Fork until the owner closes the socket, and end those that are left, or nobody has wanted one for long."""
        while events := self._poll.poll(None if self._children else 1000 * self._idle_s):
            for descriptor, _ in events:
                if descriptor in self._children:
                    self._reap(descriptor)
                elif not self._take_request():
                    self._end_all()
                    return

    def _take_request(self) -> bool:
        """Fork for the next request; False when there will be none."""
        message, descriptors, _, _ = socket.recv_fds(self._requests, len(FORK), NUM_DESCRIPTORS)
        if len(descriptors) == NUM_DESCRIPTORS:
            order, items, report = descriptors
            self._fork(order, items, socket.socket(fileno=os.dup(report)))
        for descriptor in descriptors:
            os.close(descriptor)
        return bool(message)

    def _fork(self, order: int, items: int, owner: socket.socket) -> None:
        try:
            pid = os.fork()
        except OSError as error:
            _report(owner, -(error.errno or errno.EAGAIN))
            owner.close()
            return
        if pid == 0:
            _become_decoder(order, items, self._owner)
        pidfd = os.pidfd_open(pid)
        self._children[pidfd] = (pid, owner)
        self._poll.register(pidfd, select.POLLIN)
        _report(owner, pid, pidfd)

    def _reap(self, pidfd: int) -> None:
        pid, owner = self._children.pop(pidfd)
        _, status = os.waitpid(pid, 0)
        _report(owner, os.waitstatus_to_exitcode(status))
        owner.close()
        self._poll.unregister(pidfd)
        os.close(pidfd)

    def _end_all(self) -> None:
        """Whose owner has gone ends by itself; who hangs is killed."""
        self._poll.unregister(self._requests)
        self._reap_all(OWNER_GONE_S)
        for pidfd in self._children:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        self._reap_all(KILLED_S)

    def _reap_all(self, within_s: float) -> None:
        deadline_s = time.monotonic() + within_s
        while self._children and (left_s := deadline_s - time.monotonic()) > 0:
            for pidfd, _ in self._poll.poll(1000 * left_s):
                self._reap(pidfd)


def _report(owner: socket.socket, number: int, *descriptors: int) -> None:
    with contextlib.suppress(OSError):  # nobody wants to know
        socket.send_fds(owner, [REPORT.pack(number)], descriptors, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def _become_decoder(order: int, items: int, owner: int) -> NoReturn:
    status = 1
    try:
        os.setsid()
        gc.enable()
        os.dup2(order, 0)  # instead of the requests
        _close_all_but({0, 1, 2, items, owner})
        status = run_decoder(0, items, owner)
    finally:
        os._exit(status)  # whatever is left of the fork server in here ends with it


def _close_all_but(kept: set[int]) -> None:
    for low, high in pairwise([*sorted(kept), MAX_DESCRIPTORS]):
        os.closerange(low + 1, high)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # these end the pipeline, which ends us
        signal.signal(number, signal.SIG_IGN)
    owner = os.pidfd_open(os.getppid())
    gc.disable()
    gc.collect()
    gc.freeze()  # a collection in a decoder would touch, and so copy, all that it shares
    Forks(socket.socket(fileno=0), owner).serve()


if __name__ == "__main__":
    main()
