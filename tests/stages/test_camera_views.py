"""stages/camera.py and stages/microphone.py where a camera has several views: a feed each, and one that is heard."""

import pytest

from graph.chunk import NS_PER_S, REMOVED, Chunk, ChunkType, SessionId
from stages.camera import Camera
from stages.media.feeds import Feeds
from stages.microphone import Microphone
from stages.session import View
from stages.stage import SourceId, StageError
from tests.support.media import Clip, times
from tests.support.media_script import (
    GONE,
    FakeMedia,
    FakeReader,
    data,
    events,
    frame,
    progress,
    seconds,
    source,
)
from tests.support.sessions import make_session

PORCH = SessionId("porch")
FRONT, BACK, SIDE = View("front", "rtsp://front"), View("back", "rtsp://back"), View("side", "rtsp://side")


class Porch:
    """A camera with its microphone; its views' readers come by their sources."""

    def __init__(self, readers: dict[str, list[FakeReader]] | None = None, **session: object) -> None:
        self.media = {source: FakeMedia(*script) for source, script in (readers or {}).items()}
        self.feeds = Feeds(lambda request: self.media[request.source](request)) if readers else Feeds()
        self.camera, self.microphone = Camera(self.feeds), Microphone(self.feeds)
        self.session = make_session("porch", **({"views": (FRONT, BACK), "heard": "back"} | session))
        self.camera.open_session(self.session)
        self.microphone.open_session(self.session)
        self.now_s = 0.0

    def until(self, end_s: float) -> list[Chunk]:
        said: list[Chunk] = []
        while self.now_s < end_s + 0.05:
            now_ns = round(self.now_s * NS_PER_S)
            said += self.camera.advance(PORCH, now_ns) + self.microphone.advance(PORCH, now_ns)
            self.now_s += 0.1
        return said


def of_view(chunks: list[Chunk], view: str) -> list[Chunk]:
    return [chunk for chunk in chunks if chunk.view == view]


def shown(chunks: list[Chunk], view: str) -> list[float]:
    return [chunk.start_ns / NS_PER_S for chunk in data(of_view(chunks, view), "frames")]


def ends(chunks: list[Chunk], view: str) -> list[tuple[int, bool]]:
    return [
        (chunk.start_ns, bool(chunk.attrs.get(REMOVED)))
        for chunk in of_view(chunks, view)
        if chunk.type is ChunkType.END
    ]


def test_each_view_has_pictures_of_its_own_and_one_of_them_is_heard():
    porch = Porch({"rtsp://front": [source(3, sounds=False)], "rtsp://back": [source(3)]})
    said = porch.until(4)
    assert (shown(said, "front"), shown(said, "back")) == ([0, 1, 2], [0, 1, 2])
    assert len(data(said, "sound")) == 3
    assert [media.requests[0].want_audio for media in porch.media.values()] == [False, True]
    assert (porch.camera.finished(PORCH), porch.microphone.finished(PORCH)) == (True, True)


def test_a_view_that_ends_earlier_ends_its_own_stream_only():
    porch = Porch({"rtsp://front": [source(4, sounds=False)], "rtsp://back": [source(2)]})
    said = porch.until(3)
    assert (ends(said, "front"), len(ends(said, "back"))) == ([], 1)
    assert not porch.camera.finished(PORCH)
    assert shown(said + porch.until(5), "front") == [0, 1, 2, 3]
    assert porch.camera.finished(PORCH)


def test_a_view_that_is_lost_is_looked_for_while_the_others_are_seen():
    first, again = FakeReader(*seconds(0, 1, sounds=False), GONE, live=True), FakeReader(live=True)
    porch = Porch({"rtsp://front": [source(6)], "rtsp://back": [first, again]}, heard="front")
    said = porch.until(3)
    assert (shown(said, "front"), shown(said, "back")) == ([0, 1, 2, 3], [0])
    lost = [chunk.attrs for chunk in said if chunk.attrs.get("type") == "camera_lost"]
    assert [event["view"] for event in lost] == ["back"]
    again.give(frame(4.0), progress(5, None))
    assert shown(porch.until(4.2), "back") == [4]
    reports = porch.camera.sources()
    assert (reports[SourceId(PORCH, "front")].num_lost, reports[SourceId(PORCH, "back")].num_lost) == (0, 1)


