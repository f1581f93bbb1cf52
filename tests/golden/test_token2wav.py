"""The vocoder gives the official numbers: layer by layer, and streamed, chunk by chunk; alone and in any company."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from model_shards.config import SILENCE_CODE, VocoderConfig
from model_shards.flow import Flow, FlowCache, FlowHistory, Past, extend, gather
from model_shards.fold import fold
from model_shards.hift import F0Predictor, HiftCache, HiftGenerator
from model_shards.vocoder import (
    LOOKAHEAD_CODES,
    Vocoder,
    VocoderInput,
    VocoderState,
    Voice,
    Window,
    cut_windows,
    mel_spectrogram,
)
from tests.support.golden import cases, close, read_json, read_tensors
from tests.support.vocoder import (
    FLOW_SIZES,
    HIFT_SIZES,
    below,
    frozen,
    leaves,
    official_draws,
    vocoder_config,
    with_official_draws,
    with_weights,
)

JSON, TENSORS, WEIGHTS = "token2wav.json", "token2wav.safetensors", "token2wav_weights.safetensors"
NUM_PCM_STEPS = 32767
# The phase of a source is the sum of F0 since the chunk began, and so is what another batch or CPU rounds differently
# (measured at a second's end: 1.4e-4). The waves made of it are as near as ever.
TOLERANCES = {"mel": {"rtol": 1e-4}, "hift_source": {"rtol": 0, "atol": 1e-3}}

ELSEWHERE = {
    **{f"config.{name}": f"flow.{ours}" for name, ours in FLOW_SIZES.items()},
    **{f"config.hift.{name}": f"hift.{ours}" for name, ours in HIFT_SIZES.items()},
    "config.encoder.input_size": "flow.input_size",
    "config.encoder.output_size": "flow.input_size",
    "config.encoder.up_scale_factor": "flow.up_stride",
    "config.dit.out_channels": "flow.output_size",
    "config.f0.in_channels": "hift.in_channels",
    "config.f0.cond_channels": "hift.f0_cond_channels",
    "n_timesteps": "num_steps",
}
"""Where we keep an official size."""

BUILT_IN = {
    "config.encoder.input_layer": "linear",
    "config.encoder.pos_enc_layer_type": "rel_pos_espnet",
    "config.encoder.selfattention_layer_type": "rel_selfattn",
    "config.encoder.key_bias": True,
    "config.encoder.normalize_before": True,
    "config.f0.num_class": 1,
}
"""What our modules are built for."""


@dataclass(frozen=True)
class Spoken:
    """What we made of one chunk: the end result, and what came out of the layers on the way."""

    mel: Tensor  # (mels, frames)
    flow: FlowCache  # after it; also after a turn's last chunk
    raw: Tensor  # (samples,), before the cross-fade
    source: Tensor  # (samples,), with the overlap in front
    hift: HiftCache
    wave: Tensor


class Listening(Vocoder):
    """The vocoder, and what its parts said in the last call to `speak`, by session."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.heard: dict[int, dict[str, Any]] = {}
        self.largest_batch = 0
        self._raw: tuple[Tensor, Tensor] | None = None
        self.hift.register_forward_hook(lambda _module, _args, output: setattr(self, "_raw", output))
        self.flow.register_forward_hook(self._note_flow)

    def _note_flow(self, _module: Any, args: tuple[Any, ...], output: tuple[Tensor, list[FlowHistory]]) -> None:
        caches, (mels, histories) = args[3], output
        self.heard |= {
            id(cache): {"mel": mel, "history": history}
            for cache, mel, history in zip(caches, mels, histories, strict=True)
        }
        self.largest_batch = max(self.largest_batch, len(caches))

    def _synthesise(self, mel: Tensor, caches: Any, generators: Any, last: bool) -> Any:
        waves, new = super()._synthesise(mel, caches, generators, last)
        assert self._raw is not None
        for index, generator in enumerate(generators):
            self.heard[id(generator)] = {
                "raw": self._raw[0][index],
                "source": self._raw[1][index],
                "hift": new[index],
            }
        return waves, new

    def listen(self, batch: Sequence[tuple[VocoderState, Window]]) -> list[Spoken]:
        """`speak`, and all that was said on the way."""
        self.heard.clear()
        before = [(state.flow, state.generator) for state, _ in batch]
        waves = self.speak(batch)
        return [
            self._spoken(cache, self.heard[id(generator)], wave)
            for (cache, generator), wave in zip(before, waves, strict=True)
        ]

    def _spoken(self, cache: FlowCache, voiced: dict[str, Any], wave: Tensor) -> Spoken:
        new = self.heard[id(cache)]
        return Spoken(new["mel"], extend(cache, new["history"], self.release), **voiced, wave=wave)


