"""TAIL: no text is made further ahead than the listener hears.

Rule: everything that decides how far speech may run ahead of the ear is in this file. All of it is pure: it takes
event times and returns numbers.

    sink   Player        what the listener has heard, and when a turn begins; speaks Acks
    LLM    TextBudget    n text tokens for a window:  B = L + T - ((G - P) + E),  n = clamp(B // r, 0, 18)
    TTS, vocoder
           SpeechQueue   a piece of d ns may be made when  G - P + d <= L + T

P is what was heard, G what was synthesised, E the speech estimated for text not yet synthesised, r the ns of speech
per text token (a moving average), L the lead, T the window. Decisions for window k are taken as of its end, (k+1)·T:
an Ack made later does not count. So a run on time decides the same however its messages were jittered.

The budget extrapolates P along the sink's own playing schedule; the credit uses acknowledged playback only, which
makes the bound hold whatever happens to the Acks.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from graph.chunk import NS_PER_MS, NS_PER_S, Chunk, ChunkType, SessionId
from graph.value import value

Item = TypeVar("Item")

MAX_TEXT_TOKENS = 18  # the official loop samples at most 19 tokens per unit, the first of which is <|speak|>
FIRST_NS_PER_TOKEN = 270_000_000  # 3.7 tokens per second of speech, until a turn has been measured
NS_PER_TOKEN_RANGE = (50_000_000, 2_000_000_000)
RATE_WEIGHT = 0.25  # of a new turn in the moving average
ACK_TIMEOUT_NS = 5 * NS_PER_S  # a listener unheard of for so long is taken to be gone: the session parks
NUM_CAME = 8  # pieces of speech after which the latest of them is expected to come again
SPARE_NS = 40 * NS_PER_MS  # and a little later
MAX_ACKS = 64  # while there is speech they come every 100 ms and at each event; a decision looks back one window


@value
class Ack:
    """What the sink says of its listener, as of event time `at_ns`. Totals count from the session's start.

    heard_ns:    speech really heard.                 received_ns: speech received and not flushed.
    through_ns:  speech of all windows that end at or before this has been received.
    num_turns:   turns whose last piece has been received.
    num_windows: windows that have come to their end at the sink, those included that were given up.
    queue:       (start_ns, duration_ns) of what is still to be heard, as scheduled; empty while paused.
    """

    at_ns: int
    heard_ns: int = 0
    received_ns: int = 0
    through_ns: int = 0
    num_turns: int = 0
    epoch: int = 0
    queue: tuple[tuple[int, int], ...] = ()
    num_windows: int = 0

    def heard_at(self, now_ns: int) -> int:
        """P at `now_ns`, if all goes on as scheduled. Never more than was received."""
        return self.heard_ns + sum(min(max(now_ns - start, 0), length) for start, length in self.queue)


def _order(ack: Ack) -> tuple[int, int, int, int, int, tuple[tuple[int, int], ...]]:
    return (ack.at_ns, ack.epoch, ack.through_ns, ack.received_ns, ack.heard_ns, ack.queue)


class Playback:
    """A distant listener, as the Acks describe it. Acks may be lost, doubled and come late or out of order."""

    def __init__(self) -> None:
        self._at_ns = [0]  # of the acks, in the order in which they were made
        self._acks: list[Ack | Chunk] = [Ack(0)]  # as they came: few of them are ever read

    @property
    def latest(self) -> Ack:
        return self._read(len(self._acks) - 1)

    def ack(self, ack: Ack) -> None:
        """Take an Ack, in any order, any number of times."""
        first, last = bisect_left(self._at_ns, ack.at_ns), bisect_right(self._at_ns, ack.at_ns)
        known = [self._read(index) for index in range(first, last)]  # as of the same time
        place = bisect_left(known, _order(ack), key=_order)
        if place == len(known) or known[place] != ack:
            self._acks.insert(first + place, ack)
            self._at_ns.insert(first + place, ack.at_ns)
            self._forget()

    def hear(self, chunk: Chunk) -> None:
        """Take an Ack as it travels. Where it holds none, whoever reads it gets a KeyError."""
        if chunk.start_ns > self._at_ns[-1]:  # as nearly all are
            self._at_ns.append(chunk.start_ns)
            self._acks.append(chunk)
            if len(self._acks) > 2 * MAX_ACKS:
                self._forget()
        else:
            self.ack(ack_of(chunk))

    def as_of(self, now_ns: int) -> Ack:
        """The newest Ack that was made at or before `now_ns`."""
        return self._read(max(bisect_right(self._at_ns, now_ns) - 1, 0))

    @property
    def dry_ns(self) -> int | None:
        """When the listener has heard all that has come to it, as scheduled; None while it hears nothing."""
        queue = self.latest.queue
        return sum(queue[-1]) if queue else None

    def arrived_ns(self, through_ns: int) -> int | None:
        """When all speech up to there had come to the listener, as far as its Acks are kept; None: it has not."""
        first = bisect_left(range(len(self._acks)), through_ns, key=lambda index: self._read(index).through_ns)
        return self._at_ns[first] if first < len(self._acks) else None

    def _forget(self) -> None:
        del self._at_ns[:-MAX_ACKS], self._acks[:-MAX_ACKS]

    def _read(self, index: int) -> Ack:
        ack = self._acks[index]
        if isinstance(ack, Chunk):
            self._acks[index] = ack = ack_of(ack)
        return ack

    def parked(self, now_ns: int) -> bool:
        """True when nothing has been heard of the listener for 5 s."""
        return now_ns - self.as_of(now_ns).at_ns > ACK_TIMEOUT_NS


class TextBudget:
    """How many text tokens the LLM may make in a window, for one session."""

    def __init__(self, playback: Playback, *, lead_ns: int, window_ns: int) -> None:
        self._playback = playback
        self._allowed_ns = lead_ns + window_ns
        self._num_tokens = 0
        self._num_turns = playback.latest.num_turns  # ended by the LLM; by another one, where this goes on for it
        self._turn_open = False
        # (tokens, ns of speech) up to the last moment when all text was spoken
        self._settled = (0, playback.latest.received_ns)
        self._window_ns = window_ns
        self._window_end_ns = 0  # end of the window that is being decided
        self._last_received_ns = 0
        self._quiet_since_ns = 0  # neither text nor speech in any window that ends later, as far as is known
        self.ns_per_token = FIRST_NS_PER_TOKEN

    @property
    def turn_open(self) -> bool:
        return self._turn_open

    def tokens(self, now_ns: int) -> int:
        """n for the window that ends at `now_ns`: 0 … 18."""
        if self._playback.parked(now_ns):
            return 0
        ack = self._playback.as_of(now_ns)
        unheard_ns = ack.received_ns - ack.heard_at(now_ns)
        self._window_end_ns = now_ns
        if self._all_spoken(ack, unheard_ns):
            self._settle(ack)
        left_ns = self._allowed_ns - unheard_ns - self._estimate_ns(ack)
        return min(max(left_ns // self.ns_per_token, 0), MAX_TEXT_TOKENS)

    def generated(self, num_tokens: int, *, end_of_turn: bool) -> None:
        """Account for a speaking unit's text."""
        if num_tokens:
            self._quiet_since_ns = max(self._quiet_since_ns, self._window_end_ns)
        self._num_tokens += num_tokens
        self._turn_open = not end_of_turn
        self._num_turns += end_of_turn

    def interrupted(self, ack: Ack) -> None:
        """The listener barged in: what was not heard will never be."""
        self._settled = (self._num_tokens, ack.received_ns)
        self._turn_open = False
        self._num_turns = ack.num_turns

    def _estimate_ns(self, ack: Ack) -> int:
        tokens, speech_ns = self._settled
        return max((self._num_tokens - tokens) * self.ns_per_token - (ack.received_ns - speech_ns), 0)

    def _all_spoken(self, ack: Ack, unheard_ns: int) -> bool:
        """True when no text waits for its speech: every turn has ended and its last piece has come, or the listener
        waits and a whole window after the last text gave no speech. Else an estimate that is too high would, inside
        a long turn, hold the text back for ever."""
        if ack.received_ns != self._last_received_ns:
            self._last_received_ns = ack.received_ns
            self._quiet_since_ns = max(self._quiet_since_ns, ack.through_ns)
        ran_dry = unheard_ns == 0 and ack.through_ns >= self._quiet_since_ns + self._window_ns
        return ran_dry or (not self._turn_open and ack.num_turns >= self._num_turns)

    def _settle(self, ack: Ack) -> None:
        """Nothing is owed; the rate is measured anew."""
        tokens, speech_ns = self._num_tokens - self._settled[0], ack.received_ns - self._settled[1]
        if tokens > 0 and speech_ns > 0:
            low, high = NS_PER_TOKEN_RANGE
            measured = min(max(speech_ns // tokens, low), high)
            self.ns_per_token += round(RATE_WEIGHT * (measured - self.ns_per_token))
        self._settled = (self._num_tokens, ack.received_ns)


class SpeechCredit:
    """Whether a piece of speech may be made now, for one session; one each in TTS and vocoder."""

    def __init__(self, playback: Playback, *, lead_ns: int, window_ns: int) -> None:
        self._playback = playback
        self._allowed_ns = lead_ns + window_ns
        self._under_way: deque[tuple[int, int]] = deque()  # (end of window, ns) made here, not yet received

    def unheard_ns(self, now_ns: int) -> int:
        """G - P: speech made and not acknowledged as heard, at most."""
        ack = self._playback.as_of(now_ns)
        while self._under_way and self._under_way[0][0] <= ack.through_ns:
            self._under_way.popleft()
        return ack.received_ns - ack.heard_ns + sum(length for _, length in self._under_way)

    def allows(self, duration_ns: int, now_ns: int) -> bool:
        """May `duration_ns` more be made, as of `now_ns`?"""
        return self.unheard_ns(now_ns) + duration_ns <= self._allowed_ns

    def made(self, duration_ns: int, window_end_ns: int) -> None:
        """Account for a piece that leaves with the window which ends at `window_end_ns`."""
        self._under_way.append((window_end_ns, duration_ns))

    def interrupted(self) -> None:
        """What was under way will be dropped as stale."""
        self._under_way.clear()


class SpeechQueue(Generic[Item]):
    """What waits to become speech at one stage, in order, and leaves as far as TAIL allows."""

    def __init__(self, playback: Playback, *, lead_ns: int, window_ns: int) -> None:
        self._credit = SpeechCredit(playback, lead_ns=lead_ns, window_ns=window_ns)
        self._waiting: deque[Item] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, item: Item) -> None:
        self._waiting.append(item)

    def take(self, longest_ns: Callable[[Item], int], now_ns: int) -> Item | None:
        """The next one, if it may be made as of `now_ns`. longest_ns: what it can sound for, at most."""
        if self._waiting and self._credit.allows(longest_ns(self._waiting[0]), now_ns):
            return self._waiting.popleft()
        return None

    def made(self, duration_ns: int, window_end_ns: int) -> None:
        """Account for what was made of it; see `SpeechCredit.made`."""
        self._credit.made(duration_ns, window_end_ns)

    def interrupted(self) -> None:
        """The listener barged in: nothing waits any more."""
        self._waiting.clear()
        self._credit.interrupted()


@dataclass(slots=True)
class _Piece:
    start_ns: int
    duration_ns: int
    heard_ns: int = 0  # of duration_ns


@value
class Heard:
    """A stretch of a received piece that the listener has heard: `piece` counts the pieces received, from 0."""

    piece: int
    offset_ns: int
    duration_ns: int
    at_ns: int


class Player:
    """The listener's end: pieces are heard one after the other, in real time.

    Speech of a window is played from `delay` after the window's end on: that much jitter is absorbed, and a run on
    time sounds the same every time. A turn begins as late as one of the last pieces came, where that was later, so
    that the next one that late does not break it. A piece that arrives after what was before it has been heard is
    played at once (an underrun, counted by the caller from `late_ns`).
    """

    def __init__(
        self,
        *,
        delay_ns: int,
        most_delay_ns: int = 0,
        ack: Ack = Ack(0),  # noqa: B008 - it is a value
        now_ns: int = 0,
    ) -> None:
        """most_delay_ns: a turn on time begins at most so long after its window's end; no less than delay_ns.
        ack: what was last said of a listener whose player has died; what was queued there is lost. now_ns: since."""
        self._delay_ns = delay_ns
        self._most_delay_ns = max(most_delay_ns, delay_ns)
        self._came_after_ns: deque[int] = deque(maxlen=NUM_CAME)  # their windows' ends, the last pieces
        self._in_turn = False
        self._now_ns = now_ns
        self._pieces: deque[_Piece] = deque()
        self._first = 0  # number of the piece at the head of the queue
        self._heard_ns = self._received_ns = ack.heard_ns
        self._through_ns = ack.through_ns
        self._num_turns, self._num_windows = ack.num_turns, ack.num_windows
        self._epoch = ack.epoch
        self._paused = False

    @property
    def now_ns(self) -> int:
        return self._now_ns

    @property
    def paused(self) -> bool:
        return self._paused

    @property
    def unheard_ns(self) -> int:
        """Speech received and not heard."""
        return self._received_ns - self._heard_ns

    @property
    def next_change_ns(self) -> int | None:
        """When the next piece begins to be heard, or the one that is being heard ends; None: not as things are."""
        if self._paused or not self._pieces:
            return None
        piece = self._pieces[0]
        return piece.start_ns + piece.duration_ns if piece.heard_ns else max(piece.start_ns, self._now_ns + 1)

    @property
    def last_end_ns(self) -> int:
        """When the last piece will have been heard, as scheduled; now when nothing is queued."""
        return self._pieces[-1].start_ns + self._pieces[-1].duration_ns if self._pieces else self._now_ns

    def receive(self, duration_ns: int, window_end_ns: int, *, end_of_turn: bool) -> int:
        """Queue a piece that has arrived now. Returns by how much it is late for its playing time (0: on time)."""
        delay_ns, worst_ns = self._delay_ns, max(self._came_after_ns, default=0)
        if worst_ns > delay_ns and not self._in_turn:
            delay_ns = min(worst_ns + SPARE_NS, self._most_delay_ns)
        self._came_after_ns.append(self._now_ns - window_end_ns)
        self._in_turn = not end_of_turn
        planned_ns = max(window_end_ns + delay_ns, self.last_end_ns if self._pieces else 0)
        start_ns = max(planned_ns, self._now_ns)
        self._pieces.append(_Piece(start_ns, duration_ns))
        self._received_ns += duration_ns
        self._num_turns += end_of_turn
        return start_ns - planned_ns

    def settled(self, through_ns: int) -> None:
        """All speech of windows that end at or before `through_ns` has been received."""
        self._through_ns = max(self._through_ns, through_ns)

    def ended(self, num_windows: int) -> None:
        """So many windows have come to their end."""
        self._num_windows = num_windows

    def advance(self, now_ns: int) -> list[Heard]:
        """Let time pass; returns what was heard meanwhile, in order. Time never runs backwards."""
        heard: list[Heard] = []
        while self._pieces and not self._paused:
            piece = self._pieces[0]
            until_ns = min(max(now_ns - piece.start_ns, 0), piece.duration_ns)
            if until_ns > piece.heard_ns:
                at_ns = piece.start_ns + piece.heard_ns
                heard.append(Heard(self._first, piece.heard_ns, until_ns - piece.heard_ns, at_ns))
                self._heard_ns += until_ns - piece.heard_ns
                piece.heard_ns = until_ns
            if piece.heard_ns < piece.duration_ns:
                break
            self._pieces.popleft()
            self._first += 1
        self._now_ns = max(self._now_ns, now_ns)
        return heard

    def pause(self) -> None:
        """The listener stops listening; call `advance` first."""
        self._paused = True

    def resume(self) -> None:
        """The listener goes on where it stopped; what is queued moves."""
        if not self._paused:
            return
        self._paused = False
        next_ns = self._now_ns
        for piece in self._pieces:
            rest_ns = piece.duration_ns - piece.heard_ns
            piece.start_ns = max(piece.start_ns, next_ns - piece.heard_ns)
            next_ns = piece.start_ns + piece.heard_ns + rest_ns

    def flush(self, epoch: int) -> int:
        """Barge-in: drop what was not heard and return how many ns that is; call `advance` first."""
        unheard_ns = self.unheard_ns
        self._first += len(self._pieces)
        self._pieces.clear()
        self._in_turn = False
        self._received_ns, self._epoch = self._heard_ns, epoch
        return unheard_ns

    def ack(self) -> Ack:
        """What to tell the other end, as of now."""
        pieces = () if self._paused else tuple(self._pieces)
        queue = tuple([(p.start_ns + p.heard_ns, p.duration_ns - p.heard_ns) for p in pieces])
        totals = (self._heard_ns, self._received_ns, self._through_ns, self._num_turns)
        return Ack(self._now_ns, *totals, self._epoch, queue, self._num_windows)


def ack_chunk(session: SessionId, ack: Ack, level: int = 0) -> Chunk:
    """An Ack as it travels to all who ask for it, and with it how far down the shedding ladder the session is."""
    attrs = {
        "level": level,
        "heard_ns": ack.heard_ns,
        "received_ns": ack.received_ns,
        "through_ns": ack.through_ns,
        "num_turns": ack.num_turns,
        "num_windows": ack.num_windows,
    }
    arrays = {"queue": np.array(ack.queue, dtype=np.int64)} if ack.queue else {}
    return Chunk(session, "", ack.at_ns, epoch=ack.epoch, type=ChunkType.PLAYBACK, arrays=arrays, attrs=attrs)


def ack_of(chunk: Chunk) -> Ack:
    """The Ack in a control chunk of the playback stream. Raises KeyError when it holds none."""
    through_ns, num_turns = int(chunk.attrs["through_ns"] or 0), int(chunk.attrs["num_turns"] or 0)
    num_windows = int(chunk.attrs["num_windows"] or 0)
    queue = chunk.arrays.get("queue")
    pieces = () if queue is None else tuple([(start, length) for start, length in queue.astype(np.int64).tolist()])
    return Ack(chunk.start_ns, *totals_of(chunk), through_ns, num_turns, chunk.epoch, pieces, num_windows)


def totals_of(chunk: Chunk) -> tuple[int, int]:
    """What was heard and what was received, ns, of an Ack as it travels. Raises KeyError when it holds none."""
    return int(chunk.attrs["heard_ns"] or 0), int(chunk.attrs["received_ns"] or 0)
