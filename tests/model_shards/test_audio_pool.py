"""Resident pasts: the embeddings are those of growing caches, in any company, and slots are given back."""

from collections.abc import Iterator

import pytest
import torch

from model_shards.audio import AudioEncoder, AudioState
from model_shards.audio_pool import ResidentAudio
from model_shards.config import AudioConfig
from model_shards.mel import MelChunk
from tests.support.capturing import checked

TINY = AudioConfig(
    d_model=32,
    encoder_layers=2,
    encoder_attention_heads=2,
    encoder_ffn_dim=128,
    max_source_positions=250,
    embed_dim=48,
)
LADDER = (1, 2, 4)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    # In TF32, torch's default for convolutions on a GPU, batches of other sizes round otherwise.
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def encoder(num_sessions: int = 0, device: str = "cpu") -> AudioEncoder:
    torch.manual_seed(3)
    made = AudioEncoder(TINY).to(device).eval()
    if num_sessions:
        made.make_resident(num_sessions, LADDER)
    return made


def chunk(seed: int, num_frames: int = 104, prefix: int = 2) -> MelChunk:
    frames = torch.randn(80, num_frames, generator=torch.Generator().manual_seed(seed))
    return MelChunk(frames, 0, prefix, 2)


Sessions = list[tuple[AudioState, AudioState]]


def hear(ours: AudioEncoder, stock: AudioEncoder, sessions: Sessions, chunks: dict[int, MelChunk]) -> None:
    """What both encode of these sessions' next chunks is the same."""
    said = [
        side.encode([(sessions[number][place], new) for number, new in chunks.items()])
        for place, side in enumerate((ours, stock))
    ]
    for mine, theirs in zip(*said, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    for number in chunks:
        assert sessions[number][0].num_frames == sessions[number][1].num_frames


def opened(ours: AudioEncoder, num: int) -> Sessions:
    return [(ours.open(), AudioState()) for _ in range(num)]


@pytest.mark.parametrize("device", DEVICES)
def test_resident_pasts_give_the_embeddings_of_growing_ones(device: str) -> None:
    """Sessions that begin one after the other, to whom seconds are missing, up to where their past is dropped."""
    ours, stock = encoder(4, device), encoder(device=device)
    sessions = opened(ours, 4)
    begun: set[int] = set()
    for index in range(10):
        chunks = {number: chunk(10 * index + number) for number in range(4) if index >= number and (index + number) % 4}
        for number in chunks.keys() - begun:
            chunks[number] = chunk(number, 102, 0)  # a session's first second has no neighbour on its left
        begun |= chunks.keys()
        if index == 4:
            chunks[1] = chunk(5, 37)
        if index == 6:
            chunks[2] = chunk(6, 4)  # nothing but overlap
        hear(ours, stock, sessions, chunks)
    assert all(state.slot is not None for state, _ in sessions)
    assert min(state.num_frames for state, _ in sessions) < 150  # dropped once


def test_programs_look_at_no_value_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a call would end a capture on a GPU."""
    monkeypatch.setattr(ResidentAudio, "_encode", checked(ResidentAudio._encode))
    ours, stock = encoder(2), encoder()
    hear(ours, stock, opened(ours, 2), {0: chunk(0, 102, 0), 1: chunk(1)})


def test_a_chunk_that_is_longer_than_a_second_is_encoded_without_a_program() -> None:
    ours, stock = encoder(2), encoder()
    sessions = opened(ours, 2)
    for length in (104, 260, 104):
        hear(ours, stock, sessions, {0: chunk(length, length), 1: chunk(7)})


def test_a_session_for_which_there_is_no_slot_is_encoded_without() -> None:
    ours, stock = encoder(2), encoder()
    sessions = opened(ours, 3)
    assert [state.slot is None for state, _ in sessions] == [False, False, True]
    hear(ours, stock, sessions, {number: chunk(number) for number in range(3)})
    ours.close(sessions[2][0])
    assert ours.open().slot is None


def test_who_gets_a_slot_anew_hears_nothing_of_who_had_it() -> None:
    ours, stock = encoder(1), encoder()
    for seed in range(3):
        ((state, other),) = sessions = opened(ours, 1)
        hear(ours, stock, sessions, {0: chunk(seed)})
        hear(ours, stock, sessions, {0: chunk(seed + 10)})
        assert (state.slot, other.slot) == (1, None)
        ours.close(state)


def test_more_sessions_than_the_ladder_has_are_encoded_in_parts() -> None:
    ours, stock = encoder(6), encoder()
    sessions = opened(ours, 6)
    for index in range(2):
        hear(ours, stock, sessions, {number: chunk(10 * index + number) for number in range(6)})
