"""One bad unit costs its session, never the actor.

Rule: a batch that raises is tried again one unit at a time; the session whose unit raises has a failed window. So has
one at which any other of a stage's hooks raises. Who fails three times in a row at the same hook is given up: its stage
is not asked any more, its windows go on as failed ones, and its sources are to end (control/coordinator.py). What a
stage raises may be any BaseException: SystemExit of a library is no reason to end here, either. Only what breaks the
process, out of memory or a lost device, ends the actor.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final

from graph.chunk import Chunk, Failure, SessionId
from graph.window import Unit
from stages.stage import BatchLost, Stage

MAX_IN_A_ROW: Final = 3
MAX_REASON_CHARS: Final = 200
_BREAKING_TYPES: Final = frozenset({"OutOfMemoryError", "AcceleratorError"})  # torch's; it is not imported here
_BREAKING_WORDS: Final = (
    "CUDA error",
    "CUDA out of memory",
    "CUBLAS_STATUS_",
    "CUDNN_STATUS_",
    "can't allocate memory",
)

Report = Callable[[BaseException, str], None]


def breaks_process(error: BaseException | None) -> bool:
    """Can the process not go on after this?"""
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        if type(error).__name__ in _BREAKING_TYPES or any(words in str(error) for words in _BREAKING_WORDS):
            return True
        error = error.__cause__
    return False


def reason_of(error: BaseException) -> str:
    """One line: what was raised, and its first words."""
    cause = error.__cause__ if isinstance(error, BatchLost) and error.__cause__ is not None else error
    text = f"{type(cause).__name__}: {cause}" if str(cause) else type(cause).__name__
    return " ".join(text.split())[:MAX_REASON_CHARS].encode(errors="replace").decode()


# ---- a batch ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a batch: what its units made, and why those failed that did."""

    chunks: list[Chunk] = field(default_factory=list)
    failed: dict[SessionId, BaseException] = field(default_factory=dict)

    def send(self, send: Callable[[Chunk], None]) -> None:
        """Send what was made; a session of which a chunk can't be sent has failed as well."""
        for chunk in self.chunks:
            if chunk.session not in self.failed:
                try:
                    send(chunk)
                except BaseException as error:
                    if breaks_process(error):
                        raise
                    self.failed[chunk.session] = error


def process(stage: Stage, units: list[Unit], sessions: Collection[SessionId] = ()) -> Outcome:
    """Let a stage work on a batch, and where that raises, on one unit at a time: so only those fail that raise alone.

    sessions: those that are open, where the stage may answer any of them; else it answers those of its units.

    A stage that could not leave its sessions as they were says so (`BatchLost`); then nothing is tried again.
    """
    if not units:
        return Outcome()
    try:
        return Outcome(_made(stage, units, sessions))
    except BaseException as error:
        if breaks_process(error):
            raise
        if isinstance(error, BatchLost) or len(units) == 1:
            return Outcome(failed={unit.session: error for unit in units})
    alone = [process(stage, [unit], sessions) for unit in units]
    chunks = [chunk for each in alone for chunk in each.chunks]
    return Outcome(chunks, {session: error for each in alone for session, error in each.failed.items()})


def _made(stage: Stage, units: Iterable[Unit], sessions: Collection[SessionId]) -> list[Chunk]:
    made: list[Chunk] | None = stage.process(list(units))
    if made is None:
        raise BatchLost("process() returned nothing") from TypeError("process() returned None; return a list of chunks")
    if isinstance(made, Chunk):
        raise BatchLost("process() returned a chunk") from TypeError(
            "process() returned a Chunk; return a list of chunks"
        )
    chunks, answered = list(made), {unit.session for unit in units}
    for chunk in chunks:
        if not isinstance(chunk, Chunk):
            raise BatchLost("process() is to return chunks") from TypeError(f"it returned a {type(chunk).__name__}")
        if not isinstance(chunk.session, str):
            problem = f"a chunk whose session is a {type(chunk.session).__name__}; give its id, such as unit.session"
            raise BatchLost("a chunk of no session") from TypeError(problem)
        if chunk.session not in answered and chunk.session not in sessions:
            problem = f"a chunk of session {chunk.session!r}, which {_not_there(answered, sessions)}"
            raise BatchLost("a chunk of no session of the batch") from ValueError(problem)
    return chunks


def _not_there(answered: Collection[SessionId], sessions: Collection[SessionId]) -> str:
    if sessions:
        return f"is not open; there are: {', '.join(sorted(sessions))}"
    return f"is none of its units'; they are of: {', '.join(sorted(answered))}"


# ---- a session -------------------------------------------------------------------------------------------------------


class Faults:
    """What has failed of one session at one stage.

    given_up: why its stage is not asked any more; "" as long as it is.
    """

    def __init__(self, stage: str, report: Report) -> None:
        """report: given each exception, and where it was raised: "window 3", or a hook's name."""
        self._stage = stage
        self._report = report
        self._in_a_row: dict[str, int] = {}
        self._untold: dict[str, Failure] = {}  # by reason, in order: a thousand of one kind are told as one
        self._guards: dict[str, _Guard] = {}  # by hook
        self._end_is_reported = False
        self.given_up = ""

    @property
    def are_new(self) -> bool:
        """Has something failed of which nobody was told?"""
        return bool(self._untold)

    @property
    def are_recent(self) -> bool:
        """Has something failed the last time that it was tried? Then the session is to be looked at again soon."""
        return bool(self._in_a_row)

    def within(self, hook: str) -> _Guard:
        """A context in which whatever raises costs this session only; it is left then, and what follows goes on."""
        guard = self._guards.get(hook)
        if guard is None:
            guard = self._guards[hook] = _Guard(self, hook, self._in_a_row)
        return guard

    def succeeded(self, hook: str) -> None:
        self._in_a_row.pop(hook, None)

    def failed(self, hook: str, error: BaseException, window: int | None = None) -> None:
        """One more; the third in a row gives the session up. window: of the unit at which it was raised."""
        self._report(error, hook if window is None else f"window {window}")
        reason = reason_of(error)
        self._in_a_row[hook] = self._in_a_row.get(hook, 0) + 1
        self._untold[reason] = Failure(self._stage, reason)
        if self._in_a_row[hook] >= MAX_IN_A_ROW and not self.given_up:
            self.given_up = f"stage {self._stage} failed three times in a row: {reason}"

    def take(self) -> tuple[Failure, ...]:
        """What was not told yet; of a session that was given up, that it was."""
        untold, self._untold = tuple(self._untold.values()), {}
        return untold or ((Failure(self._stage, self.given_up),) if self.given_up else ())

    def is_news(self, failure: Failure) -> bool:
        """Not told in an event before? That the stage is not asked any more is told once, and not for each window."""
        if failure.reason != self.given_up:
            return True
        was_reported, self._end_is_reported = self._end_is_reported, True
        return not was_reported


class _Guard:
    def __init__(self, faults: Faults, hook: str, in_a_row: Mapping[str, int]) -> None:
        """in_a_row: what has failed, by hook. To look there takes less than a call, and mostly there is nothing."""
        self._faults, self._hook, self._in_a_row = faults, hook, in_a_row

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> bool:
        if error is None:
            if self._in_a_row:
                self._faults.succeeded(self._hook)
            return False
        if breaks_process(error):
            return False
        self._faults.failed(self._hook, error)
        return True
