"""The suite knows nothing in advance: it passes, unchanged, on a folder with other cases.

The other folder keeps the weights of the one in use. Its pictures, sounds, sizes, chunkings, texts and names are new;
what is expected of them comes from plain formulas (tests/support/plain.py), from stock transformers, or from the
recordings, rearranged and cut.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import WhisperFeatureExtractor

from tests.support import golden, plain

SEED = 8
RATE_HZ = plain.RATE_HZ
NEW_PICTURES = ((333, 70, 4), (512, 900, 3))  # height, width, limit of cells
FILES = ("tokenizer", "image_slicing", "image_pixels", "vision", "mel", "audio", "config", "complete")


def test_another_folder_passes_unchanged(tmp_path: Path) -> None:
    build(tmp_path)
    tests = [str(Path(__file__).with_name(f"test_{name}.py")) for name in FILES]

    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        env=os.environ | {"OMNI_GOLDEN": str(tmp_path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def build(folder: Path) -> None:
    for file in golden.FOLDER.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    rng = random.Random(SEED)
    change_texts(folder, rng)
    change_slicing(folder, rng)
    change_pixels(folder)
    change_mel(folder, rng)
    change_audio(folder)
    change_vision(folder, rng)
    write_manifest(folder)


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


# --- text and pictures ---


def change_texts(folder: Path, rng: random.Random) -> None:
    model, recorded = read(folder, "tokenizer.json")["model"], read(folder, "tokenizer_cases.json")
    letters = "etaoinshrdlu"
    texts = [" ".join("".join(rng.choices(letters, k=rng.randint(1, 9))) for _ in range(12)) for _ in range(9)]
    recorded["encode"] = [{"text": text, "ids": plain.bpe(text, model["vocab"], model["merges"])} for text in texts]
    write(folder, "tokenizer_cases.json", recorded)


def change_slicing(folder: Path, rng: random.Random) -> None:
    recorded = read(folder, "image_slicing.json")
    num, image_id = 5, 12
    recorded |= {"image_feature_size": num, "image_idx_in_placeholder": image_id, "rows": []}
    for limit in (1, 3, 5, 6, 8):
        for _ in range(7):
            row = plain.slicing(rng.randint(20, 2600), rng.randint(20, 2600), limit)
            row["placeholder_rle"] = plain.placeholder(row["grid"], f"{{unk*{num}}}", image_id)
            row["placeholder_noid_rle"] = plain.placeholder(row["grid"], f"{{unk*{num}}}", None)
            recorded["rows"].append(row)
    write(folder, "image_slicing.json", recorded)


def change_pixels(folder: Path) -> None:
    """New pictures first, then the official ones, as the vision encoder saw some of them."""
    recorded = read(folder, "image_pixels.json")
    with np.load(folder / "image_pixels.npz") as stored:
        official = [(stored[f"img{index}_input"], image["max_slice_nums"]) for index, image in enumerate(recorded)]
    source = np.random.default_rng(SEED)
    images = [
        (source.integers(0, 256, (height, width, 3), dtype=np.uint8), limit) for height, width, limit in NEW_PICTURES
    ]
    recorded, arrays = [], {}
    for index, (image, most) in enumerate([*images, *official]):
        row = plain.slicing(image.shape[1], image.shape[0], most)
        patches = plain.patches(image, row)
        values = [plain.pixel_values(patch) for patch in patches]
        arrays[f"img{index}_input"] = image
        arrays[f"img{index}_patch0_u8"] = patches[0]
        arrays |= {f"img{index}_patch{j}_f32_head": value[..., :28] for j, value in enumerate(values)}
        patch_rows = [patch_row(value) for value in values]
        kept = {key: row[key] for key in ("size", "max_slice_nums", "tgt_sizes")}
        recorded.append(kept | {"patches": patch_rows})
    np.savez_compressed(folder / "image_pixels.npz", **arrays)
    write(folder, "image_pixels.json", recorded)


def patch_row(values: Any) -> dict[str, Any]:
    return {
        "shape": list(values.shape),
        "dtype": "float32",
        "sha256_f32": hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest(),
        "u8_exact": True,
        "sum": float(values.astype(np.float64).sum()),
    }


def change_vision(folder: Path, rng: random.Random) -> None:
    """The official pictures in other groups, under other names, and with rubbish in the padding."""
    recorded, tensors = read(folder, "vision.json"), load_file(folder / "vision.safetensors")
    size = read(folder, "config.json")["vision_batch_size"]
    pictures = [(name, index) for name, case in recorded.items() for index in range(len(case["tgt_sizes"]))]
    rng.shuffle(pictures)
    groups = {"one": pictures[:1], "few": pictures[1:5], "rest": pictures[5:]}
    new = {key: value for key, value in tensors.items() if key.startswith("resampler_pos_embed_")}
    for key, value in tensors.items():
        if match := re.fullmatch(r"img(\d+)\.(.+)", key):
            new[f"img{int(match[1]) + len(NEW_PICTURES)}.{match[2]}"] = value
    cases = {}
    for group, members in ((group, members) for group, members in groups.items() if members):
        sizes = [recorded[name]["tgt_sizes"][index] for name, index in members]
        rows = [i for i, (name, index) in enumerate(members) if index in recorded[name]["resampler_out_rows"]]
        cases[group] = {"tgt_sizes": sizes, "n_vpm_calls": -(-len(members) // size), "resampler_out_rows": rows}
        new[f"{group}.tgt_sizes"] = torch.tensor(sizes, dtype=torch.int32)
        outs = [recorded_embeds(recorded, tensors, *members[row]) for row in rows]
        new[f"{group}.resampler_out"] = torch.stack(outs) if outs else no_embeds(tensors)
        longest = max(height * width for height, width in sizes)
        for i, (name, index) in enumerate(members):
            new[f"{group}.pixel_values.{i}"] = tensors[f"{name}.pixel_values.{index}"]
        for call in range(cases[group]["n_vpm_calls"]):
            part = [recorded_tower(tensors, *member, size) for member in members[call * size : (call + 1) * size]]
            hidden = [F.pad(one[:longest], (0, 0, 0, max(0, longest - len(one))), value=7.0) for one, _ in part]
            new[f"{group}.vpm_out.{call}"] = torch.stack(hidden)
            places = [F.pad(one[:longest], (0, max(0, longest - len(one)))) for _, one in part]
            new[f"{group}.position_ids.{call}"] = torch.stack(places)
    write(folder, "vision.json", cases)
    save_file(new, folder / "vision.safetensors")


def no_embeds(tensors: dict[str, Tensor]) -> Tensor:
    return next(value for key, value in tensors.items() if key.endswith(".resampler_out"))[:0]


def recorded_embeds(recorded: dict[str, Any], tensors: dict[str, Tensor], name: str, index: int) -> Tensor:
    return tensors[f"{name}.resampler_out"][recorded[name]["resampler_out_rows"].index(index)]


def recorded_tower(tensors: dict[str, Tensor], name: str, index: int, size: int) -> tuple[Tensor, Tensor]:
    call, row = divmod(index, size)
    return tensors[f"{name}.vpm_out.{call}"][row], tensors[f"{name}.position_ids.{call}"][row]


# --- sound ---


def change_mel(folder: Path, rng: random.Random) -> None:
    source = np.random.default_rng(SEED)
    time = np.arange(int(5.7 * RATE_HZ)) / RATE_HZ
    sound = 0.3 * np.sin(2 * np.pi * 300 * time * time) * np.sin(time) ** 2 + 0.002 * source.standard_normal(len(time))
    signal = sound.astype(np.float32)
    recorded: dict[str, Any] = {}
    tensors = {"sigA": torch.from_numpy(signal)}
    tensors["mel_filters"] = load_file(folder / "mel.safetensors")["mel_filters"]
    seconds = {"chunk_ms": 1000, "first_chunk_ms": 1035, "cnn_redundancy_ms": 20, "slides": (6, 2)}
    add_stream(recorded, tensors, "sliding seconds", seconds, [16480, *[16000] * 11])
    odd = {"chunk_ms": 300, "first_chunk_ms": 438, "cnn_redundancy_ms": 10, "slides": None}
    add_stream(recorded, tensors, "odd", odd, [rng.randint(500, 9000) for _ in range(25)])
    add_stream(recorded, tensors, "odd end", odd, [7000, 4800, 4800, 4800, 900], last=True)
    extract = WhisperFeatureExtractor(feature_size=plain.N_MELS)

    def offline(clip: plain.Samples) -> Tensor:
        features = extract(clip, sampling_rate=RATE_HZ, return_tensors="pt").input_features[0]
        return features[:, : -(-len(clip) // plain.HOP)]

    for name, num_samples in (("short", 1111), ("whole", len(signal))):
        tensors[f"{name}.mel"] = offline(signal[:num_samples]).contiguous()
        recorded[name] = {"n_samples": num_samples, "lens": [[-(-num_samples // plain.HOP)]]}
    slices = [[100, 9000], [0, 30000], [7, 12345]]
    mels = [offline(signal[start:stop]) for start, stop in slices]
    longest = max(mel.shape[1] for mel in mels)
    tensors["three.mel"] = torch.stack([F.pad(mel, (0, longest - mel.shape[1])) for mel in mels])
    recorded["three"] = {"slices": slices, "lens": [[mel.shape[1] for mel in mels]]}
    clip = np.concatenate([signal[:12000], np.zeros(8000, np.float32), signal[12000:24000]])
    fixed = plain.whole_mel(np.pad(clip, (0, 30 * RATE_HZ - len(clip))), dynamic=False)[:, : len(clip) // plain.HOP]
    tensors |= {"leak_fresh.mel": offline(clip).contiguous(), "leak_after_stream.mel": fixed.contiguous()}
    recorded["leak"] = {"n_samples": len(clip), "max_abs_diff": float((offline(clip) - fixed).abs().max())}
    write(folder, "mel.json", recorded)
    save_file(tensors, folder / "mel.safetensors")


def add_stream(
    recorded: dict[str, Any],
    tensors: dict[str, Tensor],
    name: str,
    mode: dict[str, Any],
    sizes: list[int],
    last: bool = False,
) -> None:
    sound = np.resize(tensors["sigA"].numpy(), sum(sizes))
    pieces = np.split(sound, list(itertools.accumulate(sizes))[:-1])
    trigger, stride = mode["slides"] or (30, 10)
    rule = plain.StreamRule(
        chunk_frames=mode["chunk_ms"] // 10,
        redundancy_frames=mode["cnn_redundancy_ms"] // 10,
        slide=(trigger * RATE_HZ, stride * RATE_HZ) if mode["slides"] else None,
    )
    infos = []
    for index, (mel, info) in enumerate(plain.stream_mel(pieces, rule, last)):
        infos.append(info | ({"saved": True} if index % 3 else {}))
        if index % 3:
            tensors[f"{name}.mel.{index}"] = mel.contiguous()
    config = {
        "chunk_ms": mode["chunk_ms"],
        "first_chunk_ms": mode["first_chunk_ms"],
        "effective_first_chunk_ms": float(mode["first_chunk_ms"] // 10 * 10),
        "sample_rate": RATE_HZ,
        "n_fft": plain.N_FFT,
        "hop_length": plain.HOP,
        "cnn_redundancy_ms": mode["cnn_redundancy_ms"],
        "cnn_redundancy_frames": rule.redundancy_frames,
        "enable_sliding_window": mode["slides"] is not None,
        "trigger_seconds": float(trigger),
        "slide_seconds": float(stride),
    }
    recorded[name] = {"mode": {"mode": "exact"}, "config": config, "infos": infos}


def change_audio(folder: Path) -> None:
    """The official sessions, cut short, and the official clips in another order."""
    recorded, tensors = read(folder, "audio.json"), load_file(folder / "audio.safetensors")
    lens = list(itertools.chain.from_iterable(recorded["off_lens"]))
    order = [*range(1, len(lens)), 0]
    num = {key: sum(key in row for row in recorded["rows"]) for key in ("chunk", "plain")}
    rows = [row for row in recorded["rows"] if all(row[key] < num[key] * 3 // 4 for key in num if key in row)]
    kept = {name for row in rows for name in tensor_names(row)} & tensors.keys()
    new = {name: tensors[name] for name in kept}
    for name, tensor in tensors.items():
        if name == "off.mel" or re.fullmatch(r"off\..+\.apm_last_hidden", name):
            new[name] = tensor[order].contiguous()
        elif name.startswith("off."):
            head, row = name.rsplit(".", 1)
            new[f"{head}.{order.index(int(row))}"] = tensor
    write(folder, "audio.json", {"off_lens": [[lens[row] for row in order]], "rows": rows})
    save_file(new, folder / "audio.safetensors")


def tensor_names(row: dict[str, Any]) -> list[str]:
    kind, number = ("stream", row["chunk"]) if "chunk" in row else ("plain", row["plain"])
    return [f"{kind}.{what}.{number}" for what in ("mel", "apm_last_hidden", "embeds")]


# --- what is in it ---


def write_manifest(folder: Path) -> None:
    listed = read(folder, "manifest.json")
    for name, entry in listed.items():
        content = (folder / name).read_bytes()
        if hashlib.sha256(content).hexdigest() == entry["sha256"]:
            continue
        entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        if "tensors" in entry:
            stored = load_file(folder / name)
            spelled = {torch.float32: "F32", torch.int32: "I32"}
            entry["tensors"] = {key: [spelled[value.dtype], *value.shape] for key, value in stored.items()}
        if "arrays" in entry:
            with np.load(folder / name) as stored_arrays:
                entry["arrays"] = {
                    key: [str(stored_arrays[key].dtype), *stored_arrays[key].shape] for key in stored_arrays.files
                }
    write(folder, "manifest.json", listed)
