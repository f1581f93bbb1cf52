"""deploy/cameras/live_cameras.py and what the gateway makes of it: cameras that come and go while the pipeline runs."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from deploy.cameras.checks import Refused
from deploy.cameras.live_cameras import LiveCameras
from deploy.control.calls import Reply, answered, failed
from deploy.gateway.observe import MAX_BODY_BYTES, build_gateway
from graph.costs import Profile, StageCost
from graph.errors import GraphError
from graph.secret import Secret
from graph.sections import AdmissionSpec, CameraSpec
from stages.media.reader import MediaError
from stages.stage import StageError
from tests.deploy.gateway.test_observe import FakePipeline
from tests.support.specs import parse_spec

SPEC = parse_spec("version: 1\ncameras: {door: {source: 'test://pattern'}}", "here")
PATTERN = {"source": "test://pattern?seed=2"}
FOR_EVER_S = 36_000.0  # longer than a test may take: who waits for it fails
TOKEN = "a token of some length"


@dataclass
class Pipeline:
    """The thread which runs the pipeline: it opens what it is told to, unless it fails."""

    live: LiveCameras
    fails_with: Exception | None = None
    opened: dict[str, CameraSpec] = field(default_factory=dict)
    views: dict[str, str] = field(default_factory=dict)
    ended: list[str] = field(default_factory=list)
    is_over: bool = False
    raised: Exception | None = None

    def run(self) -> None:
        while not self.is_over:
            try:
                self.live.answer(self)
            except Exception as error:
                self.raised = error
                return
            self.live.wait(0.02)

    def open_camera(self, name: str, camera: CameraSpec) -> Reply[None]:
        if self.fails_with is not None:
            return failed(self.fails_with)
        self.opened[name] = camera
        return answered(name, None)

    def end_camera(self, name: str) -> None:
        self.ended.append(name)

    def open_view(self, name: str, view: str, source: Secret) -> Reply[None]:
        if self.fails_with is not None:
            return failed(self.fails_with)
        self.views[f"{name}/{view}"] = source.reveal()
        return answered(name, None)

    def end_view(self, name: str, view: str) -> None:
        self.views.pop(f"{name}/{view}", None)
        self.ended.append(f"{name}/{view}")


@pytest.fixture
def start() -> Iterator[Callable[..., Pipeline]]:
    started: list[tuple[Pipeline, threading.Thread]] = []

    def start(
        *, profile: Path | None = None, paced: bool = True, keeps_files: bool = False, until_s: float | None = None
    ) -> Pipeline:
        spec = SPEC if profile is None else replace(SPEC, admission=AdmissionSpec(profile=str(profile)))
        pipeline = Pipeline(LiveCameras(spec, paced=paced, keeps_files=keeps_files))
        pipeline.live.begin(until_s)
        thread = threading.Thread(target=pipeline.run)
        thread.start()
        started.append((pipeline, thread))
        return pipeline

    yield start
    for pipeline, thread in started:
        pipeline.is_over = True
        thread.join()


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """Two cameras are served on time."""
    slow = StageCost(100_000_000, 50_000_000)
    stages = dict.fromkeys(("vision_encoder", "audio_encoder", "llm", "tts", "vocoder"), slow)
    path = tmp_path / "here.json"
    path.write_text(Profile("tiny", {}, 2, stages).as_json())
    return path


def refusal(do: Callable[[], object]) -> Refused:
    with pytest.raises(Refused) as caught:
        do()
    return caught.value


def test_a_camera_is_added_as_it_is_described_and_removed(start):
    pipeline = start()
    added = pipeline.live.add("yard", {**PATTERN, "fps": 2.0})
    assert (added.name, added.source, added.warnings) == ("yard", PATTERN["source"], ())
    assert pipeline.opened["yard"].fps == 2.0
    pipeline.live.remove("yard")
    assert pipeline.ended == ["yard"]


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("yard", {"source": "gopher://10.0.0.7"}, "sources are not read here"),
        ("yard", {"source": "absent.mp4"}, "absent.mp4"),
        ("yard", {**PATTERN, "fsp": 2}, "did you mean 'fps'?"),
        ("yard", {**PATTERN, "fps": 1000}, "fps"),
        ("yard", {**PATTERN, "fps": 5}, "camera.frames->vision_encoder.frames has credit for 4"),
        ("yard", {"source": "${env:HOME}"}, "is resolved by who asks"),
        ("yard", {"source": "/nowhere/\U0001f600.png"}, "\U0001f600"),
        ("yard", {}, "source"),
        ("my yard", PATTERN, "'my yard' is no name"),
    ],
)
def test_a_wrong_description_is_refused_and_nothing_is_opened(
    start, name: str, config: dict[str, object], message: str
):
    pipeline = start()
    error = refusal(lambda: pipeline.live.add(name, config))
    assert (error.status, error.retry_after_s) == (422, None)
    assert message in str(error) and f"camera {name}: " in str(error)
    assert not pipeline.opened
    pipeline.live.add("yard", PATTERN)  # its name is free


def test_what_credentials_a_source_holds_is_not_told(start):
    source = "rtsp://me:secret@127.0.0.1:9/live"
    for name, config in (("yard", {"source": source, "fps": 0}), (source, PATTERN)):
        error = refusal(lambda name=name, config=config: start().live.add(name, config))
        assert "secret" not in str(error)


def test_a_source_is_shown_as_it_was_written_where_it_was_resolved(start):
    written = "rtsp://me:${env:PW}@127.0.0.1:9/${env:KEY}/live"
    source = "rtsp://me:Hunter2@127.0.0.1:9/xyzzy/live"
    pipeline = start()
    added = pipeline.live.add("yard", {"source": source, "masked_source": written})
    assert added.source == written
    assert "xyzzy" not in "".join(added.warnings)
    assert pipeline.opened["yard"].source.reveal() == source


@pytest.mark.parametrize("template", [7, None, "two\nlines", "rtsp://me:Hunter2@127.0.0.1:9/live"])
def test_what_is_to_be_shown_in_its_place_holds_no_password_either(start, template: object):
    config = {"source": "rtsp://me:Hunter2@127.0.0.1:9/live", "masked_source": template}
    assert start().live.add("yard", config).source == "rtsp://***@127.0.0.1:9/live"


def test_a_live_camera_that_does_not_answer_is_told_and_looked_for(start):
    pipeline = start()
    added = pipeline.live.add("yard", {"source": "rtsp://127.0.0.1:9/live"})
    (warning,) = added.warnings
    assert warning.startswith("camera yard: ") and warning.endswith("it is looked for again")
    assert "yard" in pipeline.opened


def test_a_name_is_given_once_at_a_time(start):
    pipeline = start()
    pipeline.live.add("yard", PATTERN)
    for name in ("door", "yard"):
        assert refusal(lambda name=name: pipeline.live.add(name, PATTERN)).status == 409
    pipeline.live.ended("yard")
    pipeline.live.add("yard", PATTERN)


def test_where_files_are_left_a_name_is_given_once(start):
    pipeline = start(keeps_files=True)
    pipeline.live.ended("door")
    error = refusal(lambda: pipeline.live.add("door", PATTERN))
    assert error.status == 409 and "--out" in str(error)


def test_two_who_ask_at_once_for_one_name_do_not_both_get_it(start):
    pipeline = start()
    answers: list[object] = []
    both = threading.Barrier(2)

    def ask() -> None:
        both.wait()
        try:
            answers.append(pipeline.live.add("yard", PATTERN))
        except Refused as error:
            answers.append(error.status)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers.count(409) == 1 and len(answers) == 2


def test_beyond_what_is_served_on_time_it_is_refused_until_another_has_ended(start, profile: Path):
    pipeline = start(profile=profile, until_s=time.monotonic() + 100)
    pipeline.live.add("yard", PATTERN)
    error = refusal(lambda: pipeline.live.add("hall", PATTERN))
    assert error.status == 503 and "3 cameras can't be served on time, 2 can" in str(error)
    assert error.retry_after_s == 30
    pipeline.live.ended("door")
    pipeline.live.add("hall", PATTERN)


def test_nobody_is_asked_to_come_again_when_all_is_over(start, profile: Path):
    pipeline = start(profile=profile, until_s=time.monotonic() + 20)
    pipeline.live.add("yard", PATTERN)
    assert refusal(lambda: pipeline.live.add("hall", PATTERN)).retry_after_s is None


def test_when_the_sources_have_ended_nothing_is_added(start):
    error = refusal(lambda: start(until_s=time.monotonic() - 1).live.add("yard", PATTERN))
    assert (error.status, str(error)) == (503, "the pipeline is ending")


def test_a_source_that_has_gone_since_it_was_looked_at_costs_nobody_else_anything(start):
    pipeline = start()
    pipeline.fails_with = MediaError("missing", "/tmp/clip.mp4: No such file or directory")
    error = refusal(lambda: pipeline.live.add("yard", PATTERN))
    assert (error.status, str(error)) == (422, "camera yard: /tmp/clip.mp4: No such file or directory")
    pipeline.fails_with = None
    pipeline.live.add("yard", PATTERN)


def test_more_cameras_than_a_pipeline_takes_are_refused(start, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("deploy.cameras.live_cameras.MAX_CAMERAS", 2)
    pipeline = start()
    pipeline.live.add("yard", PATTERN)
    assert "takes 2 cameras" in str(refusal(lambda: pipeline.live.add("hall", PATTERN)))


def test_an_end_waits_for_no_camera_that_keeps_silent(start, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("deploy.cameras.sources.PROBE_S", FOR_EVER_S)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        pipeline = start()
        answers: list[Refused] = []
        address = {"source": f"rtsp://127.0.0.1:{silent.getsockname()[1]}/live"}
        asking = threading.Thread(target=lambda: answers.append(refusal(lambda: pipeline.live.add("yard", address))))
        asking.start()
        connection, _ = silent.accept()
        pipeline.live.close()
        asking.join()
        connection.close()
    assert str(answers[0]) == "the pipeline is ending"


def test_a_stage_without_room_refuses_and_the_pipeline_goes_on(start):
    pipeline = start()
    pipeline.fails_with = StageError("llm: no room for another session")
    error = refusal(lambda: pipeline.live.add("yard", PATTERN))
    assert (error.status, str(error)) == (503, "llm: no room for another session")
    pipeline.fails_with = None
    pipeline.live.add("yard", PATTERN)
    assert pipeline.raised is None


def test_an_actor_that_dies_meanwhile_is_told_to_who_asked_and_costs_nobody_else(start):
    pipeline = start()
    pipeline.fails_with = GraphError("llm.0 has died")
    assert "llm.0 has died" in str(refusal(lambda: pipeline.live.add("yard", PATTERN)))
    pipeline.fails_with = None
    pipeline.live.add("yard", PATTERN)
    assert pipeline.raised is None


def test_a_fault_of_the_pipelines_own_thread_leaves_nobody_without_an_answer(start):
    pipeline = start()
    pipeline.ended = None  # type: ignore[assignment]
    with pytest.raises(Refused, match="camera door: "):
        pipeline.live.remove("door")
    assert pipeline.raised is not None


def test_while_one_camera_waits_for_a_stage_another_one_is_added():
    """The pipeline's thread waits for neither."""
    live = LiveCameras(SPEC, paced=True, keeps_files=False)
    live.begin(None)
    replies: dict[str, Reply[None]] = {"yard": Reply("llm.0"), "hall": answered("llm.1", None)}
    added: list[str] = []
    asking = [threading.Thread(target=lambda name=name: added.append(live.add(name, PATTERN).name)) for name in replies]
    for thread in asking:
        thread.start()

    class Slow(Pipeline):
        def open_camera(self, name: str, camera: CameraSpec) -> Reply[None]:
            self.opened[name] = camera
            return replies[name]

    slow = Slow(live)
    while sorted(slow.opened) != ["hall", "yard"]:
        live.answer(slow)
        live.wait(0.01)
    asking[1].join()
    assert added == ["hall"]
    replies["yard"].answer(None)
    live.answer(slow)
    asking[0].join()
    assert added == ["hall", "yard"]


