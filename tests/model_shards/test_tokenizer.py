"""Text to ids and back, and what a checkpoint's tokenizer must know."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from model_shards.errors import ModelError
from model_shards.init import init_checkpoint
from model_shards.tokenizer import ADDED_TOKENS, Tokenizer, build_backend

PLACES = [Path(__file__).parents[up] / "shared" / "golden" for up in (2, 3)]
GOLDEN = Path(os.environ.get("OMNI_GOLDEN") or next((place for place in PLACES if place.is_dir()), PLACES[0]))
golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no golden data; OMNI_GOLDEN names its folder")

VOCAB = {"a": 0, "b": 1, "Ġ": 2, "ab": 3}
MERGES = [("a", "b")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    init_checkpoint(folder)
    return Tokenizer.load(folder)


def test_text_comes_back_whatever_its_language(tokenizer: Tokenizer) -> None:
    text = "<|im_start|>system\nHello, 你好 – naïve 🙂 <unit></unit>"
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


def test_special_tokens_are_one_id_each_and_can_be_left_out(tokenizer: Tokenizer) -> None:
    special = tokenizer.special
    ids = tokenizer.encode("<unit><|speak|>a<|turn_eos|><|chunk_eos|></unit>")

    assert [ids[i] for i in (0, 1, 3, 4, 5)] == [
        special.unit,
        special.speak,
        special.turn_eos,
        special.chunk_eos,
        special.unit_end,
    ]
    assert tokenizer.decode(ids, skip_special=True) == "a"


def test_half_a_character_is_a_replacement(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("é")
    assert tokenizer.decode(ids[:1], skip_special=False) == "\N{REPLACEMENT CHARACTER}"


def test_the_untrained_model_may_not_say_brackets_or_newlines(tokenizer: Tokenizer) -> None:
    assert set(tokenizer.encode("()[]\n")) <= set(tokenizer.bad_token_ids)
    assert not set(tokenizer.encode("abc XYZ.,")) & set(tokenizer.bad_token_ids)


def test_ids_end_where_the_tokens_end(tokenizer: Tokenizer) -> None:
    assert len(tokenizer) == 256 + 1 + len(ADDED_TOKENS)
    assert tokenizer.id_of("<|timbre_31|>") == len(tokenizer) - 1
    with pytest.raises(ModelError, match="nonsense"):
        tokenizer.id_of("nonsense")


def test_a_missing_special_token_is_named() -> None:
    added = [token for token in ("<unk>", *ADDED_TOKENS) if token not in ("<|listen|>", "<|speak|>")]
    with pytest.raises(ModelError, match=r"<\|listen\|>, <\|speak\|>"):
        Tokenizer(build_backend(VOCAB, MERGES, added))


def write_separate_files(folder: Path, first_added: int) -> None:
    vocab = VOCAB | {"<unk>": 4}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    added = {token: first_added + index for index, token in enumerate(ADDED_TOKENS)}
    (folder / "added_tokens.json").write_text(json.dumps(dict(reversed(added.items()))))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bad_token_ids": [2]}))


def test_separate_files_do_as_well(tmp_path: Path) -> None:
    write_separate_files(tmp_path, first_added=5)

    tokenizer = Tokenizer.load(tmp_path)

    assert tokenizer.encode("ab a<|listen|>") == [3, 2, 0, tokenizer.special.listen]
    assert tokenizer.special.unk == 4
    assert tokenizer.special.endoftext == 5
    assert tokenizer.bad_token_ids == (2,)
    assert tokenizer.id_of("<think>") not in tokenizer.special_ids


def test_a_gap_in_the_added_ids_is_refused(tmp_path: Path) -> None:
    write_separate_files(tmp_path, first_added=9)
    with pytest.raises(ModelError, match="without a gap"):
        Tokenizer.load(tmp_path)


def test_an_empty_folder_has_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=str(tmp_path)):
        Tokenizer.load(tmp_path)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


@golden
def test_ids_are_the_official_ones() -> None:
    tokenizer = Tokenizer.load(GOLDEN)
    told: dict[str, Any] = json.loads((GOLDEN / "tokenizer_cases.json").read_text())

    assert len(tokenizer) == told["len"]
    assert {token: tokenizer.id_of(token) for token in told["special_ids"]} == told["special_ids"]
    assert [tokenizer.encode(case["text"]) for case in told["encode"]] == [case["ids"] for case in told["encode"]]
    assert sorted(tokenizer.special_ids) == told["all_special_ids"]


@golden
def test_our_own_backend_is_the_official_one() -> None:
    raw = json.loads((GOLDEN / "tokenizer.json").read_text())
    told = json.loads((GOLDEN / "tokenizer_cases.json").read_text())
    merges = [(left, right) for left, right in raw["model"]["merges"]]

    tokenizer = Tokenizer(build_backend(raw["model"]["vocab"], merges, ["<unk>", *ADDED_TOKENS]))

    assert [token["content"] for token in raw["added_tokens"]] == ["<unk>", *ADDED_TOKENS]
    assert [tokenizer.encode(case["text"]) for case in told["encode"]] == [case["ids"] for case in told["encode"]]
    assert sorted(tokenizer.special_ids) == told["all_special_ids"]
