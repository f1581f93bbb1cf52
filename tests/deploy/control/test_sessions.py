"""deploy/control/sessions.py: at which replica of each stage a session lives."""

from deploy.control.sessions import SessionTable
from tests.support.specs import parse_spec
from tests.support.units import session

TWO = [f"stages.{name}.{value}" for name in ("camera", "microphone") for value in ("process=media", "replicas=2")]
MINIMAL = "version: 1\ncameras: {test: {source: 'test://pattern'}}\n"


def living(stage: str) -> range:
    return range(2 if stage in ("camera", "microphone") else 1)


def test_stages_of_one_process_have_a_session_at_the_same_replica_of_it_and_sessions_are_spread():
    table = SessionTable(parse_spec(MINIMAL, "p.yaml", TWO), lambda: 0, num_cores=2)
    opened = [session(name) for name in "abcd"]
    table.enter(opened, living)
    placed = [table.placements[each.id].replicas for each in opened]
    assert [each["camera"] for each in placed] == [each["microphone"] for each in placed]
    assert sorted(each["camera"] for each in placed) == [0, 0, 1, 1]


def test_a_session_without_a_microphone_takes_the_place_of_its_camera_only():
    table = SessionTable(parse_spec(MINIMAL, "p.yaml", TWO), lambda: 0, num_cores=2)
    table.enter([session("deaf", microphone=False), session("door")], living)
    deaf, door = table.placements.values()
    assert "microphone" not in deaf.replicas
    assert door.replicas["camera"] == door.replicas["microphone"] == 1
