"""deploy/cli/background.py: what the command line says travels whole, however it is spelled."""

import json
import signal
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deploy.cli import background
from deploy.cli.app import app
from deploy.cli.background import decode, encode
from deploy.cli.up import UpArguments
from deploy.process.children import descendants
from deploy.run.state import StateFolder

SPELLINGS = [
    ["-d", "-f", "here.yaml"],
    ["-df", "here.yaml"],
    ["-dfhere.yaml"],
    ["--detach", "--file=here.yaml"],
    ["--file", "here.yaml", "--detach"],
    ["-d", "-d", "-f", "here.yaml"],
]


class Sent(Exception):
    """Instead of a process."""


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[UpArguments]:
    """What the process in the background would be given."""
    arrived: list[UpArguments] = []
    monkeypatch.setattr(background, "run_in_background", lambda arguments: arrived.append(decode(encode(arguments))))
    return arrived


@pytest.mark.parametrize("spelling", SPELLINGS, ids=" ".join)
def test_any_spelling_of_the_options_is_one_run_in_the_background(sent: list[UpArguments], spelling: list[str]):
    result = CliRunner().invoke(app, ["up", *spelling])
    assert (result.exit_code, sent) == (0, [UpArguments(file="here.yaml")])


def test_values_that_look_like_options_are_values(sent: list[UpArguments]):
    values = [
        "--out",
        "-d",
        "--camera=-d=--detach",
        "--set=-d=--detach",
        "--set",
        "--detach=-d",
        "--for=-d",
        "-f",
        "-d",
    ]
    result = CliRunner().invoke(app, ["up", "-d", *values, "--listener", "-d", "--barge-in=--detach"])
    assert result.exit_code == 0, result.output
    assert sent == [
        UpArguments(
            file="-d",
            overrides=("-d=--detach", "--detach=-d"),
            cameras=("-d=--detach",),
            duration="-d",
            out="-d",
            listener=("-d",),
            barge_in=("--detach",),
        )
    ]


def test_without_the_option_nothing_is_sent_to_the_background(sent: list[UpArguments]):
    result = CliRunner().invoke(app, ["up", "--out", "-d", "--speed", "no"])
    assert (result.exit_code, sent) == (2, [])


SLEEP = [sys.executable, "-c", "import time; time.sleep(1000)"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGHUP, 0)])
def test_who_interrupts_the_start_in_the_background_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("deploy.run.state.SOCKET_PATH_BYTES", 1000)
    monkeypatch.setattr(background, "python", lambda module: SLEEP)
    looks = iter([None, signal.raise_signal])  # the second one comes while it is waited for
    monkeypatch.setattr(StateFolder, "read", lambda self: (look := next(looks)) and look(number))
    before = descendants()
    result = CliRunner().invoke(app, ["up", "-d"])
    assert (result.exit_code, result.output) == (code, "pipeline: interrupted\n")
    assert descendants() == before


@pytest.mark.parametrize("text", ["门=test://pattern", "a b\n\t'\"$HOME", "\udcff.mp4", "", "x" * 100_000])
def test_every_value_arrives_as_it_was(text: str):
    arguments = UpArguments(file=text, overrides=(text, text), cameras=(text,), out=text)
    assert decode(encode(arguments)) == arguments
    assert json.loads(encode(arguments))["file"] == text
