"""The causal HiFT of minicpmo-utils 1.0.7 ("cv3"): no cross-fade, one phase through the turn, bounded history.

A chunk's speech equals that of the whole turn: each chunk is synthesised with as many old frames in front as its layers
look back, and speech is held back by as many frames as they look ahead.

Two deliberate deviations: the noise comes from the session's generator, where the official code draws a table once per
process (259 MB, the same for all sessions); and a chunk is one block, where it works in blocks of 16 frames.

Source: minicpmo-utils 1.0.7, `stepaudio2/causal_vocoder` (BoundedVocoder, CausalHiFTGenerator).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from model_shards.config import HiftConfig
from model_shards.hift import HiftDecoder, Layers
from model_shards.shapes import ByShape

F0_LOOKAHEAD = 3  # frames which the F0 predictor looks ahead
F0_HISTORY = 8  # … and back: four convolutions with a kernel of 3
ISTFT_LOOKAHEAD = 1  # frame whose samples still miss their right neighbours
GRID_FRAMES = 2  # added to the computed history, for the rounding at each change of rate


@dataclass(frozen=True, slots=True)
class CausalHiftCache:
    """What the rest of a turn still needs. Frames are counted from the turn's start.

    mel:    (mels, frames), from frame `mel_start` to the newest.
    source: (samples,), from frame `source_start` on.
    phase:  (harmonics,) float64, in turns, at the end of `source`.
    """

    mel: Tensor
    source: Tensor
    phase: Tensor
    mel_start: int
    source_start: int
    num_spoken: int  # frames whose speech was given out

    @property
    def batch_key(self) -> Hashable:
        """Sessions may share a `stream` call when their keys are equal."""
        start = self.mel_start
        return self.mel.shape[1], self.source.shape[0], self.source_start - start, self.num_spoken - start


class _Place(NamedTuple):
    """Where a chunk lies, in frames from the start of the cached mel."""

    source_start: int
    old_end: int  # of the cached source
    source_end: int  # of the source as far as the chunk lets it be known
    spoken: int
    last: bool


class CausalConv1d(nn.Conv1d):
    """Sees its own and earlier positions only."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, dilation: int = 1) -> None:
        super().__init__(channels_in, channels_out, kernel, dilation=dilation)
        self.num_back = (kernel - 1) * dilation

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (self.num_back, 0)))


