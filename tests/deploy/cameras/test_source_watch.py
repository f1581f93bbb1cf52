"""cameras/source_watch.py: what the user is told of sources while they run, and of those which never gave anything."""

from collections.abc import Mapping

from deploy.actor.session_plan import StageSnapshot
from deploy.cameras.source_watch import SourceWatch
from graph.chunk import SessionId
from stages.stage import SourceId, SourceReport

DOOR, YARD = SessionId("door"), SessionId("yard")
OF_DOOR, OF_YARD = SourceId(DOOR), SourceId(YARD)
UP = SourceReport(has_delivered=True, is_up=True)


class Console:
    """A watch with what it has told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.watch = SourceWatch(self.lines.append)
        self.watch.opened(DOOR), self.watch.opened(YARD)

    def see(self, **sources: SourceReport) -> None:
        self.see_all({SourceId(SessionId(name)): report for name, report in sources.items()})

    def see_all(self, reports: Mapping[SourceId, SourceReport]) -> None:
        both = {"camera": StageSnapshot(0, 0, {}, reports), "microphone": StageSnapshot(0, 0, {}, reports)}
        self.watch.saw({"io.0": both, "llm.0": {"llm": StageSnapshot(0, 0, {})}})


def test_a_loss_is_told_when_it_happens_and_once_until_it_is_over():
    console = Console()
    console.see(door=UP)
    for num_lost in (1, 1, 2, 3):
        console.see(door=SourceReport(has_delivered=True, num_lost=num_lost, problem="rtsp://door broke off"))
    console.see(door=SourceReport(has_delivered=True, is_up=True, num_lost=3))
    console.see(door=SourceReport(has_delivered=True, num_lost=4, problem="rtsp://door is gone"))
    assert console.lines == [
        "camera door: lost: rtsp://door broke off",
        "camera door: delivers again",
        "camera door: lost: rtsp://door is gone",
    ]


def test_a_run_in_which_nothing_ever_came_is_in_vain():
    console = Console()
    console.see(door=SourceReport(problem="gave neither picture nor sound"), yard=SourceReport())
    assert console.watch.is_all_silent
    assert console.watch.unreported == {OF_DOOR: "gave neither picture nor sound", OF_YARD: ""}


def test_one_source_that_gave_something_is_a_run():
    console = Console()
    console.see(door=SourceReport(), yard=UP)
    console.see(door=SourceReport(num_lost=1, problem="junk/ has no image"))
    assert not console.watch.is_all_silent
    assert console.lines == ["camera door: lost: junk/ has no image"]
    assert console.watch.unreported == {}, "its loss was told"


def test_a_camera_that_was_refused_is_not_spoken_of():
    console = Console()
    console.see(door=UP, n1=SourceReport())
    console.see(door=UP, n1=SourceReport(num_lost=1, problem="broke off"))
    console.watch.ended(SessionId("n1"))
    assert (console.lines, console.watch.unreported) == ([], {})


def test_a_camera_that_is_refused_changes_nothing_of_an_earlier_one_of_its_name():
    console = Console()
    console.see(door=UP)
    console.watch.ended(DOOR)
    console.see(door=SourceReport())
    assert console.watch.unreported == {}
    assert not console.watch.is_all_silent


def test_a_camera_that_is_added_again_is_a_new_one():
    console = Console()
    console.see(door=SourceReport(has_delivered=True, num_lost=3, problem="broke off"))
    console.watch.ended(DOOR)
    console.watch.opened(DOOR)
    console.see(door=SourceReport(has_delivered=True, num_lost=1, problem="broke off again"))
    assert console.lines == ["camera door: lost: broke off", "camera door: lost: broke off again"]


def test_a_run_without_a_source_is_not_in_vain():
    assert not SourceWatch(print).is_all_silent


def test_a_view_that_is_lost_is_told_by_its_name_and_the_others_are_not():
    console = Console()
    front, back = SourceId(DOOR, "front"), SourceId(DOOR, "back")
    console.see_all({front: UP, back: UP})
    console.see_all({front: UP, back: SourceReport(has_delivered=True, num_lost=1, problem="broke off")})
    console.see_all({front: UP, back: SourceReport(has_delivered=True, is_up=True, num_lost=1)})
    assert console.lines == ["camera door/back: lost: broke off", "camera door/back: delivers again"]