def test_before_the_pipeline_runs_and_when_it_ends_nothing_is_added(start):
    live = LiveCameras(SPEC, paced=True, keeps_files=False)
    early = refusal(lambda: live.add("yard", PATTERN))
    assert (early.status, early.retry_after_s) == (503, 10)
    live.begin(None)
    waiting = threading.Thread(target=lambda: answers.append(refusal(lambda: live.add("yard", PATTERN))))
    answers: list[Refused] = []
    waiting.start()
    while not live._pending:
        time.sleep(0.01)
    live.close()
    waiting.join()
    both = (*answers, refusal(lambda: live.add("hall", PATTERN)))
    assert [(e.status, str(e), e.retry_after_s) for e in both] == [(503, "the pipeline is ending", None)] * 2


def test_a_pipeline_that_does_not_answer_is_left(start, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("deploy.cameras.live_cameras.ANSWER_S", 0.05)
    live = LiveCameras(SPEC, paced=True, keeps_files=False)
    live.begin(None)
    assert refusal(lambda: live.add("yard", PATTERN)).status == 504
    late = Pipeline(live)
    live.answer(late)
    assert late.opened == {}, "nobody waits for it any more"


def test_in_virtual_time_no_camera_comes_later(start):
    assert refusal(lambda: start(paced=False).live.add("yard", PATTERN)).status == 409


def test_a_camera_that_is_about_to_come_is_not_removed_yet(start):
    live = LiveCameras(SPEC, paced=True, keeps_files=False)
    live.begin(None)
    coming = threading.Thread(target=lambda: live.add("yard", PATTERN))
    coming.start()
    while not live._pending:
        time.sleep(0.01)
    assert refusal(lambda: live.remove("yard")).status == 404
    assert refusal(lambda: live.add("yard", PATTERN)).status == 409
    live.answer(Pipeline(live))
    coming.join()
    assert refusal(lambda: live.add("yard", PATTERN)).status == 409


def test_what_is_not_there_is_not_removed(start):
    error = refusal(lambda: start().live.remove("yard"))
    assert (error.status, str(error)) == (404, "camera yard: there is none of this name; there are: door")


# ---- views -----------------------------------------------------------------------------------------------------------


def test_a_view_is_added_to_a_camera_that_is_watched_and_taken_away(start):
    pipeline = start()
    added = pipeline.live.add("door/back", PATTERN)
    assert (added.name, added.source, added.warnings) == ("door/back", PATTERN["source"], ())
    assert pipeline.views == {"door/back": PATTERN["source"]}
    assert refusal(lambda: pipeline.live.add("door/back", PATTERN)).status == 409
    pipeline.live.remove("door/back")
    assert (pipeline.views, pipeline.ended) == ({}, ["door/back"])
    pipeline.live.add("door/back", PATTERN)  # its name is free


@pytest.mark.parametrize(
    ("name", "config", "status", "message"),
    [
        ("yard/back", PATTERN, 404, "there is no camera yard; there are: door"),
        ("door/Back", PATTERN, 422, "'Back' is no name"),
        ("door/", PATTERN, 422, "'' is no name"),
        ("door/a/b", PATTERN, 422, "'a/b' is no name"),
        ("door/none", PATTERN, 422, "a view can't be called none"),
        ("door/back", {"source": "absent.mp4"}, 422, "camera door/back: absent.mp4"),
        ("door/back", {}, 422, "must be a URL"),
        ("door/back", {**PATTERN, "fps": 2}, 422, "of a view only its source is said; fps is the camera's"),
    ],
)
def test_a_wrong_view_is_refused(start, name: str, config: dict[str, object], status: int, message: str):
    pipeline = start()
    error = refusal(lambda: pipeline.live.add(name, config))
    assert error.status == status and message in str(error)
    assert pipeline.views == {}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/x", "camera /x: there is no camera ''; there are: door"),
        ("door/", "camera door/: camera door has no view ''; it has: one source only"),
        ("porch/x", "camera porch/x: there is no camera porch; there are: door"),
        ("porch", "camera porch: there is none of this name; there are: door"),
    ],
)
def test_what_is_not_there_is_not_removed_and_told_by_its_name(start, name: str, message: str):
    error = refusal(lambda: start().live.remove(name))
    assert (error.status, str(error)) == (404, message)


