"""The tokens of nano: a byte each, a word each for what it says, and the official control tokens in official order.

Rule: a word is a token only with the space before it. So every word that is said is written with one: " a dog came in".
"""

from __future__ import annotations

from typing import Final

from model_shards.nano.phrases import vocabulary
from model_shards.tokenizer import ADDED_TOKENS, NUM_BYTES, Tokenizer, build_backend, byte_texts

_SPACE: Final = byte_texts()[ord(" ")]


def build_tokenizer() -> Tokenizer:
    """Ids: 256 bytes, the words of `phrases.vocabulary`, <unk>, the added tokens.

    Text that is no word of the vocabulary falls into bytes. Bytes are forbidden in speech.
    """
    texts = [*byte_texts().values(), *(f"{_SPACE}{word}" for word in vocabulary())]
    vocab = {text: index for index, text in enumerate(texts)}
    return Tokenizer(build_backend(vocab, [], ["<unk>", *ADDED_TOKENS], whole_words=True), range(NUM_BYTES))


def words_as_text(words: list[str]) -> str:
    """How words are written to become one token each."""
    return "".join(f" {word}" for word in words)