@dataclass
class Session:
    """A recorded stream, as far as it has been spoken."""

    case: str
    state: VocoderState
    spoken: list[Spoken] = field(default_factory=list)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return read_json(JSON)[self.case]["rows"]

    @property
    def is_over(self) -> bool:
        return len(self.spoken) == len(self.rows)

    def window(self) -> Window:
        row = self.rows[len(self.spoken)]
        return Window(tuple(row["tokens"]), row["last_chunk"])


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


PITCH = "hift.f0_predictor"


def config(num_steps: int | None = None) -> VocoderConfig:
    recorded = read_json(JSON)
    return vocoder_config(recorded["config"], num_steps or recorded["n_timesteps"])


def parts() -> list[str]:
    """Of what there are weights: a compact folder has those of the pitch only."""
    stored = list(read_tensors(WEIGHTS))
    held = {"flow": "flow.", "hift": "hift.conv_pre.", PITCH: f"{PITCH}."}
    return [part for part, head in held.items() if any(name.startswith(head) for name in stored)]


@functools.cache
def pitch() -> F0Predictor:
    return with_weights(F0Predictor, config().hift, below(f"{PITCH}.", read_tensors(WEIGHTS)))


@functools.cache
def vocoder(num_steps: int | None = None) -> Listening:
    return official(unfolded(num_steps))


def official(module: Listening) -> Listening:
    """The official weights, folded as the product has them, and the official noise."""
    head = read_tensors(TENSORS)["cfm.rand_noise_head"]
    module.flow.decoder.rand_noise[..., : head.shape[2]] = head
    assert isinstance(module.hift, HiftGenerator)
    with_official_draws(module.hift)
    fold(module)
    return module


def unfolded(num_steps: int | None = None) -> Listening:
    return with_weights(Listening, config(num_steps), below("", read_tensors(WEIGHTS)))


def flow() -> Flow:
    return vocoder().flow


def hift() -> HiftGenerator:
    generator = vocoder().hift
    assert isinstance(generator, HiftGenerator)
    return generator


def voice() -> Voice:
    tensors = read_tensors(TENSORS)
    return Voice(tensors["prompt_tokens"][0], tensors["prompt_mel"], tensors["spk_emb"])


def open_session(case: str) -> Session:
    return Session(case, vocoder().open(voice(), noise_seed=read_json(JSON)[case]["manual_seed"]))


def step(sessions: Sequence[Session]) -> None:
    spoken = vocoder().listen([(session.state, session.window()) for session in sessions])
    for session, result in zip(sessions, spoken, strict=True):
        session.spoken.append(result)


@functools.cache
def alone(case: str) -> list[Spoken]:
    """A recorded stream, from its first chunk to its last."""
    session = open_session(case)
    with torch.inference_mode():
        for _ in session.rows:
            step([session])
    return session.spoken


def streams() -> list[str]:
    return [name for name, value in read_json(JSON).items() if isinstance(value, dict) and "rows" in value]


def chunks() -> list[str]:
    return [f"{name} {index}" for name in streams() for index in range(len(read_json(JSON)[name]["rows"]))]


def names(pattern: str) -> list[str]:
    """The tensors whose whole name fits."""
    return [name for name in read_tensors(TENSORS) if re.fullmatch(pattern, name)]


def sizes() -> dict[str, Any]:
    recorded = read_json(JSON)
    return leaves({"config": recorded["config"], "n_timesteps": recorded["n_timesteps"]})


# --- sizes and weights ------------------------------------------------------------------------------------------------


@cases(JSON, (name for name in sizes() if name in ELSEWHERE))
def test_a_size_is_the_official_one(case: str) -> None:
    value: Any = config()
    for part in ELSEWHERE[case].split("."):
        value = getattr(value, part)
    assert value == frozen(sizes()[case])


@cases(JSON, (name for name in sizes() if name not in ELSEWHERE))
def test_the_modules_are_built_for_this_vocoder(case: str) -> None:
    built_in = BUILT_IN | {"config.dit.in_channels": 4 * config().flow.output_size}
    assert case.endswith("dropout_rate") or sizes()[case] == built_in[case]


