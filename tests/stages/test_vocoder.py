"""stages/vocoder.py: codes become sound, never further ahead of the ear than TAIL allows."""

import copy

import numpy as np
import pytest
import torch

from graph.chunk import NS_PER_MS, NS_PER_S, Chunk
from graph.tail import Player
from stages.rates import SPEECH_RATE_HZ
from stages.session import Session
from stages.vocoder import HELD_BACK_NS, Vocoder, _longest_ns
from tests.support.batching import assert_batches
from tests.support.listeners import HearsAtOnce
from tests.support.tiny import Tiny
from tests.support.units import DOOR, ack, codes, session, unit


def voice(name: str, index: int, num_codes: int = 25, *, end: bool = False, said: str | None = None) -> Chunk:
    random = np.random.default_rng(sum(map(ord, name)) * 1000 + index)
    spoken = random.integers(0, 6000, num_codes).tolist()
    return codes(name, index, spoken, text=f"{name}{index}" if said is None else said, end_of_turn=end)


def opened(stage: Vocoder, **fields: object) -> Session:
    one = session(**fields)
    stage.open_session(one)
    return one


def num_samples(chunks: list[Chunk]) -> list[int]:
    return [len(chunk.arrays["samples"]) for chunk in chunks]


class Free(HearsAtOnce, Vocoder):
    """A vocoder whose listeners hear everything at once."""


def free(tiny: Tiny) -> Free:
    plain = tiny.vocoder(seed=4)
    return Free(plain._model, plain._voice, 4)


def test_sessions_sound_the_same_alone_and_in_any_batch(tiny: Tiny):
    lengths = {"a": (25, 25, 25, 9), "b": (25, 6, 25, 25), "c": (3, 25, 25, 0)}
    work = {
        name: [unit(name, index, voice(name, index, num, end=index == 3)) for index, num in enumerate(nums)]
        for name, nums in lengths.items()
    }
    said = assert_batches(lambda: free(tiny), work)
    assert [len(chunks) for chunks in said.values()] == [4, 4, 3]


def test_25_codes_are_24000_samples(tiny: Tiny):
    stage = free(tiny)
    opened(stage)
    said = [chunk for index in range(3) for chunk in stage.process([unit("door", index, voice("door", index))])]
    assert num_samples(said) == [24_000] * 3
    assert [(chunk.start_ns, chunk.duration_ns) for chunk in said] == [(k * NS_PER_S, NS_PER_S) for k in range(3)]


def test_the_end_of_a_turn_sounds_all_that_was_held_back(tiny: Tiny):
    stage = free(tiny)
    opened(stage)
    (first,) = stage.process([unit("door", 0, voice("door", 0))])
    (last,) = stage.process([unit("door", 1, voice("door", 1, 10, end=True))])
    assert num_samples([first, last]) == [24_000, 10 * 960 + 280 * 24]
    assert last.duration_ns == 10 * NS_PER_S // 25 + HELD_BACK_NS


def test_after_a_turn_the_next_one_begins_anew(tiny: Tiny):
    once, twice = free(tiny), free(tiny)
    for stage in (once, twice):
        opened(stage)
    twice.process([unit("door", 0, voice("door", 5, end=True))])
    assert num_samples(twice.process([unit("door", 1, voice("door", 1))])) == [24_000]
    assert num_samples(once.process([unit("door", 1, voice("door", 1))])) == [24_000]


def test_the_words_of_codes_too_few_to_sound_are_heard_with_the_next(tiny: Tiny):
    stage = free(tiny)
    opened(stage)
    assert stage.process([unit("door", 0, voice("door", 0, 2, said="Hel"))]) == []
    (chunk,) = stage.process([unit("door", 1, voice("door", 1, 25, said="lo"))])
    assert chunk.attrs["text"] == "Hello"
    (later,) = stage.process([unit("door", 2, voice("door", 2, 25, said=" there"))])
    assert later.attrs["text"] == " there"


def test_codes_wait_in_order_until_the_listener_is_ready(tiny: Tiny):
    stage = tiny.vocoder()
    listener = opened(stage)
    said = [[c.attrs["text"] for c in stage.process([unit("door", k, voice("door", k))])] for k in range(4)]
    assert said == [["door0"], ["door1"], [], []]
    listener.playback.ack(ack(4.5, heard_s=2.0, received_s=2.0, through_s=4.0))
    said = [[c.attrs["text"] for c in stage.process([unit("door", k)])] for k in (4, 5, 6)]
    assert said == [["door2"], ["door3"], []]


def test_a_session_goes_on_as_long_as_codes_wait(tiny: Tiny):
    stage = tiny.vocoder()
    listener = opened(stage)
    for index in range(3):
        stage.process([unit("door", index, voice("door", index))])
    assert stage.has_more_to_say(DOOR)
    listener.playback.ack(ack(3.5, heard_s=2.0, received_s=2.0, through_s=3.0))
    stage.process([unit("door", 3)])
    assert not stage.has_more_to_say(DOOR)


