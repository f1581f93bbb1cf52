"""What a file is by its first bytes: a picture which is read, or something which is not and has a name.

Rule: a file is what its bytes say. Its name is a hint for folders only, where not every file is opened to find out.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, Literal, TypeAlias

HEAD_BYTES: Final = 1024

PictureType: TypeAlias = Literal["JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF", "TIFF"]  # as Pillow calls them
_SUFFIXES: Final = ".jpg .jpeg .jpe .jfif .png .apng .webp .gif .bmp .dib .avif .avifs .tif .tiff"
PICTURE_SUFFIXES: Final = frozenset(_SUFFIXES.split(" "))
FILM_SUFFIXES: Final = frozenset((".mjpeg", ".mjpg"))  # of JPEGs one behind the other, which begin as one does

_PICTURES: Final[tuple[tuple[re.Pattern[bytes], PictureType], ...]] = (
    (re.compile(rb"\xff\xd8\xff"), "JPEG"),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "PNG"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "WEBP"),
    (re.compile(rb"GIF8[79]a"), "GIF"),
    (re.compile(rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", re.DOTALL), "BMP"),
    (re.compile(rb"II[*+]\0|MM\0[*+]"), "TIFF"),
)
_SUBFILE_TYPE, _SUB_IFDS, _DNG_VERSION = 254, 330, 50_706  # tags of TIFF
_HEIF_BRANDS: Final = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"))

_RAW: Final = "a camera's raw picture"
_AS_JPEG: Final = "save it as JPEG or PNG"
_AS_FILM: Final = "give the film itself"
_AS_ANY: Final = "give a film, a picture or a folder of pictures"
_NAMED: Final[tuple[tuple[re.Pattern[bytes], str, str], ...]] = (
    (re.compile(rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n"), "a JPEG XL picture", _AS_JPEG),
    (re.compile(rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51"), "a JPEG 2000 picture", _AS_JPEG),
    (re.compile(rb"8BPS"), "a Photoshop picture", _AS_JPEG),
    (re.compile(rb"v/1\x01"), "an OpenEXR picture", _AS_JPEG),
    (re.compile(rb"FUJIFILMCCD-RAW|\0MRM|II\x1a\0\0\0HEAPCCDR|IIR[OS]|IIU\0|FOVb", re.DOTALL), _RAW, _AS_JPEG),
    (re.compile(rb"\0\0[\x02\x03\x0a\x0b]\0{5}.{8}[\x08\x0f\x10\x18\x20]", re.DOTALL), "a Targa picture", _AS_JPEG),
    (re.compile(rb"gimp xcf"), "a GIMP picture", _AS_JPEG),
    (re.compile(rb"\0\0[\x01\x02]\0[^\0]\0"), "an icon", _AS_JPEG),
    (re.compile(rb"P[1-7]\s"), "a PNM picture", _AS_JPEG),
    (re.compile(rb"\xc5\xd0\xd3\xc6|%!PS"), "a PostScript file", _AS_JPEG),
    (re.compile(rb"%PDF-"), "a PDF document", "save its pages as JPEG or PNG"),
    (re.compile(rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1|PK\x03\x04.{26}(\[Content_Types\]\.xml|_rels/|word/|xl/|ppt/|"
                rb"mimetypeapplication/vnd\.oasis)|\{\\rtf", re.DOTALL),
     "an office document", "save its pages as JPEG or PNG"),
    (re.compile(rb"(<!DOCTYPE svg[^>]*>\s*)?<svg[\s>]", re.I), "an SVG drawing", _AS_JPEG),
    (re.compile(rb"#EXTM3U.*#EXT-X-", re.DOTALL), "an HLS playlist", _AS_FILM),
    (re.compile(rb"#EXTM3U"), "an M3U playlist", _AS_FILM),
    (re.compile(rb"<MPD[\s>]"), "a DASH playlist", _AS_FILM),
    (re.compile(rb"(#[^\n]*\n\s*)*(ffconcat version|file\s+('[^'\n]*'|\S+)\s*(\n|$))"), "a concat script", _AS_FILM),
    (re.compile(rb"\[playlist\]", re.I), "a PLS playlist", _AS_FILM),
    (re.compile(rb"<playlist[\s>]", re.I), "an XSPF playlist", _AS_FILM),
    (re.compile(rb"<asx[\s>]", re.I), "an ASX playlist", _AS_FILM),
    (re.compile(rb"([a-z]=[^\n]*\n){0,9}v=0\s*\n"), "an SDP description", "give the rtsp:// address"),
    (re.compile(rb"(<!doctype html|<html)[\s>]", re.I), "a web page", "give the address of the film"),
    (re.compile(rb"MThd"), "a MIDI file", "save it as WAV"),
    (re.compile(rb"\.RMF\0|\.ra\xfd"), "a RealMedia file", "save it as MP4"),
    (re.compile(rb"[FCZ]WS[\x03-\x40]"), "a Flash film", "save it as MP4"),
    (re.compile(rb"PK\x03\x04|Rar!\x1a\x07|7z\xbc\xaf\x27\x1c|\x1f\x8b\x08|\xfd7zXZ\0|\x28\xb5\x2f\xfd|BZh[1-9]1AY|"
                rb".{257}ustar", re.DOTALL),
     "an archive", "unpack it"),
    (re.compile(rb"SQLite format 3\0"), "a database", _AS_ANY),
    # A script names its interpreter's path; "#!AMR" begins sound.
    (re.compile(rb"\x7fELF|MZ.{58}..\0\0|#![ \t]*/", re.DOTALL), "a program", _AS_ANY),
)  # fmt: skip
# What may begin as nearly any film does, or what a film may stand in: named when libav has found none in it.
_UNREADABLE: Final[tuple[tuple[re.Pattern[bytes], str, str], ...]] = (
    (re.compile(rb"\d+\s*\n\d\d:\d\d:\d\d[,.]\d{3} -->|WEBVTT|\[Script Info\]"), "a file of subtitles", _AS_FILM),
    (re.compile(rb"[\[{]\s*[\[{\"\]}\d]"), "a JSON file", _AS_ANY),
    (re.compile(rb"<[?!a-z]", re.I), "an XML or HTML file", _AS_ANY),
    (re.compile(rb"[\t\n\r -~\x80-\xff]+\Z"), "a text file", _AS_ANY),
)
_PROLOGUE: Final = re.compile(rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*", re.DOTALL)
_MULTIPART: Final = re.compile(rb"\s*--[^\r\n]+\r?\n(.+\r?\n)*?content-type:\s*image/jpe?g", re.I)
_DISC_AT: Final = 32_769  # ISO 9660 and UDF leave the first 16 sectors to the computer
_DISC_MARKS: Final = frozenset((b"CD001", b"BEA01"))


def read_head(path: Path) -> bytes:
    """The bytes which say what a file is; OSError as by open()."""
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


def picture_type(head: bytes) -> PictureType | None:
    """The kind of a picture which is read; None for anything else."""
    brands = _brands(head)
    if b"avif" in brands or b"avis" in brands:
        return "AVIF"
    kind = next((name for pattern, name in _PICTURES if pattern.match(head)), None)
    return None if kind == "TIFF" and is_raw(head) else kind


def is_jpeg_film(head: bytes) -> bool:
    """Whether it begins as one JPEG behind the other does; a single one begins alike."""
    return picture_type(head) == "JPEG" or _MULTIPART.match(head) is not None


def is_raw(head: bytes) -> bool:
    """Whether what begins as a TIFF is a camera's raw picture (CR2, DNG, NEF, ARW …), of which that shows a thumbnail.

    It is one when it has the tag of a DNG, or when its first picture is a smaller one and the others lie beside it.
    """
    if not re.match(rb"II\*\0|MM\0\*", head):
        return False
    if head[8:10] == b"CR":
        return True
    order: Literal["little", "big"] = "little" if head[:2] == b"II" else "big"
    at = int.from_bytes(head[4:8], order)
    count = int.from_bytes(head[at : at + 2], order)
    entries = [head[at + 2 + 12 * k : at + 14 + 12 * k] for k in range(min(count, HEAD_BYTES // 12))]
    tags = {int.from_bytes(e[:2], order): int.from_bytes(e[8:], order) for e in entries if len(e) == 12}
    return _DNG_VERSION in tags or (tags.get(_SUBFILE_TYPE) == 1 and _SUB_IFDS in tags)


def foreign_type(head: bytes) -> str:
    """Of what is known and not read: what it is and what to do, as the rest of a sentence; "" for anything else."""
    return _sentence(*_named(head))


def unreadable_type(path: Path) -> str:
    """Of a file in which libav has found no film: as by foreign_type, "" also for one which can't be opened again."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
            file.seek(_DISC_AT)
            if file.read(5) in _DISC_MARKS:
                return _sentence("a disc image", "give the film that is on it")
    except OSError:
        return ""
    return _sentence(*_first_match(_UNREADABLE, _as_text(head)))