def test_a_view_that_comes_later_begins_with_the_next_window():
    live = FakeReader(*seconds(0, 9), live=True)
    late = FakeReader(frame(1.4), frame(2.0), progress(3, None), live=True)
    porch = Porch({"rtsp://front": [live], "rtsp://side": [late]}, views=(FRONT,), heard="front")
    porch.until(1.2)
    porch.camera.add_view(make_session("porch", views=(FRONT, SIDE), heard="front"), SIDE, round(1.3 * NS_PER_S))
    said = of_view(porch.until(2.5), "side")
    assert (said[0].type, said[0].start_ns) == (ChunkType.WATERMARK, 2 * NS_PER_S)
    assert shown(said, "side") == [2.0]


def test_a_film_that_comes_later_begins_then():
    live = FakeReader(*seconds(0, 9), live=True)
    porch = Porch({"rtsp://front": [live], "rtsp://side": [source(2, sounds=False)]}, views=(FRONT,), heard="front")
    porch.until(1.2)
    porch.camera.add_view(porch.session, SIDE, round(1.3 * NS_PER_S))
    said = porch.until(5)
    assert shown(said, "side") == [2, 3]
    assert "view_added" in events(said)


def test_a_view_that_is_taken_away_ends_with_its_window_and_may_come_again():
    back = [FakeReader(*seconds(0, 9), live=True), FakeReader(frame(3.0), live=True)]
    porch = Porch({"rtsp://front": [FakeReader(*seconds(0, 9), live=True)], "rtsp://back": back}, heard="front")
    porch.until(0.5)
    porch.camera.remove_view(PORCH, "back", NS_PER_S // 2)
    with pytest.raises(StageError, match="view back is still there"):
        porch.camera.add_view(porch.session, BACK, NS_PER_S // 2)
    said = porch.until(1.5)
    assert ends(said, "back") == [(NS_PER_S, True)]
    assert [event for event in events(said) if event != "camera_up"] == ["view_removed"], "no camera has ended"
    assert back[0].closed
    porch.camera.add_view(porch.session, BACK, 2 * NS_PER_S)
    assert shown(porch.until(3.5), "back") == [3]


def test_a_view_that_has_ended_by_itself_may_be_taken_away():
    porch = Porch({"rtsp://front": [source(9)], "rtsp://back": [source(1)]}, heard="front")
    porch.until(2)
    porch.camera.remove_view(PORCH, "back", 2 * NS_PER_S)
    assert [removed for _, removed in ends(porch.until(2.2), "back")] == [True]


def test_in_virtual_time_no_view_is_further_than_the_window_that_the_slowest_one_is_in():
    back = FakeReader()
    porch = Porch({"rtsp://front": [source(9)], "rtsp://back": [back]}, heard="front", paced=False)
    assert (shown(porch.until(2), "front"), shown(porch.until(4), "back")) == ([0], [])
    back.give(*seconds(0, 3, sounds=False))
    said = porch.until(6)
    assert (shown(said, "front"), shown(said, "back")) == ([1, 2, 3], [0, 1, 2])
    times = [(chunk.start_ns // NS_PER_S, chunk.view) for chunk in data(said, "frames")]
    assert times == sorted(times, key=lambda each: each[0]), "so they leave window by window, whoever reads faster"


def test_in_virtual_time_a_view_that_has_ended_holds_up_no_other():
    porch = Porch({"rtsp://front": [source(9)], "rtsp://back": [source(2, sounds=False)]}, heard="front", paced=False)
    assert shown(porch.until(4), "front") == list(range(9))
    assert porch.camera.finished(PORCH)


def test_two_films_are_two_views(tmp_path):
    views = []
    for name in ("front", "back"):
        path = Clip(tmp_path / f"{name}.mkv").video(times(3, 5)).sound(3).write()
        views.append(View(name, str(path)))
    porch = Porch(views=tuple(views), heard="front", paced=False)
    said: list[Chunk] = []
    while not (porch.camera.finished(PORCH) and porch.microphone.finished(PORCH)):
        said += porch.camera.advance(PORCH, 0) + porch.microphone.advance(PORCH, 0)
    assert shown(said, "front") == shown(said, "back")
    assert len(shown(said, "back")) == 3
    assert len(data(said, "sound")) == 3
