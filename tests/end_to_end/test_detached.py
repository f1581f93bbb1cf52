"""A pipeline in the background: ps, logs, down, the gateway, and who may talk to it."""

import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from graph.costs import Profile, StageCost
from tests.support.pipeline import Place, Run, wait_for

pytestmark = pytest.mark.ray

PASSWORD = "Hunter2/xy#zzy"
PIECES = (b"Hunter2", b"zzy", b"Hunter2%2Fxy%23zzy")
NOBODY = "127.0.0.1:9"  # discard: no camera is there
GATE = f"rtsp://me:${{env:GATE_PASSWORD}}@{NOBODY}/live?t=${{env:GATE_PASSWORD}}"

PROCESSES = {"coordinator", "media", "io", "vision_encoder", "audio_encoder", "llm", "tts", "vocoder"}


@pytest.fixture(scope="module")
def started(place: Place) -> Run:
    """Four cameras are served on time, as a profile says; two are there."""
    slow = StageCost(100_000_000, 60_000_000)
    stages = dict.fromkeys(("vision_encoder", "audio_encoder", "llm", "tts", "vocoder"), slow)
    (place.folder / "four.json").write_text(Profile("tiny", {}, 8, stages).as_json())
    cameras = ("--camera", "door=test://pattern", "--camera", "yard=test://pattern?seed=2")
    for name in ("deploy", "graph", "stages", "ray", "numpy", "av"):  # of the user's, and none of our business
        (place.folder / f"{name}.py").write_text("raise SystemExit('the wrong one')")
    (place.folder / "here.yaml").write_text(f"version: 1\ncameras: {{gate: {{source: '{GATE}'}}}}\n")
    options = ("--set", "admission.profile=four.json", "--set", "window.phases=2", "--out", "run")
    run = place.run("up", "-dfhere.yaml", *cameras, *options, GATE_PASSWORD=PASSWORD)
    place.watch(place.state()["pid"])
    return run


@pytest.fixture(scope="module")
def url(started: Run, place: Place) -> Iterator[str]:
    assert started.returncode == 0, started.stderr
    yield place.url()
    if place.processes():
        place.run("down")


def get(url: str) -> tuple[int, Any]:
    with urllib.request.urlopen(url, timeout=60) as answer:
        text = answer.read().decode()
        return answer.status, json.loads(text) if "json" in answer.headers["Content-Type"] else text


def test_it_starts_in_the_background_and_returns_when_it_is_ready(started: Run, url: str) -> None:
    assert f"{url}; pipeline ps | logs | down" in started.stderr
    assert get(f"{url}/healthz") == (200, {"alive": True})
    assert get(f"{url}/readyz") == (200, {"ready": True, "reasons": []})


def test_ps_json_tells_stages_sessions_and_edges(place: Place, url: str) -> None:
    def through_a_window() -> Any:
        status = json.loads(place.run("ps", "--json").stdout)
        return status if all(session["windows"] > 0 for session in status["sessions"]) else None

    status = wait_for(through_a_window)
    assert status["ready"] is True and status["model"] == "tiny" and status["trained"] is False
    assert {row["stage"] for row in status["stages"]} >= {"camera", "vision_encoder", "llm", "vocoder", "speaker"}
    assert all(row["state"] == "ready" and psutil.pid_exists(row["pid"]) for row in status["stages"])
    assert {(s["session"], s["state"]) for s in status["sessions"]} == {("door", "running"), ("yard", "running")}
    assert status["edges"]["camera.frames->vision_encoder.frames"]["accepted"] >= 2


def test_ps_is_a_table_for_people(place: Place, url: str) -> None:
    run = place.run("ps")
    assert run.returncode == 0
    lines = run.stdout.splitlines()
    assert "UNTRAINED" in lines[0]
    assert re.split(r" {2,}", lines[1])[:3] == ["STAGE", "REPLICA", "STATE"]
    assert any(line.startswith("door ") for line in lines)