def test_a_view_without_which_the_camera_is_nothing_stays(start):
    pipeline = start()
    pipeline.live.add("porch", {"views": {"front": "test://pattern", "back": "test://pattern?seed=2"}})
    error = refusal(lambda: pipeline.live.remove("porch/front"))
    assert error.status == 409 and "its sound is what is heard" in str(error)
    pipeline.live.remove("porch/back")
    error = refusal(lambda: pipeline.live.remove("porch/front"))
    assert error.status == 409 and "it is the last view" in str(error)
    error = refusal(lambda: pipeline.live.remove("porch/back"))
    assert (error.status, str(error)) == (404, "camera porch/back: camera porch has no view back; it has: front")


def test_more_views_than_an_edge_has_credit_for_are_refused(start):
    pipeline = start()
    for number in range(3):
        pipeline.live.add(f"door/v{number}", PATTERN)
    error = refusal(lambda: pipeline.live.add("door/v3", PATTERN))
    assert error.status == 422 and "a window has 5 pictures at fps 1 from 5 views" in str(error)


@pytest.fixture
def two_pictures(tmp_path: Path) -> Path:
    """A profile with which two pictures of a window are served on time, of one camera or of two."""
    cheap = StageCost(1_000_000, 1_000_000)
    stages = dict.fromkeys(("audio_encoder", "llm", "tts", "vocoder"), cheap)
    path = tmp_path / "pictures.json"
    path.write_text(Profile("tiny", {}, 2, {**stages, "vision_encoder": StageCost(0, 300_000_000)}).as_json())
    return path


