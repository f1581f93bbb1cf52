"""Ids, special tokens and the pieces of the backend are those of the official tokenizer."""

from __future__ import annotations

import json
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from model_shards.config import load_config
from model_shards.tokenizer import ADDED_TOKENS, Tokenizer, build_backend
from tests.support import golden
from tests.support.golden import cases, read_json

NAMED_IDS = {
    "eos_token_id": "im_end",
    "bos_token_id": "im_start",
    "pad_token_id": "endoftext",
    "unk_token_id": "unk",
}
PARTS = ("normalizer", "pre_tokenizer", "decoder", "model")


def table() -> dict[str, Any]:
    return read_json("tokenizer_cases.json")


def stored_added() -> list[dict[str, Any]]:
    return read_json("tokenizer.json")["added_tokens"]


@pytest.fixture(scope="module")
def official() -> Tokenizer:
    return Tokenizer.load(golden.FOLDER)


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    """Our own backend over the official vocabulary and merges."""
    model = read_json("tokenizer.json")["model"]
    merges = [(left, right) for left, right in model["merges"]]
    return Tokenizer(build_backend(model["vocab"], merges, ["<unk>", *ADDED_TOKENS]))


@cases("tokenizer_cases.json", (f"encode{index}" for index in range(len(table()["encode"]))))
def test_text_has_the_official_ids(case: str, official: Tokenizer, ours: Tokenizer) -> None:
    recorded = table()["encode"][int(case.removeprefix("encode"))]

    assert official.encode(recorded["text"]) == recorded["ids"]
    assert ours.encode(recorded["text"]) == recorded["ids"]
    assert official.decode(recorded["ids"], skip_special=False) == unicodedata.normalize("NFC", recorded["text"])


@cases("tokenizer_cases.json", table()["special_ids"])
def test_a_special_token_has_its_official_id(case: str, official: Tokenizer, ours: Tokenizer) -> None:
    assert official.id_of(case) == ours.id_of(case) == table()["special_ids"][case]
    assert official.encode(case) == [table()["special_ids"][case]]


@cases("tokenizer_cases.json", NAMED_IDS)
def test_a_role_has_its_official_token(case: str, official: Tokenizer) -> None:
    assert getattr(official.special, NAMED_IDS[case]) == table()[case]


@cases("tokenizer_cases.json", ["len", "vocab_size_model"])
def test_there_are_as_many_ids_as_officially(case: str, official: Tokenizer, ours: Tokenizer) -> None:
    sizes = {"len": len(official), "vocab_size_model": load_config(golden.FOLDER).llm.vocab_size}
    assert sizes[case] == table()[case]
    assert len(ours) == len(official)


@cases("tokenizer_cases.json", ["all_special_ids"])
def test_the_same_ids_are_left_out_of_text(case: str, official: Tokenizer, ours: Tokenizer) -> None:
    assert sorted(official.special_ids) == sorted(ours.special_ids) == sorted(table()[case])


@cases("tokenizer_cases.json", ["bad_token_ids"])
def test_the_forbidden_ids_are_read_and_exist(case: str, tmp_path: Path) -> None:
    shutil.copy(golden.FOLDER / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({case: table()[case]}))

    loaded = Tokenizer.load(tmp_path)

    assert list(loaded.bad_token_ids) == table()[case]
    assert all(0 <= index < len(loaded) for index in loaded.bad_token_ids)


@cases("tokenizer.json", (token["content"] for token in stored_added()))
def test_an_added_token_is_where_the_official_order_puts_it(case: str, official: Tokenizer, ours: Tokenizer) -> None:
    (recorded,) = (token for token in stored_added() if token["content"] == case)
    for tokenizer in (official, ours):
        assert tokenizer.id_of(case) == recorded["id"]
        assert (recorded["id"] in tokenizer.special_ids) == recorded["special"]


@cases("tokenizer.json", PARTS)
def test_our_backend_is_built_of_the_official_parts(case: str) -> None:
    stored = read_json("tokenizer.json")
    merges = [(left, right) for left, right in stored["model"]["merges"]]
    built = json.loads(build_backend(stored["model"]["vocab"], merges, ["<unk>", *ADDED_TOKENS]).to_str())
    # An absent prefix is null here and "" there.
    assert {k: v or None for k, v in built[case].items()} == {k: v or None for k, v in stored[case].items()}
