"""Text into token ids and back, and the ids which the duplex protocol is made of.

Rule: nobody else spells a special token; the others take its id from `SpecialTokens`.

Source: MiniCPM-o 4.5, `tokenizer_config.json`, `tokenization_minicpmo_fast.py`; reference/minicpmo-4.5.md §4.1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_shards.errors import ModelError
from model_shards.json_text import parse_json

if TYPE_CHECKING:
    import tokenizers

PRE_TOKENIZER_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen splits text before the byte-level BPE."""

NUM_BYTES = 256

# Added by Qwen, then by MiniCPM-o, in the order of their ids. `<unk>` stands apart: it is an entry of the vocabulary.
_PLAIN_TOKENS = (
    *("<tool_call>", "</tool_call>"),
    *("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
    *("<tool_response>", "</tool_response>", "<think>", "</think>"),
)
ADDED_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
    *_PLAIN_TOKENS,
    *("<image>", "</image>", "<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<point>", "</point>"),
    *("<slice>", "</slice>", "<image_id>", "</image_id>", "<unit>", "</unit>", "<answer>", "</answer>"),
    *("<focus>", "</focus>", "<line>", "</line>", "<perception>", "</perception>"),
    *("<source_image>", "</source_image>", "<image_save_to>", "</image_save_to>"),
    *("<|audio_start|>", "<|audio|>", "<|audio_end|>", "<|spk_bos|>", "<|spk|>", "<|spk_eos|>"),
    *("<|tts_bos|>", "<|tts_eos|>", "<|listen|>", "<|speak|>", "<|interrupt|>", "<|vad_start|>", "<|vad_end|>"),
    *("<|emotion_start|>", "<|emotion_end|>", "<|speed_start|>", "<|speed_end|>", "<|pitch_start|>", "<|pitch_end|>"),
    *("<|turn_bos|>", "<|turn_eos|>", "<|chunk_eos|>", "<|chunk_bos|>", "<|chunk_tts_bos|>", "<|chunk_tts_eos|>"),
    "<|tts_pad|>",
    *(f"<|timbre_{number}|>" for number in range(7, 32)),
)


def _token(text: str) -> Any:
    return field(metadata={"text": text})


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids of the tokens which carry structure. `im_end` is the tokenizer's end of text, `endoftext` its padding."""

    unk: int = _token("<unk>")
    endoftext: int = _token("<|endoftext|>")
    im_start: int = _token("<|im_start|>")
    im_end: int = _token("<|im_end|>")
    think: int = _token("<think>")
    think_end: int = _token("</think>")
    image: int = _token("<image>")
    image_end: int = _token("</image>")
    slice: int = _token("<slice>")
    slice_end: int = _token("</slice>")
    image_id: int = _token("<image_id>")
    image_id_end: int = _token("</image_id>")
    unit: int = _token("<unit>")
    unit_end: int = _token("</unit>")
    audio_start: int = _token("<|audio_start|>")
    audio: int = _token("<|audio|>")
    audio_end: int = _token("<|audio_end|>")
    spk_bos: int = _token("<|spk_bos|>")
    spk: int = _token("<|spk|>")
    spk_eos: int = _token("<|spk_eos|>")
    tts_bos: int = _token("<|tts_bos|>")
    tts_eos: int = _token("<|tts_eos|>")
    listen: int = _token("<|listen|>")
    speak: int = _token("<|speak|>")
    interrupt: int = _token("<|interrupt|>")
    vad_start: int = _token("<|vad_start|>")
    vad_end: int = _token("<|vad_end|>")
    turn_bos: int = _token("<|turn_bos|>")
    turn_eos: int = _token("<|turn_eos|>")
    chunk_eos: int = _token("<|chunk_eos|>")
    chunk_bos: int = _token("<|chunk_bos|>")
    chunk_tts_bos: int = _token("<|chunk_tts_bos|>")
    chunk_tts_eos: int = _token("<|chunk_tts_eos|>")
    tts_pad: int = _token("<|tts_pad|>")


