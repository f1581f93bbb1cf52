"""deploy/cli_up.py: what the end of a run says is left, is there."""

from pathlib import Path

from deploy.cli_up import _summary
from deploy.up import Outcome


def summary(out: Path) -> list[str]:
    return list(_summary(Outcome(interrupted=False, in_vain=False, ledger={}, out=out)))


def test_all_files_of_a_run_are_named(tmp_path: Path) -> None:
    for name in ("transcript.txt", "events.jsonl", "windows.jsonl", "ledger.json", "door.wav", "yard.wav"):
        (tmp_path / name).touch()
    assert summary(tmp_path) == [
        f"left in {tmp_path}: transcript.txt, events.jsonl, windows.jsonl, ledger.json, 2 WAVs"
    ]


def test_what_was_removed_during_the_run_is_not_named(tmp_path: Path) -> None:
    (tmp_path / "ledger.json").touch()
    (tmp_path / "door.wav").touch()
    assert summary(tmp_path) == [f"left in {tmp_path}: ledger.json, 1 WAV"]


def test_a_folder_that_is_gone_is_said_to_be(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert summary(out) == [f"nothing is left in {out}: its files were removed"]
