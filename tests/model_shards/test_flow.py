"""The flow model, against the official numbers, a simulation of the official trimming, and batched against alone."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from model_shards.config import FlowConfig
from model_shards.errors import ModelError
from model_shards.flow import HISTORY_FRAMES, Flow, FlowCache, FlowHistory, Past, Release, extend, gather

PLACES = [Path(__file__).parents[up] / "shared" / "golden" for up in (2, 3)]
GOLDEN = Path(os.environ.get("OMNI_GOLDEN") or next((place for place in PLACES if place.is_dir()), PLACES[0]))
golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no golden data; OMNI_GOLDEN names its folder")

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


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return load_file(GOLDEN / "token2wav.safetensors")


@pytest.fixture(scope="module")
def cases() -> dict[str, Any]:
    return json.loads((GOLDEN / "token2wav.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def official(tensors: dict[str, Tensor]) -> Flow:
    """The golden weights, built on `meta` and with the golden noise."""
    with torch.device("meta"):
        flow = Flow(TINY)
    weights = load_file(GOLDEN / "token2wav_weights.safetensors")
    own = {key.removeprefix("flow."): value for key, value in weights.items() if key.startswith("flow.")}
    flow.load_state_dict(own, strict=True, assign=True)
    flow.decoder.rand_noise[..., :240] = tensors["cfm.rand_noise_head"]
    return flow.eval()


def official_turn(flow: Flow, tensors: dict[str, Tensor]) -> FlowCache:
    """A session with the golden voice; its look-ahead is silence."""
    codes = torch.cat((tensors["prompt_tokens"], torch.full((1, 3), 4218)), dim=1).long()
    empty = flow.empty_history(10)
    _, (voice,) = flow(codes, tensors["spk_emb"], tensors["prompt_mel"], [FlowCache(empty, empty, 0)], last=False)
    turn = dataclasses.replace(empty, encoder_conv=voice.encoder_conv, dit_conv=voice.dit_conv)
    return FlowCache(voice, turn, 0)


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


@golden
def test_encoder_is_the_official_one(official: Flow, tensors: dict[str, Tensor]) -> None:
    codes = tensors["off.tokens"].long()
    empty = official.empty_history(1)
    past = gather([[empty.code_kv]], codes.shape[1]), gather([[empty.mel_kv]], 2 * codes.shape[1])
    hidden, _ = official.encoder(official.input_embedding(codes), *past, empty.encoder_conv[None], last=True)
    torch.testing.assert_close(hidden, tensors["enc.full_out"], rtol=1e-4, atol=1e-4)


@golden
def test_dit_is_the_official_one(official: Flow, tensors: dict[str, Tensor]) -> None:
    num_frames = tensors["dit.x"].shape[2]
    speakers = tensors["dit.spks"][:, :, None].expand(-1, -1, num_frames)
    x = torch.cat((tensors["dit.x"], tensors["dit.mu"], speakers, tensors["dit.cond"]), dim=1).transpose(1, 2)
    kv, conv = torch.zeros(2, 2, 2, 2, num_frames, 8), torch.zeros(2, 2, 64, 2)
    velocity, _ = official.decoder.estimator(x, tensors["dit.t"], Past(kv, None), conv)
    torch.testing.assert_close(velocity.transpose(1, 2), tensors["dit.out"], rtol=1e-4, atol=1e-4)


@golden
def test_prompt_leaves_the_official_caches(official: Flow, tensors: dict[str, Tensor]) -> None:
    voice = official_turn(official, tensors).voice
    by_code, by_frame = (
        torch.cat((*voice.code_kv.transpose(0, 1),), -1),
        torch.cat((*voice.mel_kv.transpose(0, 1),), -1),
    )
    packed = torch.cat((by_code.repeat(1, 1, 2, 1), by_frame))[:, None]  # the official cache has both rates in one
    step0 = torch.cat((*voice.dit_kv[0].transpose(0, 1),), dim=-1)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(packed, tensors["stream.setup.conformer_att_cache"], **close)
    torch.testing.assert_close(voice.encoder_conv[None], tensors["stream.setup.conformer_cnn_cache"], **close)
    torch.testing.assert_close(step0, tensors["stream.setup.estimator_att_cache.step0"], **close)
    torch.testing.assert_close(voice.dit_conv[0], tensors["stream.setup.estimator_cnn_cache.step0"], **close)


@golden
@pytest.mark.parametrize("name", ["stream", "stream_short", "stream_long"])
def test_mel_is_the_official_one_also_after_the_history_is_trimmed(
    official: Flow, tensors: dict[str, Tensor], cases: dict[str, Any], name: str
) -> None:
    cache = official_turn(official, tensors)
    for index, row in enumerate(cases[name]["rows"]):
        cond = torch.zeros(1, row["mel_frames"], 80)
        mel, (new,) = official(torch.tensor([row["tokens"]]), tensors["spk_emb"], cond, [cache], row["last_chunk"])
        cache = extend(cache, new, Release.V1_0_6)
        torch.testing.assert_close(mel, tensors[f"{name}.c{index}.mel"], rtol=1e-4, atol=1e-4)
        assert sum(piece.shape[-2] for piece in cache.dit_kv(0)) == row["estimator_att_len"]
        assert sum(piece.shape[-2] for piece in cache.mel_kv()) == row["conformer_att_len"]


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
