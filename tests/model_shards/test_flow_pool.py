"""Resident caches: the speech is that of gathered ones, whoever shares a batch, and room is given back."""

import dataclasses
import random
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from model_shards.config import FlowConfig, HiftConfig, VocoderConfig
from model_shards.errors import ModelError
from model_shards.flow import Release
from model_shards.flow_pool import ResidentFlow
from model_shards.fold import fold
from model_shards.hift import HiftGenerator
from model_shards.hift_causal import CausalHiftGenerator
from model_shards.shapes import ByShape
from model_shards.vocoder import Vocoder, VocoderInput, VocoderState, Voice, VoiceCache, Window
from tests.support.capturing import checked

STANDARD = VocoderConfig(
    flow=FlowConfig(
        input_size=32,
        encoder_attention_heads=2,
        encoder_linear_units=64,
        encoder_num_blocks=2,
        encoder_num_up_blocks=1,
        dit_hidden_size=32,
        dit_depth=2,
        dit_num_heads=2,
        dit_head_dim=8,
    ),
    hift=HiftConfig(
        base_channels=16,
        f0_cond_channels=8,
        sampling_rate_hz=1200,
        upsample_rates=(3, 2),
        upsample_kernel_sizes=(7, 4),
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1, 3),),
        source_resblock_kernel_sizes=(7, 3),
        source_resblock_dilation_sizes=((1,), (1,)),
    ),
    num_steps=2,
)
"""As the released one, but for its sizes, and 1200 samples in a second."""
CAUSAL = dataclasses.replace(STANDARD, hift=dataclasses.replace(STANDARD.hift, causal=True))
WITHOUT_GUIDANCE = dataclasses.replace(STANDARD, flow=dataclasses.replace(STANDARD.flow, inference_cfg_rate=0.0))
LADDER = (1, 2, 4)
SHORT, LONG = 12, 65  # codes of a prompt: fewer and more mel frames than a turn keeps
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    # In TF32, torch's default for convolutions on a GPU, batches of other sizes round otherwise.
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def vocoder(config: VocoderConfig, release: Release | None = None, device: str = "cpu") -> Vocoder:
    torch.manual_seed(9)
    made = Vocoder(config, release)
    for parameter in made.flow.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.constant_(made.hift.f0_predictor.classifier.bias, 120.0)
    made.to(device).eval()
    fold(made)
    return made


def voice(num_codes: int) -> Voice:
    source = torch.Generator().manual_seed(num_codes)
    mel = torch.randn(1, 2 * num_codes, 80, generator=source)
    return Voice(torch.arange(num_codes, dtype=torch.int32), mel, torch.randn(1, 192, generator=source))


class Pair:
    """The same sessions, with resident caches and without. What both say is compared by whoever makes them speak."""

    def __init__(
        self,
        prompts: Sequence[int],
        num_turns: int,
        config: VocoderConfig = STANDARD,
        release: Release | None = None,
        device: str = "cpu",
    ) -> None:
        self.ours, self.stock = (vocoder(config, release, device) for _ in range(2))
        kinds = sorted(set(prompts))
        voices = [{kind: side.prepare(voice(kind)) for kind in kinds} for side in (self.ours, self.stock)]
        self.ours.make_resident(list(voices[0].values()), num_turns, LADDER)
        self.sessions = [
            tuple(
                side.open(known[prompt], noise_seed=number)
                for side, known in zip((self.ours, self.stock), voices, strict=True)
            )
            for number, prompt in enumerate(prompts)
        ]

    def say(self, inputs: dict[int, VocoderInput]) -> None:
        said = [
            side.stream([(self.sessions[number][place], new) for number, new in inputs.items()])
            for place, side in enumerate((self.ours, self.stock))
        ]
        for ours, stock in zip(*said, strict=True):
            # What is rounded differently in F0 adds up in the phase of a second.
            torch.testing.assert_close(ours, stock, rtol=0, atol=2e-4)

    def interrupt(self, number: int) -> None:
        for place, side in enumerate((self.ours, self.stock)):
            side.reset(self.sessions[number][place])

    def is_resident(self, number: int) -> bool:
        return type(self.sessions[number][0].flow).__name__ == "ResidentTurn"


def free(of: Vocoder) -> list[int]:
    """How much of each pool is free, and how many turns there is room for."""
    resident = of._resident
    assert resident is not None
    return [len(pool._free) for pool in resident._pools.places] + [len(resident._free_slots)]


def codes(seed: int, num: int) -> list[int]:
    return random.Random(seed).choices(range(6561), k=num)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("config", "release"),
    [(STANDARD, Release.V1_0_6), (STANDARD, Release.V1_0_7), (CAUSAL, Release.V1_0_7), (WITHOUT_GUIDANCE, None)],
)
def test_resident_caches_give_the_speech_of_gathered_ones(
    config: VocoderConfig, release: Release | None, device: str
) -> None:
    """Sessions with two voices that begin, end and are interrupted at different windows, in batches of any size."""
    pair = Pair([SHORT, LONG, SHORT, LONG], 4, config, release, device)
    before = free(pair.ours)
    for index in range(9):
        inputs = {number: VocoderInput(codes(10 * index + number, 25)) for number in range(4) if index >= 2 * number}
        if index == 5:
            inputs[1] = VocoderInput(codes(5, 9), end_of_turn=True)
            inputs[2] = VocoderInput(codes(6, 11))
        if index == 7:
            pair.interrupt(0)
        pair.say(inputs)
    assert [pair.is_resident(number) for number in range(4)] == [True] * 4
    assert free(pair.ours)[-1] == 0
    for number in range(3):
        pair.interrupt(number)
    pair.say({3: VocoderInput([], end_of_turn=True)})
    assert free(pair.ours) == before


