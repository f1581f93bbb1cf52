"""deploy/cli/up.py: the end of a run says in one line whether all is accounted for, and what is left is there."""

from pathlib import Path

from deploy.cli.up import _summary
from deploy.run.up import Outcome
from graph.ledger import Account


def summary(out: Path) -> list[str]:
    return list(_summary(Outcome(interrupted=False, in_vain=False, ledger={}, out=out)))


def of_ledger(*, every_edge: bool = False, **accounts: Account) -> list[str]:
    outcome = Outcome(interrupted=False, in_vain=False, ledger=accounts, out=None)
    return [" ".join(line.split()) for line in _summary(outcome, every_edge=every_edge)]


def test_a_ledger_in_which_nothing_was_dropped_is_one_line() -> None:
    assert of_ledger(a=Account(2, 2), b=Account(3, 3)) == [
        "ledger exact on all 2 edges: 5 accepted = 5 delivered + 0 dropped + 0 in flight"
    ]


def test_an_edge_that_dropped_something_is_told_with_its_reasons() -> None:
    assert of_ledger(a=Account(2, 2), b=Account(9, 6, {"late": 1, "stale": 2})) == [
        "ledger exact on all 2 edges: 11 accepted = 8 delivered + 3 dropped (1 late, 2 stale) + 0 in flight",
        "b 9 accepted = 6 delivered + 3 dropped (1 late, 2 stale) + 0 in flight",
    ]


def test_every_edge_is_told_where_that_is_asked_for() -> None:
    assert [line.partition(" ")[0] for line in of_ledger(every_edge=True, a=Account(2, 2), b=Account(3, 3))] == [
        "ledger",
        "a",
        "b",
    ]


def test_a_chunk_that_is_not_accounted_for_is_said_to_be_and_where() -> None:
    assert of_ledger(a=Account(2, 1), b=Account(3, 3)) == [
        "ledger not exact on 1 of 2 edges: 5 accepted = 4 delivered + 0 dropped + 1 in flight",
        "a 2 accepted = 1 delivered + 0 dropped + 1 in flight",
    ]


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
