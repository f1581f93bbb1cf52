"""The golden suite: leaves out what the folder has no case of; prints passed / total, and what is held, per file."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from tests.support import golden

_OUTCOMES: dict[str, dict[str, str]] = defaultdict(dict)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if marker := item.get_closest_marker("left_out"):
            golden.LEFT_OUT.append((item.path.name, marker.args[0]))
    items[:] = [item for item in items if item.get_closest_marker("left_out") is None]
    items.sort(key=lambda item: item.path.name == "test_complete.py")  # it says what the others left out


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    marker = item.get_closest_marker("golden")
    if marker is not None and (report.when == "call" or report.outcome != "passed"):
        _OUTCOMES[marker.args[0]][item.nodeid] = report.outcome
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _OUTCOMES:
        return
    terminalreporter.section("golden cases, passed / total")
    terminalreporter.write_line(f"from {golden.SOURCE}")
    held = golden.held()
    for file, outcomes in sorted(_OUTCOMES.items()):
        passed = sum(outcome == "passed" for outcome in outcomes.values())
        line = f"{file:<28} {passed:>4} / {len(outcomes):<5}{held.get(file, '')}"
        terminalreporter.write_line(line.rstrip())
    total = sum(len(outcomes) for outcomes in _OUTCOMES.values())
    passed = sum(outcome == "passed" for outcomes in _OUTCOMES.values() for outcome in outcomes.values())
    terminalreporter.write_line(f"{'all files':<28} {passed:>4} / {total}")
    if held:
        terminalreporter.write_line("A compact part of the recordings; OMNI_GOLDEN=FOLDER takes the whole.")
    for file, count in sorted(Counter(file for _, file in golden.LEFT_OUT).items()):
        terminalreporter.write_line(f"left out: {count} tests of {file}, of which this folder has no case")