@cases(WEIGHTS, parts())
def test_the_weights_are_the_official_ones(case: str) -> None:
    official = below(f"{case}.", read_tensors(WEIGHTS))
    state = (pitch() if case == PITCH else unfolded().get_submodule(case)).state_dict()
    assert state.keys() == official.keys()
    assert all(torch.equal(state[name], official[name]) for name in official)


@cases(WEIGHTS, ["names"])
def test_no_weight_is_of_an_unknown_part(case: str) -> None:
    assert all(name.startswith(tuple(f"{part}." for part in parts())) for name in read_tensors(WEIGHTS))


# --- flow -------------------------------------------------------------------------------------------------------------


@cases(TENSORS, names(r"enc\.full_out"))
def test_the_encoder_is_the_official_one(case: str) -> None:
    codes = read_tensors(TENSORS)["off.tokens"].long()
    empty, num_frames = flow().empty_history(1), flow().num_frames(codes.shape[1], last=True)
    past = gather([[empty.code_kv]], codes.shape[1]), gather([[empty.mel_kv]], num_frames)
    hidden, _ = flow().encoder(flow().input_embedding(codes), *past, empty.encoder_conv[None], last=True)
    close(hidden, read_tensors(TENSORS)[case])


@cases(TENSORS, names(r"dit\.out"))
def test_the_dit_is_the_official_one(case: str) -> None:
    x, mu, cond, speakers, time = (read_tensors(TENSORS)[f"dit.{name}"] for name in ("x", "mu", "cond", "spks", "t"))
    num_rows, _, num_frames = x.shape
    dit = flow().config
    seen = torch.cat((x, mu, speakers[:, :, None].expand_as(x), cond), dim=1).transpose(1, 2)
    kv = torch.zeros(dit.dit_depth, 2, num_rows, dit.dit_num_heads, num_frames, dit.dit_head_dim)
    conv = torch.zeros(dit.dit_depth, num_rows, 2 * dit.dit_hidden_size, 2)
    velocity, _ = flow().decoder.estimator(seen, time, Past(kv, None), conv)
    close(velocity.transpose(1, 2), read_tensors(TENSORS)[case])


@cases(TENSORS, names(r"dit\.out"))
def test_a_row_of_the_dit_does_not_see_the_others(case: str) -> None:
    x, mu, cond, speakers, time = (read_tensors(TENSORS)[f"dit.{name}"] for name in ("x", "mu", "cond", "spks", "t"))
    dit = flow().config
    for row, expected in enumerate(read_tensors(TENSORS)[case]):
        one = slice(row, row + 1)
        seen = torch.cat((x[one], mu[one], speakers[one, :, None].expand_as(x[one]), cond[one]), dim=1).transpose(1, 2)
        kv = torch.zeros(dit.dit_depth, 2, 1, dit.dit_num_heads, x.shape[2], dit.dit_head_dim)
        conv = torch.zeros(dit.dit_depth, 1, 2 * dit.dit_hidden_size, 2)
        velocity, _ = flow().decoder.estimator(seen, time[one], Past(kv, None), conv)
        close(velocity[0].T, expected)


@cases(TENSORS, names(r"off\.mel(_\d+steps)?") if "flow" in parts() else [])
def test_the_mel_of_a_whole_utterance_is_the_official_one(case: str) -> None:
    num_steps = int(re.sub(r"\D", "", case)) if case != "off.mel" else None
    mel = vocoder(num_steps).token2mel(read_tensors(TENSORS)["off.tokens"][0].tolist(), voice())
    close(mel[None], read_tensors(TENSORS)[case])


@cases(TENSORS, names(r"stream.*\.setup\..*"))
def test_the_prompt_leaves_the_official_caches(case: str) -> None:
    history = vocoder().prepare(voice()).history
    name, _, number = case.partition(".setup.")[2].partition(".step")
    expected = read_tensors(TENSORS)[case]
    if name == "conformer_att_cache":  # both rates in one tensor: what is kept per code is stored twice in a row
        by_code, by_frame = keys_and_values(history.code_kv), keys_and_values(history.mel_kv)
        stride = by_frame.shape[-2] // by_code.shape[-2]
        close(torch.cat((by_code.repeat(1, 1, stride, 1), by_frame))[:, None], expected)
    elif name == "conformer_cnn_cache":
        close(history.encoder_conv[None], expected)
    elif name == "estimator_att_cache":
        close(keys_and_values(history.dit_kv[int(number)]), expected)
    elif name == "estimator_cnn_cache":
        close(history.dit_conv[int(number)], expected)
    else:
        pytest.fail(f"{case}: no one knows this cache")