def test_a_view_beyond_what_is_served_on_time_is_refused_until_another_one_has_gone(start, two_pictures: Path):
    pipeline = start(profile=two_pictures, until_s=time.monotonic() + 100)
    pipeline.live.add("door/back", PATTERN)
    for name in ("door/side", "yard"):
        error = refusal(lambda name=name: pipeline.live.add(name, PATTERN))
        assert (error.status, error.retry_after_s) == (503, 30)
        assert "3 pictures in a window can't be served on time, 2 with one picture each can" in str(error)
    pipeline.live.remove("door/back")
    pipeline.live.add("door/side", PATTERN)
    assert list(pipeline.views) == ["door/side"]


def test_a_camera_of_more_views_than_are_served_on_time_is_refused_whole(start, two_pictures: Path):
    pipeline = start(profile=two_pictures)
    views = {"views": {"front": "test://pattern", "back": "test://pattern?seed=2"}}
    error = refusal(lambda: pipeline.live.add("porch", views))
    assert error.status == 503 and "2 cameras with 3 pictures in a window can't be served" in str(error)
    pipeline.live.ended("door")
    pipeline.live.add("porch", views)


def test_a_view_that_is_about_to_come_has_its_place(start, two_pictures: Path):
    spec = replace(SPEC, admission=AdmissionSpec(profile=str(two_pictures)))
    live = LiveCameras(spec, paced=True, keeps_files=False)
    live.begin(None)
    coming = threading.Thread(target=lambda: live.add("door/back", PATTERN))
    coming.start()
    while not live._pending:
        time.sleep(0.01)
    assert refusal(lambda: live.add("yard", PATTERN)).status == 503
    live.answer(Pipeline(live))
    coming.join()


