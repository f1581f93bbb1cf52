"""Logins of cameras: what arrives there is what was written or referred to, and nothing of it is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from graph.chunk import NS_PER_S
from graph.reference import resolve
from graph.secret import Secret
from stages.media.reader import Failed, MediaError, MediaReader, MediaRequest, check_source
from tests.support.login_camera import LoginCamera


def refusal(source: str | Secret) -> str:
    """What is told of a camera that let nobody in."""
    secret = source if isinstance(source, Secret) else Secret(source)
    request = MediaRequest(secret.reveal(), 1.0, 1 << 16, True, False, NS_PER_S, None, masked=secret.masked)
    with MediaReader(request) as reader:
        item = reader.read(20)
        while not isinstance(item, Failed):
            item = reader.read(20)
    assert item.kind == "refused"
    return item.message


@pytest.mark.parametrize("password", ["12#34", "a%41b", "a?b", "a/b", "a@b:c", "[x] y", "p%", "äö€", "a+b&c=d"])
def test_the_camera_sees_the_password_that_is_referred_to(password: str) -> None:
    with LoginCamera() as camera:
        source = resolve(f"rtsp://me:${{env:PW}}@127.0.0.1:{camera.port}/live", {"PW": password})
        message = refusal(source)
    assert set(camera.logins) == {f"me:{password}"}
    assert set(camera.urls) == {f"rtsp://127.0.0.1:{camera.port}/live"}
    assert password not in message
    assert "${env:PW}" in message


def test_the_camera_sees_the_password_of_a_file_without_its_line_end(tmp_path: Path) -> None:
    (tmp_path / "pw").write_text("p/w \n")
    with LoginCamera() as camera:
        refusal(resolve(f"rtsp://me:${{file:{tmp_path}/pw}}@127.0.0.1:{camera.port}/live", {}))
    assert set(camera.logins) == {"me:p/w "}


def test_the_camera_sees_a_password_that_was_percent_encoded_by_hand() -> None:
    with LoginCamera() as camera:
        refusal(f"rtsp://me:a%2Fb@127.0.0.1:{camera.port}/live")
    assert set(camera.logins) == {"me:a/b"}


def test_a_secret_in_the_path_is_sent_and_not_told() -> None:
    with LoginCamera() as camera:
        message = refusal(resolve(f"rtsp://127.0.0.1:{camera.port}/${{env:KEY}}/live", {"KEY": "Hunter2"}))
    assert set(camera.urls) == {f"rtsp://127.0.0.1:{camera.port}/Hunter2/live"}
    assert "Hunter2" not in message


@pytest.mark.parametrize("separator", ["/", "#", "?", "["])
def test_a_password_that_ends_the_host_too_early_is_refused_with_the_way_out(separator: str) -> None:
    with pytest.raises(MediaError, match="percent-encode") as caught:
        check_source(f"rtsp://admin:Hunter2{separator}xyzzy@10.0.0.7/live")
    assert "Hunter2" not in str(caught.value)
    assert "xyzzy" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "source", ["rtsp://admin:12/xyzzy@10.0.0.7/live", "rtsp://admin:Hunter2", "rtsp://a:99999999/"]
)
def test_what_might_be_half_a_password_is_no_port(source: str) -> None:
    with pytest.raises(MediaError, match="percent-encode") as caught:
        check_source(source)
    assert not {"12", "xyzzy", "Hunter2", "99999999"} & set(
        str(caught.value).replace("/", " ").replace(":", " ").split()
    )


@pytest.mark.parametrize("source", ["rtsp://127.0.0.1:/live", "rtsp://cam:abc/live", "rtsp://cam:55x4/"])
def test_a_port_that_is_none_is_told_as_that(source: str) -> None:
    with pytest.raises(MediaError, match="is no port") as caught:
        check_source(source)
    assert "before its last '@'" not in str(caught.value)


@pytest.mark.parametrize("source", ["rtsp://cam:554/x@y", "rtsp://admin:554/xyzzy@10.0.0.7"])
def test_what_may_be_a_path_or_half_a_password_is_masked_and_told_with_both_ways_out(source: str) -> None:
    with pytest.raises(MediaError, match="path as %40; percent-encode") as caught:
        check_source(source)
    assert not {"554", "x", "xyzzy"} & set(str(caught.value).replace("/", " ").replace(":", " ").split())
    assert check_source("rtsp://cam:554/x%40y") == "rtsp"


def test_a_login_that_libav_would_cut_off_is_refused() -> None:
    with pytest.raises(MediaError, match="more than 127 bytes"):
        check_source(f"rtsp://admin:{'p' * 122}@10.0.0.7/live")
    assert check_source(f"rtsp://admin:{'p' * 121}@10.0.0.7/live") == "rtsp"


def test_a_host_may_have_an_at_in_its_path() -> None:
    assert check_source("rtsp://cam.local/live@1") == "rtsp"
    assert check_source("rtsp://10.0.0.7:554/live@1") == "rtsp"


def test_no_print_of_a_request_shows_its_source() -> None:
    request = MediaRequest("rtsp://admin:Hunter2@10.0.0.7/live", 1.0, 1 << 16, True, False, NS_PER_S, None)
    assert "Hunter2" not in repr(request)
