"""A part of the GPU's benchmark that finds something and then hangs, or dies, as its size says."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

from tests.benchmarks.gpu.parts import Entry, Part, Request

MADE = Part("made", "tests.support.made_part", 1.0, again=True)


def measure(request: Request) -> Iterator[Entry]:
    yield "at", "first"
    yield "first", 1
    if "second" not in request.skip:
        yield "at", "second"
        if request.size == "dies":
            os._exit(9)
        yield "child", subprocess.Popen(["sleep", "600"]).pid
        time.sleep(600)
    yield "third", 3


if __name__ == "__main__":
    from tests.benchmarks.gpu import parts

    parts.PARTS = (MADE,)  # type: ignore[assignment, misc]
    parts.serve(sys.argv[1])
