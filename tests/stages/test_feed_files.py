"""Camera and microphone in virtual time on real files: held up by whoever takes their windows, they come to the end."""

import time
from pathlib import Path

import pytest

from graph.chunk import NS_PER_S, Chunk, ChunkType
from graph.window import WindowJoin
from stages.camera import Camera
from stages.media.feeds import Feeds
from stages.microphone import Microphone
from tests.support.media import Clip, damaged, times
from tests.support.media_script import DOOR
from tests.support.sessions import make_session
from tests.support.streams import inputs

CAMERA = "frames"
CREDIT = 4  # chunks of each stream that may wait for their window
PATIENCE_S = 60.0


class Pair:
    """Camera and microphone of one file. Who has sent as many chunks as it has credit is not asked for more."""

    def __init__(self, source: Path) -> None:
        self.feeds = Feeds()
        self.stages = {CAMERA: Camera(self.feeds), "sound": Microphone(self.feeds)}
        self.join = WindowJoin(DOOR, inputs(CAMERA, "sound"), window_ns=NS_PER_S, lateness_ns=None)
        self.missing: list[set[str]] = []
        self.waiting = dict.fromkeys(self.stages, 0)
        for stage in self.stages.values():
            stage.open_session(make_session("door", str(source), paced=False))

    def run(self) -> list[set[str]]:
        """What each window lacks, to the end."""
        deadline_s = time.monotonic() + PATIENCE_S
        while not self.join.finished:
            assert time.monotonic() < deadline_s, f"they wait for each other: {self.waiting}"
            for stream, stage in self.stages.items():
                if self.waiting[stream] < CREDIT:
                    for chunk in stage.advance(DOOR, 0):
                        self.take(chunk)
            time.sleep(0.001)
        for stage in self.stages.values():
            stage.close_session(DOOR)
        return self.missing

    def take(self, chunk: Chunk) -> None:
        if chunk.stream not in self.stages:
            return
        if chunk.type is ChunkType.DATA:
            joined = self.join.add(chunk)
            self.waiting[chunk.stream] += 1
        elif chunk.type is ChunkType.END:
            joined = self.join.end(chunk.stream, chunk.start_ns)
        else:
            joined = self.join.advance(chunk.stream, chunk.start_ns)
        for unit in joined.units:
            self.missing.append(set(unit.missing))
            for stream in self.stages:
                self.waiting[stream] -= len(unit.chunks.get(stream, ()))


SOUND, PICTURES = {"sound"}, {CAMERA}


@pytest.mark.parametrize(
    ("pictures_s", "sound", "missing"),
    [
        (times(40, 5), {"seconds": 10, "start_s": 30}, [*[SOUND] * 30, *[set()] * 10]),
        (times(40, 5), {"seconds": 17.7, "hole_s": (7.9, 22.2)}, [*[set()] * 8, *[SOUND] * 22, *[set()] * 10]),
        (times(12, 5), {"seconds": 12, "start_s": 180_678}, [set()] * 12),
        (times(12, 5), {"seconds": 9.7, "hole_s": (3.9, 2.2)}, [*[set()] * 4, *[SOUND] * 2, *[set()] * 6]),
        (times(30, 5), {"seconds": 3}, [*[set()] * 3, *[SOUND] * 27]),
        ([30 + at for at in times(4, 5)], {"seconds": 34}, [*[PICTURES] * 30, *[set()] * 4]),
    ],
    ids=["late sound", "a hole", "days late", "a short hole", "sound ends early", "late pictures"],
)
def test_a_file_whose_track_has_nothing_for_long_ends_by_itself_with_a_window_per_second(
    tmp_path, pictures_s, sound, missing
):
    windows = Pair(Clip(tmp_path / "clip.mkv").video(pictures_s).sound(**sound).write()).run()
    assert len(windows) == len(missing)
    # Sound ends a packet before its second does, so that a window at an edge may have some, or none.
    assert [index for index, lacks in enumerate(windows) if lacks != missing[index]] in ([], [len(missing) - 1])


def test_sound_that_can_not_be_decoded_holds_no_picture_up(tmp_path):
    whole = Clip(tmp_path / "ok.mp4").video(times(30, 10)).sound(30).write()
    windows = Pair(damaged(whole, tmp_path / "bad.mp4", lambda kind, _: kind == "audio")).run()
    assert windows == [SOUND] * 30
