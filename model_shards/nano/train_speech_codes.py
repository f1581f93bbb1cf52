"""Nano's speech tokenizer, and the flow's encoder beside it: one autoencoder, from mel through 729 codes to mel.

Rule: code = sum of (digit + 1) * 3**place over six digits in {-1, 0, 1}, the first digit at place 0.

What the encoder sees is what it sees when it speaks: the voice's prompt, three codes of silence, then the utterance, in
the windows of the streaming.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_shards.flow import Flow
from model_shards.nano.speech_data import FRAMES_PER_CODE, Corpus, Utterance, corpus_beside, nano_silence
from model_shards.nano.speech_sizes import CODE_DIGITS, CODE_LEVELS, FLOW, NUM_CODES, PROMPT_CODES
from model_shards.nano.speech_turns import Turns, encode
from model_shards.nano.training import Schedule, Training
from model_shards.vocoder import LOOKAHEAD_CODES

PROMPT_SENTENCE: Final = "a person in red came in"  # the first of the corpus

_BATCH: Final = 10
_LONGEST: Final = 75  # codes; longer turns and the whole prompt are learnt with the flow, where they cost no more
_PROMPT_FRAMES: Final = 16
_SILENCE_FRAMES: Final = 40
_WIDTH: Final = 128
_QUIET: Final = -3.0  # the mean of a frame's mel, below which it matters little
_SEED: Final = 31


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.conv = nn.Conv1d(width, width, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv(F.gelu(self.norm(x)))
        return out


class SpeechTokenizer(nn.Module):
    """Mel to digits. It is for training: no checkpoint holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(FLOW.output_size, _WIDTH, 3, padding=1),
            _Residual(_WIDTH),
            _Residual(_WIDTH),
            nn.Conv1d(_WIDTH, _WIDTH, 4, stride=FRAMES_PER_CODE, padding=1),
            _Residual(_WIDTH),
            _Residual(_WIDTH),
            nn.Conv1d(_WIDTH, CODE_DIGITS, 1),
        )

    def forward(self, mel: Tensor) -> Tensor:
        """(batch, frames, 80) as (batch, frames / 2, 6) in {-1, 0, 1}; the gradient passes the rounding by."""
        soft = self.layers(mel.transpose(1, 2)).transpose(1, 2).tanh()
        hard: Tensor = soft + (soft.round() - soft).detach()
        return hard

    def codes(self, mel: Tensor) -> Tensor:
        """(frames, 80) as (frames / 2,) int64."""
        return codes_of(self(mel[None])[0])


def codes_of(digits: Tensor) -> Tensor:
    """(..., 6) in {-1, 0, 1} as (...) int64."""
    places = CODE_LEVELS ** torch.arange(CODE_DIGITS)
    return ((digits.round().long() + 1) * places).sum(-1)


