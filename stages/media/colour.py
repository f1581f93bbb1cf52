"""Colours of still pictures as viewers show them: those which the embedded profile means, in sRGB.

Rule: a profile that is damaged, or none of this picture's kind, costs nothing: its numbers are taken for sRGB then.
"""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

MAX_PROFILE_BYTES: Final = 4 << 20  # those of printing presses have 2 MiB

_Space: TypeAlias = Literal["RGB", "L", "CMYK"]  # as Pillow calls them
_SPACES: Final[dict[str, _Space]] = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_ERRORS: Final = (ImageCms.PyCMSError, OSError, ValueError, TypeError)


def in_srgb(rgb: npt.NDArray[np.uint8], image: Image.Image) -> npt.NDArray[np.uint8]:
    """Pixels [H, W, 3] that were made of this picture's numbers, as its profile, of RGB or of grey, means them."""
    space, transform = _of_profile(image.info.get("icc_profile"))
    if transform is None or space == "CMYK":
        return rgb
    return np.array(_applied(transform, Image.fromarray(rgb).convert(space)) or rgb, np.uint8)


def from_cmyk(image: Image.Image) -> Image.Image:
    """A picture of printing inks as RGB; without a profile, as if they were ideal."""
    space, transform = _of_profile(image.info.get("icc_profile"))
    inked = _applied(transform, image) if transform is not None and space == "CMYK" else None
    return inked or image.convert("RGB")


def _applied(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image | None:
    try:
        return ImageCms.applyTransform(image, transform)
    except _ERRORS:
        return None


@lru_cache(maxsize=1)  # of a picture which moves, all have the same
def _of_profile(data: object) -> tuple[_Space, ImageCms.ImageCmsTransform | None]:
    """What a profile is for, and how to get from there to sRGB; None: there is no profile which is of use."""
    if not isinstance(data, bytes) or not 0 < len(data) <= MAX_PROFILE_BYTES:
        return "RGB", None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        space = _SPACES[profile.profile.xcolor_space.strip()]
        srgb = ImageCms.createProfile("sRGB")
        return space, ImageCms.buildTransform(profile, srgb, space, "RGB")
    except (*_ERRORS, KeyError):
        return "RGB", None
