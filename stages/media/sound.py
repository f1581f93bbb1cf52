"""Decoded sound in, items out: one gapless 16 kHz mono track, whatever its stamps do.

Rule: the running sample count is the time. A stamp beside it is jitter until it is further off than this stream's
stamps ever stray, or stays on one side: then it is a real hole, which becomes zeros, or a real overlap, which is cut.
"""

from __future__ import annotations

from collections import deque
from typing import Final

import numpy as np
import numpy.typing as npt
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler

from graph.chunk import NS_PER_MS, NS_PER_S
from stages.media.tracks import Axis, Put
from stages.media.tracks import to_ns as stamp_ns
from stages.media.wire import FOREVER_NS, MIN_HOLE_SAMPLES, MediaRequest, Sound
from stages.rates import SOUND_RATE_HZ

MAX_PLACED: Final = 8  # of so many channels libswresample knows where they belong, though nothing says it
MIN_RATE_HZ, MAX_RATE_HZ = 1000, 768_000  # at 1 Hz one packet would become gigabytes
# Coefficients whose sum is 1, as players mix: what is not clipped in any channel is not in their mix either. Without
# it libswresample adds stereo up to +3 dB where it makes floats, and 5.1 to more.
MIX_OPTIONS: Final = {"rematrix_maxval": "1"}

GAP_NS: Final = 50 * NS_PER_MS  # how far count and stamps of a steady stream may be apart
DRIFT_NS: Final = 40 * NS_PER_MS  # on one side for DRIFT_OVER_NS: corrected, before it comes to GAP_NS
DRIFT_OVER_NS: Final = 2 * NS_PER_S  # a clock which is 0.1 % off drifts by 2 ms meanwhile
MEMORY_NS: Final = 5 * NS_PER_S  # stamps of so long say how far this stream's stray
NUM_STEADY: Final = 8  # frames, before which nothing is known of how steady a stream is
NUM_DRIFTED: Final = 16
UNKNOWN_NS: Final = 250 * NS_PER_MS  # the span of stamps which stray by 100 ms either way, and GAP_NS


class OddSound(ValueError):
    """Sound that can't be resampled; its text is for the source's owner."""


class StampJudge:
    """Whether sound whose stamp differs from its sample count is where it belongs."""

    def __init__(self) -> None:
        self._recent: deque[tuple[int, int]] = deque()  # by how much stamps were after the count; the frame's duration
        self._recent_ns = 0
        self._lost_ns = 0

    def lose(self, duration_ns: int) -> None:
        """A packet of this duration was damaged, so that the hole before what follows is real."""
        self._lost_ns += duration_ns

    def correction_ns(self, off_ns: int, duration_ns: int) -> int:
        """How far the count has to move before this frame: above 0 past a hole, below 0 back over an overlap; 0: stay.

        off_ns: by how much the frame's stamp is after its count.
        """
        lost_ns, self._lost_ns = self._lost_ns, 0
        if off_ns > 0 and lost_ns:
            by_ns = min(off_ns, lost_ns)
        elif self._strays(off_ns):
            by_ns = off_ns
        else:
            by_ns = 0
        if by_ns == off_ns != 0:  # the stamps before say how far they stray, as before
            self._remember(0, duration_ns)
            return by_ns
        self._remember(off_ns - by_ns, duration_ns)
        return by_ns + self._drift_ns()

    def _strays(self, off_ns: int) -> bool:
        """Is it further off than jitter?"""
        if len(self._recent) < NUM_STEADY:
            return abs(off_ns) > UNKNOWN_NS
        low, high = min(off for off, _ in self._recent), max(off for off, _ in self._recent)
        slack_ns = max(GAP_NS, high - low)
        return not low - slack_ns <= off_ns <= high + slack_ns

    def _remember(self, off_ns: int, duration_ns: int) -> None:
        self._recent.append((off_ns, duration_ns))
        self._recent_ns += duration_ns
        while self._recent_ns > MEMORY_NS and len(self._recent) > NUM_DRIFTED:
            self._recent_ns -= self._recent.popleft()[1]

    def _drift_ns(self) -> int:
        """How far all of the last stamps are off in common."""
        latest: list[int] = []
        over_ns = 0
        for off_ns, duration_ns in reversed(self._recent):
            if abs(off_ns) <= DRIFT_NS or (latest and (off_ns > 0) != (latest[0] > 0)):
                return 0
            latest.append(off_ns)
            over_ns += duration_ns
            if over_ns >= DRIFT_OVER_NS and len(latest) >= NUM_DRIFTED:
                by_ns = (min(latest) + max(latest)) // 2
                self._recent = deque((off - by_ns, duration) for off, duration in self._recent)
                return by_ns
        return 0


