"""Stage "timing": measures the teacher's speech of every sentence and writes timings.json beside the code."""

from __future__ import annotations

import json
from pathlib import Path

from model_shards.nano.phrases import sentences
from model_shards.nano.teacher import CODE_SAMPLES, RATE_HZ, Teacher
from model_shards.nano.timing import FILE


def measure(folder: Path, minutes: float) -> None:
    """Takes seconds; `folder` and `minutes` are every stage's, and are not needed."""
    teacher = Teacher()
    rows = {}
    for sentence in sentences():
        speech = teacher.say(sentence)
        end_ms = speech.num_codes * CODE_SAMPLES * 1000 // RATE_HZ
        rows[sentence] = [*(int(start * 1000) for start in speech.starts_s), end_ms]
    lines = ",\n".join(f"{json.dumps(sentence)}: {json.dumps(row)}" for sentence, row in rows.items())
    FILE.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
