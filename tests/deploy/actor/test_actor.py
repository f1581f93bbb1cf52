"""deploy/actor/actor.py: what an actor writes of itself never costs more than itself."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.actor.actor import _log_to
from deploy.process.printed import log_what_is_printed


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root, raises = logging.getLogger(), logging.raiseExceptions
    handlers, level = list(root.handlers), root.level
    root.handlers.clear()  # pytest's, which `force` would close
    yield
    for handler in root.handlers:
        with contextlib.suppress(OSError):
            handler.close()
    root.handlers[:], root.level, logging.raiseExceptions = handlers, level, raises


def test_an_actor_s_log_takes_every_letter(tmp_path: Path):
    _log_to(tmp_path / "logs" / "llm.0.log")
    logging.info("门 %s", "\udcff")
    assert (tmp_path / "logs" / "llm.0.log").read_text(encoding="utf-8").endswith("INFO root: 门 \\udcff\n")


def test_what_a_stage_prints_is_in_its_log_line_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdout", sys.stdout)
    _log_to(tmp_path / "asr.0.log")
    try:
        log_what_is_printed()
        print("one", 1, end="")
        print(" and\ntwo")
    finally:
        logging.captureWarnings(False)
    lines = (tmp_path / "asr.0.log").read_text().splitlines()
    assert [line.partition(" INFO ")[2] for line in lines] == ["print: one 1 and", "print: two"]


def test_a_full_disk_costs_an_actor_its_log_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "llm.0.log").symlink_to("/dev/full")
    _log_to(tmp_path / "llm.0.log")
    logging.info("what happened")
    assert capsys.readouterr().err == ""


def test_a_folder_for_logs_that_cant_be_made_costs_the_log_only(tmp_path: Path):
    (tmp_path / "logs").touch()
    _log_to(tmp_path / "logs" / "llm.0.log")
    logging.info("what happened")