class Tokenizer:
    """The tokenizer of one checkpoint.

    special: ids by name. special_ids: every id which `skip_special` leaves out of text.
    bad_token_ids: ids which the checkpoint forbids in speech (brackets, newlines, half characters …).
    """

    def __init__(self, backend: tokenizers.Tokenizer, bad_token_ids: Iterable[int] = ()) -> None:
        """Raises ModelError naming every token of `SpecialTokens` which the backend doesn't know."""
        self._backend = backend
        self.bad_token_ids = tuple(bad_token_ids)
        self._most_chars: dict[int, int] = {}
        self.special = _find_special_tokens(backend)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read `tokenizer.json` of a checkpoint folder, or else `vocab.json`, `merges.txt` and `added_tokens.json`;
        `bad_token_ids` come from `tokenizer_config.json` where it exists.

        Raises ModelError when files are missing, can't be read, or lack a special token.
        """
        config_file = path / "tokenizer_config.json"
        config = _read_json(config_file) if config_file.is_file() else {}
        try:
            return cls(_load_backend(path), config.get("bad_token_ids", ()))
        except ModelError as error:
            raise ModelError(f"{path}: {error}") from error

    def __len__(self) -> int:
        """Number of ids; an id of the tokenizer is smaller than this."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """Special tokens in the text become their ids; nothing is added at either end."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """Bytes which are no UTF-8 (a character cut in two) become U+FFFD."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special))

    def most_chars(self, token: int) -> int:
        """Characters that a token brings to a text at most: as many as it has bytes; none where there is no such token.
        Far quicker than `decode`."""
        chars = self._most_chars.get(token)
        if chars is None:
            chars = self._most_chars[token] = len(self._backend.id_to_token(token) or "")
        return chars

    def id_of(self, token: str) -> int:
        """Raises ModelError when the tokenizer has no such token."""
        index = self._backend.token_to_id(token)
        if index is None:
            raise ModelError(f"the tokenizer has no token {token!r}")
        return int(index)

    def save(self, path: Path) -> None:
        """Write `path/tokenizer.json` and `path/tokenizer_config.json`."""
        self._backend.save(str(path / "tokenizer.json"))
        config = {"bad_token_ids": list(self.bad_token_ids)}
        (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def byte_texts() -> dict[int, str]:
    """What each byte is called in a byte-level vocabulary, in the order of GPT-2's and Qwen's ids."""
    printable = [*range(ord("!"), 127), *range(161, 173), *range(174, NUM_BYTES)]
    others = [byte for byte in range(NUM_BYTES) if byte not in printable]
    texts = {byte: chr(byte) for byte in printable}
    return texts | {byte: chr(NUM_BYTES + index) for index, byte in enumerate(others)}


def build_backend(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], added: Sequence[str], *, whole_words: bool = False
) -> tokenizers.Tokenizer:
    """Byte-level BPE as Qwen has it. `added` tokens take the ids after the vocabulary, save those which are in it.

    whole_words: a word that is in the vocabulary is one token, also where no merges lead to it.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    backend = tokenizers.Tokenizer(models.BPE(vocab=dict(vocab), merges=list(merges), ignore_merges=whole_words))
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(PRE_TOKENIZER_REGEX), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(
        [tokenizers.AddedToken(token, normalized=False, special=token not in _PLAIN_TOKENS) for token in added]
    )
    return backend


def _load_backend(path: Path) -> tokenizers.Tokenizer:
    import tokenizers

    file = path / "tokenizer.json"
    if not file.is_file():
        return _load_separate_files(path)
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise ModelError(f"tokenizer.json can't be read: {error}") from error


def _load_separate_files(path: Path) -> tokenizers.Tokenizer:
    """Build the backend from the files of the slow tokenizer, and check that every added token got its id."""
    vocab, added_ids = _read_json(path / "vocab.json"), _read_json(path / "added_tokens.json")
    added = ["<unk>"] * ("<unk>" in vocab) + sorted(added_ids, key=lambda token: int(added_ids[token]))
    try:
        lines = (path / "merges.txt").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ModelError(f"has neither tokenizer.json nor merges.txt: {error}") from error
    pairs = (line.partition(" ") for line in lines if not line.startswith("#version"))
    backend = build_backend(vocab, [(left, right) for left, _, right in pairs if right], added)
    moved = [token for token in added_ids if backend.token_to_id(token) != added_ids[token]]
    if moved:
        raise ModelError(f"added_tokens.json: ids don't follow vocab.json without a gap, see {moved[0]!r}")
    return backend


def _find_special_tokens(backend: tokenizers.Tokenizer) -> SpecialTokens:
    texts = {f.name: f.metadata["text"] for f in fields(SpecialTokens)}
    ids: dict[str, Any] = {name: backend.token_to_id(text) for name, text in texts.items()}
    missing = [texts[name] for name, index in ids.items() if index is None]
    if missing:
        raise ModelError(f"the tokenizer lacks special tokens: {', '.join(missing)}")
    return SpecialTokens(**ids)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file.name} can't be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file.name}: expected a JSON object, got {type(content).__name__}")
    return content
