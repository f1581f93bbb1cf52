"""stages/media/__init__.py: what a reader of media needs, by one name, and nothing loaded before it is asked for."""

import subprocess
import sys

import pytest

import stages.media
from stages.media import reader


@pytest.mark.parametrize("name", stages.media.__all__)
def test_the_package_has_what_reading_a_source_takes(name: str) -> None:
    assert getattr(stages.media, name) is getattr(reader, name)


def test_a_name_that_is_not_there_is_an_error_as_in_any_module() -> None:
    with pytest.raises(AttributeError, match=r"module 'stages\.media' has no attribute 'Nope'"):
        stages.media.Nope  # noqa: B018


def test_the_package_alone_loads_no_decoder() -> None:
    code = "import sys, stages.media; print('stages.media.reader' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
