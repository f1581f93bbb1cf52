"""graph/reference.py: the camera sees the secret itself, wherever in the source it is referred to."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from graph.reference import resolve
from graph.secret import Secret

PASSWORDS = ["12#34", "a%41b", "a?b", "a/b", "a@b", "a:b", "[a]", "a b", "${x}", "pä€", "a\\b", "a+b=c&d"]


def revealed(template: str, **environment: str) -> str:
    secret = resolve(template, environment)
    assert isinstance(secret, Secret)
    return secret.reveal()


@pytest.mark.parametrize("password", PASSWORDS)
def test_a_password_by_reference_is_the_password_of_the_url(password: str) -> None:
    url = urlsplit(revealed("rtsp://admin:${env:PW}@10.0.0.7:554/live", PW=password))
    assert (url.hostname, url.port, url.path) == ("10.0.0.7", 554, "/live")
    assert (url.username, unquote(url.password or "")) == ("admin", password)


@pytest.mark.parametrize("password", PASSWORDS)
def test_one_reference_may_be_user_and_password(password: str) -> None:
    url = urlsplit(revealed("rtsp://${env:LOGIN}@10.0.0.7/live", LOGIN=f"me:{password}"))
    assert (url.username, unquote(url.password or ""), url.hostname) == ("me", password, "10.0.0.7")


@pytest.mark.parametrize("password", PASSWORDS)
def test_a_token_by_reference_is_the_value_of_the_query(password: str) -> None:
    url = urlsplit(revealed("rtsp://10.0.0.7/live?token=${env:TOKEN}&channel=1", TOKEN=password))
    assert parse_qs(url.query) == {"token": [password], "channel": ["1"]}


def test_path_and_host_stand_as_they_are() -> None:
    assert revealed("rtsp://${env:HOST}/${env:PATH}", HOST="10.0.0.7:554", PATH="a/b%20c?d=1") == (
        "rtsp://10.0.0.7:554/a/b%20c?d=1"
    )


def test_a_reference_that_is_all_stands_as_it_is() -> None:
    assert revealed("${env:CAMERA}", CAMERA="rtsp://a:b%2F@10.0.0.7/x y?z") == "rtsp://a:b%2F@10.0.0.7/x y?z"


def test_a_file_is_read_without_the_line_end_of_its_editor(tmp_path: Path) -> None:
    for end in ("\n", "\r\n", ""):
        (tmp_path / "pw").write_bytes(f" p w {end}".encode())
        assert unquote(revealed(f"rtsp://u:${{file:{tmp_path}/pw}}@h/")) == "rtsp://u: p w @h/"


@pytest.mark.parametrize(
    ("password", "named"),
    [
        ("pass1\n", "a line's end (U+000A)"),
        ("pa\tss1", "a tab (U+0009)"),
        ("p\x7fass1", "U+007F"),
        ("\x1bpass", "U+001B"),
    ],
)
def test_a_control_character_is_named_and_the_secret_is_not(password: str, named: str) -> None:
    with pytest.raises(ValueError, match="environment variable PW") as caught:
        resolve("rtsp://u:${env:PW}@h/", {"PW": password})
    assert named in str(caught.value)
    assert "pass" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_second_line_in_a_secret_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "pw").write_text("first\nsecond\n")
    with pytest.raises(ValueError, match="character 6 is a line's end"):
        resolve(f"rtsp://u:${{file:{tmp_path}/pw}}@h/", {})


def test_what_is_shown_is_what_was_written() -> None:
    assert str(resolve("rtsp://u:${env:PW}@h/x?k=${env:PW}", {"PW": "a/b"})) == "rtsp://u:${env:PW}@h/x?k=${env:PW}"
