"""`python -m tests.benchmarks.gpu`: measure, or show what was measured.

Exit codes: 0 ok · 2 usage · 130 interrupted, with what was measured until then.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from deploy.evaluate.bench import BenchUsageError, check_record
from tests.benchmarks.gpu import parts, show
from tests.benchmarks.gpu.options import CHOICES, NAMES, check_options


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu", description="One GPU measured in minutes.")
    parser.add_argument("--minutes", default="8", help="it takes so long at most")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), metavar="OUT", help="all that was measured")
    parser.add_argument("--size", default="", help=f"of the weights: {', '.join(CHOICES['size'])}; full on a GPU")
    parser.add_argument("--device", default="", help=f"{', '.join(CHOICES['device'])}; cuda where there is one")
    parser.add_argument("--parts", default=",".join(NAMES), help=f"some of {','.join(NAMES)}")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print such a file as tables, and measure nothing")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        parts.serve(given.part)
        return
    try:
        if given.show:
            show.show(_read(given.show))
            return
        check_options(given.minutes, given.size, given.device, given.parts)
        check_record(given.json)
    except BenchUsageError as error:
        parser.error(str(error))
    _measure(given)


def _read(file: Path) -> dict[str, Any]:
    """A record. Raises BenchUsageError where the file is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchUsageError(f"{file}: {error.strerror}") from None
    except ValueError as error:
        raise BenchUsageError(f"{file}: no JSON: {error}") from None
    if not isinstance(content, dict) or content.get("benchmark") != "gpu":
        raise BenchUsageError(f"{file}: nothing that this benchmark has measured")
    return content


def _measure(given: argparse.Namespace) -> None:
    signal.signal(signal.SIGINT, _interrupt)
    record: parts.Record | None = None
    try:
        device = given.device or _device()
        size, minutes = given.size or ("full" if device == "cuda" else "tiny"), float(given.minutes)
        header = {"benchmark": "gpu", "size": size, "device": device, "minutes": minutes}
        record = parts.Record(given.json, {**header, "begun": time.strftime("%Y-%m-%d %H:%M:%S %z")})
        parts.run_parts(record, size, device, minutes, given.parts.split(","))
        show.show(record.content)
    except KeyboardInterrupt:
        if record is not None:
            show.show(record.content)
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _interrupt(number: int, frame: object) -> None:
    """Once: nothing cuts off the end of the parts, nor what is shown."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _device() -> str:
    """torch is asked in the parts' processes; this one stays small and holds no device."""
    program = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    command = [sys.executable, "-c", program]
    return "cpu" if subprocess.run(command, check=False, start_new_session=True).returncode else "cuda"


if __name__ == "__main__":
    main()
