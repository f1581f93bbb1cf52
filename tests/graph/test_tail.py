from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from random import Random

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from graph.chunk import NS_PER_MS, NS_PER_S, Chunk, ChunkType, SessionId
from graph.codec import decode, encode
from graph.tail import (
    ACK_TIMEOUT_NS,
    FIRST_NS_PER_TOKEN,
    MAX_ACKS,
    MAX_TEXT_TOKENS,
    NUM_CAME,
    SPARE_NS,
    Ack,
    Heard,
    Playback,
    Player,
    SpeechCredit,
    TextBudget,
    ack_chunk,
    ack_of,
)

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure

T = NS_PER_S
LEAD = NS_PER_S
ALLOWED = LEAD + T
LONGEST = 1280 * NS_PER_MS  # the last piece of a turn: the vocoder's look-ahead comes out with it
ACK_EVERY = 100 * NS_PER_MS
DELAY = 1200 * NS_PER_MS


# ---- the closed loop, in event time --------------------------------------------------------------------------------

Fate = Callable[[Random, int], list[int]]
"""How long each copy of an Ack travels that is made at a time; empty: it is lost."""


def perfect(random: Random, at_ns: int) -> list[int]:
    return [0]


def in_time(random: Random, at_ns: int) -> list[int]:
    """Jittered, reordered and doubled, but there when the window is decided."""
    return [random.randrange(LLM_AT_NS) for _ in range(random.choice([1, 1, 2]))]