def test_a_turn_for_which_there_is_no_room_is_spoken_without() -> None:
    pair = Pair([SHORT] * 3, 2)
    pair.say({number: VocoderInput(codes(number, 25)) for number in range(3)})
    assert [pair.is_resident(number) for number in range(3)] == [True, True, False]
    pair.say({number: VocoderInput(codes(number, 25), end_of_turn=number == 0) for number in range(3)})
    pair.say({number: VocoderInput(codes(number, 25)) for number in range(3)})
    assert [pair.is_resident(number) for number in range(3)] == [True, True, False]  # it began without
    pair.interrupt(1)
    pair.say({2: VocoderInput(codes(7, 3), end_of_turn=True)})
    pair.say({number: VocoderInput(codes(number, 25)) for number in (0, 2)})
    assert pair.is_resident(2)


def test_a_voice_that_is_not_resident_is_spoken_without() -> None:
    made = vocoder(STANDARD)
    made.make_resident([made.prepare(voice(SHORT))], 2, LADDER)
    state = made.open(voice(LONG), noise_seed=0)
    made.stream([(state, VocoderInput(codes(0, 25)))])
    assert free(made)[-1] == 2


def test_more_sessions_than_the_ladder_has_are_spoken_in_parts() -> None:
    pair = Pair([SHORT] * 6, 6)
    for index in range(2):
        pair.say({number: VocoderInput(codes(10 * index + number, 25)) for number in range(6)})


def test_a_place_that_a_row_sees_for_the_last_time_is_not_overwritten_in_the_same_run() -> None:
    """There is no place to spare, and each row drops as many as the others take."""
    pair = Pair([SHORT] * 4, 4, release=Release.V1_0_7)
    pools = pair.ours._resident._pools.places  # type: ignore[union-attr]
    for index in range(6):
        pair.say({number: VocoderInput(codes(10 * index + number, 25)) for number in range(4)})
    assert [len(pool._free) for pool in pools] == [4 * 25, 4 * 50, 4 * 50]


@pytest.mark.parametrize("config", [STANDARD, CAUSAL])
def test_all_programs_are_made_before_anyone_speaks_and_that_leaves_no_trace(config: VocoderConfig) -> None:
    pair = Pair([SHORT] * 2, 2, config)
    before = free(pair.ours)
    pair.ours.warm_up(pair.sessions[0][0].voice)
    assert free(pair.ours) == before
    made = num_programs(pair.ours)
    for index in range(5):
        pair.say({number: VocoderInput(codes(10 * index + number, 25)) for number in range(1 + index % 2)})
    assert num_programs(pair.ours) == made


def num_programs(of: Vocoder) -> int:
    of_hift, resident = of.hift._continue, of._resident
    assert isinstance(of_hift, ByShape) and resident is not None
    return sum(len(program._of_size) for program in (resident._program, *of_hift._programs.values()))


@pytest.mark.parametrize("config", [STANDARD, CAUSAL])
def test_programs_look_at_no_value_on_the_host(config: VocoderConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a call would end a capture on a GPU."""
    for kind in (ResidentFlow, HiftGenerator, CausalHiftGenerator):
        name = "_run" if kind is ResidentFlow else "_continued"
        monkeypatch.setattr(kind, name, checked(getattr(kind, name)))
    pair = Pair([SHORT], 1, config)
    for index in range(3):
        pair.say({0: VocoderInput(codes(index, 25))})


def spoken_state() -> tuple[Vocoder, VocoderState]:
    made = vocoder(STANDARD)
    cache: VoiceCache = made.prepare(voice(SHORT))
    made.make_resident([cache], 1, LADDER)
    state = made.open(cache, noise_seed=0)
    made.stream([(state, VocoderInput(codes(0, 25)))])
    return made, state


def test_a_window_with_more_than_25_new_codes_is_refused_in_a_resident_turn() -> None:
    made, state = spoken_state()
    with pytest.raises(ModelError, match="a window of 29 codes; resident caches take 25 new ones"):
        made.speak([(state, Window(tuple(codes(1, 29)), last=False))])
    made.reset(state)
    (wave,) = made.speak([(state, Window(tuple(codes(1, 40)), last=True))])  # a turn that begins so is not resident
    assert wave.shape == (40 * 48,)


def test_a_resident_turn_is_not_copied() -> None:
    _, state = spoken_state()
    with pytest.raises(ModelError, match="can't be copied"):
        state.copy()


def test_the_mel_of_a_program_is_that_of_gathered_caches() -> None:
    """Closer than speech can say it, at a turn's first window and when its history is full."""
    pair = Pair([LONG], 1)
    mels: list[list[Tensor]] = [[], []]
    for place, side in enumerate((pair.ours, pair.stock)):

        def keep(mel: Tensor, *args: object, to: list[Tensor] = mels[place], whole=side._synthesise) -> object:
            to.append(mel)
            return whole(mel, *args)

        side._synthesise = keep  # type: ignore[method-assign, assignment]
    for index in range(7):
        pair.say({0: VocoderInput(codes(index, 25))})
    for ours, stock in zip(*mels, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)