def test_a_barge_in_forgets_codes_words_and_voice(tiny: Tiny):
    stage, fresh = tiny.vocoder(), tiny.vocoder()
    listener = opened(stage)
    for index in range(4):
        stage.process([unit("door", index, voice("door", index))])
    listener.playback.ack(ack(4.5, heard_s=0.2, received_s=0.2, through_s=1.0, epoch=1))
    assert stage.interrupt(DOOR, listener.playback.latest) == []
    assert stage.process([unit("door", 4)]) == []
    opened(fresh)
    for one in (stage, fresh):
        (chunk,) = one.process([unit("door", 5, voice("door", 5))])
        assert (chunk.attrs["text"], num_samples([chunk])) == ("door5", [24_000])


@pytest.mark.parametrize("num_codes", [0, 1, 4, 5, 12, 25])
def test_no_piece_is_longer_than_was_asked_for(tiny: Tiny, num_codes: int):
    stage = free(tiny)
    opened(stage)
    stage.process([unit("door", 0, voice("door", 0))])
    (last,) = stage.process([unit("door", 1, voice("door", 1, num_codes, end=True))])
    assert last.duration_ns <= num_codes * NS_PER_S // 25 + HELD_BACK_NS


@pytest.mark.parametrize("num_held", [1, 2, 3, 4])
def test_codes_that_an_earlier_window_left_count_in_what_the_last_one_sounds_for(tiny: Tiny, num_held: int):
    plain = tiny.vocoder(seed=4)
    longest_ns: list[int] = []

    class Watched(Free):
        def _next_codes(self, unit):
            state = self._open[unit.session]
            for chunk in unit.chunks["codes"]:
                longest_ns.append(_longest_ns(state.vocoder.codes, chunk))
            return super()._next_codes(unit)

    stage = Watched(plain._model, plain._voice, 4)
    opened(stage)
    stage.process([unit("door", 0, voice("door", 0, num_held))])
    (last,) = stage.process([unit("door", 1, voice("door", 1, 25, end=True))])
    assert last.duration_ns <= longest_ns[-1]


def resident(tiny: Tiny, num_turns: int) -> Vocoder:
    """As on a GPU, but for its speed."""
    shared = tiny.vocoder()
    stage = Vocoder(copy.deepcopy(shared._model), shared._voice, 0)
    with torch.inference_mode():
        stage._model.make_resident([stage._voice], num_turns)
    return stage


def test_who_is_interrupted_or_leaves_gives_its_resident_caches_back(tiny: Tiny):
    stage, stock = resident(tiny, 1), tiny.vocoder()
    assert stage._model._resident is not None
    assert (stage.runs_with, stock.runs_with) == ("cpu, graphs for up to 1 sessions", "")
    room = stage._model._resident._free_slots
    for name in ("a", "b", "c"):
        said = []
        for one in (stage, stock):
            listener = opened(one, name=name)
            said += one.process([unit(name, 0, voice(name, 0))])
            if one is stage:
                assert room == []
            if name == "b":
                one.interrupt(listener.id, ack(1.0, heard_s=0.0, received_s=0.0, through_s=0.0, epoch=1))
            one.close_session(listener.id)
        np.testing.assert_allclose(*(chunk.arrays["samples"] for chunk in said), atol=1e-3)
        assert len(room) == 1


class Listener:
    """The far end of a session: hears what has come at the end of each window, in virtual time."""

    def __init__(self, one: Session) -> None:
        self.session = one
        self.player = Player(delay_ns=one.delay_ns)
        self.unheard_ns: list[int] = []

    def hear(self, index: int, chunks: list[Chunk]) -> None:
        end_ns = (index + 1) * NS_PER_S
        self.player.advance(end_ns)
        for chunk in chunks:
            self.player.receive(chunk.duration_ns, end_ns, end_of_turn=bool(chunk.attrs["end_of_turn"]))
        self.player.settled(end_ns)
        self.unheard_ns.append(self.player.unheard_ns)
        self.player.advance(end_ns + NS_PER_S)
        self.session.playback.ack(self.player.ack())


@pytest.mark.parametrize("lead_ns", [300 * NS_PER_MS, NS_PER_S, 3 * NS_PER_S])
def test_speech_never_runs_further_ahead_than_a_lead_and_a_window(tiny: Tiny, lead_ns: int):
    # Given: a talker that never stops, and a listener who pauses from 6 s to 12 s.
    stage = tiny.vocoder()
    listener = Listener(opened(stage, lead_ns=lead_ns))
    said = []
    for index in range(20):
        if index == 6:
            listener.player.pause()
        if index == 12:
            listener.player.resume()
        said += (chunks := stage.process([unit("door", index, voice("door", index))]))
        listener.hear(index, chunks)
    assert max(listener.unheard_ns) <= lead_ns + NS_PER_S
    assert [chunk.attrs["text"] for chunk in said] == [f"door{index}" for index in range(len(said))]
    assert len(said) >= 12


def test_samples_are_float32_and_at_the_rate_that_the_speaker_plays(tiny: Tiny):
    stage = free(tiny)
    opened(stage)
    (chunk,) = stage.process([unit("door", 0, voice("door", 0))])
    assert chunk.arrays["samples"].dtype == np.float32
    assert chunk.duration_ns * SPEECH_RATE_HZ // NS_PER_S == len(chunk.arrays["samples"])
