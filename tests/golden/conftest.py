"""The golden suite: skipped as a whole without its folder; prints passed / total per file."""

from __future__ import annotations

from collections import defaultdict

import pytest

from tests.support import golden

_OUTCOMES: dict[str, dict[str, str]] = defaultdict(dict)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name == "test_complete.py")  # it tells what the others left out
    if golden.PRESENT:
        return
    for item in items:
        if "golden" in item.path.parts:
            # First, as a test without cases already has a marker that says no more than that.
            item.add_marker(pytest.mark.skip(reason=golden.REASON), append=False)


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
    for file, outcomes in sorted(_OUTCOMES.items()):
        passed = sum(outcome == "passed" for outcome in outcomes.values())
        terminalreporter.write_line(f"{file:<28} {passed:>4} / {len(outcomes)}")
    total = sum(len(outcomes) for outcomes in _OUTCOMES.values())
    passed = sum(outcome == "passed" for outcomes in _OUTCOMES.values() for outcome in outcomes.values())
    terminalreporter.write_line(f"{'all files':<28} {passed:>4} / {total}")
