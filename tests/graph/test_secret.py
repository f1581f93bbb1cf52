"""graph/secret.py: nothing of a password is shown, and what is no password stays."""

from __future__ import annotations

import json
import time
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graph.secret import KnownSecrets, Secret, hide, mask_source, mask_urls

PASSWORD = "hunter2"


@settings(deadline=None, max_examples=50)  # the machine that tests may be busy
@given(st.text("xyzäß:/@?#&= %'\"1.[]", min_size=1))
def test_whatever_the_password_looks_like_it_is_masked(password: str) -> None:
    assert mask_urls(f"rtsp://admin:{password}@10.0.0.7/live") == "rtsp://***@10.0.0.7/live"


@pytest.mark.parametrize("template", ["?user=a&password={}", "/user=a_passwd={}_channel=1", "/x?access_token={}&y=1"])
def test_a_password_in_path_or_query_is_masked(template: str) -> None:
    assert PASSWORD not in mask_urls("rtsp://10.0.0.7" + template.format(PASSWORD))


def test_a_password_with_an_underscore_goes_as_a_whole() -> None:
    shown = mask_urls("rtsp://10.0.0.7/user=admin_password=tl_Jw_pb_channel=1_stream=0.sdp")
    assert shown == "rtsp://10.0.0.7/user=admin_password=***_channel=1_stream=0.sdp"


@pytest.mark.parametrize("host", ["10.0.0.7", "10.0.0.7:554", "[fe80::1]", "[fe80::1]:554"])
@pytest.mark.parametrize("rest", ["/live@1", "?to=a@b", "/a://b", "", " is away"])
def test_behind_an_address_is_no_login(host: str, rest: str) -> None:
    assert mask_urls(f"rtsp://{host}{rest}") == f"rtsp://{host}{rest}"


@pytest.mark.parametrize("login", ["10.0.0.7", "10.0.0.7:554", "10.0.0.7:pw", "[fe80::1]:pw/x", "cam:554/x", "cam/x"])
def test_what_may_be_a_login_is_masked(login: str) -> None:
    assert mask_urls(f"rtsp://{login}@10.0.0.9/live") == "rtsp://***@10.0.0.9/live"


def test_every_url_of_a_text_is_masked() -> None:
    text = f"not rtsp://10.0.0.7/live but rtsp://admin:{PASSWORD}@10.0.0.9/live or rtsp://root:{PASSWORD}@10.0.0.8"
    assert mask_urls(text) == "not rtsp://10.0.0.7/live but rtsp://***@10.0.0.8"


@pytest.mark.parametrize(
    "template", ["rtsp://${env:A}@h/x", "rtsp://admin:${env:A}@h/x", "rtsp://h/?token=${env:A}", "${file:/run/secret}"]
)
def test_references_stay_as_they_were_written(template: str) -> None:
    assert mask_urls(template) == template


def test_a_long_text_takes_little_time() -> None:
    started_s = time.process_time()
    for part in ("://", "://10.0.0.7/", "://[", "?pass", "pass=", "@", "_channel="):
        mask_urls(part * 100_000)
    assert time.process_time() - started_s < 5  # a guard against quadratic time; typically 0.2


def test_secrets_are_equal_by_what_they_hide() -> None:
    assert Secret("${env:A}", "x") == Secret("x")
    assert hash(Secret("${env:A}", "x")) == hash(Secret("x"))
    assert Secret("x") != "x"


# ---- Whole sources --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", ["/", "#", "?", "@", " ", "[", "]", "%", "\\", "'", '"', ",", ";", "&", ":"])
@pytest.mark.parametrize("form", ["rtsp://admin:{}@10.0.0.7/live", "rtsp://{}@10.0.0.7", "admin:{}@10.0.0.7/live"])
def test_nothing_of_a_password_is_shown_wherever_a_parser_would_cut_it(form: str, separator: str) -> None:
    source = form.format(f"Hunter2{separator}xyzzy")
    for shown in (mask_source(source), str(Secret(source)), repr(Secret(source)), hide(mask_urls(f"not {source}"))):
        assert "Hunter2" not in shown
        assert "xyzzy" not in shown


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("rtsp://admin:Hunter2", "rtsp://***"),  # the rest was a comment: "#b@10.0.0.7"
        ("rtsp://admin:Hunter2/xy", "rtsp://***"),
        ("rtsp:/admin:Hunter2@10.0.0.7/live", "***@10.0.0.7/live"),
        ("rtsp://10.0.0.7/live?t=Hunter2", "rtsp://10.0.0.7/live?***"),
        ("rtsp://10.0.0.7/live?Hunter2", "rtsp://10.0.0.7/live?***"),
        ("rtsp://10.0.0.7/live#token=Hunter2", "rtsp://10.0.0.7/live#***"),
        (
            "rtsp://10.0.0.7/user=admin_password=a&Hunter2_channel=1",
            "rtsp://10.0.0.7/user=admin_password=***_channel=1",
        ),
    ],
)
def test_what_may_be_a_secret_in_a_source_is_masked(source: str, shown: str) -> None:
    assert mask_source(source) == shown


