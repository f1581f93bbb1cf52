"""What a decoder process gives of a source, read to its end."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from graph.chunk import NS_PER_S
from stages.media.reader import Ended, Failed, Frame, MediaItem, MediaReader, MediaRequest

PATIENCE_S = 120.0


def request(source: object, **changes: Any) -> MediaRequest:
    """One picture per second and the sound, unless changed."""
    usual = {"fps": 1.0, "max_pixels": 2048 * 2048, "want_video": True, "want_audio": True}
    return MediaRequest(str(source), **(usual | {"piece_ns": NS_PER_S, "duration_ns": None} | changes))


def read_to_end(of: MediaRequest) -> list[MediaItem]:
    """All items of a source; a hang is to be found, no busy machine."""
    items: list[MediaItem] = []
    with MediaReader(of) as reader:
        while not items or not isinstance(items[-1], (Ended, Failed)):
            item = reader.read(PATIENCE_S)
            assert item is not None, "the decoder neither works nor fails"
            items.append(item)
    return items


def read_all(source: object, **changes: Any) -> list[MediaItem]:
    return read_to_end(request(source, **changes))


def frames_of(items: Iterable[MediaItem]) -> list[Frame]:
    return [item for item in items if isinstance(item, Frame)]


def starts_s(items: Iterable[MediaItem]) -> list[float]:
    """When the frames are, in seconds, to the hundredth."""
    return [round(frame.start_ns / NS_PER_S, 2) for frame in frames_of(items)]


def first_image(source: object, **changes: Any) -> np.ndarray:
    """The first frame's picture [H, W, 3]."""
    return frames_of(read_all(source, **changes))[0].image


def quarters(image: np.ndarray) -> list[list[int]]:
    """The colours in the middle of the four quarters: upper left, upper right, lower left, lower right."""
    height, width, _ = image.shape
    return [image[y, x].tolist() for y in (height // 4, height * 3 // 4) for x in (width // 4, width * 3 // 4)]
