from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graph.chunk import Chunk, ChunkType, SessionId, watermark
from graph.epoch import EpochFence
from tests.support.streams import KINDS, kind_of

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure

SAID = [kind.name for kind in KINDS.values() if kind.is_fenced]
SENSED = ["camera/door", "mic", "image", "audio", "events"]


def fence(epoch: int) -> EpochFence:
    made = EpochFence()
    made.raise_to(epoch)
    return made


def piece(stream: str, epoch: int, kind: ChunkType = ChunkType.DATA) -> Chunk:
    return Chunk(SessionId("porch"), stream, 0, epoch=epoch, type=kind)


@unhurried
@given(st.lists(st.integers(0, 9)))
def test_the_epoch_never_moves_back_and_each_rise_is_news_once(epochs: list[int]) -> None:
    subject = EpochFence()
    news = [epoch for epoch in epochs if subject.raise_to(epoch)]
    assert subject.epoch == max([0, *epochs])
    assert news == sorted(set(news))


@pytest.mark.parametrize("stream", SAID)
def test_what_was_said_before_the_barge_in_is_stale(stream: str) -> None:
    assert [fence(2).is_stale(piece(stream, epoch), kind_of(stream)) for epoch in (0, 1, 2, 3)] == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("stream", SENSED)
def test_what_is_seen_and_heard_goes_on_through_a_barge_in(stream: str) -> None:
    assert not fence(2).is_stale(piece(stream, 0), kind_of(stream))
    assert fence(2).epoch_of(kind_of(stream)) == 0


@pytest.mark.parametrize("stream", SAID)
def test_what_is_said_now_belongs_to_the_new_epoch(stream: str) -> None:
    assert fence(3).epoch_of(kind_of(stream)) == 3
    assert not fence(3).is_stale(piece(stream, fence(3).epoch_of(kind_of(stream))), kind_of(stream))


@pytest.mark.parametrize("stream", SAID)
def test_control_is_never_stale_so_that_windows_go_on_closing(stream: str) -> None:
    assert not fence(2).is_stale(watermark(SessionId("porch"), stream, 0), kind_of(stream))
    assert not fence(2).is_stale(piece(stream, 0, ChunkType.END), kind_of(stream))
