"""A checkpoint's JSON files, damaged: a ModelError that names the file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from model_shards.config import load_config
from model_shards.errors import ModelError
from model_shards.json_text import parse_json
from model_shards.tokenizer import Tokenizer
from tests.support.tiny import Tiny

DAMAGED = {
    "empty": b"",
    "zeros": b"\0" * 9,
    "list": b"[1]",
    "deep": b"[" * 100_000,
    "long": b"9" * 5000,
    "bad": b"\xff{}",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_config_is_told_by_its_name(tiny: Tiny, tmp_path: Path, content: bytes) -> None:
    folder = shutil.copytree(tiny.path, tmp_path / "damaged")
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        load_config(folder)


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_told_by_its_name(tiny: Tiny, tmp_path: Path, name: str, content: bytes) -> None:
    folder = shutil.copytree(tiny.path, tmp_path / "damaged")
    (folder / name).write_bytes(content)
    with pytest.raises(ModelError, match=name.partition(".")[0]):
        Tokenizer.load(folder)


def test_what_is_nested_without_end_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="nested too deep"):
        parse_json("[" * 100_000)