def digits_of(codes: Tensor) -> Tensor:
    """The inverse of `codes_of`, float32."""
    places = CODE_LEVELS ** torch.arange(CODE_DIGITS)
    return (codes[..., None] // places % CODE_LEVELS - 1).float()


class Autoencoder(nn.Module):
    """tokenizer, digit_rows: the row of the flow's code table that digits make. flow: its encoder is trained here."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = SpeechTokenizer()
        self.digit_rows = nn.Linear(CODE_DIGITS, FLOW.input_size)
        self.encoder = Flow(FLOW).encoder
        self.encoder_proj = nn.Linear(FLOW.input_size, FLOW.output_size)

    def code_table(self) -> Tensor:
        """The flow's `input_embedding.weight`: (729, hidden)."""
        table: Tensor = self.digit_rows(digits_of(torch.arange(NUM_CODES)))
        return table

    def silence(self) -> Tensor:
        """Digits of endless silence: (6,)."""
        mel = nano_silence(_SILENCE_FRAMES)
        return self.tokenizer(mel[None])[0, _SILENCE_FRAMES // FRAMES_PER_CODE // 2]  # type: ignore[no-any-return]

    def prompt(self, mel: Tensor) -> Tensor:
        """Digits of a voice's prompt, which begins with codes of silence: (1, frames, 80) as (frames / 2, 6)."""
        silence = self.silence().expand(LOOKAHEAD_CODES, CODE_DIGITS)
        return torch.cat((silence, self.tokenizer(mel)[0, LOOKAHEAD_CODES:]))


@dataclass(frozen=True, slots=True)
class MelBatch:
    """mel: (batch, frames, 80), filled up with silence; num_codes: of each."""

    mel: Tensor
    num_codes: tuple[int, ...]


def mel_batch(corpus: Corpus, utterances: Sequence[Utterance]) -> MelBatch:
    longest = max(utterance.num_codes for utterance in utterances) * FRAMES_PER_CODE
    mels = [corpus.mel_of(utterance) for utterance in utterances]
    filled = [torch.cat((mel, nano_silence(longest - len(mel)))) for mel in mels]
    return MelBatch(torch.stack(filled), tuple(utterance.num_codes for utterance in utterances))


def prompt_mel(corpus: Corpus) -> Tensor:
    """The mel of the voice's prompt: silence, one sentence, silence. (1, 100, 80)."""
    (utterance,) = [u for u in corpus.utterances if " ".join(u.words) == PROMPT_SENTENCE]
    lead = nano_silence(LOOKAHEAD_CODES * FRAMES_PER_CODE)
    mel = torch.cat((lead, corpus.mel_of(utterance)))[: PROMPT_CODES * FRAMES_PER_CODE]
    return torch.cat((mel, nano_silence(PROMPT_CODES * FRAMES_PER_CODE - len(mel))))[None]


def train(folder: Path, minutes: float) -> None:
    corpus = corpus_beside(folder)
    torch.manual_seed(_SEED)
    schedule = Schedule(minutes=minutes, rate=1.5e-3, weight_decay=0.01)
    training = Training(folder, Autoencoder(), schedule)
    model = training.module
    assert isinstance(model, Autoencoder)
    prompt = prompt_mel(corpus)[:, :_PROMPT_FRAMES]
    short = [utterance for utterance in corpus.utterances if utterance.num_codes <= _LONGEST]

    def loss(step: int, passed: float) -> tuple[Tensor, Mapping[str, float]]:
        random = np.random.default_rng((_SEED, step))
        chosen = [short[index] for index in random.integers(0, len(short), _BATCH)]
        return autoencoder_loss(model, prompt, mel_batch(corpus, chosen))

    training.run(loss)


def autoencoder_loss(model: Autoencoder, prompt: Tensor, batch: MelBatch) -> tuple[Tensor, dict[str, float]]:
    """L1 + half of L2 between what the encoder makes of the codes and the mel."""
    digits = model.tokenizer(batch.mel)
    lead = torch.cat((model.prompt(prompt), model.silence().expand(LOOKAHEAD_CODES, -1)))
    rows = model.digit_rows(torch.cat((lead.expand(len(digits), -1, -1), digits), dim=1))
    num_prompt = prompt.shape[1] // FRAMES_PER_CODE
    turns = Turns(num_prompt, tuple(LOOKAHEAD_CODES + count for count in batch.num_codes))
    made = model.encoder_proj(encode(model.encoder, rows, turns))[:, num_prompt * FRAMES_PER_CODE :]
    silence = nano_silence(LOOKAHEAD_CODES * FRAMES_PER_CODE).expand(len(digits), -1, -1)
    true = torch.cat((silence, batch.mel), dim=1)
    weight = turns.turn_frames() * torch.where(true.mean(-1) < _QUIET, 0.1, 1.0)
    error = (made - true).abs()
    l1 = (error.mean(-1) * weight).sum() / weight.sum()
    l2 = (error.square().mean(-1) * weight).sum() / weight.sum()
    used = len(set(codes_of(digits.detach()).flatten().tolist()))
    return l1 + 0.5 * l2, {"l1": float(l1.detach()), "used": float(used)}
