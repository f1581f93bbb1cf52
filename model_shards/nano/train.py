"""`python -m model_shards.nano.train STAGE`: every training of nano. Resumable: run again, it goes on."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Final

Stage = Callable[[Path, float], None]

STAGES: Final = MappingProxyType(
    {
        "timing": "model_shards.nano.measure_timing:measure",
        "vision": "model_shards.nano.train_vision:train",
        "audio": "model_shards.nano.train_audio:train",
        "llm": "model_shards.nano.train_llm:train",
        "speech-data": "model_shards.nano.speech_data:train",
        "speech-vocoder": "model_shards.nano.train_speech_vocoder:train",
        "speech-codes": "model_shards.nano.train_speech_codes:train",
        "speech-flow": "model_shards.nano.train_speech_flow:train",
        "speech-talker": "model_shards.nano.train_speech_talker:train",
        "speech-eval": "model_shards.nano.speech_eval:evaluate",
    }
)
"""Stage to module:function, imported only when it is run. Called with the training's folder and minutes."""


def load_stage(name: str) -> Stage:
    module, function = STAGES[name].split(":")
    stage: Stage = getattr(import_module(module), function)
    return stage


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model_shards.nano.train", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--folder", type=Path, help="where the training stands; default ../nano-training/STAGE")
    parser.add_argument("--minutes", type=float, default=60.0, help="of computing, over all resumptions")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that helpers end, too
    folder = args.folder or Path("../nano-training") / args.stage
    load_stage(args.stage)(folder, args.minutes)


if __name__ == "__main__":
    main()
