"""Nano's flow: codes to mel. The encoder goes on from the autoencoder's, the DiT learns to reach the mel from noise."""

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
from model_shards.nano.speech_codes import CorpusCodes, load_codes, trained_autoencoder
from model_shards.nano.speech_data import FRAMES_PER_CODE, Corpus, Utterance, corpus_beside, nano_silence
from model_shards.nano.speech_sizes import FLOW, PROMPT_CODES
from model_shards.nano.speech_turns import Turns, encode, velocity
from model_shards.nano.train_speech_codes import mel_batch, prompt_mel
from model_shards.nano.training import Schedule, Training
from model_shards.vocoder import LOOKAHEAD_CODES, Voice

EULER_TIMES: Final = (0.0, 0.29289)  # of two steps

_BATCH: Final = 8
_LONGEST: Final = 105  # codes; nano's longest sentence has 98
_AT_EULER_TIMES: Final = 0.6  # of the batches; the others are of any time, so that other numbers of steps work too
_PROMPT_WEIGHT: Final = 0.1
_ENCODER_RATE: Final = 0.3  # of the DiT's learning rate
_QUIET: Final = -1.7  # the mean of a frame's mel, below which it matters little
_SEED: Final = 51


def new_flow(folder: Path) -> Flow:
    """An untrained DiT behind the trained autoencoder's encoder; the DiT begins as the identity."""
    torch.manual_seed(_SEED)
    flow, trained = Flow(FLOW), trained_autoencoder(folder)
    flow.encoder.load_state_dict(trained.encoder.state_dict())
    flow.encoder_proj.load_state_dict(trained.encoder_proj.state_dict())
    with torch.no_grad():
        flow.input_embedding.weight.copy_(trained.code_table())
    dit = flow.decoder.estimator
    gates = [dit.final_layer.linear, *(layer.adaLN_modulation[1] for layer in (*dit.blocks, dit.final_layer))]
    for parameter in (parameter for gate in gates for parameter in gate.parameters()):
        nn.init.zeros_(parameter)
    for name, parameter in flow.named_parameters():
        if not name.startswith("decoder."):
            parameter.rate_scale = _ENCODER_RATE  # type: ignore[attr-defined]
    return flow


def stored_voice(codes: CorpusCodes, corpus: Corpus) -> Voice:
    """The one voice of nano."""
    speaker = torch.zeros(1, FLOW.spk_embed_dim)
    speaker[0, 0] = 1.0
    return Voice(torch.tensor(codes.prompt, dtype=torch.int32), prompt_mel(corpus), speaker)


@dataclass(frozen=True, slots=True)
class FlowBatch:
    """codes: (batch, prompt + longest turn); mel: (batch, frames, 80) of the same, true also where the prompt is."""

    codes: Tensor
    mel: Tensor
    turns: Turns


class FlowData:
    """Turns behind the voice's prompt."""

    def __init__(self, corpus: Corpus, codes: np.ndarray, voice: Voice, silence: int) -> None:
        self._corpus, self._codes, self._voice, self._silence = corpus, codes, voice, silence

    def batch(self, utterances: Sequence[Utterance]) -> FlowBatch:
        mels = mel_batch(self._corpus, utterances)
        longest, num = max(mels.num_codes), len(utterances)
        lead = torch.cat((self._voice.prompt_tokens.long(), torch.full((LOOKAHEAD_CODES,), self._silence)))
        codes = torch.full((num, longest), self._silence)
        for row, utterance in enumerate(utterances):
            own = self._codes[utterance.first_code : utterance.first_code + utterance.num_codes]
            codes[row, : utterance.num_codes] = torch.from_numpy(own.astype(np.int64))
        silence = nano_silence(LOOKAHEAD_CODES * FRAMES_PER_CODE)
        lead_mel = torch.cat((self._voice.prompt_mel[0], silence)).expand(num, -1, -1)
        return FlowBatch(
            torch.cat((lead.expand(num, -1), codes), dim=1),
            torch.cat((lead_mel, mels.mel), dim=1),
            Turns(PROMPT_CODES, tuple(LOOKAHEAD_CODES + count for count in mels.num_codes)),
        )


def train(folder: Path, minutes: float) -> None:
    codes, corpus = load_codes(folder), corpus_beside(folder)
    voice = stored_voice(codes, corpus)
    schedule = Schedule(minutes=minutes, rate=1.5e-3, weight_decay=0.01, average=0.995)
    training = Training(folder, new_flow(folder), schedule)
    flow = training.module
    assert isinstance(flow, Flow)
    data = FlowData(corpus, codes.corpus, voice, codes.silence)
    usual = [utterance for utterance in corpus.utterances if utterance.num_codes <= _LONGEST]

    def loss(step: int, passed: float) -> tuple[Tensor, Mapping[str, float]]:
        random = np.random.default_rng((_SEED, step))
        batch = data.batch([usual[index] for index in random.integers(0, len(usual), _BATCH)])
        return flow_loss(flow, batch, voice.spk_emb, torch.Generator().manual_seed(step))

    training.run(loss)


def flow_loss(
    flow: Flow, batch: FlowBatch, speaker: Tensor, random: torch.Generator
) -> tuple[Tensor, dict[str, float]]:
    """L1 + half of L2 of the encoder's mel, and the flow matching of the DiT, which sees that mel but can't move it."""
    prompt = PROMPT_CODES * FRAMES_PER_CODE
    mu = flow.encoder_proj(encode(flow.encoder, flow.input_embedding(batch.codes), batch.turns))
    weight = frame_weights(batch)
    error = (mu - batch.mel)[:, prompt:]
    regression = _weighted(error.abs() + 0.5 * error.square(), weight[:, prompt:])
    time = _times(len(mu), random)
    noise = torch.randn(batch.mel.shape, generator=random)
    x = torch.lerp(noise, batch.mel, time[:, None, None])
    speakers = flow.spk_embed_affine_layer(F.normalize(speaker, dim=1))[:, None].expand_as(mu)
    cond = torch.cat((batch.mel[:, :prompt], torch.zeros_like(batch.mel[:, prompt:])), dim=1)
    seen = torch.cat((x, mu.detach(), speakers, cond), dim=-1)
    made = velocity(flow.decoder.estimator, seen, time, batch.turns)
    matching = _weighted((made - (batch.mel - noise)).square(), weight)
    numbers = {"mu_l1": float(_weighted(error.detach().abs(), weight[:, prompt:])), "flow": float(matching.detach())}
    return regression + matching, numbers


def frame_weights(batch: FlowBatch) -> Tensor:
    """(batch, frames): little for the prompt and for silence, nothing for holes."""
    prompt = torch.full((len(batch.mel), PROMPT_CODES * FRAMES_PER_CODE), _PROMPT_WEIGHT)
    filled = torch.cat((prompt, batch.turns.turn_frames()), dim=1)
    return filled * torch.where(batch.mel.mean(-1) < _QUIET, 0.3, 1.0)


def _weighted(error: Tensor, weight: Tensor) -> Tensor:
    return (error.mean(-1) * weight).sum() / weight.sum()


def _times(count: int, random: torch.Generator) -> Tensor:
    """(count,) in [0, 1]."""
    if torch.rand((), generator=random) < _AT_EULER_TIMES:
        return torch.tensor(EULER_TIMES)[torch.randint(len(EULER_TIMES), (count,), generator=random)]
    return 1 - torch.cos(torch.rand(count, generator=random) * 0.5 * torch.pi)
