"""Where windows end: of which there is a row."""

from deploy.actor.sink import WindowEnd
from graph.chunk import AFTERWORD, Chunk, Trace
from stages.session import Session
from tests.support.units import session, unit


class Counting:
    """What is counted of windows."""

    def __init__(self) -> None:
        self.num_windows = 0

    def window(self, session: Session, latency_s: float, late_stage: str, missing: tuple[str, ...]) -> None:
        self.num_windows += 1

    def moved(self, session: Session, level: int) -> None:
        raise AssertionError("there is no ladder")


def rows_of(digests: list[str]) -> list[object]:
    """Of windows 0, 1, 2 … with these digests: the indices of those that have a row."""
    meter = Counting()
    end = WindowEnd("speaker", session(), None, meter, "events")
    events: list[Chunk] = []
    for index, digest in enumerate(digests):
        of = unit("door", index)
        events += end.done(of, of.end_ns, Trace(digest=digest), of.end_ns, 1)
    assert meter.num_windows == end.num_windows == len(events)
    return [event.attrs["index"] for event in events]


def test_a_window_of_the_camera_has_a_row_also_where_it_was_given_up() -> None:
    assert rows_of(["a", "", "b"]) == [0, 1, 2]


def test_a_window_that_only_says_the_rest_has_none() -> None:
    assert rows_of(["a", "b", AFTERWORD, AFTERWORD]) == [0, 1]


def test_one_after_it_that_was_given_up_has_none_either() -> None:
    """Its trace came too late to tell what it was."""
    assert rows_of(["a", AFTERWORD, "", AFTERWORD]) == [0]
