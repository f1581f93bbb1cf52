"""Thousands of small storms: whatever happens in them, what must hold does. OMNI_TEST_SEEDS: how many, if not 3 000."""

import json
import os
import subprocess
import sys

import pytest

NUM_SEEDS = int(os.environ.get("OMNI_TEST_SEEDS", "3000"))
NUM_PROCESSES = 2


@pytest.mark.timeout(3600)  # it gets what time the others leave
def test_thousands_of_storms_break_nothing_that_must_hold() -> None:
    each = NUM_SEEDS // NUM_PROCESSES
    processes = [_simulate(first, first + each) for first in range(0, NUM_SEEDS, each)]
    reports = [(*process.communicate(), process.returncode) for process in processes]
    assert [code for _, _, code in reports] == [0] * NUM_PROCESSES, reports
    results = [json.loads(stdout) for stdout, _, _ in reports]
    assert [report["violations"] for report in results] == [[]] * NUM_PROCESSES
    assert sum(report["windows"] for report in results) >= NUM_SEEDS * 2 * 5
    for reason in ("stale", "late", "shed", "closed", "crash"):  # the faults were there
        assert all(report["drops"][reason] > 0 for report in results), reason


def _simulate(first: int, last: int) -> "subprocess.Popen[str]":
    """A seed that fails is printed, made as simple as it can be."""
    command = [sys.executable, "-m", "deploy", "simulate", "squall", "--seeds", f"{first}:{last}", "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
