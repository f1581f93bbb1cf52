"""Shared by all tests: what takes a second to make is made once per run."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # three runs share the cores: two threads each wait for one another

from tests.support.tiny import Tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """An untrained checkpoint of the smallest size, in a folder of its own."""
    return Tiny(tmp_path_factory.mktemp("checkpoint") / "tiny")