def foreign_name(head: bytes) -> str:
    """Of what is known and not read: what it is; "" for anything else."""
    return _named(head)[0]


def _sentence(name: str, instead: str) -> str:
    return f"is {name}, which is not read here; {instead}" if name else ""


def _named(head: bytes) -> tuple[str, str]:
    brands = _brands(head)
    if brands[:1] and brands[0] in _HEIF_BRANDS:
        return "a HEIC picture", _AS_JPEG
    if is_raw(head):
        return _RAW, _AS_JPEG
    name, instead = _first_match(_NAMED, head)
    return (name, instead) if name else _first_match(_NAMED, _as_text(head))


def _first_match(table: tuple[tuple[re.Pattern[bytes], str, str], ...], head: bytes) -> tuple[str, str]:
    return next(((name, instead) for pattern, name, instead in table if pattern.match(head)), ("", ""))


def _as_text(head: bytes) -> bytes:
    """UTF-8 without what may stand before the first word: a byte order mark, an XML declaration, comments."""
    for mark, encoding in ((b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be")):
        if head.startswith(mark):
            head = head[2:].decode(encoding, "ignore").encode()
    head = head.removeprefix(b"\xef\xbb\xbf")
    prologue = _PROLOGUE.match(head)
    return head[prologue.end() :] if prologue else head


def _brands(head: bytes) -> list[bytes]:
    """The brands of an ISO base media file, the major one first."""
    if head[4:8] != b"ftyp":
        return []
    box = head[8 : min(int.from_bytes(head[:4]), HEAD_BYTES)]
    return [box[:4], *(box[at : at + 4] for at in range(8, len(box) - 3, 4))]
