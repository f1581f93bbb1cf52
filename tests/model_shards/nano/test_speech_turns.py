"""The training-time forward equals the streaming, window by window."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_shards.nano.speech_sizes import NUM_CODES, PROMPT_CODES, vocoder_config
from model_shards.nano.speech_turns import KEPT_CODES, UP, Turns, encode, velocity, window_starts
from model_shards.vocoder import LOOKAHEAD_CODES, Vocoder, VocoderInput, Voice

SILENCE = 5
LENGTHS = [3, 20, 54, 76, 93]  # codes of a turn; after 93 the streaming has forgotten


@pytest.fixture(scope="module")
def vocoder() -> Vocoder:
    torch.manual_seed(0)
    vocoder = Vocoder(vocoder_config(SILENCE)).eval().requires_grad_(False)
    for parameter in vocoder.flow.decoder.parameters():
        nn.init.normal_(parameter, std=0.1)
    return vocoder


@pytest.fixture(scope="module")
def voice() -> Voice:
    source = torch.Generator().manual_seed(1)
    codes = torch.randint(NUM_CODES, (PROMPT_CODES,), generator=source, dtype=torch.int32)
    codes[:LOOKAHEAD_CODES] = SILENCE
    mel, speaker = (torch.randn(*shape, generator=source) for shape in ((1, UP * PROMPT_CODES, 80), (1, 16)))
    return Voice(codes, mel, speaker)


def turn_codes(count: int) -> list[int]:
    return torch.randint(NUM_CODES, (count,), generator=torch.Generator().manual_seed(count)).tolist()


@contextmanager
def watched(module: nn.Module, method: str) -> Iterator[list[Tensor]]:
    """The first result of every call of a method."""
    original, results = getattr(module, method), []

    def wrapper(*args: object) -> object:
        out = original(*args)
        results.append(out[0])
        return out

    setattr(module, method, wrapper)
    try:
        yield results
    finally:
        delattr(module, method)


def stream(vocoder: Vocoder, voice: Voice, codes: list[int]) -> tuple[Tensor, Tensor]:
    """(frames, 80) each: the encoder's and the DiT's mel, of all windows."""
    state = vocoder.open(voice, noise_seed=0)
    with watched(vocoder.flow, "encode") as encoded, watched(vocoder.flow.decoder, "forward") as decoded:
        for start in range(0, len(codes), 25):
            new = VocoderInput(codes[start : start + 25], end_of_turn=start + 25 >= len(codes))
            vocoder.stream([(state, new)])
    return torch.cat(encoded, dim=1)[0], torch.cat(decoded, dim=1)[0]


def whole(vocoder: Vocoder, voice: Voice, codes: list[int]) -> tuple[Tensor, Tensor]:
    flow, prompt = vocoder.flow, UP * PROMPT_CODES
    row = torch.cat((voice.prompt_tokens.long(), torch.tensor([SILENCE] * LOOKAHEAD_CODES + codes)))[None]
    turns = Turns(PROMPT_CODES, (LOOKAHEAD_CODES + len(codes),))
    mu = flow.encoder_proj(encode(flow.encoder, flow.input_embedding(row), turns))
    speaker = flow.spk_embed_affine_layer(F.normalize(voice.spk_emb, dim=1))[:, None].expand_as(mu)
    cond = torch.cat((voice.prompt_mel, torch.zeros_like(mu[:, prompt:])), dim=1)
    x = noise_of(vocoder, turns.lengths[0])[None]
    times = 1 - torch.cos(torch.linspace(0, 1, vocoder.config.num_steps + 1) * 0.5 * torch.pi)
    for start, end in itertools.pairwise(times):
        seen = torch.cat((x, mu, speaker, cond), dim=-1)
        x = x + (end - start) * velocity(flow.decoder.estimator, seen, start[None], turns)
    return mu[0, prompt:], x[0, prompt:]


def noise_of(vocoder: Vocoder, num_codes: int) -> Tensor:
    """What the streaming starts each window from: it no longer moves on once a history is trimmed."""
    noise, prompt, starts = vocoder.flow.decoder.rand_noise[0].T, UP * PROMPT_CODES, window_starts(num_codes)
    pieces = [noise[:prompt]]
    for start, end in zip(starts, [*starts[1:], num_codes], strict=True):
        begin = prompt + UP * min(start, KEPT_CODES)
        pieces.append(noise[begin : begin + UP * (end - start)])
    return torch.cat(pieces)


@pytest.mark.parametrize("count", LENGTHS)
def test_the_encoder_is_trained_as_it_streams(vocoder: Vocoder, voice: Voice, count: int):
    codes = turn_codes(count)
    torch.testing.assert_close(stream(vocoder, voice, codes)[0], whole(vocoder, voice, codes)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("count", LENGTHS)
def test_the_dit_is_trained_as_it_streams(vocoder: Vocoder, voice: Voice, count: int):
    """Save in the last three codes, silence, of a turn so long that the streaming forgets: the official trimming keeps
    the wrong end of a window there."""
    codes = turn_codes(count)
    end = UP * count
    streamed, trained = stream(vocoder, voice, codes)[1], whole(vocoder, voice, codes)[1]
    assert len(streamed) == len(trained) == end + UP * LOOKAHEAD_CODES
    torch.testing.assert_close(streamed[:end], trained[:end], atol=1e-5, rtol=1e-4)


def test_turns_of_unequal_length_share_a_batch(vocoder: Vocoder):
    encoder = vocoder.flow.encoder
    rows = torch.randn(2, PROMPT_CODES + 60, 128)
    both = encode(encoder, rows, Turns(PROMPT_CODES, (60, 31)))
    alone = encode(encoder, rows[1:, : PROMPT_CODES + 31], Turns(PROMPT_CODES, (31,)))
    torch.testing.assert_close(both[1:, : alone.shape[1]], alone, atol=1e-5, rtol=1e-4)


def test_windows_are_cut_as_the_vocoder_cuts_them():
    assert window_starts(3 + 25) == [0, 25]
    assert window_starts(3 + 29) == [0, 25]
    assert window_starts(3 + 30) == [0, 25, 30]
    assert window_starts(3 + 2) == [0]