class SoundTrack:
    """One audio stream as 16 kHz mono, one piece per item.

    Small holes are filled with zeros. Of one that is longer than MIN_HOLE_SAMPLES whole pieces are left out: nothing is
    not silence.

    start_ns: event time at which the source was opened; nothing is earlier.
    """

    def __init__(self, request: MediaRequest, axis: Axis, put: Put, start_ns: int = 0) -> None:
        self.axis = axis
        self.num_bad = 0
        self.num_decoded = 0
        self.ended = False
        self._put = put
        self._piece_ns = request.piece_ns
        self._limit = FOREVER_NS if request.duration_ns is None else _samples(request.duration_ns)
        self._parts: list[npt.NDArray[np.float32]] = []
        self._num_sent = _samples(start_ns)  # since event time 0, whoever sent them
        self._num_samples = self._num_sent  # sent, and waiting in _parts
        self._num_to_cut = 0  # of what comes next, for it has been before
        self._num_holes = 0
        self._judge = StampJudge()
        self._resampler: AudioResampler | None = None
        self._source_format: tuple[int, str, str] | None = None
        self._anchor_ns = start_ns  # start of the present stretch without holes, and the source's samples since
        self._num_source_samples = 0
        self._corrected_ns = -FOREVER_NS  # when the count was last moved

    @property
    def position_ns(self) -> int:
        """Nothing earlier will be sent."""
        return FOREVER_NS if self.ended else self._num_sent * NS_PER_S // SOUND_RATE_HZ

    @property
    def done(self) -> bool:
        return self.ended or self._num_sent >= self._limit

    @property
    def num_gaps(self) -> int:
        return self.axis.num_jumps + self._num_holes

    def lose(self, duration_ns: int) -> None:
        """A packet of this duration could not be decoded."""
        self._judge.lose(duration_ns)

    def add(self, frame: AudioFrame, arrival_ns: int) -> None:
        """OddSound when its rate is none of sound, ValueError when it can't be resampled."""
        if not MIN_RATE_HZ <= frame.sample_rate <= MAX_RATE_HZ:
            raise OddSound(f"it has {frame.sample_rate} Hz; {MIN_RATE_HZ} to {MAX_RATE_HZ} Hz are read")
        source_format = (frame.sample_rate, frame.layout.name, frame.format.name)
        rate_hz = self._source_format[0] if self._source_format is not None else frame.sample_rate
        expected_ns = self._anchor_ns + self._num_source_samples * NS_PER_S // rate_hz
        time_ns = self.axis.place(stamp_ns(frame.pts, frame.time_base), expected_ns, arrival_ns)
        if self._source_format is None:
            by_ns = max(time_ns - expected_ns, 0)
        else:
            by_ns = self._judge.correction_ns(time_ns - expected_ns, frame.samples * NS_PER_S // frame.sample_rate)
            self._count_correction(by_ns, expected_ns)
        if by_ns > 0 or self._source_format != source_format:
            self._start_stretch(expected_ns + max(by_ns, 0), frame.layout.nb_channels)
            self._source_format = source_format
        if by_ns < 0:
            self._num_to_cut += -by_ns * SOUND_RATE_HZ // NS_PER_S
            self._anchor_ns += by_ns
        self._num_source_samples += frame.samples
        self._resample(_mean_of_channels(frame) if _has_no_places(frame) else frame)
        self.num_decoded += 1

    def _count_correction(self, by_ns: int, at_ns: int) -> None:
        """One which goes on, as a backlog that comes at once, is one."""
        if by_ns:
            self._num_holes += at_ns - self._corrected_ns >= NS_PER_S
            self._corrected_ns = at_ns + max(by_ns, 0)

    def _start_stretch(self, time_ns: int, num_channels: int) -> None:
        """Zeros up to time_ns, and a fresh resampler: the old one's tail belongs before them."""
        self._drain()
        self._skip_to(_samples(time_ns))
        self._anchor_ns = max(time_ns, self._num_samples * NS_PER_S // SOUND_RATE_HZ)
        self._num_source_samples = 0
        mix = MIX_OPTIONS if num_channels > 1 else None
        self._resampler = AudioResampler(format="flt", layout="mono", rate=SOUND_RATE_HZ, options=mix)

    def _resample(self, frame: AudioFrame | None) -> None:
        if frame is not None:
            frame.pts = None  # the count is the time; a resampler which sees PTS may act on it
        for out in self._resampler.resample(frame) if self._resampler is not None else ():
            if out is not None:  # flushing a resampler which had nothing to do gives [None]
                samples = np.asarray(out.to_ndarray(), np.float32).reshape(-1)
                num_cut = min(self._num_to_cut, samples.size)
                self._num_to_cut -= num_cut
                self._append(samples[num_cut:])

    def _drain(self) -> None:
        try:
            self._resample(None)
        finally:  # one which has failed has nothing more to give
            self._resampler = None

    def _skip_to(self, sample: int) -> None:
        """Zeros up to this sample; whole pieces of a long hole are left out."""
        if sample - self._num_samples >= MIN_HOLE_SAMPLES:
            if self._parts:
                self._silence(self._next_end() - self._num_samples)
            piece = sample * NS_PER_S // SOUND_RATE_HZ // self._piece_ns
            begin = min(self._piece_end(piece - 1), self._limit)
            if begin - self._num_sent >= MIN_HOLE_SAMPLES:
                self._num_sent = self._num_samples = begin
        self._silence(sample - self._num_samples)

    def _silence(self, num_samples: int) -> None:
        while num_samples > 0 and not self.done:
            self._append(np.zeros(min(num_samples, SOUND_RATE_HZ), np.float32))
            num_samples -= SOUND_RATE_HZ

    def _append(self, samples: npt.NDArray[np.float32]) -> None:
        while samples.size and self._num_samples < self._limit:
            end = self._next_end()
            part = samples[: end - self._num_samples]
            samples = samples[part.size :]
            self._parts.append(part)
            self._num_samples += part.size
            if self._num_samples == end:
                self._send()

    def _next_end(self) -> int:
        """Where the piece ends which is sent next."""
        piece = self._num_sent * NS_PER_S // SOUND_RATE_HZ // self._piece_ns
        end = min(self._piece_end(piece), self._limit)
        if end > self._num_sent:
            return end
        return min(self._piece_end(piece + 1), self._limit)  # the piece's length is no whole number of samples

    def _piece_end(self, piece: int) -> int:
        return _samples((piece + 1) * self._piece_ns)

    def _send(self) -> None:
        if self._parts:
            whole = np.nan_to_num(np.concatenate(self._parts), copy=False, posinf=1.0, neginf=-1.0)
            self._put(Sound(self._num_sent, np.clip(whole, -1.0, 1.0, out=whole)))
            self._num_sent, self._parts = self._num_samples, []

    def finish(self) -> None:
        try:
            self._drain()
        finally:
            self._send()
            self.ended = True


def _has_no_places(frame: AudioFrame) -> bool:
    """Many channels, and nothing says where they belong: libswresample refuses to mix them."""
    num_channels = frame.layout.nb_channels
    return num_channels > MAX_PLACED and frame.layout.name == f"{num_channels} channels" and frame.format.is_packed


def _mean_of_channels(frame: AudioFrame) -> AudioFrame:
    samples = frame.to_ndarray().reshape(-1, frame.layout.nb_channels)
    mono = samples.mean(axis=1, dtype=np.float64).astype(samples.dtype).reshape(1, -1)
    mixed = AudioFrame.from_ndarray(mono, format=frame.format.name, layout="mono")
    mixed.sample_rate = frame.sample_rate
    return mixed


def _samples(time_ns: int) -> int:
    return time_ns * SOUND_RATE_HZ // NS_PER_S
