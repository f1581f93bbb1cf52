"""A checkpoint split into one file per component, and a manifest by which each file and each tensor can be checked.

A split folder holds what the checkpoint's folder holds beside its weights (config, tokenizer, voice), the weights in
`shards/<component>.safetensors`, and `manifest.json`. It is loaded, inspected and run like the checkpoint; a machine
that runs one component needs that component's file only.

Rule: nothing is held in memory: tensors go from the mapped file of the one side to the file of the other.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from model_shards.checkpoint import (
    COMPONENTS,
    DTYPES,
    SPLIT_FOLDER,
    VOCODER_FOLDER,
    VOICE_FILE,
    Component,
    stored_tensors,
    tell_names,
    unclaimed_tensors,
)
from model_shards.config import load_config
from model_shards.errors import ModelError
from model_shards.init import new_folder, vocoder_sizes
from model_shards.json_text import parse_json

MANIFEST_FILE = "manifest.json"
_VERSION = 1

_DTYPE_NAMES = MappingProxyType({dtype: name for name, dtype in DTYPES.items()})
_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".gguf")
_NOT_COPIED = (*_WEIGHTS, ".safetensors.index.json", ".py")
_MAX_HEADER_BYTES = 100_000_000  # the official limit
_READ_BYTES = 1 << 22
_CONFIG = "config.json"
_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """dtype: as safetensors spells it, like BF16. sha256: of the bytes."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True, slots=True)
class FileRecord:
    """`tensors` is empty for what is no component's file."""

    num_bytes: int
    sha256: str
    tensors: Mapping[str, TensorRecord]


Manifest = Mapping[str, FileRecord]
"""By name relative to the folder, with slashes."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor as a safetensors header tells it. `start` and `end` are bytes of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


Change = Callable[[Component, Mapping[str, Tensor]], Mapping[str, Tensor]]
"""What becomes of a component's tensors."""


def split_checkpoint(
    checkpoint: Path, out: Path, change: Change = lambda _, tensors: tensors, settings: Mapping[str, Any] = _NOTHING
) -> Manifest:
    """Write `checkpoint` as a split folder; it appears whole or not at all.

    change: the weights on their way. settings: what config.json says of it.
    Raises ModelError when the checkpoint is damaged, holds tensors that are no component's, or `out` exists and is not
    an empty folder.
    """
    config = load_config(checkpoint)
    if stray := unclaimed_tensors(checkpoint):
        raise ModelError(f"{checkpoint}: holds tensors that are no component's. {tell_names('stray', stray)}")
    with new_folder(out) as folder:
        (folder / SPLIT_FOLDER).mkdir()
        manifest = {name: _copy(checkpoint / name, folder / name) for name in _other_files(checkpoint)}
        for component in COMPONENTS:
            if tensors := stored_tensors(checkpoint, component):
                name = _shard_name(component)
                manifest[name] = _write_shard(folder / name, change(component, tensors))
        if config.vocoder is not None and _VOCODER_CONFIG not in manifest:  # what its files told must be written now
            (folder / VOCODER_FOLDER).mkdir(parents=True, exist_ok=True)
            (folder / _VOCODER_CONFIG).write_text(json.dumps(vocoder_sizes(config.vocoder), indent=1), encoding="utf-8")
            manifest[_VOCODER_CONFIG] = _record(folder / _VOCODER_CONFIG)
        if settings:
            raw = json.loads((folder / _CONFIG).read_text(encoding="utf-8")) | settings
            (folder / _CONFIG).write_text(json.dumps(raw, indent=1), encoding="utf-8")
            manifest[_CONFIG] = _record(folder / _CONFIG)
        _write_manifest(folder, manifest)
    return manifest


