"""stages/audio_encoder.py: every window is heard, in its place."""

import copy

import numpy as np
import torch

from graph.chunk import NS_PER_S, Chunk, SessionId
from graph.window import Unit
from stages.audio_encoder import VOICE_ROLE, AudioEncoder
from stages.rates import SOUND_RATE_HZ
from tests.support.batching import TOLERANCE, assert_batches
from tests.support.streams import MIC
from tests.support.tiny import Tiny
from tests.support.units import session, unit


def noise(name: str, index: int) -> np.ndarray:
    return np.random.default_rng(sum(map(ord, name)) * 100 + index).normal(0, 0.1, SOUND_RATE_HZ).astype(np.float32)


def sound(name: str, index: int, samples: np.ndarray | None = None, first: int = 0) -> Chunk:
    samples = noise(name, index) if samples is None else samples
    start_ns = index * NS_PER_S + first * NS_PER_S // SOUND_RATE_HZ
    duration_ns = len(samples) * NS_PER_S // SOUND_RATE_HZ
    return Chunk(SessionId(name), MIC, start_ns, duration_ns, arrays={"samples": samples})


def listen(stage: AudioEncoder, *units: Unit) -> list[Chunk]:
    stage.open_session(session("a"))
    return [chunk for one in units for chunk in stage.process([one])]


def close(one: Chunk, other: Chunk) -> bool:
    return np.allclose(one.arrays["embeds"], other.arrays["embeds"], rtol=TOLERANCE, atol=TOLERANCE)


def test_sessions_get_the_same_alone_and_in_any_batch(tiny: Tiny):
    work = {name: [unit(name, k, sound(name, k)) for k in range(5)] for name in ("a", "b", "c")}
    said = assert_batches(tiny.audio_encoder, work)
    assert [chunk.arrays["embeds"].shape for chunk in said["a"]] == [(10, 128)] * 5


def test_with_resident_pasts_sessions_get_the_same_and_who_leaves_gives_its_place_back(tiny: Tiny):
    stock = tiny.audio_encoder()
    resident = AudioEncoder(copy.deepcopy(stock._model))
    with torch.inference_mode():
        resident._model.make_resident(1)
    assert (resident.runs_with, stock.runs_with) == ("cpu, graphs for up to 1 sessions", "")
    for name in ("a", "b"):
        units = [unit(name, index, sound(name, index)) for index in range(3)]
        said = []
        for stage in (resident, stock):
            stage.open_session(session(name))
            said.append([chunk for one in units for chunk in stage.process([one])])
        assert all(close(one, other) for one, other in zip(*said, strict=True)) and len(said[0]) == 3
        assert resident._open[SessionId(name)].state.slot == 1
        resident.close_session(SessionId(name))


def test_a_missing_window_is_heard_as_silence_and_nothing_is_told_of_it(tiny: Tiny):
    silence = np.zeros(SOUND_RATE_HZ, np.float32)
    missing = listen(tiny.audio_encoder(), unit("a", 0, sound("a", 0)), unit("a", 1), unit("a", 2, sound("a", 2)))
    quiet = listen(tiny.audio_encoder(), *(unit("a", k, sound("a", k, silence if k == 1 else None)) for k in range(3)))
    assert [chunk.start_ns for chunk in missing] == [0, 2 * NS_PER_S]
    assert close(missing[1], quiet[2])


def test_a_window_that_was_heard_shows_in_those_that_follow(tiny: Tiny):
    missing = listen(tiny.audio_encoder(), unit("a", 0, sound("a", 0)), unit("a", 1), unit("a", 2, sound("a", 2)))
    whole = listen(tiny.audio_encoder(), *(unit("a", k, sound("a", k)) for k in range(3)))
    assert not close(missing[1], whole[2])


def test_a_part_of_a_window_stands_in_its_place(tiny: Tiny):
    half = noise("a", 0)[:8_000]
    padded = np.concatenate([np.zeros(4_000, np.float32), half, np.zeros(4_000, np.float32)])
    one = listen(tiny.audio_encoder(), unit("a", 0, sound("a", 0, half, first=4_000)))
    other = listen(tiny.audio_encoder(), unit("a", 0, sound("a", 0, padded)))
    assert close(one[0], other[0])


def test_of_a_chunk_that_was_carried_only_what_lies_in_the_window_is_heard(tiny: Tiny):
    # Given: a chunk which begins half a second before the window that it was carried into.
    long = np.concatenate([noise("a", 0)[8_000:], noise("a", 1)])
    carried = listen(tiny.audio_encoder(), unit("a", 0), unit("a", 1, sound("a", 0, long, first=8_000)))
    exact = listen(tiny.audio_encoder(), unit("a", 0), unit("a", 1, sound("a", 1)))
    assert close(carried[0], exact[0])


def test_the_voice_comes_once_with_the_first_window(tiny: Tiny):
    said = listen(tiny.audio_encoder(voice=True), unit("a", 0), unit("a", 1, sound("a", 1)))
    voice, *rest = said
    assert (voice.attrs["role"], voice.start_ns, voice.duration_ns) == (VOICE_ROLE, 0, 0)
    assert voice.arrays["embeds"].shape[1] == 128
    assert [chunk.attrs.get("role") for chunk in rest] == [None]


def test_a_closed_session_may_come_again(tiny: Tiny):
    stage = tiny.audio_encoder()
    first = listen(stage, unit("a", 0, sound("a", 0)), unit("a", 1, sound("a", 1)))
    stage.close_session(SessionId("a"))
    stage.close_session(SessionId("a"))
    again = listen(stage, unit("a", 0, sound("a", 0)))
    assert close(first[0], again[0])


def test_the_voice_comes_again_for_who_knows_nothing(tiny: Tiny):
    encoder = tiny.audio_encoder(voice=True)
    listen(encoder, unit("a", 0, sound("a", 0)))
    encoder.downstream_replaced(SessionId("a"))
    said = [chunk for k in (1, 2) for chunk in encoder.process([unit("a", k, sound("a", k))])]
    assert [chunk.attrs.get("role") for chunk in said] == [VOICE_ROLE, None, None]
