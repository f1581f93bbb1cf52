"""Who takes long, for people: an actor that takes no call, and one that is waited for while the pipeline starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from deploy.control.calls import NowS
from deploy.control.fleet import Fleet, Living

SLOW_S = 5.0  # then it is said, and again each time that it has been twice as long


class Slow:
    """The actors that take no call, since one of their stages is in a long batch, or hangs."""

    def __init__(self, fleet: Fleet, directory: Path, tell: Callable[[str], None]) -> None:
        """directory: where actors note what they work on."""
        self._fleet, self._directory, self._tell = fleet, directory, tell
        self._due_s: dict[str, float] = {}
        self.at: dict[str, tuple[str, str]] = {}  # by actor: the stage, "" where it is not known, and what to say of it

    def look(self) -> None:
        """Say who is slow, if it was not said lately."""
        slow = {name: each for name, each in self._fleet.living.items() if each.line.silent_s >= SLOW_S}
        self.at = {name: self._described(name, living) for name, living in slow.items()}
        self._due_s = {name: self._due_s.get(name, SLOW_S) for name in slow}
        for name, living in slow.items():
            if living.line.silent_s >= self._due_s[name]:
                self._tell(self.at[name][1])
                self._due_s[name] *= 2

    def _described(self, name: str, living: Living) -> tuple[str, str]:
        work, seconds = self._fleet.work_of(living, self._directory), f"{living.line.silent_s:.0f} s"
        if not work.windows:
            return "", f"{name} has not answered for {seconds}"
        return work.stage, f"stage {work.stage} has been at {work.named} for {seconds}"


class Waiting:
    """What is waited for while a pipeline starts."""

    def __init__(self, what: str, tell: Callable[[str], None], now_s: NowS) -> None:
        """what: they are to do, such as "load"."""
        self._what, self._tell, self._now_s = what, tell, now_s
        self._since_s, self._due_s = now_s(), SLOW_S

    def look(self, names: Iterable[str]) -> None:
        """names: who is still waited for."""
        waited_s = self._now_s() - self._since_s
        if waited_s >= self._due_s:
            self._due_s *= 2
            self._tell(f"  waiting for {', '.join(names)} to {self._what} ({waited_s:.0f} s)")
