"""The processors' rules in plain loops, as reference/minicpmo-4.5.md tells them: slow, stateless, and not our code.

Our modules are compared with these where there is no golden folder, and these make up the cases of another one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

Samples = npt.NDArray[np.float32]

RATE_HZ, HOP, N_FFT, N_MELS = 16000, 160, 400, 80


def bpe(text: str, vocab: Mapping[str, int], merges: Sequence[Sequence[str]]) -> list[int]:
    """Ids of words of letters with single spaces between: in each word, with the space before it, the earliest merge
    goes first."""
    ranks = {tuple(pair): rank for rank, pair in enumerate(merges)}
    ids = []
    for word in text.replace(" ", " Ġ").split():
        parts = list(word)
        while pairs := [pair for pair in itertools.pairwise(parts) if pair in ranks]:
            best = min(pairs, key=ranks.__getitem__)
            at = list(itertools.pairwise(parts)).index(best)
            parts[at : at + 2] = ["".join(best)]
        ids += [vocab[part] for part in parts]
    return ids


def slicing(width: int, height: int, limit: int, scale: int = 448, patch: int = 14) -> dict[str, Any]:
    """One row of image_slicing.json, without its placeholders (§2.1)."""

    def whole(length: float, divisor: int) -> int:
        return max(round(length / divisor) * divisor, divisor)

    def best(w: float, h: float, upscale: bool) -> tuple[int, int]:
        if upscale or w * h > scale * scale:
            ratio = w / h
            h = int(scale / math.sqrt(ratio))
            w = int(h * ratio)
        return whole(w, patch), whole(h, patch)

    grid = None
    num_cells = min(math.ceil(width * height / (scale * scale)), limit)
    if num_cells > 1:
        smallest = math.inf
        for count in (num_cells - 1, num_cells, num_cells + 1):
            for cols in range(1, count + 1):
                if count == 1 or count > limit or count % cols:
                    continue
                rows = count // cols
                error = abs(math.log(width / height) - math.log(cols / rows))
                if error < smallest:
                    smallest, grid = error, (cols, rows)
    source = best(width, height, upscale=grid is None)
    row: dict[str, Any] = {"size": [width, height], "max_slice_nums": limit, "source_size": list(source)}
    row |= {"grid": None, "refine_size": None, "slice_size": None}
    row["tgt_sizes"] = [[source[1] // patch, source[0] // patch]]
    if grid is not None:
        cols, rows = grid
        cell = best(whole(width, cols) / cols, whole(height, rows) / rows, upscale=True)
        row |= {"grid": [cols, rows], "slice_size": list(cell), "refine_size": [cell[0] * cols, cell[1] * rows]}
        row["tgt_sizes"] += [[cell[1] // patch, cell[0] // patch]] * (cols * rows)
    return row


def placeholder(grid: Sequence[int] | None, unknown: str, image_id: int | None) -> str:
    """The text that keeps a picture's place in a chat (§2.4)."""
    text = "" if image_id is None else f"<image_id>{image_id}</image_id>"
    text += f"<image>{unknown}</image>"
    cols, rows = grid or (0, 0)
    lines = []
    for _ in range(rows):
        lines.append(f"<slice>{unknown}</slice>" * cols)
    return text + "\n".join(lines)


def patches(image: npt.NDArray[np.uint8], row: Mapping[str, Any], patch: int = 14) -> list[npt.NDArray[np.uint8]]:
    """The resized picture and its cells, [3, patch, patch · L] uint8 each, patch beside patch (§2.2)."""
    picture = Image.fromarray(image)
    pieces = [np.asarray(picture.resize(row["source_size"], Image.Resampling.BICUBIC))]
    if row["grid"] is not None:
        (cols, rows), (width, height) = row["grid"], row["slice_size"]
        refined = np.asarray(picture.resize(row["refine_size"], Image.Resampling.BICUBIC))
        for y in range(rows):
            for x in range(cols):
                pieces.append(refined[y * height : (y + 1) * height, x * width : (x + 1) * width])
    return [_side_by_side(piece, patch) for piece in pieces]