def test_a_view_that_a_stage_refuses_is_none(start):
    pipeline = start()
    pipeline.fails_with = StageError("camera: what session 'door' sees has ended")
    assert refusal(lambda: pipeline.live.add("door/back", PATTERN)).status == 503
    pipeline.fails_with = None
    pipeline.live.add("door/back", PATTERN)


# ---- the gateway -----------------------------------------------------------------------------------------------------


@pytest.fixture
def gateway(start) -> tuple[TestClient, Pipeline]:
    pipeline = start(profile=None)
    return TestClient(build_gateway(FakePipeline(), pipeline.live, TOKEN), base_url="http://127.0.0.1"), pipeline


KNOWN = {"Authorization": f"Bearer {TOKEN}"}


def test_a_camera_is_posted_and_deleted(gateway: tuple[TestClient, Pipeline]):
    client, pipeline = gateway
    answer = client.post("/api/v1/cameras", json={"name": "yard", **PATTERN}, headers=KNOWN)
    assert answer.status_code == 201
    assert answer.json() == {"name": "yard", "source": PATTERN["source"], "warnings": []}
    assert client.delete("/api/v1/cameras/yard", headers=KNOWN).status_code == 202
    assert pipeline.ended == ["yard"]
    assert client.delete("/api/v1/cameras/hall", headers=KNOWN).status_code == 404


