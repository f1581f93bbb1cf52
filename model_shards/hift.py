"""HiFT: mel frames (50 Hz) become samples (24 kHz), by a neural source filter and an inverse STFT.

Rules:
- All randomness of a session comes from its own generator, so that no session's speech depends on its neighbours.
- Consecutive chunks of a turn overlap by OVERLAP_FRAMES: the overlap is synthesised again from the cached source and
  cross-faded with what was held back.

Source: minicpmo-utils 1.0.6, `stepaudio2` (Token2wav.stream, HiFTGenerator, SourceModuleHnNSF2);
reference/minicpmo-4.5.md §6.4.
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
from model_shards.programs import frozen
from model_shards.shapes import ByShape

OVERLAP_FRAMES = 8  # 160 ms, the official hold-back
MAX_MAGNITUDE = 1e2
POST_SLOPE = 0.01  # the last leaky_relu has torch's default slope


@dataclass(frozen=True, slots=True)
class HiftCache:
    """End of what was synthesised in this turn; all empty before its first chunk.

    mel: (mels, frames); source, speech: (samples,), the last OVERLAP_FRAMES of each.
    """

    mel: Tensor
    source: Tensor
    speech: Tensor

    @property
    def batch_key(self) -> Hashable:
        """Sessions may share a `stream` call when their keys are equal."""
        return self.mel.shape[1]


class Snake(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        alpha = self.alpha.view(-1, *[1] * (x.dim() - 2))
        return x + (x * alpha).sin().square() / (alpha + 1e-9)


class Layers(NamedTuple):
    """The convolutions in which the standard and the causal generator differ."""

    conv: Callable[[int, int, int, int], nn.Module]  # channels in, out, kernel, dilation: keeps the length
    up: Callable[[int, int, int, int], nn.Module]  # channels in, out, kernel, rate: multiplies the length
    down: Callable[[int, int, int], nn.Module]  # channels in, out, rate: divides the length


def _conv(channels_in: int, channels_out: int, kernel: int, dilation: int = 1) -> nn.Conv1d:
    return nn.Conv1d(channels_in, channels_out, kernel, dilation=dilation, padding=dilation * (kernel - 1) // 2)


def _up(channels_in: int, channels_out: int, kernel: int, rate: int) -> nn.ConvTranspose1d:
    return nn.ConvTranspose1d(channels_in, channels_out, kernel, rate, padding=(kernel - rate) // 2)


def _down(channels_in: int, channels_out: int, rate: int) -> nn.Conv1d:
    if rate == 1:
        return nn.Conv1d(channels_in, channels_out, 1)
    return nn.Conv1d(channels_in, channels_out, 2 * rate, rate, padding=rate // 2)


STANDARD = Layers(_conv, _up, _down)


class ResBlock(nn.Module):
    def __init__(self, channels: int, kernel: int, dilations: Sequence[int], layers: Layers) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(weight_norm(layers.conv(channels, channels, kernel, d)) for d in dilations)
        self.convs2 = nn.ModuleList(weight_norm(layers.conv(channels, channels, kernel, 1)) for _ in dilations)
        self.activations1 = nn.ModuleList(Snake(channels) for _ in dilations)
        self.activations2 = nn.ModuleList(Snake(channels) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        parts = (self.activations1, self.convs1, self.activations2, self.convs2)
        for activation1, conv1, activation2, conv2 in zip(*parts, strict=True):
            x = x + conv2(activation2(conv1(activation1(x))))
        return x


class F0Predictor(nn.Module):
    """Fundamental frequency in Hz, of each mel frame. The keys are positions in the official Sequential."""

    def __init__(self, config: HiftConfig) -> None:
        super().__init__()
        sizes = [config.in_channels] + [config.f0_cond_channels] * 5
        layers: list[nn.Module] = []
        for channels_in, channels_out in itertools.pairwise(sizes):
            layers += [weight_norm(_conv(channels_in, channels_out, 3)), nn.ELU()]
        self.condnet = nn.Sequential(*layers)
        self.classifier = nn.Linear(config.f0_cond_channels, 1)

    def forward(self, mel: Tensor) -> Tensor:
        """(batch, mels, frames) as (batch, frames)."""
        return self.classifier(self.condnet(mel).transpose(1, 2)).squeeze(-1).abs()  # type: ignore[no-any-return]


class Source(nn.Module):
    """Excitation: harmonics of F0 where there is a voice, noise elsewhere."""

    def __init__(self, config: HiftConfig) -> None:
        super().__init__()
        self.config = config
        self.l_linear = nn.Linear(config.nb_harmonics + 1, 1)

    def weigh(self, harmonics: Tensor) -> Tensor:
        """(…, harmonics), each by its weight: (…)."""
        return harmonics @ self.l_linear.weight[0]

    def mix(self, f0: Tensor, sines: Tensor, noise: Tensor) -> Tensor:
        """f0 (batch, frames), sines and noise (batch, samples) of which all harmonics are weighed: (batch, samples) in
        (-1, 1)."""
        c = self.config
        voiced = (f0 > c.nsf_voiced_threshold).to(f0.dtype)[..., None]
        level = voiced * c.nsf_sigma + (1 - voiced) * c.nsf_alpha / 3
        sines, noise = (x.view(*f0.shape, -1) for x in (sines, noise))  # the samples of each frame
        return torch.tanh(sines * (c.nsf_alpha * voiced) + level * noise + self.l_linear.bias).flatten(1)


class HiftDecoder(nn.Module):
    """What the standard and the causal generator have in common: from the first hidden layer to the wave."""

    window: Tensor

    def __init__(self, config: HiftConfig, layers: Layers) -> None:
        super().__init__()
        self.config = config
        self.hop = math.prod(config.upsample_rates) * config.istft_hop_len  # samples per mel frame
        self.overlap = OVERLAP_FRAMES * self.hop
        widths = [config.base_channels >> i for i in range(len(config.upsample_rates) + 1)]
        num_bands = config.istft_n_fft + 2  # real and imaginary parts, or magnitudes and phases
        steps = zip(widths[:-1], widths[1:], config.upsample_kernel_sizes, config.upsample_rates, strict=True)
        self.m_source = Source(config)
        self.ups = nn.ModuleList(weight_norm(layers.up(*step)) for step in steps)
        down_rates = [math.prod(config.upsample_rates[i + 1 :]) for i in range(len(config.upsample_rates))]
        self.source_downs = nn.ModuleList(
            layers.down(num_bands, width, rate) for width, rate in zip(widths[1:], down_rates, strict=True)
        )
        source_blocks = (widths[1:], config.source_resblock_kernel_sizes, config.source_resblock_dilation_sizes)
        self.source_resblocks = nn.ModuleList(ResBlock(*block, layers) for block in zip(*source_blocks, strict=True))
        blocks = list(zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True))
        self.resblocks = nn.ModuleList(ResBlock(width, *block, layers) for width in widths[1:] for block in blocks)
        self.conv_post = weight_norm(layers.conv(widths[-1], num_bands, 7, 1))
        # On the CPU even where the weights are built on `meta`, as no checkpoint fills it.
        window = torch.hann_window(config.istft_n_fft, dtype=torch.float64, device="cpu").float()
        self.register_buffer("window", window, persistent=False)
        self._net: Callable[[Tensor, Tensor], Tensor] = self.bands

    def spectrum(self, source: Tensor) -> Tensor:
        """(batch, samples) as (batch, n_fft + 2, samples / hop_len + 1): real parts, then imaginary parts."""
        c = self.config
        bands = torch.stft(source, c.istft_n_fft, c.istft_hop_len, window=self.window, return_complex=True)
        return torch.cat((bands.real, bands.imag), dim=1)

    def synthesise(self, hidden: Tensor, spectrum: Tensor) -> Tensor:
        """hidden (batch, base_channels, frames), spectrum of the source: (batch, samples), not yet limited."""
        return self._inverse(self._net(hidden, spectrum))

    def bands(self, hidden: Tensor, spectrum: Tensor) -> Tensor:
        """What `synthesise` takes, as logarithms of magnitudes and phases, (batch, n_fft + 2, time)."""
        num_kernels = len(self.config.resblock_kernel_sizes)
        for index, (up, down, source_block) in enumerate(
            zip(self.ups, self.source_downs, self.source_resblocks, strict=True)
        ):
            hidden = up(F.leaky_relu(hidden, self.config.lrelu_slope))
            if index == len(self.ups) - 1:
                hidden = torch.cat((hidden[..., 1:2], hidden), dim=-1)  # reflected: the STFT has one frame more
            hidden = hidden + source_block(down(spectrum))
            blocks = self.resblocks[index * num_kernels : (index + 1) * num_kernels]
            hidden = sum(block(hidden) for block in blocks) / num_kernels
        bands: Tensor = self.conv_post(F.leaky_relu(hidden, POST_SLOPE))
        return bands

    def freeze_net(self, net: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        """Compute `bands` as one program from now on. net: what computes it, `bands` itself or its equal."""
        self.requires_grad_(False)
        c, weight = self.config, self.m_source.l_linear.weight
        hidden = weight.new_zeros(2, c.base_channels, 2)
        spectrum = weight.new_zeros(2, c.istft_n_fft + 2, 2 * math.prod(c.upsample_rates) + 1)
        self._net = frozen(net or self.bands, (hidden, spectrum))

    def limit(self, wave: Tensor) -> Tensor:
        return wave.clamp(-self.config.audio_limit, self.config.audio_limit)

    def _inverse(self, bands: Tensor) -> Tensor:
        """The inverse STFT. torch.istft looks at the window's sum on the host, which no CUDA graph allows."""
        n_fft, hop = self.config.istft_n_fft, self.config.istft_hop_len
        log_magnitude, angle = bands.chunk(2, dim=1)
        polar = torch.polar(log_magnitude.exp().clamp(max=MAX_MAGNITUDE), angle.sin())
        frames = (torch.fft.irfft(polar, n=n_fft, dim=1) * self.window[:, None]).transpose(1, 2)
        num_frames, pieces = frames.shape[1], torch.split(frames, hop, dim=2)
        wave = frames.new_zeros(len(frames), num_frames + len(pieces) - 1, hop)  # cut into hops
        weight = frames.new_zeros(wave.shape[1:])
        for at, (piece, window) in enumerate(zip(pieces, torch.split(self.window.square(), hop), strict=True)):
            wave[:, at : at + num_frames, : piece.shape[2]] += piece
            weight[at : at + num_frames, : len(window)] += window
        inner = slice(n_fft // 2, n_fft // 2 + hop * (num_frames - 1))
        samples: Tensor = wave.flatten(1)[:, inner] / weight.flatten()[inner]
        return samples


class HiftGenerator(HiftDecoder):
    """The generator of minicpmo-utils 1.0.5 and 1.0.6."""

    fade: Tensor

    def __init__(self, config: HiftConfig) -> None:
        super().__init__(config, STANDARD)
        self.conv_pre = weight_norm(_conv(config.in_channels, config.base_channels, 7))
        self.f0_predictor = F0Predictor(config)
        # In double, as the official cross-fade. The two Hamming halves sum to 1.08.
        fade = torch.hamming_window(2 * self.overlap, periodic=False, dtype=torch.float64, device="cpu")
        self.register_buffer("fade", fade, persistent=False)
        self._continue: Callable[..., tuple[Tensor, ...]] = self._continued

    def forward(self, mel: Tensor, noise: Tensor, known_source: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Synthesise a batch.

        mel:          (batch, mels, frames).
        noise:        (batch, samples), see `draw_noise`; samples = frames * hop.
        known_source: (batch, n): takes the place of the first n samples of the source.
        returns:      wave (batch, samples) in [-audio_limit, audio_limit], and its source (batch, samples).
        """
        source = self.source(self.f0_predictor(mel), noise)
        if known_source is not None:
            source = torch.cat((known_source, source[:, known_source.shape[1] :]), dim=1)
        return self.decode(mel, source), source

    def decode(self, mel: Tensor, source: Tensor) -> Tensor:
        """(batch, mels, frames) and its source (batch, samples) as a wave (batch, samples)."""
        return self.limit(self.synthesise(self.conv_pre(mel), self.spectrum(source)))

    def source(self, f0: Tensor, noise: Tensor) -> Tensor:
        """Excitation (batch, samples) for F0 (batch, frames) in Hz. The phase starts at zero."""
        return self.m_source.mix(f0, self._sines(f0), noise)

    def _sines(self, f0: Tensor) -> Tensor:
        """The weighed sum of all harmonics: (batch, samples).

        The phase is that of the fundamental at the middle of each frame, in between on a straight line. The sum takes
        one sine and one cosine per sample (Clenshaw's recurrence). Harmonics above the sampling rate are not folded as
        the official ones: no voice has any.
        """
        per_frame = f0.double() * (self.hop / self.config.sampling_rate_hz)  # turns
        middle = F.pad(per_frame.cumsum(dim=1).remainder(1), (1, 0))
        middle[:, 0] = middle[:, 1]
        step = F.pad(per_frame[:, 1:], (1, 1))  # none before the first middle, nor behind the last one
        ramp = torch.arange(self.hop, device=f0.device, dtype=f0.dtype) + (0.5 if self.hop % 2 == 0 else 0.0)
        turns = middle.to(f0.dtype)[..., None] + step.to(f0.dtype)[..., None] * (ramp / self.hop)
        start = self.hop - self.hop // 2
        phase = turns.flatten(1)[:, start : start + f0.shape[1] * self.hop] * (2 * math.pi)
        twice_cos = 2 * phase.cos()
        later = total = torch.zeros_like(phase)
        for weight in reversed(self.m_source.l_linear.weight[0].unbind()):
            later, total = total, torch.addcmul(weight - later, twice_cos, total)
        return total * phase.sin()

    def draw_noise(self, generator: torch.Generator, num_frames: int) -> Tensor:
        """Noise of one session, (samples,).

        The official code draws one normal per harmonic and weighs them. A weighed sum of normals is one normal, as
        large as the weights are together: here only that one is drawn.
        """
        size: Tensor = torch.linalg.vector_norm(self.m_source.l_linear.weight)
        return torch.randn(num_frames * self.hop, generator=generator, device=generator.device) * size

    def empty_cache(self) -> HiftCache:
        weight = self.conv_post.bias
        none = weight.new_zeros(0)
        return HiftCache(mel=weight.new_zeros(self.config.in_channels, 0), source=none, speech=none)

    def stream(
        self, mel: Tensor, caches: Sequence[HiftCache], generators: Sequence[torch.Generator], last: bool
    ) -> tuple[list[Tensor], list[HiftCache]]:
        """Continue the speech of a batch of sessions by one chunk.

        mel:     (batch, mels, frames), frames >= OVERLAP_FRAMES unless `last`. All caches have the same `batch_key`.
        returns: per session its samples, and its next cache. The end is held back for the next chunk's cross-fade,
                 unless `last`; the turn's first chunk gets as much silence in front, unless it is also the last.
        """
        is_first = caches[0].mel.shape[1] == 0
        num_frames = caches[0].mel.shape[1] + mel.shape[2]
        noise = torch.stack([self.draw_noise(generator, num_frames) for generator in generators])
        ends = [torch.stack(parts) for parts in zip(*((c.mel, c.source, c.speech) for c in caches), strict=True)]
        wave, *new_ends = (part.clone() for part in self._continue(None, mel, noise, *ends))
        next_caches = [HiftCache(*parts) for parts in zip(*new_ends, strict=True)]
        if not last:
            wave = F.pad(wave, (self.overlap if is_first else 0, -self.overlap))
        return list(wave), next_caches

    def use_programs(self, num_frames: int, ladder: Sequence[int]) -> None:
        """Chunks of so many frames are computed by programs of fixed shapes from now on."""
        self._continue = ByShape(self._continued, lambda _, mel, *__: mel.shape[2] == num_frames, ladder)

    def _continued(
        self, _: None, mel: Tensor, noise: Tensor, old_mel: Tensor, known_source: Tensor, held_back: Tensor
    ) -> tuple[Tensor, ...]:
        """A chunk's wave with the overlap in front and its end, and the parts of the next caches."""
        mel = torch.cat((old_mel, mel), dim=2)
        wave, source = self(mel, noise, known_source)
        wave = self._cross_fade(wave, held_back)
        return wave, mel[..., -OVERLAP_FRAMES:], source[:, -self.overlap :], wave[:, -self.overlap :]

    def _cross_fade(self, wave: Tensor, held_back: Tensor) -> Tensor:
        num_held = held_back.shape[1]
        if num_held == 0:
            return wave
        rising, falling = self.fade[: self.overlap], self.fade[self.overlap :]
        faded = wave[:, : self.overlap] * rising + held_back * falling
        return torch.cat((faded.to(wave.dtype), wave[:, self.overlap :]), dim=1)