def _side_by_side(piece: npt.NDArray[np.uint8], patch: int) -> npt.NDArray[np.uint8]:
    height, width, _ = piece.shape
    squares = []
    for top in range(0, height, patch):
        for left in range(0, width, patch):
            squares.append(piece[top : top + patch, left : left + patch].transpose(2, 0, 1))
    return np.concatenate(squares, axis=2)


def pixel_values(patch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Bytes to [-1, 1], with the rounding of three steps in float32."""
    half = np.float32(0.5)
    values: npt.NDArray[np.float32] = (patch.astype(np.float32) / np.float32(255) - half) / half
    return values


def buckets(num_patches: int, side: int) -> list[set[int]]:
    """The learned positions that each of `num_patches` along one side may take (§2.2): how many of the boundaries
    k / side lie at or below its fraction. One that lies on a boundary may be rounded below it, in float32."""
    places = []
    for i in range(num_patches):
        bucket, rest = divmod(i * side, num_patches)
        places.append({bucket} if rest or bucket == 0 else {bucket, bucket - 1})
    return places


def grid_place(row: int, col: int, width: int) -> list[float]:
    """What the resampler adds to the key of the patch at (row, col): [sin col | cos col | sin row | cos row] (§2.3)."""
    quarter = width // 4
    frequencies = [10000 ** (-i / quarter) for i in range(quarter)]
    values = []
    for place in (col, row):
        values += [math.sin(place * frequency) for frequency in frequencies]
        values += [math.cos(place * frequency) for frequency in frequencies]
    return values


def whole_mel(samples: Samples, dynamic: bool) -> Tensor:
    """The log-mel [80, n // 160] of a whole buffer, clamped 8 below its loudest bin if `dynamic` (§3.1); nothing for
    what is shorter than a window."""
    if len(samples) < N_FFT:
        return torch.zeros(N_MELS, 0)
    filters = mel_filter_bank(N_FFT // 2 + 1, N_MELS, 0.0, RATE_HZ / 2, RATE_HZ, norm="slaney", mel_scale="slaney")
    sound = torch.from_numpy(samples)
    spectrum = torch.stft(sound, N_FFT, HOP, window=torch.hann_window(N_FFT), return_complex=True)
    power = spectrum[:, :-1].abs() ** 2
    logs = (torch.from_numpy(filters).float().T @ power).clamp(min=1e-10).log10()
    floor = float(logs.max()) - 8.0 if dynamic else -10.0
    return (logs.clamp(min=floor) + 4.0) / 4.0


@dataclass(frozen=True, slots=True)
class StreamRule:
    """How a stream is cut (§3.2). `slide`: at how many samples how many are dropped; None: never."""

    chunk_frames: int
    redundancy_frames: int
    slide: tuple[int, int] | None


def stream_mel(
    pieces: Sequence[Samples], rule: StreamRule, last: bool = False
) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Per piece the frames that come out and the info of mel.json, recomputed from the whole buffer each time."""
    buffer, base, done = np.zeros(0, np.float32), 0, 0
    for number, piece in enumerate(pieces, start=1):
        buffer = np.concatenate([buffer, piece])
        if rule.slide is not None and len(buffer) >= rule.slide[0]:
            buffer, base = buffer[rule.slide[1] :], base + rule.slide[1] // HOP
        total = len(buffer) // HOP
        stable = sum(HOP * t + N_FFT // 2 <= len(buffer) for t in range(total))
        start, end = done, done + rule.chunk_frames
        first, stop = max(0, start - rule.redundancy_frames - base), end + rule.redundancy_frames - base
        ready = stable >= stop or (last and number == len(pieces))
        mel = whole_mel(buffer, dynamic=len(buffer) >= 5 * RATE_HZ)[:, first:stop] if ready else torch.zeros(N_MELS, 0)
        done = end if ready else done
        yield (
            mel,
            {
                "type": "exact_chunk",
                "chunk_number": number,
                "emitted_frames": mel.shape[1],
                "stable_T": stable,
                "T_full": total,
                "base_T": base,
                "stable_T_global": base + stable,
                "buffer_len_samples": len(buffer),
                "left_samples_dropped": base * HOP,
                "core_start": start,
                "core_end": end,
                "n_samples_in": len(piece),
            },
        )