def test_logs_are_printed_per_process(place: Place, url: str) -> None:
    run = place.run("logs", "up")
    assert run.returncode == 0
    assert all(line.startswith("up ") for line in run.stdout.splitlines())
    assert "running: 2 session(s)" in run.stdout


def test_logs_of_an_unknown_process_are_an_error(place: Place, url: str) -> None:
    run = place.run("logs", "gramophone")
    assert run.returncode == 1
    assert "no logs here of 'gramophone'; there are: audio_encoder.0, " in run.stderr


def test_one_page_shows_the_metrics_of_all_processes(url: str) -> None:
    status, page = get(f"{url}/metrics")
    assert status == 200
    assert set(re.findall(r'stage_process="(\w+)"', page)) == {*PROCESSES, "gateway"}
    assert not re.search(r"^omni_scrape_failures_total{.*} [1-9]", page, re.MULTILINE)


def test_prometheus_finds_every_process(url: str) -> None:
    _, targets = get(f"{url}/sd/prometheus")
    assert {target["labels"]["stage_process"] for target in targets} == PROCESSES
    for target in targets:
        (address,) = target["targets"]
        assert "omni_" in get(f"http://{address}/metrics")[1]


def test_actors_have_the_priority_of_any_other_program(place: Place, url: str) -> None:
    pid = place.state()["pid"]
    assert {child.nice() for child in place.watch(pid)} == {psutil.Process(pid).nice()}


def test_nothing_listens_to_the_network(place: Place, url: str) -> None:
    pid = place.state()["pid"]
    sockets = [
        (process.name(), connection.laddr)
        for process in [psutil.Process(pid), *place.watch(pid)]
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(sockets) >= 10, "gateway, exporters, and Ray's"
    assert {address.ip.removeprefix("::ffff:") for _, address in sockets} == {"127.0.0.1"}


def test_ray_refuses_who_has_not_its_token(place: Place, url: str) -> None:
    pid = place.state()["pid"]
    (gcs,) = [process for process in place.watch(pid) if process.name() == "gcs_server"]
    (port,) = [c.laddr.port for c in gcs.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    ask = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1]).get_all_node_info(timeout=10)"
    stranger = subprocess.run(
        [sys.executable, "-c", ask, f"127.0.0.1:{port}"],
        env={**place.environment, "RAY_AUTH_MODE": "disabled", "RAY_gcs_rpc_server_connect_timeout_s": "5"},
        capture_output=True,
        text=True,
    )
    assert stranger.returncode != 0
    assert "token" in stranger.stderr.lower()


def test_a_camera_is_added_and_removed_while_the_others_run(place: Place, url: str) -> None:
    before = sessions(url)
    run = place.run("camera", "add", "hall=test://pattern?seed=3", "--fps", "2")
    assert (run.returncode, run.stderr) == (0, "camera hall: added\n")
    wait_for(lambda: sessions(url)["hall"]["windows"] >= 2)
    again = place.run("camera", "add", "hall=test://pattern?seed=3")
    assert (again.returncode, again.stderr) == (2, "pipeline: camera hall: there is one of this name\n")
    assert place.run("camera", "add", "attic=test://pattern?seed=4").returncode == 0
    one_more = place.run("camera", "add", "cellar=test://pattern?seed=5")
    assert one_more.returncode == 1
    more = "5 cameras with 6 pictures in a window can't be served on time, 4 with one picture each can"
    assert more in one_more.stderr, "hall has two"
    assert one_more.stderr.endswith("; try again in 30 s\n")
    run = place.run("camera", "remove", "hall")
    assert (run.returncode, run.stderr) == (0, "camera hall: removed\n")
    wait_for(lambda: sessions(url)["hall"]["state"] == "ended")
    after = sessions(url)
    assert after["hall"]["windows"] >= 2, "what was seen of it stays"
    assert all(after[name]["state"] == "running" for name in ("door", "yard"))
    assert all(after[name]["windows"] > before[name]["windows"] for name in ("door", "yard"))
    edge = get(f"{url}/api/v1/ps")[1]["edges"]["camera.frames->vision_encoder.frames"]
    assert edge["dropped"]["shed"] == edge["dropped"]["closed"] == 0, "it was gone through to its end"
    again = place.run("camera", "add", "hall=test://pattern")
    assert "--out holds what an earlier one of this name has left" in again.stderr
    assert place.run("camera", "add", "porch=test://pattern").returncode == 0, "there is room again"


