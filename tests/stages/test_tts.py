"""stages/tts.py: what is said becomes codes, as far as the listener is."""

import numpy as np
import pytest

from graph.chunk import NS_PER_S, Chunk, SessionId
from graph.window import Unit
from model_shards.kv_cache import KvCache
from model_shards.tts_paged import NUM_STEPS, PagedTalker, shape_of
from stages.session import Session
from stages.stage import Site, StageError
from stages.tts import Tts, TtsOptions
from tests.support.batching import assert_batches, open_all
from tests.support.listeners import HearsAtOnce
from tests.support.tiny import CPU, Tiny
from tests.support.units import DOOR, ack, session, text, unit

DIM = 128


def say(name: str, index: int, num_tokens: int = 3, *, start: bool = False, end: bool = False) -> Unit:
    """A window in which so many tokens are said; the text names the window."""
    random = np.random.default_rng(sum(map(ord, name)) * 1000 + index)
    ids = random.integers(0, 250, num_tokens).tolist()
    hidden = random.normal(0, 1, (num_tokens, DIM)).astype(np.float32)
    attrs = {"text": f"{name}{index}", "turn_start": start, "end_of_turn": end}
    return unit(name, index, text(name, index, ids, hidden, **attrs))


def turns(name: str, num_windows: int) -> list[Unit]:
    """Turns of three windows each, with one window of silence between them."""
    windows = []
    for index in range(num_windows):
        place = index % 4
        windows.append(unit(name, index) if place == 3 else say(name, index, start=place == 0, end=place == 2))
    return windows


def opened(stage: Tts, **fields: object) -> Session:
    one = session(**fields)
    stage.open_session(one)
    return one


def texts(chunks: list[Chunk]) -> list[object]:
    return [chunk.attrs["text"] for chunk in chunks]


class Free(HearsAtOnce, Tts):
    """A TTS whose listeners hear everything at once."""


def test_sessions_say_the_same_alone_and_in_any_batch(tiny: Tiny):
    work = {name: turns(name, 8) for name in ("a", "b", "c")}
    said = assert_batches(lambda: Free(tiny.model("tts"), tiny.tts()._where, None), work)
    assert [len(said[name]) for name in work] == [6, 6, 6]


def test_drawn_codes_are_the_same_alone_and_in_any_batch(tiny: Tiny):
    work = {name: turns(name, 4) for name in ("a", "b", "c")}
    assert_batches(lambda: Free(tiny.model("tts"), tiny.tts()._where, 5), work)


def test_what_is_drawn_depends_on_the_seed_and_the_name(tiny: Tiny):
    def codes(name: str, seed: int) -> tuple[int, ...]:
        stage = tiny.tts(seed)
        open_all(stage, [name])
        words = text(name, 0, [1, 2, 3], np.ones((3, DIM), np.float32), text="")
        stage.process([unit(name, 0, words)])
        return tuple(stage.process([unit(name, 1, words)])[0].arrays["codes"].tolist())

    assert codes("a", 1) == codes("a", 1)
    assert len({codes("a", 1), codes("a", 2), codes("b", 1)}) == 3


def test_a_window_inside_a_turn_has_25_codes(tiny: Tiny):
    stage = tiny.tts()
    opened(stage)
    stage.process([say("door", 0, start=True)])
    (chunk,) = stage.process([say("door", 1)])
    assert chunk.arrays["codes"].shape == (25,)
    assert (chunk.start_ns, chunk.duration_ns) == (NS_PER_S, NS_PER_S)


def test_codes_tell_what_is_said_and_where_a_turn_begins_and_ends(tiny: Tiny):
    stage = tiny.tts()
    opened(stage)
    said = stage.process([say("door", 0, start=True)]) + stage.process([say("door", 1, end=True)])
    assert [dict(chunk.attrs) for chunk in said] == [
        {"text": "door0", "turn_start": True, "end_of_turn": False},
        {"text": "door1", "turn_start": False, "end_of_turn": True},
    ]


def test_text_waits_in_order_until_the_listener_is_ready(tiny: Tiny):
    # Given: a lead and a window are 2 s, and nothing is heard.
    stage = tiny.tts()
    listener = opened(stage)
    said = [texts(stage.process([say("door", index)])) for index in range(4)]
    assert said == [["door0"], ["door1"], [], []]
    # When: one second of two has been heard.
    listener.playback.ack(ack(4.5, heard_s=1.0, received_s=2.0, through_s=4.0))
    said = [texts(stage.process([unit("door", index)])) for index in (4, 5)]
    assert said == [["door2"], []]
    # When: everything has been heard.
    listener.playback.ack(ack(6.5, heard_s=3.0, received_s=3.0, through_s=6.0))
    assert texts(stage.process([say("door", 6)])) == ["door3"]
    assert texts(stage.process([unit("door", 7)])) == ["door6"]


def test_at_most_one_window_of_speech_is_made_in_a_window(tiny: Tiny):
    stage = tiny.tts()
    opened(stage)
    words = [chunk for index in range(3) for chunk in say("door", index).chunks.get("text", ())]
    assert texts(stage.process([unit("door", 2, *words)])) == ["door0"]


def test_the_speech_going_on_does_not_queue_behind_waiting_text(tiny: Tiny):
    stage = tiny.tts()
    listener = opened(stage)
    for index in range(3):
        stage.process([say("door", index)])
    for index in range(3, 20):
        stage.process([say("door", index, num_tokens=0)])
    listener.playback.ack(ack(20.5, heard_s=2.0, received_s=2.0, through_s=20.0))
    said = [texts(stage.process([unit("door", index)])) for index in range(20, 24)]
    assert said == [["door2"], [], [], []]


