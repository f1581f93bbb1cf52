"""A decoder's process: its order, its limits, its lifeline; forked by stages/media/fork_server.py.

An order comes in as one line, messages of stages/media/wire.py go out. The order's descriptor stays open as a lifeline:
when it closes, the owner is gone or has had enough.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import sys
import threading
from typing import Final

from stages.media.decoder import MAX_MEMORY_BYTES, Outlet, ParentGone, decode_order
from stages.media.wire import GOODBYE_SIGNAL, Order

MAX_FILES: Final = 32


def run_decoder(order_fd: int, items_fd: int, owner_fd: int) -> int:
    """Decode what is ordered; the exit status.

    owner_fd: the pidfd of the process that this one belongs to.
    """
    try:
        order = read_order(order_fd)
        outlet = Outlet(items_fd, order.request.start_ns)
        threading.Thread(target=watch_lifeline, args=(order_fd, owner_fd), daemon=True).start()
        limit_resources()
        signal.signal(GOODBYE_SIGNAL, lambda *_: sys.exit(0))  # so that a camera is told goodbye
        outlet.put(decode_order(order, outlet))
    except ParentGone:
        return 1
    except SystemExit:  # as by GOODBYE_SIGNAL
        return 0
    return 0


def read_order(fd: int) -> Order:
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(fd, 65_536)
        if not part:
            raise ParentGone
        line += part
    return Order.from_line(line)


def limit_resources() -> None:
    """After the imports: no core, no file, little memory. Processor time is the owner's watchdog's business."""
    for limit, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, MAX_FILES),
        (resource.RLIMIT_AS, MAX_MEMORY_BYTES),
    ):
        resource.setrlimit(limit, (value, value))


def watch_lifeline(lifeline: int, owner: int) -> None:
    """End this process when the owner's end of the lifeline closes, or the owner itself has ended.

    Not the death of our parent: a fork server that dies takes no camera with it. And not PR_SET_PDEATHSIG of the owner,
    which fires when the *thread* that started somebody ends: actors open sources from threads.
    """
    poll = select.poll()
    poll.register(lifeline, 0)  # hang-up only
    poll.register(owner, select.POLLIN)
    poll.poll()
    os._exit(0)