class CausalUp(nn.Conv1d):
    """Repeats each position `rate` times, then smooths causally."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, rate: int) -> None:
        super().__init__(channels_in, channels_out, kernel)
        self.num_back = kernel - 1
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x.repeat_interleave(self.rate, dim=2), (self.num_back, 0)))


class CausalDown(nn.Conv1d):
    """One position out of `rate`, which sees 2 * rate positions up to its own."""

    def __init__(self, channels_in: int, channels_out: int, rate: int) -> None:
        super().__init__(channels_in, channels_out, 2 * rate, stride=rate)
        self.num_back = rate - 1

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (self.num_back, 0)))


def _down(channels_in: int, channels_out: int, rate: int) -> nn.Conv1d:
    return CausalConv1d(channels_in, channels_out, 1) if rate == 1 else CausalDown(channels_in, channels_out, rate)


CAUSAL = Layers(CausalConv1d, CausalUp, _down)


class CausalF0Predictor(nn.Module):
    """Fundamental frequency in Hz. Computed in double: an error in F0 adds up in the phase for the whole turn."""

    def __init__(self, config: HiftConfig) -> None:
        super().__init__()
        sizes = [config.in_channels] + [config.f0_cond_channels] * 5
        kernels = [F0_LOOKAHEAD + 1, 3, 3, 3, 3]
        layers: list[nn.Module] = []
        for (channels_in, channels_out), kernel in zip(itertools.pairwise(sizes), kernels, strict=True):
            layers += [weight_norm(nn.Conv1d(channels_in, channels_out, kernel)), nn.ELU()]
        self.condnet = nn.Sequential(*layers)
        self.classifier = nn.Linear(config.f0_cond_channels, 1)
        self._folded: list[tuple[Tensor, Tensor]] | None = None

    def forward(self, mel: Tensor, last: bool) -> Tensor:
        """(batch, mels, frames) as (batch, frames − F0_LOOKAHEAD), or all frames if `last`; same dtype as mel."""
        x = F.pad(mel.double(), (0, F0_LOOKAHEAD if last else 0))
        *convs, (weight, bias) = self._folded or self._in_double()
        for index, conv in enumerate(convs):
            x = F.elu(F.conv1d(F.pad(x, (2 if index else 0, 0)), *conv))
        return F.linear(x.transpose(1, 2), weight, bias).squeeze(-1).abs().to(mel.dtype)

    def fold(self) -> None:
        self._folded = self._in_double()

    def _in_double(self) -> list[tuple[Tensor, Tensor]]:
        """Weight and bias of each convolution, and of the classifier. The weight norm, too, is taken in double."""
        convs = [_doubled(self.condnet[index]) for index in range(0, len(self.condnet), 2)]
        return [*convs, (self.classifier.weight.double(), self.classifier.bias.double())]


def _doubled(conv: nn.Module) -> tuple[Tensor, Tensor]:
    names = ("parametrizations.weight.original0", "parametrizations.weight.original1", "bias")
    scale, direction, bias = (conv.get_parameter(name).double() for name in names)
    return direction * (scale / direction.norm(dim=(1, 2), keepdim=True)), bias


class CausalHiftGenerator(HiftDecoder):
    """The streaming generator of minicpmo-utils 1.0.7."""

    def __init__(self, config: HiftConfig) -> None:
        super().__init__(config, CAUSAL)
        self.lookahead = config.conv_pre_look_right
        self.conv_pre = weight_norm(nn.Conv1d(config.in_channels, config.base_channels, self.lookahead + 1))
        self.f0_predictor = CausalF0Predictor(config)
        self.num_history = _num_history_frames(config)
        self._continue: Callable[..., tuple[Tensor, ...]] = self._continued

    @property
    def delay_frames(self) -> int:
        """Frames by which speech comes later than its mel (8)."""
        return F0_LOOKAHEAD + self.lookahead + ISTFT_LOOKAHEAD

    def decode(self, mel: Tensor, source: Tensor, last: bool) -> Tensor:
        """(batch, mels, frames) and its source (batch, samples) as a wave.

        The wave is as long as the source if `last`, else lookahead + ISTFT_LOOKAHEAD frames shorter.
        """
        spectrum = self.spectrum(source)
        if last:
            return self.limit(self.synthesise(self.conv_pre(F.pad(mel, (0, self.lookahead))), spectrum))
        num_ahead = self.lookahead * (self.hop // self.config.istft_hop_len)
        wave = self.synthesise(self.conv_pre(mel), spectrum[..., : spectrum.shape[2] - num_ahead])
        return self.limit(wave[:, : wave.shape[1] - ISTFT_LOOKAHEAD * self.hop])

    def source(self, f0: Tensor, phase: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Continue the excitation.

        f0 (batch, frames) in Hz; phase (batch, harmonics) float64, in turns; noise (batch, samples, harmonics).
        returns: (batch, samples), and the phase at its end.
        """
        harmonics = torch.arange(1, self.config.nb_harmonics + 2, device=f0.device, dtype=f0.dtype)
        increments = (f0[..., None] * harmonics / self.config.sampling_rate_hz).remainder(1)
        turns = (increments.double().cumsum(dim=1) * self.hop + phase[:, None]).remainder(1)
        sines = self.m_source.weigh((turns * (2 * math.pi)).sin().to(f0.dtype)).repeat_interleave(self.hop, dim=1)
        return self.m_source.mix(f0, sines, self.m_source.weigh(noise)), turns[:, -1]

    def draw_noise(self, generator: torch.Generator, num_frames: int) -> Tensor:
        """Noise of one session, (samples, harmonics), uniform in [0, 1) as the official table."""
        shape = (num_frames * self.hop, self.config.nb_harmonics + 1)
        return torch.rand(shape, generator=generator, device=generator.device)

    def empty_cache(self) -> CausalHiftCache:
        weight = self.conv_post.bias
        phase = weight.new_zeros(self.config.nb_harmonics + 1, dtype=torch.float64)
        return CausalHiftCache(weight.new_zeros(self.config.in_channels, 0), weight.new_zeros(0), phase, 0, 0, 0)

    def stream(
        self, mel: Tensor, caches: Sequence[CausalHiftCache], generators: Sequence[torch.Generator], last: bool
    ) -> tuple[list[Tensor], list[CausalHiftCache]]:
        """Continue the speech of a batch of sessions by one chunk.

        mel:     (batch, mels, frames), frames > delay_frames unless `last`. All caches have the same `batch_key`.
        returns: per session its samples, and its next cache. Speech comes `delay_frames` late; the turn's first chunk
                 gets as much silence in front, unless it is also the last.
        """
        origin = caches[0].mel_start  # frames are counted from here; the batch key makes it the same for all
        first = caches[0]
        source_start, spoken = first.source_start - origin, first.num_spoken - origin
        old_end = source_start + first.source.shape[0] // self.hop
        source_end = first.mel.shape[1] + mel.shape[2] - (0 if last else F0_LOOKAHEAD)
        place = _Place(source_start, old_end, source_end, spoken, last)
        noise = torch.stack([self.draw_noise(generator, source_end - old_end) for generator in generators])
        ends = [torch.stack(parts) for parts in zip(*((c.mel, c.source, c.phase) for c in caches), strict=True)]
        wave, *new_ends = (part.clone() for part in self._continue(place, mel, noise, *ends))
        if spoken == 0 and origin == 0 and not last:
            wave = F.pad(wave, (self.delay_frames * self.hop, 0))
        next_caches = [
            CausalHiftCache(
                kept_mel,
                kept_source,
                phase,
                cache.mel_start + self._keep_mel(place),
                cache.mel_start + self._keep_source(place),
                cache.mel_start + self._spoken_after(place),
            )
            for cache, kept_mel, kept_source, phase in zip(caches, *new_ends, strict=True)
        ]
        return list(wave), next_caches

    def use_programs(self, num_frames: int, ladder: Sequence[int]) -> None:
        """Chunks of so many frames are computed by programs of fixed shapes from now on."""
        self._continue = ByShape(self._continued, lambda _, mel, *__: mel.shape[2] == num_frames, ladder)

    def _continued(
        self, place: _Place, mel: Tensor, noise: Tensor, old_mel: Tensor, old_source: Tensor, phase: Tensor
    ) -> tuple[Tensor, ...]:
        """A chunk's wave, and the parts of the next caches."""
        mel = torch.cat((old_mel, mel), dim=2)
        start = max(0, place.old_end - F0_HISTORY)
        f0 = self.f0_predictor(mel[:, :, start:], place.last)[:, place.old_end - start :]
        new, phase = self.source(f0, phase, noise)
        source = torch.cat((old_source, new), dim=1)
        start = max(0, place.spoken - self.num_history)
        seen = source[:, (start - place.source_start) * self.hop :]
        wave = self.decode(mel[:, :, start : place.source_end], seen, place.last)[
            :, (place.spoken - start) * self.hop :
        ]
        kept_source = source[:, (self._keep_source(place) - place.source_start) * self.hop :]
        return wave, mel[:, :, self._keep_mel(place) :], kept_source, phase

    def _spoken_after(self, place: _Place) -> int:
        return place.source_end - (0 if place.last else self.lookahead + ISTFT_LOOKAHEAD)

    def _keep_source(self, place: _Place) -> int:
        return max(0, self._spoken_after(place) - self.num_history)

    def _keep_mel(self, place: _Place) -> int:
        return max(0, min(self._spoken_after(place) - self.num_history, place.source_end - F0_HISTORY))


