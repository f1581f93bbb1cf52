"""The flow model: against plain formulas, a simulation of the official trimming, and batched against alone.

The official numbers: tests/golden/test_token2wav.py.
"""

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from model_shards.config import FlowConfig
from model_shards.errors import ModelError
from model_shards.flow import (
    HISTORY_FRAMES,
    DitAttention,
    DitConv,
    Flow,
    FlowCache,
    FlowHistory,
    LayerPast,
    Past,
    PreLookahead,
    Release,
    RelPosAttention,
    TimeEmbedding,
    UpSample,
    distance_embedding,
    extend,
    gather,
)

TINY = FlowConfig(
    input_size=32,
    encoder_attention_heads=2,
    encoder_linear_units=64,
    encoder_num_blocks=2,
    encoder_num_up_blocks=1,
    dit_hidden_size=32,
    dit_depth=2,
    dit_num_heads=2,
    dit_head_dim=8,
)


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


def small_flow(config: FlowConfig = TINY) -> Flow:
    torch.manual_seed(5)
    flow = Flow(config)
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return flow.eval()


def open_turn(flow: Flow, num_codes: int, num_steps: int = 2, seed: int = 0) -> FlowCache:
    """A session whose voice is `num_codes` random codes."""
    source = torch.Generator().manual_seed(seed)
    codes = torch.randint(TINY.vocab_size, (1, num_codes + 3), generator=source)
    mel = torch.randn(1, 2 * num_codes, 80, generator=source)
    empty = flow.empty_history(num_steps)
    _, (voice,) = flow(codes, torch.ones(1, 192), mel, [FlowCache(empty, empty, 0)], last=False)
    turn = dataclasses.replace(empty, encoder_conv=voice.encoder_conv, dit_conv=voice.dit_conv)
    return FlowCache(voice, turn, 0)


def continue_turn(flow: Flow, codes: Tensor, caches: list[FlowCache]) -> tuple[Tensor, list[FlowCache]]:
    cond = torch.zeros(len(caches), flow.num_frames(codes.shape[1], last=False), 80)
    mel, new = flow(codes, torch.ones(len(caches), 192), cond, caches, last=False)
    return mel, [extend(cache, history, Release.V1_0_6) for cache, history in zip(caches, new, strict=True)]


def heads(x: Tensor, num_heads: int) -> Tensor:
    """(frames, heads * dim) as (heads, frames, dim)."""
    return x.unflatten(1, (num_heads, -1)).transpose(0, 1)


