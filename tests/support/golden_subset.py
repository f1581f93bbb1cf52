"""A compact part of the recordings, for the repository: `python -m tests.support.golden_subset SOURCE OUT`.

Rules: a value is copied or left out, never computed. A list is cut at its end, a table of rows keeps its shape with the
rows that no kept case reads at zero, a component whose weights would be too large is left out with its cases. What is
kept is chosen by rule (the first, the smallest), so that any folder of the format can be cut, with one result.

Every file but the manifest is stored as xz: of float32 weights that saves what the exponents repeat, of zeros all.
tests/support/golden.py unpacks it.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import math
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save

from model_shards.config import load_config
from model_shards.image import slice_image
from model_shards.vision import position_buckets
from tests.support.golden import num_records

Array = npt.NDArray[Any]
Arrays = dict[str, Array]

NUM_UNITS = 2  # of a recorded session
NUM_PREFILL_ROWS = 4
NUM_COMPANIONS = 2  # other pictures in the batch of the smallest one
NUM_MEL_CHUNKS = 3
AS_THEY_ARE = ("config.json", "tokenizer.json", "tokenizer_cases.json", "image_slicing.json", "vision_buckets.json")
# The talker is small; of its recordings only the turns (and their probabilities) are many.
TURN_KEYS = ("kw", "attention_type")
# float32: four bytes, of which the last repeats.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 2, "lp": 2, "pb": 2}]
TOKEN_TABLES = ("llm.model.embed_tokens.weight", "tts.emb_text.weight")
FED_KEYS = ("ids", "gen", "prefix_ids", "suffix_ids", "tts_hidden_token_ids")
POSITION_TABLE = "vpm.embeddings.position_embedding.weight"
F0 = "f0_predictor."
NOT_SAID = r"</?unit>|<\|(listen|chunk_eos|speak)\|>|(<image>|<slice>)?\[\w+\](</image>|</slice>)?"


class Cut:
    """The recordings of `source`, and of them what has been kept so far."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.json: dict[str, Any] = {}
        self.arrays: dict[str, Arrays] = {}

    def read_json(self, name: str) -> Any:
        return json.loads((self.source / name).read_text(encoding="utf-8"))

    def read_arrays(self, name: str) -> Arrays:
        if not name.endswith(".npz"):
            return load_file(self.source / name)
        with np.load(self.source / name, allow_pickle=False) as stored:
            return {key: stored[key] for key in stored.files}

    def keep(self, name: str, kept: Mapping[str, Array]) -> None:
        self.arrays[name] = {key: np.ascontiguousarray(value) for key, value in kept.items()}


def cut(source: Path) -> Cut:
    """Everything that is kept of a folder of recordings."""
    kept = Cut(source)
    kept.json |= {name: kept.read_json(name) for name in AS_THEY_ARE}
    for part in (cut_pixels, cut_vision, cut_mel, cut_audio, cut_llm, cut_duplex, cut_tts, cut_vocoder, cut_causal):
        part(kept)
    cut_weights(kept)
    return kept


# --- pictures ---


def cut_pixels(kept: Cut) -> None:
    """The picture with the fewest bytes, without the bytes of its patches: their hash is kept."""
    rows, arrays = kept.read_json("image_pixels.json"), kept.read_arrays("image_pixels.npz")
    index = min(range(len(rows)), key=lambda k: arrays[f"img{k}_input"].size)
    head = f"img{index}_"
    kept.json["image_pixels.json"] = [rows[index]]
    kept.keep(
        "image_pixels.npz",
        {
            f"img0_{key.removeprefix(head)}": value
            for key, value in arrays.items()
            if key.startswith(head) and not key.endswith("_u8")
        },
    )


def cut_vision(kept: Cut) -> None:
    """The smallest picture whose embeddings were recorded, with the smallest of its batch as company."""
    cases, arrays = kept.read_json("vision.json"), kept.read_arrays("vision.safetensors")
    size = kept.read_json("config.json")["vision_batch_size"]
    groups = [(name, group) for name, case in cases.items() for group in small_groups(case, size)]
    name, rows = min(groups, key=lambda group: num_patches(cases[group[0]], group[1]))
    case, call = cases[name], rows[0] // size
    places = [row - call * size for row in rows]
    longest = max(math.prod(case["tgt_sizes"][row]) for row in rows)
    place = case["resampler_out_rows"].index(rows[0])
    kept.json["vision.json"] = {
        name: {"tgt_sizes": [case["tgt_sizes"][row] for row in rows], "n_vpm_calls": 1, "resampler_out_rows": [0]}
    }
    kept.keep(
        "vision.safetensors",
        {
            **{f"{name}.pixel_values.{new}": arrays[f"{name}.pixel_values.{row}"] for new, row in enumerate(rows)},
            f"{name}.tgt_sizes": arrays[f"{name}.tgt_sizes"][rows],
            f"{name}.position_ids.0": arrays[f"{name}.position_ids.{call}"][places, :longest],
            f"{name}.vpm_out.0": arrays[f"{name}.vpm_out.{call}"][places, :longest],
            f"{name}.resampler_out": arrays[f"{name}.resampler_out"][place : place + 1],
            **{key: value for key, value in arrays.items() if key.startswith("resampler_pos_embed_")},
        },
    )


