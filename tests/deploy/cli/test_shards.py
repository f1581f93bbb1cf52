"""`pipeline shards`: what it prints and how it exits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deploy.cli.app import app
from model_shards.checkpoint import COMPONENTS


@pytest.fixture
def split(tmp_path: Path) -> Path:
    assert run("init", "--out", str(tmp_path / "tiny"))[0] == 0
    assert run("split", str(tmp_path / "tiny"), "--out", str(tmp_path / "split"))[0] == 0
    return tmp_path / "split"


def run(*arguments: str) -> tuple[int, str, str]:
    """Exit code, data, talk."""
    result = CliRunner().invoke(app, ["shards", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_a_split_is_verified_and_inspected_like_its_checkpoint(split: Path) -> None:
    code, _, talk = run("verify", str(split))
    assert code == 0
    assert "as its manifest tells" in talk and "tensors" in talk
    inspected = [json.loads(run("inspect", str(folder), "--json")[1]) for folder in (split, split.parent / "tiny")]
    assert inspected[0] == inspected[1]
    assert [row["component"] for row in inspected[0]] == list(COMPONENTS)


def test_a_damaged_split_is_told_in_one_line_per_problem_and_exits_with_1(split: Path) -> None:
    (split / "shards" / "tts.safetensors").unlink()
    code, data, talk = run("verify", str(split))
    assert (code, data) == (1, "")
    assert "files missing: shards/tts.safetensors" in talk
    assert "Traceback" not in talk


def test_a_split_does_not_write_over_anything(split: Path) -> None:
    code, _, talk = run("split", str(split.parent / "tiny"), "--out", str(split))
    assert code == 1
    assert "not an empty folder" in talk


def test_a_folder_that_is_no_checkpoint_is_told(tmp_path: Path) -> None:
    for command in (["verify", str(tmp_path)], ["split", str(tmp_path), "--out", str(tmp_path / "x")]):
        code, _, talk = run(*command)
        assert code == 1
        assert "no such file" in talk
