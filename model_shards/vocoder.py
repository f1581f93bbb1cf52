"""The vocoder: speech codes of many sessions become their speech, one second at a time.

Rule: the module holds weights only. A session's state is a VocoderState which its caller owns; its tensors are never
written in place, so that sessions share a voice, and the end of a turn costs nothing. For a GPU `make_resident` makes
one exception: the flow's caches then lie in a pool of the module's, and a turn that began has a place in it, until its
last window or `reset`.

Source: minicpmo-utils 1.0.6, `stepaudio2` (Token2wav), and how the duplex model drives it
(`modeling_minicpmo_unified.py`, `_generate_waveform_from_tokens`); reference/minicpmo-4.5.md §6.4 and §6.5.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_shards.config import VocoderConfig
from model_shards.errors import ModelError
from model_shards.flow import WINDOW_CODES, Flow, FlowCache, FlowHistory, Release, extend
from model_shards.flow_pool import ResidentChunk, ResidentFlow, ResidentTurn
from model_shards.hift import HiftCache, HiftGenerator
from model_shards.hift_causal import CausalHiftCache, CausalHiftGenerator
from model_shards.programs import LADDER

T = TypeVar("T")
SpeechCache = HiftCache | CausalHiftCache

LOOKAHEAD_CODES = 3
MIN_WINDOW_CODES = 5  # a shorter rest waits for the next codes
NUM_WARM_UP_WINDOWS = 4  # of a turn: in the last ones, no shape is new any more

MEL_RATE_HZ = 24_000
MEL_N_FFT = 1920
MEL_HOP = 480
MEL_TOP_HZ = 8_000
NUM_MELS = 80


@dataclass(frozen=True, slots=True)
class Voice:
    """How a session shall sound: what `prompt.safetensors` holds.

    prompt_tokens: (N,) int32, codes of the reference speech.
    prompt_mel:    (1, 2 N, mels), its mel at 50 Hz; see `mel_spectrogram`.
    spk_emb:       (1, spk_embed_dim), speaker embedding.
    """

    prompt_tokens: Tensor
    prompt_mel: Tensor
    spk_emb: Tensor


@dataclass(frozen=True, slots=True)
class VoiceCache:
    """A voice, and the history which its prompt leaves. Never changes: any number of sessions share it."""

    voice: Voice
    history: FlowHistory


@dataclass(slots=True)
class VocoderState:
    """One session, owned by the caller."""

    voice: VoiceCache
    generator: torch.Generator
    codes: list[int]  # not yet spoken, or needed once more as look-ahead
    flow: FlowCache | ResidentTurn
    hift: SpeechCache

    def copy(self) -> VocoderState:
        """A snapshot that later calls don't change. It shares all tensors, as nothing writes into them.

        Raises ModelError where the turn's caches are resident: there is one of each.
        """
        if isinstance(self.flow, ResidentTurn):
            raise ModelError("vocoder: a turn whose caches are resident on the device can't be copied")
        return replace(self, codes=list(self.codes), generator=self.generator.clone_state())


@dataclass(frozen=True, slots=True)
class VocoderInput:
    """New codes of one session. `end_of_turn` also speaks what is held back, and goes back to the voice."""

    codes: Sequence[int]
    end_of_turn: bool = False


class Window(NamedTuple):
    """Codes which go through the models at once; unless `last`, the final LOOKAHEAD_CODES are only looked at."""

    codes: tuple[int, ...]
    last: bool


def cut_windows(codes: Sequence[int], end_of_turn: bool) -> tuple[list[Window], list[int]]:
    """Cut a session's codes as the duplex model does, and say which codes stay for the next call (§6.5)."""
    windows, rest = [], list(codes)
    while len(rest) >= LOOKAHEAD_CODES + MIN_WINDOW_CODES:
        taken = rest[: WINDOW_CODES + LOOKAHEAD_CODES]
        windows.append(Window(tuple(taken), last=False))
        rest = rest[len(taken) - LOOKAHEAD_CODES :]
    if end_of_turn:
        windows.append(Window(tuple(rest), last=True))
        rest = []
    return windows, rest