def _num_history_frames(config: HiftConfig) -> int:
    """Mel frames which one sample of speech depends on, looking back (31 at the released sizes)."""
    samples, hop = 0, math.prod(config.upsample_rates) * config.istft_hop_len
    blocks = zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True)
    block_back = max(_num_back(kernel, dilations) for kernel, dilations in blocks)
    for stage, kernel in enumerate(config.upsample_kernel_sizes):
        step = hop // math.prod(config.upsample_rates[: stage + 1])  # samples per position of this stage
        down_rate = step // config.istft_hop_len
        source_back = _num_back(
            config.source_resblock_kernel_sizes[stage], config.source_resblock_dilation_sizes[stage]
        )
        down_back = (2 * down_rate - 1 if down_rate > 1 else 0) * config.istft_hop_len
        from_source = config.istft_n_fft + down_back + source_back * step
        samples = max(samples + (kernel - 1) * step, from_source) + block_back * step
    samples += 7 * config.istft_hop_len + config.istft_n_fft  # conv_post and the reflected position; inverse STFT
    return math.ceil(samples / hop) + GRID_FRAMES


def _num_back(kernel: int, dilations: Sequence[int]) -> int:
    """Positions a residual block looks back: a dilated and a plain convolution per dilation."""
    return sum((kernel - 1) * (dilation + 1) for dilation in dilations)
