"""What a pipeline that was killed (`kill -9`) has left running: two of Ray's processes outlive it by a minute.

Rule: a process is one of these only where it works in the project's state folder and has a title of Ray's: somebody
may stand in that folder to read the logs.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

import psutil

from deploy.run.state import StateFolder

TITLE: Final = "ray::"  # that Ray's Python processes give themselves
GONE_S: Final = 5.0  # the kernel takes a moment to free the memory of a killed process


def left_running(state: StateFolder) -> list[psutil.Process]:
    """What a killed pipeline of this project has left; nothing where one starts, runs or ends."""
    if not state.path.is_dir() or state.holder() is not None:
        return []
    return [process for process in psutil.process_iter() if _is_rays(process, state.path)]


def end_left(state: StateFolder) -> int:
    """End what a killed pipeline of this project has left; returns how many processes. Raises StateError."""
    if not left_running(state):
        return 0
    with state.hold():  # nobody starts one meanwhile
        left = [process for process in psutil.process_iter() if _is_rays(process, state.path)]
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=GONE_S)
        state.forget()
    return len(left)


def _is_rays(process: psutil.Process, folder: Path) -> bool:
    try:
        if process.uids().real != os.getuid() or process.cwd() != str(folder):
            return False
        return any(title.startswith(TITLE) for title in process.cmdline()[:1])
    except psutil.Error:  # it has ended, or shows nothing of itself
        return False