def test_the_speech_goes_on_by_itself_where_no_text_waits(tiny: Tiny):
    stage = tiny.tts()
    opened(stage)
    stage.process([say("door", 0, start=True)])
    (chunk,) = stage.process([say("door", 1, num_tokens=0)])
    assert len(chunk.arrays["codes"]) == 25


def test_a_turn_is_ended_without_a_word(tiny: Tiny):
    stage = tiny.tts()
    opened(stage)
    stage.process([say("door", 0, start=True)])
    (chunk,) = stage.process([say("door", 1, num_tokens=0, end=True)])
    assert chunk.attrs["end_of_turn"] and len(chunk.arrays["codes"]) <= 25


def test_a_session_goes_on_as_long_as_text_waits(tiny: Tiny):
    stage = tiny.tts()
    listener = opened(stage)
    assert not stage.has_more_to_say(DOOR)
    for index in range(3):
        stage.process([say("door", index)])
    assert stage.has_more_to_say(DOOR)
    listener.playback.ack(ack(3.5, heard_s=2.0, received_s=2.0, through_s=3.0))
    stage.process([unit("door", 3)])
    assert not stage.has_more_to_say(DOOR)


def test_a_barge_in_forgets_what_waits_and_what_was_under_way(tiny: Tiny):
    stage = tiny.tts()
    listener = opened(stage)
    for index in range(5):
        stage.process([say("door", index)])
    listener.playback.ack(ack(5.2, heard_s=0.5, received_s=0.5, through_s=1.0, epoch=1))
    assert stage.interrupt(DOOR, listener.playback.latest) == []
    assert stage.process([unit("door", 5)]) == []
    assert texts(stage.process([say("door", 6, start=True)])) == ["door6"]


def test_after_a_barge_in_the_talker_begins_anew(tiny: Tiny):
    fresh, interrupted = tiny.tts(), tiny.tts()
    for stage in (fresh, interrupted):
        opened(stage)
    interrupted.process([say("door", 7, start=True)])
    interrupted.interrupt(DOOR, ack(1.0))
    expected, actual = (stage.process([say("door", 1, start=True)])[0] for stage in (fresh, interrupted))
    assert actual.arrays["codes"].tolist() == expected.arrays["codes"].tolist()


def paged(tiny: Tiny, num_sessions: int = 3) -> PagedTalker:
    """As on a GPU, with the plain reference of its kernels."""
    model = tiny.model("tts")
    num_pages = num_sessions * -(-(model.config.max_position_embeddings + NUM_STEPS) // 32) + 1
    return PagedTalker(model, KvCache(shape_of(model.config), num_pages), "sdpa", (1, 2, 4))


def test_in_pages_sessions_say_the_same_alone_and_in_any_batch_and_leave_none(tiny: Tiny):
    speaker = paged(tiny)
    cache = speaker.new_state(None).cache
    work = {name: turns(name, 4) for name in ("a", "b", "c")}
    stages: list[Tts] = []

    def make() -> Tts:
        stages.append(Free(speaker, CPU, 5))
        return stages[-1]

    said = assert_batches(make, work)
    assert [len(said[name]) for name in work] == [3, 3, 3]
    for stage in stages:
        for name in work:
            stage.close_session(SessionId(name))
    assert cache.num_used_pages == 1, "that of the blank rows"


def test_in_pages_what_is_likeliest_is_said_as_elsewhere(tiny: Tiny):
    work = [say("door", 0, start=True), say("door", 1), say("door", 2, end=True)]
    codes = []
    for stage in (Free(paged(tiny), CPU, None), Free(tiny.model("tts"), CPU, None)):
        opened(stage)
        codes.append([chunk.arrays["codes"].tolist() for one in work for chunk in stage.process([one])])
    assert codes[0] == codes[1]


def test_a_barge_in_and_a_close_in_the_middle_of_a_turn_give_pages_back(tiny: Tiny):
    speaker = paged(tiny)
    stage, cache = Tts(speaker, CPU, 1), speaker.new_state(None).cache
    opened(stage)
    stage.process([say("door", 0, start=True)])
    stage.process([say("door", 1)])
    assert cache.num_used_pages > 1
    stage.interrupt(DOOR, ack(2.0))
    assert cache.num_used_pages == 1
    stage.process([say("door", 2, start=True)])
    stage.close_session(DOOR)
    assert cache.num_used_pages == 1


def test_a_session_for_which_the_pages_do_not_last_is_refused(tiny: Tiny):
    stage = Tts(paged(tiny, num_sessions=2), CPU, 1)
    open_all(stage, ["a", "b"])
    with pytest.raises(StageError, match=r"no room for session 'c'.*2 sessions are open.*raise stages.tts.kv_memory"):
        open_all(stage, ["c"])
    stage.close_session(SessionId("a"))
    open_all(stage, ["c"])


def test_it_says_what_it_computes_with(tiny: Tiny):
    assert Tts.load(TtsOptions(), Site("tts", tiny.path)).runs_with == "cpu float32, sdpa attention"
    assert Tts(paged(tiny), CPU, 1, "varlen").runs_with == "cpu float32, varlen attention, 5 codes per graph"
    with pytest.raises(StageError, match=r"tts: stages.tts.attention: flash runs on a GPU, not on cpu"):
        Tts.load(TtsOptions(attention="flash"), Site("tts", tiny.path))


def test_closing_twice_does_nothing(tiny: Tiny):
    stage = tiny.tts()
    opened(stage)
    stage.close_session(SessionId("door"))
    stage.close_session(SessionId("door"))
    assert stage.process([]) == []
