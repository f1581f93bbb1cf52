"""deploy/process/masked_output.py, and the whole command line: no part of a password comes out, however it went in."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deploy.cameras.sources import check_sources
from deploy.process.masked_output import MaskedStream, MaskingFormatter, environment_without_secrets
from graph.errors import GraphError
from graph.reference import resolve
from graph.secret import KNOWN, hide
from tests.support.specs import parse_spec

ROOT = Path(__file__).resolve().parents[3]
SOURCES = [
    f"rtsp://admin:Hunter2{end}@10.0.0.7/live" for end in ("/xyzzy", "#xyzzy", "?xyzzy", " xyzzy", "[xyzzy", "%xyzzy")
]
BARE = "admin:Hunter2/xyzzy@10.0.0.7"


def said(folder: Path, *arguments: str, environment: dict[str, str] | None = None) -> str:
    """What a command says, which must fail: nothing of it is about the world."""
    done = subprocess.run(
        [sys.executable, "-m", "deploy", *arguments],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "HOME": str(folder), "TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
        | (environment or {}),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    return done.stdout + done.stderr


def assert_masked(text: str) -> None:
    assert "Hunter2" not in text
    assert "xyzzy" not in text


@pytest.mark.parametrize("source", [*SOURCES[:2], BARE])
def test_up_with_a_raw_password_shows_none_of_it_and_tells_the_way_out(tmp_path: Path, source: str) -> None:
    text = said(tmp_path, "up", "--camera", f"door={source}")
    assert_masked(text)
    assert "percent-encode" in text or "sources are not read here" in text


LINES = [
    *(f'door: {{source: "{source}"}}' for source in SOURCES),
    *(f"door: {{source: {source}}}" for source in SOURCES),  # without quotes it is cut, or no YAML
    "door: {source: rtsp://admin:Hunter2,xyzzy@10.0.0.7/live}",  # in a flow a comma begins the next key
    "door: {source: rtsp://admin:Hunter2: xyzzy@10.0.0.7/live}",
    'door: {source: "rtsp://admin:xyzzy\\Hunter2@10.0.0.7/live"}',
    f'door: {{sorce: "{SOURCES[0]}"}}',
    f'"{SOURCES[0]}": 1',
    f'door: ["{SOURCES[0]}"]',
    f'door: {{source: "test://pattern", fps: "{SOURCES[0]}"}}',
]


@pytest.mark.parametrize("number", range(len(LINES)))
def test_a_description_with_a_raw_password_shows_none_of_it(number: int) -> None:
    # A password of its own: those of other tests are known to this process.
    line = LINES[number].replace("Hunter2", f"Hunter{number}q").replace("xyzzy", f"xyzzy{number}q")
    with pytest.raises(GraphError) as caught:
        check_sources(parse_spec(f"version: 1\ncameras:\n  {line}\n", "pipeline.yaml"), paced=False)
    assert f"Hunter{number}q" not in hide(str(caught.value))
    assert f"xyzzy{number}q" not in hide(str(caught.value))


@pytest.mark.parametrize(
    "arguments",
    [
        ("up", SOURCES[0]),  # an argument too many: click tells it
        ("up", f"--camra=door={SOURCES[0]}"),
        ("up", "--set", f"cameras.door.sorce={SOURCES[0]}", "--camera", SOURCES[1]),
        ("up", "--for", SOURCES[0]),
        ("camera", "add", SOURCES[1]),
    ],
)
def test_no_mistake_in_a_command_shows_a_password(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert_masked(said(tmp_path, *arguments))


def test_a_secret_of_the_environment_is_not_shown(tmp_path: Path) -> None:
    text = said(
        tmp_path,
        *("up", "--camera", "door=http://me:${env:PW}@10.0.0.7/${env:PW}/live?t=${env:PW}"),
        environment={"PW": "Hunter2 xyzzy"},
    )
    assert_masked(text)
    assert "${env:PW}" in text or "***" in text


def test_a_traceback_in_a_log_shows_no_known_secret() -> None:
    KNOWN.add("Hunter2/xyzzy")
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    handler.setFormatter(MaskingFormatter("%(message)s"))
    logger = logging.Logger("test")
    logger.addHandler(handler)
    try:
        raise ValueError("Port could not be cast to integer value as 'Hunter2/xyzzy'")
    except ValueError:
        logger.exception("at %s", "Hunter2%2Fxyzzy")
    assert "ValueError" in log.getvalue()
    assert_masked(log.getvalue())


def test_a_masked_stream_is_the_stream_in_all_else() -> None:
    KNOWN.add("Hunter2/xyzzy")
    inner = io.StringIO()
    stream = MaskedStream(inner)
    assert stream.write("a Hunter2/xyzzy b") == len("a Hunter2/xyzzy b")
    stream.writelines(["Hunter2/xyzzy\n", "c"])
    stream.flush()
    assert stream.getvalue() == "a *** b***\nc"


def test_an_argument_with_a_password_is_starred_while_its_process_runs(tmp_path: Path) -> None:
    source = f"door={SOURCES[5]}"  # nobody answers there for 12 s
    process = subprocess.Popen(
        [sys.executable, "-m", "deploy", "up", "--camera", source.replace("10.0.0.7", "127.0.0.1:9")],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    arguments = Path(f"/proc/{process.pid}/cmdline")
    try:
        while b"****" not in arguments.read_bytes():
            assert process.poll() is None, "it ended first"
            time.sleep(0.05)
        written = arguments.read_bytes()
    finally:
        process.kill()
        process.wait()
    assert_masked(written.decode())
    assert b"door=rtsp://" in written
    assert b"@127.0.0.1:9/live" in written


def test_what_is_started_inherits_no_secret_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOOR_PASSWORD", "Hunter2/xyzzy")
    resolve("rtsp://me:${env:DOOR_PASSWORD}@10.0.0.7/${env:HOME}", os.environ)
    with environment_without_secrets():
        inherited = subprocess.run(["env"], capture_output=True, text=True, check=True).stdout
    assert_masked(inherited)
    assert "HOME=" in inherited
    assert os.environ["DOOR_PASSWORD"] == "Hunter2/xyzzy"