def verify_split(folder: Path) -> Manifest:
    """Read a split folder whole, and compare it with its manifest.

    Raises ModelError, which names every file and every tensor that is missing, extra, cut off or changed.
    """
    manifest = read_manifest(folder)
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    problems = [
        tell_names("files missing", [name for name in manifest if name not in present]),
        tell_names("files extra", sorted(present - manifest.keys() - {MANIFEST_FILE})),
        *(_compare(folder / name, record) for name, record in manifest.items() if name in present),
    ]
    if any(problems):
        raise ModelError(f"{folder}: is not what its {MANIFEST_FILE} tells. " + " ".join(filter(None, problems)))
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Raises ModelError when there is none, or it can't be understood."""
    file = folder / MANIFEST_FILE
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
        manifest = {str(name): _parse_record(record) for name, record in content["files"].items()}
    except FileNotFoundError as error:
        raise ModelError(f"{file}: no such file; `pipeline shards split` writes one") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file}: not the manifest of a split checkpoint: {error!r}") from error
    outside = [name for name in manifest if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
    if outside:
        raise ModelError(f"{file}: {outside[0]!r} is not the name of a file in this folder")
    return manifest


_VOCODER_CONFIG = (VOCODER_FOLDER / "config.json").as_posix()


def _shard_name(component: Component) -> str:
    return (SPLIT_FOLDER / f"{component}.safetensors").as_posix()


def _other_files(checkpoint: Path) -> list[str]:
    """What a checkpoint holds beside weights and code; hidden files and an older split's are left out."""
    files = (path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file())
    return sorted(
        file.as_posix()
        for file in files
        if file == VOICE_FILE
        or not (
            file.name.endswith(_NOT_COPIED)
            or any(part.startswith(".") for part in file.parts)
            or file.parts[0] == SPLIT_FOLDER.name
            or file.as_posix() == MANIFEST_FILE
        )
    )


def _copy(source: Path, target: Path) -> FileRecord:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    return _record(target)


def _record(file: Path) -> FileRecord:
    return FileRecord(file.stat().st_size, _sha256(file), {})


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _write_shard(file: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write a safetensors file: large items first, so that each is aligned, then by name."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header = _header({name: tensors[name] for name in order})
    whole = hashlib.sha256(header)
    records = {}
    with file.open("wb") as sink:
        sink.write(header)
        for name in order:
            tensor = tensors[name]
            content = _bytes_of(tensor)
            sink.write(content)
            whole.update(content)
            digest = hashlib.sha256(content).hexdigest()
            records[name] = TensorRecord(_DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), digest)
    return FileRecord(file.stat().st_size, whole.hexdigest(), records)


def _bytes_of(tensor: Tensor) -> memoryview:
    # as_strided: a single item counts as contiguous whatever its stride is, but only with stride 1 it has bytes.
    return tensor.contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    """Length, then JSON, padded so that the first tensor is aligned."""
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPE_NAMES:
            raise ModelError(f"{name}: is of dtype {tensor.dtype}, which is not supported")
        end = start + tensor.numel() * tensor.dtype.itemsize
        content[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    files = {
        name: {"bytes": record.num_bytes, "sha256": record.sha256}
        | ({"tensors": {key: _tensor_json(tensor) for key, tensor in record.tensors.items()}} if record.tensors else {})
        for name, record in manifest.items()
    }
    text = json.dumps({"version": _VERSION, "files": files}, indent=1)
    (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")


def _tensor_json(tensor: TensorRecord) -> dict[str, Any]:
    return {"dtype": tensor.dtype, "shape": list(tensor.shape), "sha256": tensor.sha256}


def _parse_record(raw: Mapping[str, Any]) -> FileRecord:
    tensors = {
        str(name): TensorRecord(str(entry["dtype"]), tuple(map(int, entry["shape"])), str(entry["sha256"]))
        for name, entry in raw.get("tensors", {}).items()
    }
    return FileRecord(int(raw["bytes"]), str(raw["sha256"]), tensors)


def _compare(file: Path, record: FileRecord) -> str:
    """What is wrong with a file; nothing where it is whole. Tensors are looked at only where something is wrong."""
    num_bytes = file.stat().st_size
    if num_bytes == record.num_bytes and _sha256(file) == record.sha256:
        return ""
    size = "" if num_bytes == record.num_bytes else f", {num_bytes} bytes instead of {record.num_bytes}"
    if not record.tensors:
        return f"{file.name}: changed{size}."
    with file.open("rb") as opened:
        try:
            entries = _read_entries(opened)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return f"{file.name}: no safetensors header{size}: {error!r}; it should hold {len(record.tensors)} tensors."
        problems = list(filter(None, _compare_tensors(opened, num_bytes, entries, record.tensors)))
    return f"{file.name}: changed{size}. " + (" ".join(problems) or "Its tensors are whole.")


def _compare_tensors(
    opened: BinaryIO, num_bytes: int, entries: Mapping[str, _Entry], records: Mapping[str, TensorRecord]
) -> Iterator[str]:
    both = [name for name in records if name in entries]
    other = [
        f"{name} is {entries[name].dtype} {entries[name].shape} instead of {records[name].dtype} {records[name].shape}"
        for name in both
        if (entries[name].dtype, entries[name].shape) != (records[name].dtype, records[name].shape)
    ]
    cut = [name for name in both if entries[name].end > num_bytes]
    whole = [name for name in both if name not in cut]
    yield tell_names("tensors missing", [name for name in records if name not in entries])
    yield tell_names("tensors extra", [name for name in entries if name not in records])
    yield tell_names("tensors of another kind", other)
    yield tell_names("tensors cut off", cut)
    yield tell_names("tensors changed", [n for n in whole if _digest(opened, entries[n]) != records[n].sha256])


def _read_entries(opened: BinaryIO) -> dict[str, _Entry]:
    """Raises ValueError, KeyError, TypeError or AttributeError when this is no header."""
    length = int.from_bytes(opened.read(8), "little")
    if not 0 < length <= _MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes")
    content = parse_json(opened.read(length))
    data = 8 + length
    entries = {}
    for name, entry in content.items():
        if name != "__metadata__":
            start, end = map(int, entry["data_offsets"])
            if not 0 <= start <= end:
                raise ValueError(f"{name} at {start} to {end}")
            entries[name] = _Entry(str(entry["dtype"]), tuple(map(int, entry["shape"])), data + start, data + end)
    return entries


def _digest(opened: BinaryIO, entry: _Entry) -> str:
    digest, left = hashlib.sha256(), entry.end - entry.start
    opened.seek(entry.start)
    while left > 0 and (piece := opened.read(min(left, _READ_BYTES))):
        digest.update(piece)
        left -= len(piece)
    return digest.hexdigest()