def sessions(url: str) -> dict[str, Any]:
    return {row["session"]: row for row in get(f"{url}/api/v1/ps")[1]["sessions"]}


def test_a_stranger_adds_no_camera(url: str) -> None:
    body = json.dumps({"name": "attic", "source": "test://pattern"}).encode()
    request = urllib.request.Request(f"{url}/api/v1/cameras", data=body, method="POST")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(request, timeout=60)


def test_the_gateway_takes_no_other_method(url: str) -> None:
    request = urllib.request.Request(f"{url}/metrics", data=b"x", method="POST")
    with pytest.raises(urllib.error.HTTPError, match="413"):
        urllib.request.urlopen(request, timeout=60)


def is_answered(run: Run) -> Run | None:
    """None where it is to be tried again."""
    return None if run.returncode == 1 and "try again" in run.stderr else run


@pytest.fixture(scope="module")
def secretive(place: Place, url: str) -> list[Run]:
    """A camera that needs a password comes, and one whose password is written where it must not be."""
    for name in ("attic", "porch"):
        place.run("camera", "remove", name)
    # There is room for it when what those two have seen and heard is gone through.
    added = wait_for(lambda: is_answered(place.run("camera", "add", f"gate={GATE}", GATE_PASSWORD=PASSWORD)))
    assert added.returncode == 0, added.stderr
    wait_for(lambda: '"session": "gate"' in (place.folder / "run" / "events.jsonl").read_text())
    refused = place.run("camera", "add", f"raw=rtsp://me:{PASSWORD}@{NOBODY}/live")
    assert refused.returncode == 2
    return [added, refused]


def pieces_in(*texts: bytes) -> list[bytes]:
    return [piece for piece in PIECES for text in texts if piece in text]


def test_no_command_says_a_password(place: Place, secretive: list[Run]) -> None:
    runs = [*secretive, place.run("ps"), place.run("ps", "--json"), place.run("logs")]
    assert not pieces_in(*(f"{run.stdout}{run.stderr}".encode() for run in runs))
    assert "${env:GATE_PASSWORD}" in runs[3].stdout


def test_no_answer_of_the_gateway_holds_a_password(url: str, secretive: list[Run]) -> None:
    assert not pieces_in(*(str(get(url + path)).encode() for path in ("/api/v1/ps", "/metrics", "/sd/prometheus")))


def test_no_process_shows_a_password_and_none_inherits_it(place: Place, secretive: list[Run]) -> None:
    pid = place.state()["pid"]
    children = place.watch(pid)
    assert len(children) >= len(PROCESSES)
    shown = [process.cmdline() for process in [psutil.Process(pid), *children]]
    assert not pieces_in(*(str(text).encode() for text in [*shown, *(child.environ() for child in children)]))


def test_no_file_holds_a_password(place: Place, secretive: list[Run]) -> None:
    files = [path for folder in (place.tmp, place.folder) for path in folder.rglob("*") if path.is_file()]
    assert "events.jsonl" in {path.name for path in files}
    assert [path for path in files if pieces_in(path.read_bytes())] == []


def test_down_lets_it_come_to_its_end_and_leaves_nothing(place: Place, url: str) -> None:
    run = place.run("down")
    assert (run.returncode, run.stderr) == (0, "stopped\n")
    assert all(a["accepted"] == a["delivered"] > 0 for edge, a in run.ledger().items() if "->events" in edge)
    assert all(account["in_flight"] == 0 for account in run.ledger().values())
    assert {row["session"] for row in run.rows("windows.jsonl")} >= {"door", "yard", "hall", "attic"}
    said = place.run("logs", "up").stdout
    assert "ending: the listener hears what was said" in said
    assert "Ctrl-C" not in said
    assert place.leftovers() == []
    assert place.run("ps").returncode == 1