def test_a_key_that_only_sounds_like_a_secret_is_none() -> None:
    text = "set edges[0].credit=4, mapping=x, design=y, spinning=1"
    assert mask_urls(text) == text


@pytest.mark.parametrize(
    "source",
    [
        "rtsp://cam.local:554/live",
        "rtsp://10.0.0.7/cam?channel=1&subtype=0",
        "rtsp://[fe80::1]:554/live@1",
        "rtsp://cam:${env:PORT}/live?key=${env:KEY}",
        "rtsp://admin:${file:/run/secrets/a@b}@10.0.0.7/live",
        "test://pattern?seed=12345&size=640x480",
        "synthetic://room?seed=7&events=busy",
        "/home/a:b/c@d.mp4",
        "./12:30@noon.mp4",
        "clip?x.mp4",
    ],
)
def test_what_is_no_secret_is_shown(source: str) -> None:
    assert mask_source(source) == source


# ---- What this process knows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("secret", ["12#34", "a%41b", "p w/d", "äöü€", 'quo"te', "back\\slash"])
def test_a_known_secret_is_hidden_in_each_way_of_writing_it(secret: str) -> None:
    known = KnownSecrets()
    known.add(secret)
    for written in (secret, quote(secret), quote(secret, safe=""), json.dumps(secret), repr(secret)):
        assert secret not in known.hide(f"before {written} after")
        assert known.hide(f"before {written} after").count("***") == 1


def test_pieces_that_a_parser_tells_of_a_password_are_hidden() -> None:
    known = KnownSecrets()
    known.add_source("rtsp://admin:Hunter2/xyzzy@10.0.0.7/live?t=topsecret")
    assert known.hide(
        "no port: 'Hunter2', no path: 'xyzzy', no key: topsecret"
    ) == "no port: '***', no path: '***', " + ("no key: ***")
    assert known.hide("camera door at 10.0.0.7/live, admin") == "camera door at 10.0.0.7/live, admin"


def test_what_is_too_short_is_no_secret() -> None:
    known = KnownSecrets()
    known.add("abc")
    assert known.hide("abc") == "abc"


def test_the_oldest_secrets_go_first() -> None:
    known = KnownSecrets()
    for number in range(known.MAX_KNOWN + 1):
        known.add(f"secret{number:06}")
    assert known.hide("secret000000") == "secret000000"
    assert known.hide("secret000001") == "***"


def test_a_reference_is_shown_although_its_source_is_known() -> None:
    known = KnownSecrets()
    known.add_source("rtsp://admin:${env:PASSWORD}@10.0.0.7/live")
    assert known.hide("'rtsp://admin:${env:PASSWORD}@10.0.0.7/live'") == "'rtsp://admin:${env:PASSWORD}@10.0.0.7/live'"


def test_sources_in_a_text_that_is_not_understood_are_known() -> None:
    known = KnownSecrets()
    known.add_text("cameras: {door: {source: rtsp://admin:Hunter2,xyzzy@10.0.0.7/live}}")
    assert known.hide("unknown key 'xyzzy@10.0.0.7/live'") == "unknown key '***@10.0.0.7/live'"


@pytest.mark.parametrize(
    "source",
    [
        "rtsp://${env:DOOR_LOGIN}@10.0.0.7/stream",
        "rtsp://${file:/run/secrets/camera}@10.0.0.7/stream",
        "rtsp://me:${file:secrets/camera}@10.0.0.7/stream?token=${env:DOOR_TOKEN}",
        "rtsp://${file:C:/secrets/camera}@10.0.0.7/${env:DOOR_TOKEN}",
    ],
)
def test_the_text_of_a_reference_is_no_secret(source: str):
    known = KnownSecrets()
    known.add_source(source)
    known.add_text(f"--camera a={source}")
    text = "camera a: environment variable DOOR_LOGIN is not set; DOOR_TOKEN; /run/secrets/camera: no such file; me"
    assert known.hide(text) == text


def test_what_stands_beside_a_reference_is_a_secret():
    known = KnownSecrets()
    known.add_source("rtsp://me:Hunter2${env:REST}@10.0.0.7/stream")
    assert known.hide("Hunter2 REST") == "*** REST"
