"""Our child processes: what they get of the user's, and that none is left.

They get the environment, but neither the folder nor what steers an interpreter.

Rule: whatever lies in the user's folder, and whatever PYTHON… variables say, a child runs our code with our packages.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

import psutil

from deploy.process.search_path import ROOT, is_current_folder

# Of the variables that steer an interpreter these change no result.
KEPT = ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX", "PYTHONHOME", "PYTHONUSERBASE", "PYTHONNOUSERSITE")


PR_SET_CHILD_SUBREAPER = 36
BURIED_S = 5.0  # the kernel takes a moment to free the memory of a killed process


def python(module: str) -> list[str]:
    """The command that runs one of our modules. -P: not a file of that name in the working folder."""
    return [sys.executable, "-P", "-m", module]


def environment_for_children(of: Mapping[str, str]) -> dict[str, str]:
    """The user's environment for an interpreter of ours: text is UTF-8, our packages come first, no current folder."""
    theirs = {name: value for name, value in of.items() if not name.startswith("PYTHON") or name in KEPT}
    return theirs | {"PYTHONSAFEPATH": "1", "PYTHONUTF8": "1", "PYTHONPATH": _search_path(of.get("PYTHONPATH", ""))}


def _search_path(theirs: str) -> str:
    """An empty or relative entry means the current folder, whichever that is then."""
    ours = [str(ROOT), sysconfig.get_path("purelib")]
    added = [entry for entry in theirs.split(os.pathsep) if Path(entry).is_absolute() and not is_current_folder(entry)]
    return os.pathsep.join(dict.fromkeys([*ours, *added]))


def descendants() -> frozenset[psutil.Process]:
    """Our children and theirs, as far as they have not been orphaned."""
    return frozenset(psutil.Process().children(recursive=True))


@contextlib.contextmanager
def no_descendants_left(but: Set[psutil.Process]) -> Iterator[None]:
    """In here our children are ended; whatever is left of them and theirs then, `but` some, is killed and buried.

    Orphans become our children meanwhile, so that none is out of sight.
    """
    before = descendants() - but
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        left = set(before | descendants() - but)
        while left := {process for process in left if process.is_running()}:
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            _, stuck = psutil.wait_procs(left, timeout=BURIED_S)
            left = set() if stuck else set(descendants() - but)  # what they have started meanwhile
