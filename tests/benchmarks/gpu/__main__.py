"""`python -m tests.benchmarks.gpu`: measure, or show what was measured."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from tests.benchmarks.gpu import parts, show


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu", description="One GPU measured in minutes.")
    parser.add_argument("--minutes", type=float, default=8.0, help="it takes so long at most")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), metavar="OUT", help="all that was measured")
    parser.add_argument("--size", choices=("full", "tiny"), help="of the weights; full where there is a GPU")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cuda where there is one")
    names = [part.name for part in parts.PARTS]
    parser.add_argument("--parts", default=",".join(names), help=f"some of {','.join(names)}")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print such a file as tables, and measure nothing")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        parts.serve(given.part)
    elif given.show:
        show.show(json.loads(given.show.read_text(encoding="utf-8")))
    else:
        _measure(given)


def _measure(given: argparse.Namespace) -> None:
    device = given.device or _device()
    size = given.size or ("full" if device == "cuda" else "tiny")
    told = {"benchmark": "gpu", "size": size, "device": device, "minutes": given.minutes}
    record = parts.Record(given.json, {**told, "begun": time.strftime("%Y-%m-%d %H:%M:%S %z")})
    parts.run_parts(record, size, device, given.minutes, given.parts.split(","))
    show.show(record.content)


def _device() -> str:
    """torch is asked in the parts' processes; this one stays small and holds no device."""
    import subprocess

    asked = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return "cpu" if subprocess.run([sys.executable, "-c", asked], check=False).returncode else "cuda"


if __name__ == "__main__":
    main()