def unreliable(random: Random, at_ns: int) -> list[int]:
    """Lost, doubled, reordered and late, by seconds at times; silent for long at times."""
    silent = random.random() < 0.3 or (at_ns // (7 * NS_PER_S)) % 3 == 2
    return [] if silent else [random.choice([0, 50, 400, 3000]) * NS_PER_MS for _ in range(random.choice([1, 1, 3]))]


LLM_AT_NS = 200 * NS_PER_MS  # after the window's end
TTS_AT_NS = 350 * NS_PER_MS


@dataclass(frozen=True)
class World:
    """What is random in a session, apart from the acks' ways."""

    seed: int
    num_windows: int = 40
    true_ns_per_token: int = 270 * NS_PER_MS
    talkative: float = 0.6  # chance per window that a turn begins
    turn_tokens: tuple[int, int] = (1, 60)
    pauses: bool = True
    barge_ins: bool = True


@dataclass
class Loop:
    """A listener, an LLM and a TTS of one session, with the real parts of graph/tail.py between them.

    The acks go to LLM and TTS on ways of their own, with fates of their own; whatever else is random comes from the
    world, so that two runs which differ in the acks' fates may be compared.
    """

    world: World
    fate: Fate
    calm_from_ns: int = 10**18  # acks are perfect from here on
    budgets: list[int] = field(default_factory=list)
    parked: list[bool] = field(default_factory=list)
    pieces: list[tuple[int, int]] = field(default_factory=list)
    unheard: list[int] = field(default_factory=list)
    heard: list[Heard] = field(default_factory=list)
    num_late: int = 0
    num_planned: int = 0

    def __post_init__(self) -> None:
        self.acks_random = Random(self.world.seed + 1)
        self.now_ns = 0
        self.agenda: list[tuple[int, int, Callable[[], None]]] = []
        self.player = Player(delay_ns=DELAY)
        self.llm_playback, self.tts_playback = Playback(), Playback()
        self.budget = TextBudget(self.llm_playback, lead_ns=LEAD, window_ns=T)
        self.credit = SpeechCredit(self.tts_playback, lead_ns=LEAD, window_ns=T)
        self.epoch = self.llm_epoch = self.tts_epoch = 0
        self.tokens_to_say = 0  # of the LLM's turn
        self.speech_to_make_ns = 0  # text that the TTS has not spoken yet
        self.turn_ended = True  # as far as the TTS has heard
        self.last_arrival_ns = 0

    def at(self, at_ns: int, do: Callable[[], None]) -> None:
        """Plan something; what is planned first comes first at equal times."""
        heapq.heappush(self.agenda, (at_ns, self.num_planned, do))
        self.num_planned += 1

    def run(self) -> Loop:
        for k in range(self.world.num_windows):
            random = Random(self.world.seed * 1_000_003 + k)
            self._plan_window(k, random)
        self.at((self.world.num_windows + 10) * T, self._ack)
        while self.agenda:
            self.now_ns, _, do = heapq.heappop(self.agenda)
            self.heard += self.player.advance(self.now_ns)
            do()
            self.unheard.append(self.player.unheard_ns)
        return self

    def _plan_window(self, k: int, random: Random) -> None:
        end_ns = (k + 1) * T
        self.at(end_ns + LLM_AT_NS, lambda: self._decide_text(end_ns, random))
        self.at(end_ns + TTS_AT_NS, lambda: self._make_speech(end_ns, random))
        for tick in range(T // ACK_EVERY):
            self.at(k * T + tick * ACK_EVERY, self._ack)
        if self.world.pauses and random.random() < 0.1:
            begin_ns = k * T + 1 + random.randrange(T)
            self.at(begin_ns, self._then_ack(self.player.pause))
            self.at(begin_ns + random.randrange(4 * T), self._then_ack(self.player.resume))
        if self.world.barge_ins and random.random() < 0.08:
            self.at(k * T + 1 + random.randrange(T), lambda: self._barge_in(random))

    # the listener

    def _then_ack(self, do: Callable[[], None]) -> Callable[[], None]:
        def both() -> None:
            do()
            self._ack()

        return both

    def _ack(self) -> None:
        ack = self.player.ack()
        fate = perfect if self.now_ns >= self.calm_from_ns else self.fate
        for playback in (self.llm_playback, self.tts_playback):
            for way_ns in fate(self.acks_random, self.now_ns):
                self.at(self.now_ns + way_ns, lambda playback=playback: playback.ack(ack))  # type: ignore[misc]

    def _receive(self, duration_ns: int, end_ns: int, last: bool, epoch: int) -> None:
        if epoch == self.epoch and duration_ns:
            self.num_late += self.player.receive(duration_ns, end_ns, end_of_turn=last) > 0
        self.player.settled(end_ns)
        self._ack()

    def _barge_in(self, random: Random) -> None:
        """The sink flushes first and tells then: its word reaches everyone, some time later."""
        self.epoch += 1
        unheard_ns = self.player.unheard_ns
        assert self.player.flush(self.epoch) == unheard_ns
        ack, epoch = self.player.ack(), self.epoch
        self.at(self.now_ns + random.randrange(100 * NS_PER_MS), lambda: self._interrupt_llm(ack, epoch))
        self.at(self.now_ns + random.randrange(100 * NS_PER_MS), lambda: self._interrupt_tts(ack, epoch))

    # the LLM

    def _interrupt_llm(self, ack: Ack, epoch: int) -> None:
        self.llm_epoch = max(self.llm_epoch, epoch)
        self.llm_playback.ack(ack)
        self.budget.interrupted(ack)
        self.tokens_to_say = 0

    def _decide_text(self, end_ns: int, random: Random) -> None:
        budget = self.budget.tokens(end_ns)
        self.budgets.append(budget)
        self.parked.append(self.llm_playback.parked(end_ns))
        if not self.budget.turn_open and random.random() < self.world.talkative:
            self.tokens_to_say = random.randint(*self.world.turn_tokens)
        if not self.tokens_to_say or not budget:
            return
        num_tokens = min(random.randint(1, budget), self.tokens_to_say)
        self.tokens_to_say -= num_tokens
        last = self.tokens_to_say == 0
        self.budget.generated(num_tokens, end_of_turn=last)
        epoch = self.llm_epoch
        self.at(self.now_ns + 1, lambda: self._take_text(num_tokens, last, epoch))

    # TTS and vocoder

    def _interrupt_tts(self, ack: Ack, epoch: int) -> None:
        self.tts_epoch = max(self.tts_epoch, epoch)
        self.tts_playback.ack(ack)
        self.credit.interrupted()
        self.speech_to_make_ns = 0
        self.turn_ended = True

    def _take_text(self, num_tokens: int, last: bool, epoch: int) -> None:
        if epoch >= self.tts_epoch:
            self.speech_to_make_ns += num_tokens * self.world.true_ns_per_token
            self.turn_ended = last

    def _make_speech(self, end_ns: int, random: Random) -> None:
        """At most T in a window, and up to 1.28 s where a turn ends."""
        rest_ns = self.speech_to_make_ns
        last = self.turn_ended and rest_ns <= LONGEST
        duration_ns = rest_ns if last else min(rest_ns, T)
        if not duration_ns or not self.credit.allows(LONGEST if last else T, end_ns):
            duration_ns = last = 0
        else:
            self.credit.made(duration_ns, end_ns)
            self.speech_to_make_ns -= duration_ns
            self.pieces.append((end_ns, duration_ns))
        epoch = self.tts_epoch
        arrival_ns = max(self.now_ns + random.randrange(600 * NS_PER_MS), self.last_arrival_ns + 1)
        self.last_arrival_ns = arrival_ns
        self.at(arrival_ns, lambda: self._receive(duration_ns, end_ns, bool(last), epoch))


def merged(heard: list[Heard]) -> list[Heard]:
    """The same stretches, however often the listener was looked at meanwhile."""
    whole: list[Heard] = []
    for part in heard:
        last = whole[-1] if whole else Heard(-1, 0, 0, 0)
        goes_on = (last.piece, last.at_ns + last.duration_ns) == (part.piece, part.at_ns)
        begin = whole.pop() if goes_on else replace(part, duration_ns=0)
        whole.append(replace(begin, duration_ns=begin.duration_ns + part.duration_ns))
    return whole


seeds = st.integers(0, 2**32)
rates = st.integers(60, 900).map(lambda ms: ms * NS_PER_MS)


@settings(unhurried, max_examples=60)
@given(seeds, rates, st.sampled_from([perfect, in_time, unreliable]))
def test_unheard_speech_never_exceeds_lead_and_window_whatever_happens_to_the_acks(
    seed: int, true_ns_per_token: int, fate: Fate
) -> None:
    loop = Loop(World(seed, true_ns_per_token=true_ns_per_token, turn_tokens=(1, 200)), fate).run()
    assert max(loop.unheard) <= ALLOWED


@settings(unhurried, max_examples=40)
@given(seeds, rates)
def test_the_text_budget_stays_in_its_bounds_and_is_nothing_while_parked(seed: int, true_ns_per_token: int) -> None:
    loop = Loop(World(seed, true_ns_per_token=true_ns_per_token), unreliable).run()
    assert all(0 <= n <= MAX_TEXT_TOKENS for n in loop.budgets)
    assert all(n == 0 for n, parked in zip(loop.budgets, loop.parked, strict=True) if parked)


@settings(unhurried, max_examples=40)
@given(seeds, rates)
def test_a_run_decides_the_same_however_its_acks_were_jittered_in_time(seed: int, true_ns_per_token: int) -> None:
    world = World(seed, true_ns_per_token=true_ns_per_token)
    ideal, jittered = Loop(world, perfect).run(), Loop(world, in_time).run()
    assert jittered.budgets == ideal.budgets
    assert jittered.pieces == ideal.pieces
    assert merged(jittered.heard) == merged(ideal.heard)


@settings(unhurried, max_examples=40)
@given(seeds, rates)
@example(0, 100 * NS_PER_MS)
def test_speech_goes_on_once_the_acks_come_back(seed: int, true_ns_per_token: int) -> None:
    world = World(
        seed, true_ns_per_token=true_ns_per_token, talkative=1.0, pauses=False, barge_ins=False, turn_tokens=(40, 400)
    )
    loop = Loop(world, unreliable, calm_from_ns=20 * T).run()
    assert sum(n.duration_ns for n in loop.heard if n.at_ns >= 30 * T) >= T


@settings(unhurried, max_examples=20)
@given(seeds, rates)
@example(0, 200 * NS_PER_MS)
def test_a_long_turn_never_runs_dry_for_good(seed: int, true_ns_per_token: int) -> None:
    """An estimate that is too high grows with every token of a turn; were it never corrected, no text would follow."""
    world = World(seed, 60, true_ns_per_token, talkative=1.0, pauses=False, barge_ins=False, turn_tokens=(900, 999))
    loop = Loop(world, perfect).run()
    assert sum(n.duration_ns for n in loop.heard if n.at_ns >= 40 * T) >= T


# ---- the text budget -----------------------------------------------------------------------------------------------


@dataclass
class Talk:
    """A budget whose every text is spoken in full, window by window, at a true rate, and heard at once."""

    playback: Playback
    budget: TextBudget
    heard_ns: int = 0
    num_turns: int = 0
    now_ns: int = 0

    def turn(self, num_tokens: int, true_ns_per_token: int) -> int:
        """Say and hear one turn; returns the budget there was for it."""
        self.now_ns += T
        budget = self.budget.tokens(self.now_ns)
        self.budget.generated(num_tokens, end_of_turn=True)
        self.heard_ns += num_tokens * true_ns_per_token
        self.num_turns += 1
        self.playback.ack(Ack(self.now_ns + 1, self.heard_ns, self.heard_ns, self.now_ns, self.num_turns))
        return budget


def new_budget() -> tuple[Playback, TextBudget]:
    playback = Playback()
    return playback, TextBudget(playback, lead_ns=LEAD, window_ns=T)


def test_the_first_window_may_say_what_fills_lead_and_window() -> None:
    _, budget = new_budget()
    assert budget.tokens(T) == ALLOWED // FIRST_NS_PER_TOKEN == 7


def test_the_text_waits_for_the_listener() -> None:
    playback, budget = new_budget()
    playback.ack(Ack(T, received_ns=ALLOWED, queue=((T, ALLOWED),)))
    assert budget.tokens(T) == 0
    assert budget.tokens(2 * T) == T // FIRST_NS_PER_TOKEN


def test_text_that_was_not_spoken_yet_counts_as_speech() -> None:
    _, budget = new_budget()
    budget.tokens(T)
    budget.generated(5, end_of_turn=False)
    assert budget.tokens(2 * T) == (ALLOWED - 5 * FIRST_NS_PER_TOKEN) // FIRST_NS_PER_TOKEN


def test_an_ack_that_was_made_after_the_windows_end_does_not_count() -> None:
    playback, budget = new_budget()
    playback.ack(Ack(T, received_ns=ALLOWED))
    playback.ack(Ack(T + 1, heard_ns=ALLOWED, received_ns=ALLOWED))
    assert budget.tokens(T) == 0
    assert budget.tokens(T + 1) == 7


def test_after_five_seconds_without_acks_the_session_parks_and_the_next_ack_wakes_it() -> None:
    playback, budget = new_budget()
    playback.ack(Ack(T))
    assert budget.tokens(T + ACK_TIMEOUT_NS) == 7
    assert budget.tokens(T + ACK_TIMEOUT_NS + 1) == 0
    playback.ack(Ack(T + ACK_TIMEOUT_NS + 1))
    assert budget.tokens(T + ACK_TIMEOUT_NS + 1) == 7


def test_who_goes_on_for_another_owes_nothing_of_what_that_one_said() -> None:
    playback = Playback()
    playback.ack(Ack(9 * T, heard_ns=5 * T, received_ns=5 * T, through_ns=9 * T, num_turns=4))
    budget = TextBudget(playback, lead_ns=LEAD, window_ns=T)
    assert budget.tokens(9 * T) == ALLOWED // FIRST_NS_PER_TOKEN
    budget.generated(4, end_of_turn=True)
    assert budget.tokens(9 * T) == (ALLOWED - 4 * FIRST_NS_PER_TOKEN) // FIRST_NS_PER_TOKEN
    playback.ack(Ack(10 * T, heard_ns=6 * T, received_ns=6 * T, through_ns=10 * T, num_turns=5))
    budget.tokens(10 * T)
    assert budget.ns_per_token < FIRST_NS_PER_TOKEN, "measured by what was said here: 4 tokens, 1 s"


def test_after_a_barge_in_nothing_is_owed_and_the_turn_is_closed() -> None:
    playback, budget = new_budget()
    budget.tokens(T)
    budget.generated(7, end_of_turn=False)
    flushed = Ack(2 * T, heard_ns=T // 2, received_ns=T // 2, epoch=1)
    playback.ack(flushed)
    budget.interrupted(flushed)
    assert not budget.turn_open
    assert budget.tokens(2 * T) == 7


@unhurried
@given(rates, st.lists(st.integers(5, 40), min_size=40, max_size=60))
def test_the_rate_converges_to_what_is_measured(true_ns_per_token: int, turns: list[int]) -> None:
    talk = Talk(*new_budget())
    for num_tokens in turns:
        talk.turn(num_tokens, true_ns_per_token)
    assert abs(talk.budget.ns_per_token - true_ns_per_token) <= true_ns_per_token // 100


@unhurried
@given(st.integers(1, 10**12))
def test_a_measurement_beyond_reason_moves_the_rate_within_its_range_only(true_ns_per_token: int) -> None:
    talk = Talk(*new_budget())
    budgets = [talk.turn(10, true_ns_per_token) for _ in range(50)]
    assert 40_000_000 <= talk.budget.ns_per_token <= 2_000_000_000
    assert all(0 <= n <= MAX_TEXT_TOKENS for n in budgets)


# ---- the acks ------------------------------------------------------------------------------------------------------


@unhurried
@given(st.lists(st.builds(Ack, st.integers(1, 50), st.integers(0, 3)), unique_by=lambda a: a.at_ns), st.data())
def test_acks_say_the_same_in_any_order_and_any_number(acks: list[Ack], data: st.DataObject) -> None:
    in_order, shuffled = Playback(), Playback()
    for ack in sorted(acks, key=lambda a: a.at_ns):
        in_order.ack(ack)
    for ack in [*data.draw(st.permutations(acks)), *acks]:
        shuffled.ack(ack)
    assert [shuffled.as_of(t) for t in range(60)] == [in_order.as_of(t) for t in range(60)]
    assert shuffled.latest == in_order.latest


def test_a_flood_of_acks_is_forgotten_but_for_the_newest() -> None:
    playback = Playback()
    for at_ns in range(1, 10 * MAX_ACKS):
        playback.ack(Ack(at_ns))
    playback.ack(Ack(1))
    assert playback.as_of(0).at_ns == 9 * MAX_ACKS
    assert playback.latest.at_ns == 10 * MAX_ACKS - 1


def test_an_ack_travels_as_a_chunk() -> None:
    ack = Ack(5, 3, 9, 4, 2, 1, ((5, 2), (7, 4)))
    chunk = ack_chunk(SessionId("porch"), ack).on("playback")
    assert chunk.is_control
    assert ack_of(decode([bytes(frame) for frame in encode(chunk)])) == ack


def test_an_ack_with_nothing_queued_travels_too() -> None:
    assert ack_of(decode(encode(ack_chunk(SessionId("porch"), Ack(5)).on("playback")))) == Ack(5)


def test_a_chunk_without_an_ack_is_a_mistake() -> None:
    with pytest.raises(KeyError):
        ack_of(Chunk(SessionId("porch"), "playback", 0, type=ChunkType.PLAYBACK))


# ---- the credit of speech ------------------------------------------------------------------------------------------


def test_speech_may_be_made_up_to_lead_and_window() -> None:
    credit = SpeechCredit(Playback(), lead_ns=LEAD, window_ns=T)
    assert (credit.allows(ALLOWED, T), credit.allows(ALLOWED + 1, T)) == (True, False)
    credit.made(T, T)
    assert (credit.unheard_ns(T), credit.allows(T, T), credit.allows(T + 1, T)) == (T, True, False)


def test_only_acknowledged_playback_gives_credit() -> None:
    playback = Playback()
    credit = SpeechCredit(playback, lead_ns=LEAD, window_ns=T)
    playback.ack(Ack(T, received_ns=ALLOWED, queue=((T, ALLOWED),)))
    assert not credit.allows(1, 3 * T)
    playback.ack(Ack(2 * T, heard_ns=T, received_ns=ALLOWED))
    assert (credit.allows(T, 3 * T), credit.allows(T + 1, 3 * T)) == (True, False)


def test_speech_under_way_counts_until_the_sink_has_all_of_its_window() -> None:
    playback = Playback()
    credit = SpeechCredit(playback, lead_ns=LEAD, window_ns=T)
    credit.made(T, T)
    credit.made(T, 2 * T)
    playback.ack(Ack(2 * T, heard_ns=0, received_ns=T, through_ns=T))
    assert credit.unheard_ns(2 * T) == 2 * T
    playback.ack(Ack(3 * T, heard_ns=T, received_ns=2 * T, through_ns=2 * T))
    assert credit.unheard_ns(3 * T) == T


def test_a_barge_in_frees_what_was_under_way() -> None:
    playback = Playback()
    credit = SpeechCredit(playback, lead_ns=LEAD, window_ns=T)
    credit.made(ALLOWED, T)
    playback.ack(Ack(T, epoch=1))
    credit.interrupted()
    assert credit.allows(ALLOWED, T)


# ---- the listener --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Move:
    """One thing that happens to the listener, some time after the one before."""

    verb: str
    after_ns: int
    duration_ns: int


moves = st.lists(
    st.builds(
        Move,
        st.sampled_from(["receive", "receive", "receive", "look", "pause", "resume", "flush"]),
        st.integers(0, 40),
        st.integers(0, 30),
    ),
    max_size=30,
)


@dataclass
class Listening:
    """A player, and what went in and came out, piece by piece."""

    player: Player
    heard: list[Heard] = field(default_factory=list)
    received: list[int] = field(default_factory=list)
    flushed: list[tuple[int, int]] = field(default_factory=list)  # (said to be unheard, really unheard)
    gone: list[int] = field(default_factory=list)  # pieces that a flush has dropped, or cut
    now_ns: int = 0

    def make(self, moves: list[Move]) -> Iterator[Move]:
        for move in moves:
            self.now_ns += move.after_ns
            self.heard += self.player.advance(self.now_ns)
            {
                "receive": self._receive,
                "look": lambda move: None,
                "pause": lambda move: self.player.pause(),
                "resume": lambda move: self.player.resume(),
                "flush": self._flush,
            }[move.verb](move)
            yield move

    def heard_of(self, piece: int) -> int:
        return sum(h.duration_ns for h in self.heard if h.piece == piece)

    def _receive(self, move: Move) -> None:
        self.received.append(move.duration_ns)
        self.player.receive(move.duration_ns, self.now_ns - move.after_ns, end_of_turn=False)

    def _flush(self, move: Move) -> None:
        left = {n: d - self.heard_of(n) for n, d in enumerate(self.received) if n not in self.gone}
        self.flushed.append((self.player.flush(len(self.flushed) + 1), sum(left.values())))
        self.gone += [n for n, rest in left.items() if rest]


@unhurried
@given(moves)
def test_what_is_heard_is_continuous_in_order_and_never_twice(script: list[Move]) -> None:
    listening = Listening(Player(delay_ns=20))
    for _ in listening.make(script):
        pass
    places = [(h.piece, h.offset_ns) for h in listening.heard]
    assert places == sorted(set(places))
    assert all(h.offset_ns == 0 or (h.piece, 0) in places for h in listening.heard)
    follows = zip(listening.heard, listening.heard[1:], strict=False)
    assert all(b.offset_ns == (a.offset_ns + a.duration_ns) * (a.piece == b.piece) for a, b in follows)


@unhurried
@given(moves)
def test_what_is_heard_takes_its_time(script: list[Move]) -> None:
    listening = Listening(Player(delay_ns=20))
    for _ in listening.make(script):
        assert all(h.at_ns + h.duration_ns <= listening.now_ns for h in listening.heard)
    follows = zip(listening.heard, listening.heard[1:], strict=False)
    assert all(a.at_ns + a.duration_ns <= b.at_ns for a, b in follows)


@unhurried
@given(moves)
def test_a_piece_is_heard_whole_unless_it_was_flushed_or_is_still_queued(script: list[Move]) -> None:
    listening = Listening(Player(delay_ns=20))
    for _ in listening.make(script):
        pass
    listening.player.resume()
    listening.heard += listening.player.advance(listening.player.last_end_ns)
    whole = [n for n in range(len(listening.received)) if n not in listening.gone]
    assert [listening.heard_of(n) for n in whole] == [listening.received[n] for n in whole]
    assert listening.player.unheard_ns == 0


@unhurried
@given(moves)
def test_the_totals_are_what_was_really_heard_and_received(script: list[Move]) -> None:
    listening = Listening(Player(delay_ns=20))
    for _ in listening.make(script):
        ack = listening.player.ack()
        dropped_ns = sum(said for said, _ in listening.flushed)
        assert ack.heard_ns == sum(h.duration_ns for h in listening.heard) <= ack.received_ns
        assert ack.received_ns == sum(listening.received) - dropped_ns
        assert (ack.at_ns, ack.epoch) == (listening.now_ns, len(listening.flushed))


@unhurried
@given(moves)
def test_a_flush_says_exactly_what_was_not_heard(script: list[Move]) -> None:
    listening = Listening(Player(delay_ns=20))
    for _ in listening.make(script):
        pass
    assert all(said == real for said, real in listening.flushed)


@unhurried
@given(moves, st.lists(st.integers(0, 40), max_size=5))
def test_an_ack_foretells_exactly_what_will_have_been_heard(script: list[Move], waits: list[int]) -> None:
    listening = Listening(Player(delay_ns=20))
    for _ in listening.make(script):
        pass
    foretold = listening.player.ack()
    for wait_ns in waits:
        listening.now_ns += wait_ns
        listening.player.advance(listening.now_ns)
        assert foretold.heard_at(listening.now_ns) == listening.player.ack().heard_ns


def test_speech_is_played_from_the_delay_after_its_windows_end_on() -> None:
    player = Player(delay_ns=200)
    player.advance(1000)
    assert player.receive(500, 1000, end_of_turn=False) == 0
    assert player.advance(2000) == [Heard(0, 0, 500, 1200)]


def test_a_piece_that_arrives_after_its_time_is_played_at_once_and_says_how_late_it_is() -> None:
    player = Player(delay_ns=200)
    player.advance(1500)
    assert player.receive(500, 1000, end_of_turn=False) == 300
    assert player.advance(2500) == [Heard(0, 0, 500, 1500)]


def test_a_turn_begins_as_late_as_speech_came_lately_so_that_the_next_piece_that_late_breaks_nothing() -> None:
    player = Player(delay_ns=200, most_delay_ns=10**12)
    player.advance(1500)
    assert player.receive(100, 1000, end_of_turn=True) == 300
    player.advance(10_100)
    assert player.receive(1000, 10_000, end_of_turn=False) == 0
    assert player.ack().queue == ((10_500 + SPARE_NS, 1000),)
    player.advance(11_500)
    assert player.receive(1000, 11_000, end_of_turn=True) == 0


def test_a_turn_on_time_begins_after_the_delay_and_none_later_than_the_most() -> None:
    player = Player(delay_ns=200, most_delay_ns=300)
    player.receive(100, 0, end_of_turn=True)
    player.receive(100, 1000, end_of_turn=True)
    assert player.ack().queue == ((200, 100), (1200, 100))
    player.advance(2900)
    player.receive(100, 2000, end_of_turn=True)  # 700 later than it was to begin
    player.advance(3000)
    player.receive(100, 3000, end_of_turn=True)
    assert player.ack().queue == ((3300, 100),)


def test_speech_that_comes_on_time_again_is_no_longer_waited_for() -> None:
    player = Player(delay_ns=200, most_delay_ns=10**12)
    player.advance(900)
    for index in range(NUM_CAME + 1):
        player.receive(1, 10_000 * index, end_of_turn=True)
    player.advance(10**9)
    player.receive(1, 2 * 10**9, end_of_turn=True)
    assert player.ack().queue == ((2 * 10**9 + 200, 1),)


def test_a_listener_runs_dry_when_all_that_has_come_was_heard() -> None:
    playback = Playback()
    assert playback.dry_ns is None
    playback.ack(Ack(10, received_ns=100, queue=((20, 40), (60, 60))))
    assert playback.dry_ns == 120
    playback.ack(Ack(130, heard_ns=100, received_ns=100))
    assert playback.dry_ns is None


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.integers(0, 40))
def test_speech_had_come_when_the_first_ack_says_so(steps: list[int], through_ns: int) -> None:
    playback, acks = Playback(), []
    for at_ns, step in enumerate(steps):
        acks.append(Ack(10 * at_ns, through_ns=step + (acks[-1].through_ns if acks else 0)))
        playback.ack(acks[-1])
    came = [ack.at_ns for ack in acks if ack.through_ns >= through_ns]
    assert playback.arrived_ns(through_ns) == (0 if through_ns == 0 else min(came, default=None))


def test_a_piece_behind_another_begins_where_that_one_ends() -> None:
    player = Player(delay_ns=0)
    player.receive(700, 0, end_of_turn=False)
    assert player.receive(700, 500, end_of_turn=False) == 0
    assert player.advance(5000) == [Heard(0, 0, 700, 0), Heard(1, 0, 700, 700)]


def test_a_pause_moves_what_is_queued() -> None:
    player = Player(delay_ns=0)
    player.receive(100, 0, end_of_turn=False)
    player.receive(100, 100, end_of_turn=False)
    assert player.advance(40) == [Heard(0, 0, 40, 0)]
    player.pause()
    assert (player.advance(1000), player.ack().queue, player.ack().heard_at(5000)) == ([], (), 40)
    player.resume()
    assert player.ack().queue == ((1000, 60), (1060, 100))
    assert player.advance(2000) == [Heard(0, 40, 60, 1000), Heard(1, 0, 100, 1060)]


def test_a_short_pause_before_the_first_sound_moves_nothing() -> None:
    player = Player(delay_ns=500)
    player.receive(100, 0, end_of_turn=False)
    player.pause()
    player.advance(300)
    player.resume()
    assert player.ack().queue == ((500, 100),)


def test_a_turn_counts_once_its_last_piece_has_come_even_one_without_sound() -> None:
    player = Player(delay_ns=0)
    player.receive(10, 0, end_of_turn=False)
    assert player.ack().num_turns == 0
    player.receive(0, 0, end_of_turn=True)
    assert player.ack().num_turns == 1


def test_what_has_been_settled_stays_settled() -> None:
    player = Player(delay_ns=0)
    player.settled(2 * T)
    player.settled(T)
    assert player.ack().through_ns == 2 * T