def keys_and_values(kv: Tensor) -> Tensor:
    """(layers, 2, …, head_dim) as the official (layers, …, 2 * head_dim)."""
    return torch.cat(tuple(kv.unbind(1)), dim=-1)


@cases(TENSORS, names(r"mel24k\.mel"))
def test_the_mel_of_reference_speech_is_the_official_one(case: str) -> None:
    mel = mel_spectrogram(read_tensors(TENSORS)["mel24k.audio"])
    close(mel.T[None], read_tensors(TENSORS)[case], rtol=0, atol=2e-5)


# --- HiFT -------------------------------------------------------------------------------------------------------------


@cases(TENSORS, names(r"off\.f0"))
def test_f0_is_the_official_one(case: str) -> None:
    close(pitch()(read_tensors(TENSORS)["off.mel"]), read_tensors(TENSORS)[case])


def draws() -> list[str]:
    recorded = read_json(JSON)["hift_draws"]
    return [f"hift.draw{index}.{kind}" for index, (kind, _) in enumerate(recorded)]


@cases(TENSORS, draws())
def test_a_seed_draws_what_the_official_code_draws(case: str) -> None:
    """Initial phases, noise, and a noise which nobody hears; what the other golden tests take is the second."""
    mel, expected = read_tensors(TENSORS)["hift.mel"], read_tensors(TENSORS)[case]
    index = draws().index(case)
    assert list(expected.shape) == read_json(JSON)["hift_draws"][index][1]
    generator = torch.Generator().manual_seed(read_json(JSON)["hift_manual_seed"])
    noise = official_draws(generator, mel.shape[2] * hift().hop, hift().config.nb_harmonics + 1)[None]
    after = torch.rand(1, generator=generator)
    again = torch.Generator().manual_seed(read_json(JSON)["hift_manual_seed"])
    phases = torch.rand(1, noise.shape[2], generator=again)
    torch.empty(noise.shape[2], noise.shape[1]).T.normal_(generator=again)
    branch = torch.randn(1, noise.shape[1], 1, generator=again)
    assert torch.equal(torch.rand(1, generator=again), after)  # nothing else is drawn
    assert torch.equal((phases, noise, branch)[index], expected)


@cases(TENSORS, names(r"hift\.(wav|source)"))
def test_given_the_draws_the_speech_is_the_official_one(case: str) -> None:
    (noise,) = (read_tensors(TENSORS)[name] for name in names(r"hift\.draw1\..*"))
    wave, source = hift()(read_tensors(TENSORS)["hift.mel"], hift().m_source.weigh(noise))
    close({"hift.wav": wave, "hift.source": source[:, None]}[case], read_tensors(TENSORS)[case], rtol=0)


@cases(TENSORS, names(r"hift\.decode_.*_wav"))
def test_the_wave_of_a_given_source_is_the_official_one(case: str) -> None:
    expected = read_tensors(TENSORS)[case]
    num_frames, rate_hz = expected.shape[1] // hift().hop, hift().config.sampling_rate_hz
    if case == "hift.decode_zero_source_wav":
        mel, source = read_tensors(TENSORS)["hift.mel"], torch.zeros_like(expected)
    else:
        match = re.fullmatch(r"hift\.decode_sine(\d+)_wav", case)
        assert match is not None, f"{case}: no one knows this source"
        seconds = torch.arange(expected.shape[1], dtype=torch.float64) / rate_hz
        mel = read_tensors(TENSORS)["off.mel"][..., :num_frames]
        source = (0.1 * torch.sin(2 * torch.pi * int(match[1]) * seconds)).float()[None]
    close(hift().decode(mel, source), expected, rtol=0)


# --- streams ----------------------------------------------------------------------------------------------------------


@cases(JSON, chunks())
def test_a_chunk_is_spoken_as_officially(case: str) -> None:
    stream, _, index = case.rpartition(" ")
    check_chunk(stream, int(index), alone(stream)[int(index)])