def test_relative_attention_is_that_of_transformer_xl() -> None:
    """score(i, j) = ((q_i + u) · k_j + (q_i + v) · r(i − j)) / sqrt(dim)"""
    torch.manual_seed(0)
    attention, hidden, num_heads = RelPosAttention(16, 2), 16, 2
    old, new = torch.randn(3, hidden), torch.randn(4, hidden)
    kv = torch.zeros(2, 1, num_heads, 7, hidden // num_heads)
    kv[0, 0, :, :3] = heads(attention.linear_k(old), num_heads)
    kv[1, 0, :, :3] = heads(attention.linear_v(old), num_heads)

    out = attention(new[None], distance_embedding(7, 4, new), LayerPast(kv, None))

    seen = torch.cat((old, new))
    q = heads(attention.linear_q(new), num_heads)
    k, v = (heads(linear(seen), num_heads) for linear in (attention.linear_k, attention.linear_v))
    scores = torch.empty(num_heads, 4, 7)
    for i in range(4):
        for j in range(7):
            r = attention.linear_pos(sinusoids(3 + i - j, hidden)).view(num_heads, -1)
            by_content = ((q[:, i] + attention.pos_bias_u) * k[:, j]).sum(-1)
            scores[:, i, j] = by_content + ((q[:, i] + attention.pos_bias_v) * r).sum(-1)
    expected = (scores / math.sqrt(hidden // num_heads)).softmax(-1) @ v
    torch.testing.assert_close(out[0], attention.linear_out(expected.transpose(0, 1).flatten(1)))


def sinusoids(distance: int, hidden: int) -> Tensor:
    pairs = [distance / 10000 ** (i / hidden) for i in range(0, hidden, 2)]
    return torch.tensor([wave(angle) for angle in pairs for wave in (math.sin, math.cos)])


def test_distances_go_from_the_oldest_key_to_the_newest() -> None:
    expected = torch.stack([sinusoids(distance, 8) for distance in (4, 3, 2, 1, 0, -1)])
    torch.testing.assert_close(distance_embedding(5, 2, torch.empty(0, 8)), expected)


def test_dit_attention_knows_no_positions_and_normalises_queries_and_keys_per_head() -> None:
    torch.manual_seed(0)
    attention = DitAttention(TINY)
    for norm in (attention.q_norm, attention.k_norm):
        torch.nn.init.normal_(norm.weight)
    x, num_heads, dim = torch.randn(5, TINY.dit_hidden_size), TINY.dit_num_heads, TINY.dit_head_dim

    out = attention(x[None], LayerPast(torch.zeros(2, 1, num_heads, 5, dim), None))

    q, k, v = (heads(linear(x), num_heads) for linear in (attention.to_q, attention.to_k, attention.to_v))
    q, k = attention.q_norm(q), attention.k_norm(k)
    expected = (q @ k.transpose(1, 2) / math.sqrt(dim)).softmax(-1) @ v
    torch.testing.assert_close(out[0], attention.proj(expected.transpose(0, 1).flatten(1)))


def test_time_is_embedded_in_thousandths() -> None:
    embedding = TimeEmbedding(8)
    angles = [1000 * 0.3 / 10000 ** (i / 128) for i in range(128)]
    waves = torch.tensor([[*map(math.cos, angles), *map(math.sin, angles)]])
    torch.testing.assert_close(embedding(torch.tensor([0.3])), embedding.mlp(waves), rtol=1e-3, atol=1e-4)


def test_convolutions_look_back_and_only_the_first_looks_ahead() -> None:
    torch.manual_seed(0)
    ahead, up, dit = PreLookahead(6, 3), UpSample(6, 2), DitConv(6)
    x = torch.randn(1, 9, 6)

    out, _ = ahead(x, torch.zeros(1, 6, 2))
    first = F.leaky_relu(F.conv1d(x.transpose(1, 2), ahead.conv1.weight, ahead.conv1.bias))
    second = F.conv1d(F.pad(first, (2, 0)), ahead.conv2.weight, ahead.conv2.bias)
    torch.testing.assert_close(out, second.transpose(1, 2) + x[:, :6])

    out, _ = up(x, torch.zeros(1, 6, 4))
    twice = torch.stack((x, x), dim=2).flatten(1, 2).transpose(1, 2)
    torch.testing.assert_close(out, F.conv1d(F.pad(twice, (4, 0)), up.conv.weight, up.conv.bias).transpose(1, 2))

    out, _ = dit(x, torch.zeros(1, 12, 2))
    conv1, norm, conv2 = (dit.block[name] for name in ("1", "3", "6"))
    hidden = F.mish(norm(F.conv1d(F.pad(x.transpose(1, 2), (2, 0)), conv1.weight, conv1.bias).transpose(1, 2)))
    expected = F.conv1d(F.pad(hidden.transpose(1, 2), (2, 0)), conv2.weight, conv2.bias).transpose(1, 2)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("num_steps", [5, 10])
def test_mel_is_noise_moved_along_the_guided_velocity(num_steps: int) -> None:
    """x += (t' − t) · (1.7 v(condition) − 0.7 v(nothing)), t = 1 − cos(π/2 · step / steps)"""
    flow, num_frames = small_flow(), 12
    mu, cond, speaker = torch.randn(1, num_frames, 80), torch.randn(1, num_frames, 80), torch.randn(1, 80)
    empty = flow.empty_history(num_steps)

    mel, _, _ = flow.decoder(mu, speaker, cond, [FlowCache(empty, empty, 0)])

    def velocity(*condition: Tensor) -> Tensor:
        kv = torch.zeros(TINY.dit_depth, 2, 1, TINY.dit_num_heads, num_frames, TINY.dit_head_dim)
        conv = torch.zeros(TINY.dit_depth, 1, 2 * TINY.dit_hidden_size, 2)
        return flow.decoder.estimator(torch.cat((x, *condition), dim=2), torch.tensor([now]), Past(kv, None), conv)[0]

    x = flow.decoder.rand_noise[..., :num_frames].transpose(1, 2)
    condition, nothing = (mu, speaker[:, None].expand_as(mu), cond), torch.zeros(1, num_frames, 240)
    for step in range(num_steps):
        now, later = (1 - math.cos(math.pi / 2 * index / num_steps) for index in (step, step + 1))
        x = x + (later - now) * (1.7 * velocity(*condition) - 0.7 * velocity(nothing))
    torch.testing.assert_close(mel, x, rtol=1e-3, atol=1e-4)


def test_speech_in_one_chunk_is_the_encoder_then_the_integration() -> None:
    flow, codes, speaker = small_flow(), torch.arange(7)[None], torch.randn(1, 192)
    cond, empty = torch.randn(1, 14, 80), flow.empty_history(3)
    cache = FlowCache(empty, empty, 0)

    mel, _ = flow(codes, speaker, cond, [cache], last=True)

    mu, *_ = flow.encode(codes, [cache], last=True)
    unit_speaker = speaker / speaker.norm()
    expected, _, _ = flow.decoder(mu, flow.spk_embed_affine_layer(unit_speaker), cond, [cache])
    torch.testing.assert_close(mel, expected.transpose(1, 2))


def test_released_sizes() -> None:
    with torch.device("meta"):
        flow = Flow(FlowConfig())
    dit = sum(parameter.numel() for parameter in flow.decoder.estimator.parameters())
    encoder = sum(parameter.numel() for parameter in flow.encoder.parameters())
    assert (round(dit / 1e6, 1), round(encoder / 1e6, 1)) == (114.6, 37.8)


def test_noise_is_the_same_in_every_process_and_is_there_when_built_on_meta() -> None:
    with torch.device("meta"):
        built_on_meta = Flow(TINY)
    torch.testing.assert_close(built_on_meta.decoder.rand_noise, Flow(TINY).decoder.rand_noise, rtol=0, atol=0)
    assert "decoder.rand_noise" not in built_on_meta.state_dict()


def test_sessions_with_unequal_histories_share_a_forward() -> None:
    flow, source = small_flow(), torch.Generator().manual_seed(1)
    caches = [open_turn(flow, num_codes, seed=num_codes) for num_codes in (60, 7, 20)]
    for _ in range(5):
        codes = torch.randint(TINY.vocab_size, (3, 28), generator=source)
        alone = [continue_turn(flow, codes[i : i + 1], [caches[i]])[0] for i in range(3)]
        mel, caches = continue_turn(flow, codes, caches)
        torch.testing.assert_close(mel, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_a_chunk_changes_no_cache_but_gives_a_new_one() -> None:
    flow, codes = small_flow(), torch.arange(28)[None]
    cache = open_turn(flow, 20)
    first, (later,) = continue_turn(flow, codes, [cache])
    continue_turn(flow, codes, [later])
    again, _ = continue_turn(flow, codes, [cache])
    torch.testing.assert_close(again, first, rtol=0, atol=0)


def test_any_number_of_steps_is_possible() -> None:
    flow = small_flow()
    for num_steps in (1, 3, 17):
        mel, _ = continue_turn(flow, torch.arange(10)[None], [open_turn(flow, 6, num_steps)])
        assert mel.shape == (1, 80, 14)
        assert mel.isfinite().all()


def test_without_guidance_only_the_conditioned_branch_runs() -> None:
    flow = small_flow(dataclasses.replace(TINY, inference_cfg_rate=0.0))
    guided = small_flow()
    guided.decoder.guidance = 1e-9
    codes = torch.arange(10)[None]
    mel, (cache,) = continue_turn(flow, codes, [open_turn(flow, 6)])
    expected, _ = continue_turn(guided, codes, [open_turn(guided, 6)])
    torch.testing.assert_close(mel, expected, rtol=1e-4, atol=1e-5)
    assert cache.turn.dit_kv.shape[3] == 1


def test_more_frames_than_there_is_noise_are_refused() -> None:
    flow = small_flow()
    flow.decoder.rand_noise = flow.decoder.rand_noise[..., :40]
    with pytest.raises(ModelError, match="the noise has 40"):
        continue_turn(flow, torch.arange(28)[None], [open_turn(flow, 10)])


def test_gather_aligns_histories_at_their_ends() -> None:
    def ids(*frames: int) -> Tensor:
        return torch.tensor(frames, dtype=torch.float32).view(1, len(frames), 1)

    kv, visible = gather([[ids(1, 2), ids(3)], [ids(9)]], num_new=1)
    assert kv[:, 0, :3, 0].tolist() == [[1, 2, 3], [0, 0, 9]]
    assert visible is not None
    assert visible.tolist() == [[True] * 4, [False, False, True, True]]
    assert gather([[ids(1)], [ids(2)]], num_new=1).visible is None


def numbered(frames: range, codes: range) -> FlowHistory:
    """A history whose keys are the numbers of their frames."""
    by_code, by_frame = (torch.tensor(list(r), dtype=torch.float32).view(1, 1, 1, -1, 1) for r in (codes, frames))
    no_conv = torch.zeros(1)
    return FlowHistory(by_code, by_frame, no_conv, by_frame[None, None], no_conv)


def numbers(pieces: tuple[Tensor, ...]) -> list[int]:
    return [int(number) for piece in pieces for number in piece.flatten()]


class OfficialLists:
    """The official caches as lists of frame numbers (`Token2wav.stream` of 1.0.6 and 1.0.7)."""

    def __init__(self, num_codes: int, release: Release) -> None:
        self.num_prompt, self.release = 2 * num_codes, release
        self.codes = list(range(num_codes))
        self.mel = list(range(2 * num_codes))
        self.dit = list(range(2 * num_codes))

    def add(self, codes: range, frames: range) -> None:
        self.codes += codes
        self.mel += frames
        self.dit = [*frames, *self.dit]
        if len(self.mel) > self.num_prompt + 100:
            packed = self.cut(self.codes * 2)
            newest = self.codes[: self.num_prompt // 2] + self.codes[-50:]
            self.codes = packed[: len(packed) // 2] if self.release is Release.V1_0_6 else newest
            self.mel, self.dit = self.cut(self.mel), self.cut(self.dit)

    def cut(self, history: list[int]) -> list[int]:
        return history[: self.num_prompt] + history[-100:]


@pytest.mark.parametrize("release", list(Release))
@given(num_prompt_codes=st.integers(1, 130), chunks=st.lists(st.integers(5, 25), max_size=16))
def test_trimming_keeps_what_the_official_code_keeps(
    release: Release, num_prompt_codes: int, chunks: list[int]
) -> None:
    voice = numbered(range(2 * num_prompt_codes), range(num_prompt_codes))
    cache, lists = FlowCache(voice, numbered(range(0), range(0)), 0), OfficialLists(num_prompt_codes, release)
    num_codes = num_prompt_codes
    for chunk in chunks:
        codes = range(num_codes, num_codes + chunk)
        frames = range(2 * codes.start, 2 * codes.stop)
        cache = extend(cache, numbered(frames, codes), release)
        lists.add(codes, frames)
        num_codes += chunk
        assert numbers(cache.code_kv()) == lists.codes
        assert numbers(cache.mel_kv()) == lists.mel
        assert sorted(numbers(cache.dit_kv(0))) == sorted(lists.dit)
        assert cache.turn.dit_kv.shape[-2] <= max(HISTORY_FRAMES, 2 * num_prompt_codes)