def small_groups(case: dict[str, Any], size: int) -> Iterable[list[int]]:
    """Per recorded embedding its picture, and the smallest of the same batch."""
    for row in case["resampler_out_rows"]:
        batch = range(row // size * size, min(len(case["tgt_sizes"]), (row // size + 1) * size))
        others = sorted((other for other in batch if other != row), key=lambda other: num_patches(case, [other]))
        yield [row, *others[:NUM_COMPANIONS]]


def num_patches(case: dict[str, Any], rows: list[int]) -> int:
    return sum(math.prod(case["tgt_sizes"][row]) for row in rows)


# --- sound ---


def cut_mel(kept: Cut) -> None:
    """The stream whose first chunks need the least sound, and the shortest clip."""
    table, arrays = kept.read_json("mel.json"), kept.read_arrays("mel.safetensors")
    streams = {name: pieces_of(entry["infos"]) for name, entry in table.items() if "infos" in entry}
    stream = min(streams, key=lambda name: num_samples(streams[name]))
    clips = {name: entry["n_samples"] for name, entry in table.items() if "lens" in entry and "n_samples" in entry}
    clip = min(clips, key=lambda name: clips[name])
    heard = max(num_samples(streams[stream]), clips[clip])
    kept.json["mel.json"] = {stream: table[stream] | {"infos": streams[stream]}, clip: table[clip]}
    saved = [f"{stream}.mel.{index}" for index, info in enumerate(streams[stream]) if info.get("saved")]
    kept.keep(
        "mel.safetensors",
        {"sigA": arrays["sigA"][:heard]} | {key: arrays[key] for key in (*saved, f"{clip}.mel", "mel_filters")},
    )


def pieces_of(infos: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first pieces of a stream, until so many chunks have come out."""
    ends = [index for index, info in enumerate(infos, start=1) if info["emitted_frames"]]
    return infos[: ends[min(NUM_MEL_CHUNKS, len(ends)) - 1]]


def num_samples(infos: Iterable[dict[str, Any]]) -> int:
    return sum(info["n_samples_in"] for info in infos)


def cut_audio(kept: Cut) -> None:
    """The first chunks of the stream, and the shortest clip."""
    table, arrays = kept.read_json("audio.json"), kept.read_arrays("audio.safetensors")
    lens = [length for batch in table["off_lens"] for length in batch]
    clip = lens.index(min(lens))
    rows = [row for row in table["rows"] if row.get("chunk", NUM_UNITS) < NUM_UNITS]
    kept.json["audio.json"] = {"off_lens": [[lens[clip]]], "rows": rows}
    new = {
        f"stream.{what}.{row['chunk']}": arrays[f"stream.{what}.{row['chunk']}"]
        for row in rows
        for what in ("mel", "apm_last_hidden", "embeds")
    }
    for key, value in arrays.items():
        if key == "off.mel" or re.fullmatch(r"off\..+\.apm_last_hidden", key):
            new[key] = value[clip : clip + 1]
        elif key.startswith("off.") and key.endswith(f".{clip}"):
            new[f"{key.rpartition('.')[0]}.0"] = value
    kept.keep("audio.safetensors", new)


# --- language ---


def cut_llm(kept: Cut) -> None:
    """The first rows of the prefill, which see no later ones; the first units of every run; every decision."""
    table, arrays = kept.read_json("llm.json"), kept.read_arrays("llm.safetensors")
    new: Arrays = {}
    for key, value in arrays.items():
        if re.fullmatch(r"(prefill|offset\d+)\.[kv]\.\d+", key):
            new[key] = value[:, :, :NUM_PREFILL_ROWS]
        elif re.fullmatch(r"(prefill|offset\d+)\..+", key):
            new[key] = value[:, :NUM_PREFILL_ROWS]
        elif key.startswith("decode_rule.") or is_unit(key):
            new[key] = value
    runs = {name: run | {"rows": run["rows"][:NUM_UNITS]} for name, run in table.items() if "window" in run}
    kept.json["llm.json"] = table | runs | {"prefill": table["prefill"] | {"len": NUM_PREFILL_ROWS}}
    kept.keep("llm.safetensors", new)


def is_unit(key: str) -> bool:
    match = re.fullmatch(r"[^.]+\.unit(\d+)\..+", key)
    return match is not None and int(match[1]) < NUM_UNITS


def cut_duplex(kept: Cut) -> None:
    """The first units of the first session that sees something in them."""
    traces, arrays = kept.read_json("duplex.json"), kept.read_arrays("duplex.safetensors")
    name = next(name for name, trace in traces.items() if frames_of(trace["units"][:NUM_UNITS]))
    trace = cut_trace(traces[name])
    heard = max(unit["inputs"]["audio_offset"] + (unit["inputs"]["audio_samples"] or 0) for unit in trace["units"])
    heads = (f"{name}.prepare.", *(f"{name}.u{index}." for index in range(NUM_UNITS)))
    new = {key: value for key, value in arrays.items() if key.startswith(heads)}
    new |= {"audio": arrays["audio"][:heard], "ref_audio": arrays["ref_audio"][: trace["prepare"]["ref_audio_samples"]]}
    images = kept.read_arrays("duplex_images.npz")
    kept.json["duplex.json"] = {name: trace}
    kept.keep("duplex.safetensors", new)
    kept.keep("duplex_images.npz", {f"frame{index}": images[f"frame{index}"] for index in frames_of(trace["units"])})


def frames_of(units: Iterable[dict[str, Any]]) -> list[int]:
    return sorted({index for unit in units for index in unit["inputs"]["frames"] or ()})


def cut_trace(trace: dict[str, Any]) -> dict[str, Any]:
    """A session as if it had ended after its first units: of what was noted at its end, the part that they said."""
    units = trace["units"][:NUM_UNITS]
    schema = "".join(f"{part}</unit>" for part in trace["session_schema"].split("</unit>")[:NUM_UNITS])
    text = re.sub(
        r"<unit>|</unit>|<\|(listen|chunk_eos|speak)\|>|(<image>|<slice>)?\[\w+\](</image>|</slice>)?", "", schema
    )
    ids = [token for unit in units for feed in unit["generate_feeds"] or () for token in feed["ids"]]
    assert trace["res_ids"][: len(ids)] == ids and trace["generated_text"].startswith(text), "cut another session"
    margins = [margin for unit in units for step in unit["decode_steps"] for margin in step["argmax_margins"]]
    return trace | {
        "units": units,
        "session_schema": schema,
        "generated_text": text,
        "res_ids": ids,
        "min_llm_argmax_margin": min(margins),
        "min_tts_prob_margin": min(unit["tts"]["min_margin"] for unit in units if unit["tts"]),
    }


# --- speech ---


def cut_tts(kept: Cut) -> None:
    """Of the turns the smallest of each kind, and all the rest."""
    table, arrays = kept.read_json("tts.json"), kept.read_arrays("tts.safetensors")
    turns = {key: [name for name, case in table.items() if isinstance(case, dict) and key in case] for key in TURN_KEYS}
    dropped = {name for names in turns.values() for name in names}
    for names in turns.values():
        dropped.remove(min(names, key=lambda n: sum(a.nbytes for k, a in arrays.items() if k.startswith(f"{n}."))))
    kept.json["tts.json"] = {name: case for name, case in table.items() if name not in dropped}
    kept.keep("tts.safetensors", {k: value for k, value in arrays.items() if k.partition(".")[0] not in dropped})


def cut_vocoder(kept: Cut) -> None:
    """Its sizes, and the pitch of a mel: flow and generator are too large."""
    table, arrays = kept.read_json("token2wav.json"), kept.read_arrays("token2wav.safetensors")
    streams = {name for name, value in table.items() if isinstance(value, dict) and "rows" in value}
    kept.json["token2wav.json"] = {key: value for key, value in table.items() if key not in streams} | {
        "hift_draws": []
    }
    kept.keep("token2wav.safetensors", {key: arrays[key] for key in ("off.mel", "off.f0")})
    weights = kept.read_arrays("token2wav_weights.safetensors")
    kept.keep(
        "token2wav_weights.safetensors", {key: value for key, value in weights.items() if key.startswith(f"hift.{F0}")}
    )


def cut_causal(kept: Cut) -> None:
    """The same of the causal vocoder."""
    table, arrays = kept.read_json("cv3.json"), kept.read_arrays("cv3.safetensors")
    kept.json["cv3.json"] = table | {"rows": []}
    kept.keep(
        "cv3.safetensors",
        {k: v for k, v in arrays.items() if k.startswith(f"cv3.weight.{F0}") or k in ("cv3.mel", "cv3.f0_full")},
    )


# --- weights ---


def cut_weights(kept: Cut) -> None:
    """All of the model; of its tables the rows that are read."""
    weights = kept.read_arrays("model.safetensors")
    for name in TOKEN_TABLES:
        weights[name] = only_rows(weights[name], token_ids(kept))
    weights[POSITION_TABLE] = only_rows(weights[POSITION_TABLE], positions(kept))
    kept.keep("model.safetensors", weights)


def only_rows(table: Array, rows: set[int]) -> Array:
    new = np.zeros_like(table)
    chosen = sorted(row for row in rows if row < len(table))
    new[chosen] = table[chosen]
    return new


def token_ids(kept: Cut) -> set[int]:
    """The special ones, and those that are fed in what is kept of language and speech."""
    config = kept.json["config.json"]["tts_config"]
    ids = set(kept.json["tokenizer_cases.json"]["special_ids"].values())
    ids |= {config["audio_bos_token_id"], config["text_eos_token_id"]}
    ids |= {int(token) for token in kept.arrays["tts.safetensors"]["proj.ids"]}
    return ids | set(fed_ids([kept.json["llm.json"], kept.json["duplex.json"]]))


def fed_ids(value: Any) -> Iterable[int]:
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if key in FED_KEYS:
            yield from inner or ()
        elif isinstance(inner, dict | list):
            yield from fed_ids(inner)


def positions(kept: Cut) -> set[int]:
    """Where the patches of the kept pictures lie, on the grid of learned positions."""
    places: set[int] = set()
    for key, value in kept.arrays["vision.safetensors"].items():
        if ".position_ids." in key:
            places |= {int(place) for place in value.flatten()}
    vision = load_config(kept.source).vision
    assert vision is not None
    side = vision.image_size // vision.patch_size
    for image in kept.arrays["duplex_images.npz"].values():
        for cell in slice_image(image, vision.slices):
            rows, cols = (position_buckets(num, side).tolist() for num in (cell.rows, cell.cols))
            places |= {row * side + col for row in rows for col in cols}
    return places


# --- the folder ---


def write(kept: Cut, out: Path) -> None:
    """The kept part as a folder of the format, packed, with a manifest of its own and what the whole has."""
    out.mkdir(parents=True, exist_ok=True)
    listed = kept.read_json("manifest.json")
    assert listed.keys() == kept.json.keys() | kept.arrays.keys(), "every file has a part of its own"
    manifest = {name: entry(kept, name, listed[name]) for name in sorted(listed)}
    for name in manifest:
        (out / f"{name}.xz").write_bytes(packed(content_of(kept, name)))
    (out / "manifest.json").write_text(listing(manifest), encoding="utf-8")


def listing(manifest: dict[str, Any]) -> str:
    """A line per file."""
    return "{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in manifest.items()) + "\n}\n"


def content_of(kept: Cut, name: str) -> bytes:
    if name in kept.json:
        return json.dumps(kept.json[name], ensure_ascii=False, separators=(",", ":")).encode()
    if not name.endswith(".npz"):
        return save(kept.arrays[name])
    stream = io.BytesIO()
    np.savez(stream, **kept.arrays[name])
    return stream.getvalue()


def entry(kept: Cut, name: str, whole: dict[str, Any]) -> dict[str, Any]:
    content = content_of(kept, name)
    fields: dict[str, Any] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    kind = next((kind for kind in ("tensors", "arrays") if kind in whole), None)
    if kind is not None:
        types = {key: whole[kind][key][0] for key in kept.arrays[name] if key in whole[kind]}
        fields[kind] = {
            key: [types.get(key, spelled(value, kind)), *value.shape] for key, value in kept.arrays[name].items()
        }
    num = {"tensors": len(whole[kind])} if kind else {"records": num_records(kept.read_json(name))}
    return fields | {"whole": {"bytes": whole["bytes"], "sha256": whole["sha256"], **num}}


def spelled(array: Array, kind: str) -> str:
    safetensors_names = {"float32": "F32", "int32": "I32", "int64": "I64", "uint8": "U8"}
    return safetensors_names[str(array.dtype)] if kind == "tensors" else str(array.dtype)


def packed(content: bytes) -> bytes:
    return lzma.compress(content, format=lzma.FORMAT_XZ, filters=FILTERS)


def main(argv: list[str]) -> None:
    source, out = map(Path, argv)
    write(cut(source), out)
    print(f"{out}: {sum(file.stat().st_size for file in out.iterdir())} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