class Vocoder(nn.Module):
    """Flow and HiFT. `release` says which official streaming is followed; by default the one of the checkpoint."""

    def __init__(self, config: VocoderConfig, release: Release | None = None) -> None:
        super().__init__()
        self.config = config
        self.release = release or _release_of(config)
        self.flow = Flow(config.flow)
        self.hift = CausalHiftGenerator(config.hift) if config.hift.causal else HiftGenerator(config.hift)
        self._resident: ResidentFlow | None = None

    def make_resident(self, voices: Sequence[VoiceCache], num_turns: int, ladder: Sequence[int] = LADDER) -> None:
        """From now on `num_turns` turns in these voices are spoken by programs of fixed shapes, as a GPU wants them;
        what is beyond that, as before.

        ladder: batch sizes of the programs, as far as there are turns. On a CPU this is slower than without.
        """
        known = [(voice.history, voice.voice.spk_emb) for voice in voices]
        self._resident = ResidentFlow(self.flow, self.release, known, num_turns, ladder)
        self.hift.use_programs(self.config.flow.up_stride * WINDOW_CODES, self._resident.ladder)

    @property
    def runs_with(self) -> str:
        """For the user: where windows are graphs; else "" (nothing is chosen)."""
        if self._resident is None:
            return ""
        return f"{self.flow.encoder_proj.weight.device.type}, graphs for up to {self._resident.ladder[-1]} sessions"

    def warm_up(self, voice: VoiceCache) -> None:
        """Speak some windows of batches of all sizes for which there are programs, so that no session waits until one
        is made. The largest come first: the others find room in their memory.
        """
        assert self._resident is not None, "programs come with resident caches"
        codes = tuple(range(WINDOW_CODES + LOOKAHEAD_CODES))
        for size in reversed(self._resident.ladder):
            states = [self.open(voice, noise_seed=0) for _ in range(size)]
            for _ in range(NUM_WARM_UP_WINDOWS):
                self.speak([(state, Window(codes, last=False)) for state in states])
            for state in states:
                self.reset(state)

    def prepare(self, voice: Voice) -> VoiceCache:
        """Run a voice's prompt through the flow, once for all sessions which speak with it.

        Raises ModelError when the voice's tensors don't fit together or don't fit this model.
        """
        voice = self._placed(voice)
        codes = voice.prompt_tokens.long()
        if self.release is Release.V1_0_7:
            ahead = codes[:LOOKAHEAD_CODES]
        else:
            ahead = codes.new_full((LOOKAHEAD_CODES,), self.config.silence_code)
        empty = self._no_voice()
        codes = torch.cat((codes, ahead))[None]
        _, (history,) = self.flow(codes, voice.spk_emb, voice.prompt_mel, [empty], last=False)
        return VoiceCache(voice, history)

    def open(self, voice: VoiceCache | Voice, *, noise_seed: int) -> VocoderState:
        """Begin a session. The seed decides its source noise, and nothing else."""
        cache = self.prepare(voice) if isinstance(voice, Voice) else voice
        generator = torch.Generator(device=self.flow.encoder_proj.weight.device).manual_seed(noise_seed)
        return VocoderState(cache, generator, *self._turn_start(cache))

    def reset(self, state: VocoderState) -> None:
        """Forget the turn (barge-in, or the session's end): the next code begins a new one."""
        if isinstance(state.flow, ResidentTurn):
            assert self._resident is not None
            self._resident.end(state.flow)
        state.codes, state.flow, state.hift = self._turn_start(state.voice)

    def stream(self, batch: Sequence[tuple[VocoderState, VocoderInput]]) -> list[Tensor]:
        """Speak the new codes of many sessions.

        returns: per session (samples,) float32 at 24 kHz. 25 new codes give one second, 160 ms late; a call which gives
                 less gets silence in front, up to one second, unless the turn ends; one which gives nothing is empty.
        Raises ModelError, before any state changes, for a code outside the vocabulary.
        """
        cuts = [cut_windows([*state.codes, *new.codes], new.end_of_turn) for state, new in batch]
        self._check_windows(itertools.chain.from_iterable(windows for windows, _ in cuts))
        for (state, _), (_, rest) in zip(batch, cuts, strict=True):
            state.codes = rest
        pieces: list[list[Tensor]] = [[] for _ in batch]
        for nth in range(max((len(windows) for windows, _ in cuts), default=0)):
            places = [place for place, (windows, _) in enumerate(cuts) if nth < len(windows)]
            waves = self.speak([(batch[place][0], cuts[place][0][nth]) for place in places])
            for place, wave in zip(places, waves, strict=True):
                pieces[place].append(wave)
        return [self._joined(waves, new.end_of_turn) for waves, (_, new) in zip(pieces, batch, strict=True)]

    def speak(self, batch: Sequence[tuple[VocoderState, Window]]) -> list[Tensor]:
        """Speak one window of each session, as its caller cut it; `stream` cuts as the duplex model does.

        A last window ends the turn: the session goes back to its voice. Windows of equal length share a forward.
        returns: per session (samples,) float32 at 24 kHz.
        Raises ModelError, before any state changes, for a window that is too short, or a code that doesn't exist.
        """
        self._check_windows(window for _, window in batch)
        for state, window in batch:
            if isinstance(state.flow, ResidentTurn) and not self._fits(window):
                raise ModelError(f"vocoder: a window of {len(window.codes)} codes; resident caches take 25 new ones")
        waves: dict[int, Tensor] = {}
        due = [_Due(place, state, window) for place, (state, window) in enumerate(batch)]
        mels = self._mels_of_resident(due) + self._mels_of_others(due)
        for members in _grouped(mels, lambda member: (member[1].shape, member[0].window.last, member[0].batch_key)):
            items = [item for item, _ in members]
            spoken = self._to_wave(items, torch.stack([mel for _, mel in members]))
            waves |= {item.place: wave for item, wave in zip(items, spoken, strict=True)}
        for state, window in batch:
            if window.last:
                self.reset(state)
        return [waves[place] for place in range(len(batch))]

    def token2mel(self, codes: Sequence[int], voice: Voice) -> Tensor:
        """Mel (mels, 2 n) of n codes, seen as a whole."""
        voice = self._placed(voice)
        self._check_windows([Window(tuple(codes), last=True)])
        prompt = voice.prompt_tokens.long()
        row = torch.cat((prompt, torch.tensor(codes, dtype=torch.long, device=prompt.device)))[None]
        num_frames, num_prompt = self.flow.num_frames(row.shape[1], last=True), voice.prompt_mel.shape[1]
        cond = F.pad(voice.prompt_mel, (0, 0, 0, num_frames - num_prompt))
        mel, _ = self.flow(row, voice.spk_emb, cond, [self._no_voice()], last=True)
        return mel[0, :, num_prompt:]  # type: ignore[no-any-return]

    def token2wav(self, codes: Sequence[int], voice: Voice, *, noise_seed: int) -> Tensor:
        """Speech (960 n,) of n codes, seen as a whole: 24 kHz float32."""
        mel = self.token2mel(codes, voice)[None]
        generator = torch.Generator(device=mel.device).manual_seed(noise_seed)
        (wave,), _ = self._synthesise(mel, [self.hift.empty_cache()], [generator], last=True)
        return wave

    def _mels_of_resident(self, due: Sequence[_Due]) -> list[tuple[_Due, Tensor]]:
        """Items whose turn is resident, or may be so from its beginning on, each with its mel (mels, frames)."""
        if self._resident is None:
            return []
        for item in due:
            state = item.state
            if isinstance(state.flow, FlowCache) and state.flow.num_frames == 0 and self._fits(item.window):
                state.flow = self._resident.begin(state.voice.history) or state.flow
        items = [item for item in due if isinstance(item.state.flow, ResidentTurn)]
        chunks = [ResidentChunk(item.state.flow, *item.window) for item in items]  # type: ignore[arg-type]
        return list(zip(items, self._resident.speak(chunks), strict=True))

    def _fits(self, window: Window) -> bool:
        return self._resident is not None and self._resident.fits(*window)

    def _mels_of_others(self, due: Sequence[_Due]) -> list[tuple[_Due, Tensor]]:
        items = [item for item in due if isinstance(item.state.flow, FlowCache)]
        groups = _grouped(items, lambda item: (len(item.window.codes), item.window.last))
        return [pair for group in groups for pair in zip(group, self._to_mel(group), strict=True)]

    def _to_mel(self, group: Sequence[_Due]) -> Tensor:
        """Mel (sessions, mels, frames) of windows which are alike, of turns that are not resident; moves the flow
        caches on."""
        weight, last = self.flow.encoder_proj.weight, group[0].window.last
        codes = torch.tensor([item.window.codes for item in group], device=weight.device)
        speakers = torch.cat([item.state.voice.voice.spk_emb for item in group])
        no_cond = weight.new_zeros(len(group), self.flow.num_frames(codes.shape[1], last), weight.shape[0])
        caches = [cast(FlowCache, item.state.flow) for item in group]
        mel, histories = self.flow(codes, speakers, no_cond, caches, last)
        if not last:  # else nothing will look back
            for item, cache, history in zip(group, caches, histories, strict=True):
                item.state.flow = extend(cache, history, self.release)
        return mel  # type: ignore[no-any-return]

    def _to_wave(self, group: Sequence[_Due], mel: Tensor) -> Sequence[Tensor]:
        """Samples of each session; moves the HiFT caches on. The caches have the same `batch_key`."""
        states = [item.state for item in group]
        generators = [state.generator for state in states]
        waves, caches = self._synthesise(mel, [state.hift for state in states], generators, group[0].window.last)
        for state, cache in zip(states, caches, strict=True):
            state.hift = cache
        return waves

    def _synthesise(
        self, mel: Tensor, caches: Sequence[SpeechCache], generators: Sequence[torch.Generator], last: bool
    ) -> tuple[Sequence[Tensor], Sequence[SpeechCache]]:
        """`stream` of either HiFT, whose caches are its own."""
        return self.hift.stream(mel, caches, generators, last)  # type: ignore[arg-type]

    def _joined(self, waves: Sequence[Tensor], end_of_turn: bool) -> Tensor:
        """A call's samples. Official: what is shorter than a second is late, so silence goes in front of it."""
        if not waves:
            return self.flow.encoder_proj.weight.new_zeros(0)
        wave = torch.cat(list(waves))
        num_missing = self.config.hift.sampling_rate_hz - wave.shape[0]
        return wave if end_of_turn or num_missing <= 0 else F.pad(wave, (num_missing, 0))

    def _no_voice(self) -> FlowCache:
        empty = self.flow.empty_history(self.config.num_steps)
        return FlowCache(empty, empty, 0)

    def _turn_start(self, voice: VoiceCache) -> tuple[list[int], FlowCache, SpeechCache]:
        empty = self.flow.empty_history(self.config.num_steps)
        turn = replace(empty, encoder_conv=voice.history.encoder_conv, dit_conv=voice.history.dit_conv)
        codes = [self.config.silence_code] * LOOKAHEAD_CODES  # so that the turn's first 25 codes give a second at once
        return codes, FlowCache(voice.history, turn, 0), self.hift.empty_cache()

    def _placed(self, voice: Voice) -> Voice:
        """The voice, checked, on this module's device and in its dtype."""
        config = self.config.flow
        num_codes = voice.prompt_tokens.shape[0]
        mel_shape = (1, num_codes * config.up_stride, config.output_size)
        if num_codes == 0 or voice.prompt_mel.shape != mel_shape or voice.spk_emb.shape != (1, config.spk_embed_dim):
            raise ModelError(
                f"voice: prompt_tokens {tuple(voice.prompt_tokens.shape)}, prompt_mel {tuple(voice.prompt_mel.shape)}, "
                f"spk_emb {tuple(voice.spk_emb.shape)}; expected (N,), (1, {config.up_stride} N, "
                f"{config.output_size}), (1, {config.spk_embed_dim})"
            )
        weight = self.flow.encoder_proj.weight
        mel, speaker = (tensor.to(weight.device, weight.dtype) for tensor in (voice.prompt_mel, voice.spk_emb))
        return Voice(voice.prompt_tokens.to(weight.device), mel, speaker)

    def check(self, codes: Sequence[int]) -> None:
        """Raises ModelError where one of them is no speech code."""
        num_codes = self.config.flow.vocab_size
        if codes and not 0 <= min(codes) <= max(codes) < num_codes:
            raise ModelError(f"vocoder: {tuple(codes)} are not all speech codes, 0 to {num_codes - 1}")

    def _check_windows(self, windows: Iterable[Window]) -> None:
        for window in windows:
            least = 1 if window.last else LOOKAHEAD_CODES + MIN_WINDOW_CODES
            if len(window.codes) < least:
                raise ModelError(f"vocoder: a window of {len(window.codes)} codes; it needs {least}")
            self.check(window.codes)


