"""A checkpoint of the released sizes which costs no disk and no memory, and how much of a file was read."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from model_shards.checkpoint import VOCODER_FOLDER, build
from model_shards.config import RELEASED, TtsConfig
from model_shards.init import official_config, vocoder_sizes

Shapes = Mapping[str, tuple[int, ...]]

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


def unused_talker_table(config: TtsConfig) -> Shapes:
    """What the released talker has and ours has not: its Llama's own table of embeddings, of LlamaConfig's default
    size. Nothing reads it, as the talker is fed embeddings (reference §1.5).
    """
    return {"tts.model.embed_tokens.weight": (32000, config.hidden_size)}


def released_shapes() -> Shapes:
    """Every tensor of the released `model.safetensors`, by official name."""
    assert RELEASED.tts is not None
    shapes: dict[str, tuple[int, ...]] = dict(unused_talker_table(RELEASED.tts))
    with torch.device("meta"):
        for component in ("llm", "vision", "audio", "tts"):
            shapes |= {name: tuple(t.shape) for name, t in build(component, RELEASED).state_dict().items()}
    return shapes


def vocoder_shapes() -> Shapes:
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in build("vocoder", RELEASED).state_dict().items()}


def write_sparse(file: Path, shapes: Shapes, dtype: str = "BF16", item_bytes: int = 2) -> None:
    """Write a safetensors file whose tensors are a hole: zeros, without a block on the disk."""
    header, start = {}, 0
    for name, shape in shapes.items():
        end = start + item_bytes * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as sink:
        sink.write(len(text).to_bytes(8, "little") + text)
        sink.truncate(8 + len(text) + start)


def write_released(folder: Path) -> None:
    """A folder in the released layout and of the released sizes, 19.4 GB long and some 100 kB large."""
    (folder / VOCODER_FOLDER).mkdir(parents=True)
    write_sparse(folder / "model.safetensors", released_shapes())
    for part in ("flow", "hift"):
        own = {name: shape for name, shape in vocoder_shapes().items() if name.startswith(f"{part}.")}
        write_sparse(folder / VOCODER_FOLDER / f"{part}.safetensors", own, "F32", 4)
    (folder / "config.json").write_text(json.dumps(official_config(RELEASED)))
    assert RELEASED.vocoder is not None
    (folder / VOCODER_FOLDER / "config.json").write_text(json.dumps(vocoder_sizes(RELEASED.vocoder)))


def bytes_in_page_cache(file: Path) -> int:
    """How much of a file the kernel has in memory: all that was ever read of a new file, mapped or not.

    A hole is read like data: its pages come into memory when they are touched.
    """
    num_bytes, page = file.stat().st_size, mmap.PAGESIZE
    resident = (ctypes.c_ubyte * -(-num_bytes // page))()
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), num_bytes) as mapping:
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        if LIBC.mincore(start, num_bytes, resident) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return page * sum(value & 1 for value in bytes(resident))


def bytes_read_by_calls() -> int:
    """What this process has asked `read` and its kin for, cached or not."""
    for line in Path("/proc/self/io").read_text().splitlines():
        name, _, value = line.partition(": ")
        if name == "rchar":
            return int(value)
    raise OSError("/proc/self/io: has no rchar")