def check_chunk(stream: str, index: int, spoken: Spoken) -> None:
    row, prefix = read_json(JSON)[stream]["rows"][index], f"{stream}.c{index}."
    ours = {
        "mel": spoken.mel[None],
        "wav": spoken.wave[None],
        "hift_wav_raw": spoken.raw[None],
        "hift_source": spoken.source,
    }
    stored = [name for name in read_tensors(TENSORS) if name.startswith(prefix)]
    assert {f"{prefix}mel"} <= set(stored)
    for name in stored:
        what = name.removeprefix(prefix)
        close(ours[what], read_tensors(TENSORS)[name], **TOLERANCES.get(what, {"rtol": 0}))
    assert spoken.mel.shape[1] == row["mel_frames"]
    assert (spoken.wave.shape[0], str(spoken.wave.dtype)) == (row["wav_samples"], f"torch.{row['wav_dtype']}")
    assert sum(piece.shape[-2] for piece in spoken.flow.mel_kv()) == row["conformer_att_len"]
    assert sum(piece.shape[-2] for piece in spoken.flow.dit_kv(0)) == row["estimator_att_len"]
    assert {
        "mel": [1, *spoken.hift.mel.shape],
        "source": [1, 1, *spoken.hift.source.shape],
        "speech": [1, *spoken.hift.speech.shape],
    } == row["hift_cache"]
    # A difference of 1e-5 turns into one step of 16 bits in one of three samples, up or down; measured: 34 of 24000.
    pcm = (spoken.wave.clamp(-1, 1) * NUM_PCM_STEPS).to(torch.int16)
    assert abs(int(pcm.sum()) - row["pcm_sum"]) <= row["wav_samples"] // 100


@cases(JSON, ["all streams, resident"] if "flow" in parts() else [])
def test_resident_caches_speak_the_recorded_streams(case: str) -> None:
    module = official(unfolded())
    cache = module.prepare(voice())
    module.make_resident([cache], len(streams()), ladder=(1, 2, 4))
    seeds = {name: read_json(JSON)[name]["manual_seed"] for name in streams()}
    sessions = [Session(name, module.open(cache, noise_seed=seeds[name])) for name in streams()]
    while running := [session for session in sessions if not session.is_over]:
        waves = module.speak([(session.state, session.window()) for session in running])
        for session, wave in zip(running, waves, strict=True):
            expected = alone(session.case)[len(session.spoken)]
            close(wave, expected.wave, rtol=0)
            session.spoken.append(expected)


@cases(JSON, (f"{name} in company, order {seed}" for seed in range(3) for name in streams()))
def test_a_stream_is_spoken_the_same_in_any_company(case: str) -> None:
    seed = int(case.rpartition(" ")[2])
    finished, largest_batch = company(seed)
    ours = [session for session in finished if session.case == case.partition(" in company")[0]]
    assert ours and largest_batch > 1
    for session in ours:
        for index, spoken in enumerate(session.spoken):
            check_chunk(session.case, index, spoken)


@functools.cache
def company(seed: int) -> tuple[list[Session], int]:
    """Four sessions of each stream: half of them begin together, the others join later; the largest batch.

    They leave as they end, and are due in changing order, not all at each step.
    """
    order = random.Random(seed)
    running = [open_session(name) for name in streams() * 2]
    waiting = order.sample(streams() * 2, 2 * len(streams()))
    finished: list[Session] = []
    vocoder().largest_batch = 0
    with torch.inference_mode():
        step(running)
        while waiting or running:
            finished += [session for session in running if session.is_over]
            running = [session for session in running if not session.is_over]
            running += [open_session(waiting.pop()) for _ in range(min(len(waiting), order.randint(0, 3)))]
            step(order.sample(running, order.randint(min(1, len(running)), len(running))))
    return finished, vocoder().largest_batch


def cut_alike(name: str) -> list[dict[str, Any]]:
    """The first rows of a stream, as far as each repeats the look-ahead of the one before and fits a window."""
    kept, alike = [SILENCE_CODE] * LOOKAHEAD_CODES, []
    for row in read_json(JSON)[name]["rows"]:
        windows, rest = cut_windows(row["tokens"], end_of_turn=False)
        if row["last_chunk"] or row["tokens"][:LOOKAHEAD_CODES] != kept or len(windows) != 1:
            break
        alike.append(row)
        kept = rest
    return alike


@cases(JSON, (f"{name} as the duplex model cuts it" for name in streams() if cut_alike(name)))
def test_new_codes_become_the_recorded_seconds(case: str) -> None:
    """`stream` cuts chunks itself. So far as a stream was recorded cut alike, the new codes give its speech."""
    name = case.partition(" as the")[0]
    state = open_session(name).state
    for row, spoken in zip(cut_alike(name), alone(name), strict=False):
        (wave,) = vocoder().stream([(state, VocoderInput(row["tokens"][LOOKAHEAD_CODES:]))])
        close(wave[-row["wav_samples"] :], spoken.wave, rtol=0)
