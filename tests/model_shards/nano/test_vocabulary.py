from pathlib import Path

from model_shards.nano.phrases import sentences, vocabulary
from model_shards.nano.vocabulary import build_tokenizer, words_as_text
from model_shards.tokenizer import ADDED_TOKENS, NUM_BYTES, Tokenizer


def test_every_word_of_nano_is_one_token():
    tokenizer = build_tokenizer()
    for sentence in sentences():
        words = sentence.split()
        ids = tokenizer.encode(words_as_text(words))
        assert len(ids) == len(words)
        assert tokenizer.decode(ids, skip_special=True) == f" {sentence}"


def test_other_text_falls_into_bytes_and_comes_back():
    tokenizer = build_tokenizer()
    text = "Zürich, a dog 7!"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special=True) == text
    assert len([index for index in ids if index < NUM_BYTES]) == len(text.encode()) - len(" a dog")


def test_control_tokens_follow_the_words_in_official_order():
    tokenizer = build_tokenizer()
    first = NUM_BYTES + len(vocabulary()) + 1  # behind <unk>
    assert [tokenizer.id_of(token) for token in ADDED_TOKENS] == list(range(first, first + len(ADDED_TOKENS)))
    assert len(tokenizer) == first + len(ADDED_TOKENS)


def test_bytes_are_forbidden_in_speech():
    assert build_tokenizer().bad_token_ids == tuple(range(NUM_BYTES))


def test_a_saved_tokenizer_still_knows_words_without_merges(tmp_path: Path):
    build_tokenizer().save(tmp_path)
    ids = Tokenizer.load(tmp_path).encode(" the door is open<|turn_eos|>")
    assert ids == build_tokenizer().encode(" the door is open<|turn_eos|>")
    assert len(ids) == 5
