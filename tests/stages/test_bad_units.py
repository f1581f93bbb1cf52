"""The model stages under a unit that raises: the others say what they would have said without it."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from deploy.actor.isolation import process
from graph.chunk import NS_PER_S, Chunk, SessionId
from graph.window import Unit
from stages.stage import Stage
from tests.support.batching import open_all
from tests.support.streams import MIC, camera_stream
from tests.support.tiny import Tiny
from tests.support.units import audio, codes, image, text, unit

DIM = 128
Make = Callable[[str, int, bool], Unit]


def pictures(name: str, index: int, bad: bool) -> Unit:
    shape = (7,) if bad else (32, 32, 3)
    return unit(
        name, index, Chunk(SessionId(name), camera_stream(name), index, arrays={"image": np.zeros(shape, np.uint8)})
    )


def sound(name: str, index: int, bad: bool) -> Unit:
    samples = np.full((16_000, 2) if bad else 16_000, 0.1 * (index + 1), np.float32)
    return unit(name, index, Chunk(SessionId(name), MIC, index * NS_PER_S, NS_PER_S, arrays={"samples": samples}))


def sensed(name: str, index: int, bad: bool) -> Unit:
    random = np.random.default_rng(index)
    seen = image(name, index * NS_PER_S, random.normal(0, 1, (1, 64, 7 if bad else DIM)).astype(np.float32))
    return unit(name, index, seen, audio(name, index, random.normal(0, 1, (10, DIM)).astype(np.float32)))


def said(name: str, index: int, bad: bool) -> Unit:
    hidden = np.random.default_rng(index).normal(0, 1, (3, DIM)).astype(np.float32)
    attrs = {"text": "word", "turn_start": index == 0, "end_of_turn": False}
    whole = text(name, index, [1, 2, 3], hidden, **attrs)
    return unit(name, index, Chunk(SessionId(name), "text", index, attrs=attrs) if bad else whole)


def spoken(name: str, index: int, bad: bool) -> Unit:
    return unit(name, index, codes(name, index, [10**6] if bad else [index] * 25, text="word", end_of_turn=False))


STAGES: dict[str, tuple[Callable[[Tiny], Stage], Make]] = {
    "vision_encoder": (lambda tiny: tiny.vision_encoder(), pictures),
    "audio_encoder": (lambda tiny: tiny.audio_encoder(), sound),
    "llm": (lambda tiny: tiny.llm(), sensed),
    "tts": (lambda tiny: tiny.tts(), said),
    "vocoder": (lambda tiny: tiny.vocoder(), spoken),
}


def of(name: str, chunks: Sequence[Chunk]) -> list[tuple[str, dict[str, np.ndarray]]]:
    return [(chunk.stream, dict(chunk.arrays)) for chunk in chunks if chunk.session == name]


@pytest.mark.parametrize("name", STAGES)
def test_a_bad_unit_fails_alone_and_the_others_go_on_as_without_it(tiny: Tiny, name: str):
    make_stage, make = STAGES[name]
    beside, alone = make_stage(tiny), make_stage(tiny)
    open_all(beside, ["door", "yard"])
    open_all(alone, ["yard"])
    for index in range(3):
        outcome = process(beside, [make("door", index, index == 1), make("yard", index, False)])
        expected = process(alone, [make("yard", index, False)])
        assert set(outcome.failed) == ({"door"} if index == 1 else set()), outcome.failed
        ours, theirs = of("yard", outcome.chunks), of("yard", expected.chunks)
        assert [stream for stream, _ in ours] == [stream for stream, _ in theirs]
        for (_, got), (_, reference) in zip(ours, theirs, strict=True):
            for key in reference:
                np.testing.assert_allclose(got[key], reference[key], atol=1e-4)


@pytest.mark.parametrize("name", ["audio_encoder", "llm", "tts", "vocoder"])
def test_after_a_failure_in_the_model_itself_all_lose_a_window_and_go_on(tiny: Tiny, name: str):
    make_stage, make = STAGES[name]
    stage = make_stage(tiny)
    open_all(stage, ["door", "yard"])
    process(stage, [make(each, 0, False) for each in ("door", "yard")])
    owner, method = {
        "audio_encoder": ("_model", "encode"),
        "llm": ("_engine", "close"),
        "tts": ("_model", "generate"),
        "vocoder": ("_model", "stream"),
    }[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(getattr(stage, owner), method, broken)
        failed = process(stage, [make(each, 1, False) for each in ("door", "yard")]).failed
    assert set(failed) == {"door", "yard"}
    assert process(stage, [make(each, 2, False) for each in ("door", "yard")]).failed == {}


def broken(*_: object) -> None:
    raise RuntimeError("a kernel that is none")