def test_a_view_is_posted_and_deleted(gateway: tuple[TestClient, Pipeline]):
    client, pipeline = gateway
    answer = client.post("/api/v1/cameras", json={"name": "door/back", **PATTERN}, headers=KNOWN)
    assert answer.json() == {"name": "door/back", "source": PATTERN["source"], "warnings": []}
    assert client.delete("/api/v1/cameras/door/back", headers=KNOWN).status_code == 202
    assert client.delete("/api/v1/cameras/door%2Fback", headers=KNOWN).status_code == 404
    assert pipeline.ended == ["door/back"]


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer"}, {"Authorization": f"Basic {TOKEN}"},
                                     {"Authorization": "Bearer something else"}])  # fmt: skip
def test_without_the_token_nothing_is_changed(gateway: tuple[TestClient, Pipeline], headers: dict[str, str]):
    client, pipeline = gateway
    added = client.post("/api/v1/cameras", json={"name": "yard", **PATTERN}, headers=headers)
    removed = client.delete("/api/v1/cameras/door", headers=headers)
    assert (added.status_code, removed.status_code) == (401, 401)
    assert added.headers["WWW-Authenticate"] == "Bearer"
    assert not pipeline.opened and not pipeline.ended


NO_DESCRIPTIONS = (b"", b"{", b"[]", b"7", b'{"source": "test://pattern"}', b'{"name": 7}', b"\xff", b"[" * 9000)


@pytest.mark.parametrize("body", NO_DESCRIPTIONS)
def test_what_is_no_description_is_refused(gateway: tuple[TestClient, Pipeline], body: bytes):
    answer = gateway[0].post("/api/v1/cameras", content=body, headers=KNOWN)
    assert answer.status_code == 400
    assert "expected JSON like" in answer.json()["error"]


def test_a_name_that_is_no_text_is_refused(gateway: tuple[TestClient, Pipeline]):
    body = b'{"name": "\\ud800", "source": "test://pattern"}'
    assert gateway[0].post("/api/v1/cameras", content=body, headers=KNOWN).status_code == 422


def test_without_a_token_nobody_is_known():
    client = TestClient(
        build_gateway(FakePipeline(), LiveCameras(SPEC, paced=True, keeps_files=False)), base_url="http://127.0.0.1"
    )
    assert client.delete("/api/v1/cameras/door", headers={"Authorization": "Bearer "}).status_code == 401


def test_a_body_that_is_too_large_is_refused(gateway: tuple[TestClient, Pipeline]):
    body = json.dumps({"name": "yard", "source": "x" * MAX_BODY_BYTES}).encode()
    assert gateway[0].post("/api/v1/cameras", content=body, headers=KNOWN).status_code == 413
    assert gateway[0].post("/api/v1/cameras", content=iter([body]), headers=KNOWN).status_code == 413


def test_a_refusal_says_when_to_ask_again(start, profile: Path):
    client = TestClient(build_gateway(FakePipeline(), start(profile=profile).live, TOKEN), base_url="http://127.0.0.1")
    assert client.post("/api/v1/cameras", json={"name": "yard", **PATTERN}, headers=KNOWN).status_code == 201
    answer = client.post("/api/v1/cameras", json={"name": "hall", **PATTERN}, headers=KNOWN)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "30")
    assert "can't be served on time" in answer.json()["error"]


def test_a_gateway_without_cameras_takes_none():
    client = TestClient(build_gateway(FakePipeline()), base_url="http://127.0.0.1")
    assert client.post("/api/v1/cameras", json={"name": "yard", **PATTERN}, headers=KNOWN).status_code == 404
