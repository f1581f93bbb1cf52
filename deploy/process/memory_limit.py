"""How much memory a process may take: where it wants more, its allocation fails, and the machine goes on."""

from __future__ import annotations

import resource
from pathlib import Path

KIB = 1024


def limit_memory(num_bytes: int) -> None:
    """This process gets so much more private memory than it has now, stacks and libraries' arenas included."""
    _set(_private_bytes() + num_bytes)


def lift_memory_limit() -> None:
    """So that there is room to say what has happened."""
    _set(resource.RLIM_INFINITY)


def _set(num_bytes: int) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    soft = num_bytes if most == resource.RLIM_INFINITY or 0 <= num_bytes < most else most
    resource.setrlimit(resource.RLIMIT_DATA, (soft, most))


def _private_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) * KIB for line in lines if line.startswith("VmData:")), 0)
