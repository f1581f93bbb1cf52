"""Places to run in, the clip they look at, and the checkpoint: made once per test run."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from model_shards.init import init_checkpoint
from tests.support.media import RECORDED, Clip, times
from tests.support.pipeline import Place, new_place


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """XDG_CACHE_HOME of all runs, with the tiny checkpoint in it."""
    folder = tmp_path_factory.mktemp("cache")
    init_checkpoint(folder / "omni-pipeline" / "tiny", "tiny")
    return folder


@pytest.fixture(scope="session")
def tiny(cache: Path) -> Path:
    """The folder of the tiny checkpoint."""
    return cache / "omni-pipeline" / "tiny"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Place]:
    with new_place(tmp_path_factory.mktemp("project"), cache) as new:
        yield new


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """H.264 and AAC of 20 s: the recorded video, else one of our own making."""
    if RECORDED.is_file():
        return RECORDED
    return Clip(tmp_path_factory.mktemp("media") / "clip.mp4").video(times(20)).sound(20).write()
