"""Text to ids and back, and what a checkpoint's tokenizer must know."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_shards.errors import ModelError
from model_shards.init import init_checkpoint
from model_shards.tokenizer import ADDED_TOKENS, Tokenizer, build_backend
from tests.support import plain

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


@given(ids=st.lists(st.integers(0, 10_000), max_size=20), skip_special=st.booleans())
def test_a_text_has_no_more_characters_than_its_tokens_may_bring(
    tokenizer: Tokenizer, ids: list[int], skip_special: bool
) -> None:
    text = tokenizer.decode(ids, skip_special=skip_special)
    assert len(text) <= sum(map(tokenizer.most_chars, ids))


def test_a_plain_word_has_as_many_characters_as_its_tokens_may_bring(tokenizer: Tokenizer) -> None:
    assert sum(map(tokenizer.most_chars, tokenizer.encode("someone walks in"))) == len("someone walks in")


def test_the_untrained_model_may_not_say_brackets_or_newlines(tokenizer: Tokenizer) -> None:
    assert set(tokenizer.encode("()[]\n")) <= set(tokenizer.bad_token_ids)
    assert not set(tokenizer.encode("abc XYZ.,")) & set(tokenizer.bad_token_ids)


def test_ids_end_where_the_tokens_end(tokenizer: Tokenizer) -> None:
    assert len(tokenizer) == 256 + 1 + len(ADDED_TOKENS)
    assert tokenizer.id_of("<|timbre_31|>") == len(tokenizer) - 1
    with pytest.raises(ModelError, match="nonsense"):
        tokenizer.id_of("nonsense")


@pytest.mark.parametrize(
    ("token", "released_id"),
    [
        ("<|im_end|>", 151645),
        ("</think>", 151668),
        ("<image>", 151669),
        ("</slice>", 151680),
        ("<unit>", 151683),
        ("<focus>", 151687),
        ("</perception>", 151692),
        ("<|audio_start|>", 151697),
        ("<|tts_bos|>", 151703),
        ("<|listen|>", 151705),
        ("<|turn_eos|>", 151717),
        ("<|chunk_eos|>", 151718),
        ("<|tts_pad|>", 151722),
        ("<|timbre_31|>", 151747),
    ],
)
def test_added_tokens_stand_in_the_released_order(token: str, released_id: int) -> None:
    """The ids of reference/minicpmo-4.5.md §4.1; <|endoftext|> is the first."""
    assert 151643 + ADDED_TOKENS.index(token) == released_id


@given(text=st.text("etaoinshrdlu ", max_size=60).map(lambda text: " ".join(text.split())))
def test_words_are_merged_as_the_plain_rule_merges_them(text: str) -> None:
    letters = [*"etaoinshrdlu", "Ġ"]
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("e", "r"), ("Ġ", "th"), ("a", "in"), ("h", "e")]
    vocab = {part: index for index, part in enumerate([*letters, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(build_backend(vocab, merges, ["<unk>", *ADDED_TOKENS]))
    assert tokenizer.encode(text) == plain.bpe(text, vocab, merges)


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