def _release_of(config: VocoderConfig) -> Release:
    if config.release is not None:
        return Release(config.release)
    return Release.V1_0_7 if config.hift.causal else Release.V1_0_6


class _Due(NamedTuple):
    """One item of a `speak` call, and its place in the batch."""

    place: int
    state: VocoderState
    window: Window

    @property
    def batch_key(self) -> Hashable:
        return self.state.hift.batch_key


def _grouped(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Items with equal keys, in their order."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def mel_spectrogram(samples: Tensor) -> Tensor:
    """Mel of reference speech as the flow knows it: (samples,) at 24 kHz in [-1, 1] as (frames, 80) at 50 Hz.

    Natural logarithm of magnitudes, at least ln 1e-5. The signal must be longer than 720 samples.
    Source: `stepaudio2/flashcosyvoice/utils/audio.py`.
    """
    edge = (MEL_N_FFT - MEL_HOP) // 2
    padded = F.pad(samples[None], (edge, edge), mode="reflect")
    window = torch.hann_window(MEL_N_FFT, device=samples.device)
    bands = torch.stft(padded, MEL_N_FFT, MEL_HOP, window=window, center=False, return_complex=True)
    magnitudes = (torch.view_as_real(bands).square().sum(dim=-1) + 1e-9).sqrt()[0]
    return (_mel_filters().to(samples.device) @ magnitudes).clamp(min=1e-5).log().T


def _mel_filters() -> Tensor:
    """Triangles of unit area on Slaney's mel scale (linear up to 1 kHz, then logarithmic): (80, MEL_N_FFT // 2 + 1)."""
    top_mel = 15.0 + 27.0 * math.log(MEL_TOP_HZ / 1000.0) / math.log(6.4)
    mels = torch.linspace(0.0, top_mel, NUM_MELS + 2, dtype=torch.float64)
    edges_hz = torch.where(mels < 15.0, mels * 200.0 / 3.0, 1000.0 * 6.4 ** ((mels - 15.0) / 27.0))
    bins_hz = torch.linspace(0.0, MEL_RATE_HZ / 2, MEL_N_FFT // 2 + 1, dtype=torch.float64)
    low, mid, high = edges_hz[:-2, None], edges_hz[1:-1, None], edges_hz[2:, None]
    triangles = torch.minimum((bins_hz - low) / (mid - low), (high - bins_hz) / (high - mid)).clamp(min=0.0)
    return (triangles * 2.0 / (high - low)).float()
