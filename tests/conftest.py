"""Shared by all tests: what takes a second to make is made once per run."""

import os
import signal

import pytest
import torch
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # three runs share the cores: two threads each wait for one another

from tests.support.tiny import Tiny

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under `nohup` it is ignored, also by what is started here

# How long an example takes says how busy the machine is, and nothing of what is tested.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """An untrained checkpoint of the smallest size, in a folder of its own."""
    return Tiny(tmp_path_factory.mktemp("checkpoint") / "tiny")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
