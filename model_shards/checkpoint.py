"""The checkpoint, cut at its joints: each actor reads the tensors of its component and nobody else's.

Rule: what is in the files is compared with the module by name and shape before a single weight is read, and everything
that differs is told at once. Headers cost kilobytes; weights are read once, from the mapped file.

A checkpoint folder holds `config.json`, the tokenizer, `model.safetensors` (or its shards and their index), and in
`assets/token2wav` the vocoder: `flow` and `hift`, as `.safetensors` or as released, `.pt`. Or it was split
(model_shards/split.py): then `shards` holds one file per component.

Source: reference/minicpmo-4.5.md §1.6, §6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from model_shards.config import ModelConfig, load_config
from model_shards.errors import ModelError
from model_shards.json_text import parse_json
from model_shards.quantized import settle

if TYPE_CHECKING:
    from model_shards.audio import AudioEncoder
    from model_shards.llm import LanguageModel
    from model_shards.tts import Talker
    from model_shards.vision import VisionEncoder
    from model_shards.vocoder import Vocoder, Voice

Component = Literal["vision", "audio", "llm", "tts", "vocoder"]
COMPONENTS: tuple[Component, ...] = ("vision", "audio", "llm", "tts", "vocoder")

PREFIXES: Mapping[Component, tuple[str, ...]] = MappingProxyType(
    {
        "vision": ("vpm.", "resampler."),
        "audio": ("apm.", "audio_projection_layer."),
        "llm": ("llm.",),
        "tts": ("tts.",),
        "vocoder": ("flow.", "hift."),
    }
)

UNUSED_PREFIXES = ("tts.model.embed_tokens.", "tts.projector_spk.")
"""Tensors of the released checkpoint which inference never touches: the talker is fed embeddings, and it has no
speaker rows. A module may leave them out; what it leaves out is never read."""

SPLIT_FOLDER = Path("shards")
VOCODER_FOLDER = Path("assets") / "token2wav"
VOICE_FILE = VOCODER_FOLDER / "prompt.safetensors"

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)
_WEIGHT_NORM_NAMES = MappingProxyType(
    {".weight_g": ".parametrizations.weight.original0", ".weight_v": ".parametrizations.weight.original1"}
)
_MAX_NAMES_SHOWN = 8


@dataclass(frozen=True, slots=True)
class ComponentInfo:
    """What the headers say about one component. `num_parameters` counts the elements of all its tensors, two weights
    of 4 bits as one."""

    component: Component
    num_tensors: int
    num_parameters: int
    num_bytes: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor as it lies in a file, where it is called `key`."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_parameters(self) -> int:
        return torch.Size(self.shape).numel()


@overload
def build(component: Literal["vision"], config: ModelConfig) -> VisionEncoder: ...
@overload
def build(component: Literal["audio"], config: ModelConfig) -> AudioEncoder: ...
@overload
def build(component: Literal["llm"], config: ModelConfig) -> LanguageModel: ...
@overload
def build(component: Literal["tts"], config: ModelConfig) -> Talker: ...
@overload
def build(component: Literal["vocoder"], config: ModelConfig) -> Vocoder: ...
@overload
def build(component: Component, config: ModelConfig) -> nn.Module: ...
def build(component: Component, config: ModelConfig) -> nn.Module:
    """Build a component without its weights, on the current default device.

    Raises ModelError when the config switches it off.
    """
    # Imported here, so that an actor loads the code of its own component only.
    if component == "vision" and config.vision is not None:
        from model_shards.vision import VisionEncoder

        return VisionEncoder(config.vision)
    if component == "audio" and config.audio is not None:
        from model_shards.audio import AudioEncoder

        return AudioEncoder(config.audio)
    if component == "llm":
        from model_shards.llm import LanguageModel

        return LanguageModel(config.llm)
    if component == "tts" and config.tts is not None:
        from model_shards.tts import Talker

        return Talker(config.tts)
    if component == "vocoder" and config.vocoder is not None:
        from model_shards.vocoder import Vocoder

        return Vocoder(config.vocoder)
    raise ModelError(f"config.json switches {component!r} off (init_vision, init_audio, init_tts)")


@overload
def load_shard(
    path: Path, component: Literal["vision"], *, dtype: torch.dtype = ..., device: str = ...
) -> VisionEncoder: ...
@overload
def load_shard(
    path: Path, component: Literal["audio"], *, dtype: torch.dtype = ..., device: str = ...
) -> AudioEncoder: ...
@overload
def load_shard(
    path: Path, component: Literal["llm"], *, dtype: torch.dtype = ..., device: str = ...
) -> LanguageModel: ...
@overload
def load_shard(path: Path, component: Literal["tts"], *, dtype: torch.dtype = ..., device: str = ...) -> Talker: ...
@overload
def load_shard(
    path: Path, component: Literal["vocoder"], *, dtype: torch.dtype = ..., device: str = ...
) -> Vocoder: ...
@overload
def load_shard(path: Path, component: Component, *, dtype: torch.dtype = ..., device: str = ...) -> nn.Module: ...
def load_shard(
    path: Path, component: Component, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> nn.Module:
    """Build one component and give it its weights; reads nothing of the other components.

    Floating point weights become `dtype`. On the CPU, weights that have it already stay in the mapped file, so that
    replicas on one host share them: a checkpoint in use must not be written over.
    returns: the module in eval mode, without gradients.
    Raises ModelError when a file is missing or damaged, or naming the tensors that are missing, unknown or of another
    shape than the config says.
    """
    module = build_hollow(component, load_config(path))
    load_component(path, component, module, dtype=dtype, device=device)
    return module


def build_hollow(component: Component, config: ModelConfig) -> nn.Module:
    """Build a component on the meta device: shapes, and no memory. Raises what `build` raises."""
    with torch.device("meta"), _Unfilled():
        return build(component, config)


class _Unfilled(TorchFunctionMode):
    """Leaves out what fills new modules: random numbers, the initialisation, and the norms that weight_norm takes of
    it. On the meta device they fill nothing but make torch load its compiler, a second or more per process."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        if func in (torch.rand, torch.randn) and "generator" not in (kwargs or {}):  # with one, they are meant
            return torch.empty(*args, **(kwargs or {}))
        if func is torch.norm_except_dim:
            weight, _, dim = args
            return weight.new_empty([size if axis == dim else 1 for axis, size in enumerate(weight.shape)])
        return func(*args, **(kwargs or {}))


def load_component(path: Path, component: Component, module: nn.Module, *, dtype: torch.dtype, device: str) -> None:
    """Give `module`, which may be on the meta device, the weights of a component; see `load_shard`."""
    expected = module.state_dict()
    stored = _checked(path, component, expected)
    weights = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in _read_stored({name: stored[name] for name in expected}, device)
    }
    module.load_state_dict(weights, assign=True)
    module.to(device).eval().requires_grad_(False)  # tables that no checkpoint fills are built on the CPU
    hollow = [name for name, t in chain(module.named_parameters(), module.named_buffers()) if t.is_meta]
    assert not hollow, f"{component}: {hollow} are neither in the checkpoint nor computed when they are used"
    settle(module)


def check(path: Path, components: Iterable[Component]) -> None:
    """Compare components with the config, from the headers only. Raises ModelError as `load_shard` would."""
    config = load_config(path)
    for component in components:
        _checked(path, component, build_hollow(component, config).state_dict())


def inspect(path: Path) -> list[ComponentInfo]:
    """Say what a checkpoint holds, component by component, from the headers only; absent components are left out.

    Raises ModelError when a file is damaged.
    """
    stored = {component: list(_list_stored(path, component).values()) for component in COMPONENTS}
    return [
        ComponentInfo(
            component=component,
            num_tensors=len(tensors),
            num_parameters=sum(tensor.num_parameters for tensor in tensors),
            num_bytes=sum(tensor.num_parameters * tensor.dtype.itemsize for tensor in tensors),
            dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})),
        )
        for component, tensors in stored.items()
        if tensors
    ]


def stored_tensors(path: Path, component: Component) -> dict[str, Tensor]:
    """A component's tensors by official name, unconverted; they stay in the mapped files. Empty where there are none.

    Raises ModelError when a file is damaged.
    """
    return dict(_read_stored(_list_stored(path, component), "cpu"))


def unclaimed_tensors(path: Path) -> list[str]:
    """Tensors of the main files which are no component's. Raises ModelError when a file is damaged."""
    claimed = tuple(chain.from_iterable(PREFIXES.values()))
    files = _find_files(path, "llm", prefixes=("",))
    return [name for file in files for name in _read_header(file) if not name.startswith(claimed)]


def load_voice(path: Path) -> Voice | None:
    """Read the voice that is stored with a checkpoint, for the vocoder; None when it has none.

    Raises ModelError when the file is damaged or lacks a tensor.
    """
    from model_shards.vocoder import Voice

    tensors = _read_voice_file(path)
    if not tensors:
        return None
    missing = {"prompt_tokens", "prompt_mel", "spk_emb"} - tensors.keys()
    if missing:
        raise ModelError(f"{path / VOICE_FILE}: lacks {', '.join(sorted(missing))}")
    return Voice(tensors["prompt_tokens"].to(torch.int32), tensors["prompt_mel"].float(), tensors["spk_emb"].float())


def load_ref_audio(path: Path) -> Tensor | None:
    """Read the sound of the stored voice, which the LLM hears in its system prompt: (samples,) float32, 16 kHz mono.

    None when the checkpoint has none. Raises ModelError when the file is damaged.
    """
    audio = _read_voice_file(path).get("ref_audio")
    return None if audio is None else audio.float().flatten()


def save_voice(path: Path, voice: Voice, ref_audio: Tensor | None = None) -> None:
    """Store a voice, and its sound, with a checkpoint; see `load_voice` and `load_ref_audio`."""
    tensors = {"prompt_tokens": voice.prompt_tokens, "prompt_mel": voice.prompt_mel, "spk_emb": voice.spk_emb}
    if ref_audio is not None:
        tensors["ref_audio"] = ref_audio
    (path / VOICE_FILE).write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def _read_voice_file(path: Path) -> dict[str, Tensor]:
    file = path / VOICE_FILE
    return dict(_read_stored(_read_header(file), "cpu")) if file.is_file() else {}


def _file_names(component: Component) -> list[tuple[str, ...]]:
    """Groups of file names, relative to the checkpoint: of each group, the first that exists counts."""
    split = str(SPLIT_FOLDER / f"{component}.safetensors")
    if component == "vocoder":
        parts = (str(VOCODER_FOLDER / part) for part in ("flow", "hift"))
        return [(split, f"{part}.safetensors", f"{part}.pt") for part in parts]
    return [(split, "model.safetensors.index.json", "model.safetensors")]


def _find_files(path: Path, component: Component, prefixes: tuple[str, ...] | None = None) -> list[Path]:
    """Find the safetensors and `.pt` files that hold a component; of an index, what it says about `prefixes`."""
    groups = [[path / name for name in group if (path / name).is_file()] for group in _file_names(component)]
    files = list(dict.fromkeys(group[0] for group in groups if group))
    if files and files[0].suffix == ".json":
        return _find_indexed_files(files[0], prefixes or PREFIXES[component])
    return files


def _find_indexed_files(index: Path, prefixes: tuple[str, ...]) -> list[Path]:
    try:
        weight_map = parse_json(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(file) for tensor, file in weight_map.items() if tensor.startswith(prefixes)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: not an index of safetensors files: {error!r}") from error
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ModelError(f"{index}: {outside[0]!r} is not the name of a file beside it")
    return [index.parent / name for name in sorted(names)]


def _list_stored(path: Path, component: Component) -> dict[str, _Stored]:
    """List a component's tensors by official name."""
    stored: dict[str, _Stored] = {}
    for file in _find_files(path, component):
        for key, tensor in _read_header(file).items():
            name = _vocoder_name(file.stem, key) if file.stem in ("flow", "hift") else key
            if name.startswith(PREFIXES[component]):
                stored[name] = tensor
    return stored


def _vocoder_name(part: str, key: str) -> str:
    """Name a tensor of `flow.*` or `hift.*` as our module does, whichever version of the packages wrote the file."""
    name = key.removeprefix(f"{part}.").removeprefix("generator.")
    for old, new in _WEIGHT_NORM_NAMES.items():
        if name.endswith(old):
            name = name.removesuffix(old) + new
    return f"{part}.{name}"


def _checked(path: Path, component: Component, expected: Mapping[str, Tensor]) -> dict[str, _Stored]:
    """A component's tensors as they are stored, once they are known to fit."""
    stored = _list_stored(path, component)
    if not stored:
        names = ", ".join(dict.fromkeys(chain.from_iterable(_file_names(component))))
        raise ModelError(f"{path}: holds no tensors of {component!r}; looked into {names}")
    _check_tensors(f"{path}: {component}", expected, stored)
    return stored


def _check_tensors(where: str, expected: Mapping[str, Tensor], stored: Mapping[str, _Stored]) -> None:
    shapes = [
        f"{name} is {stored[name].shape}, the config wants {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in stored and stored[name].shape != tuple(tensor.shape)
    ]
    problems = [
        tell_names("missing", [name for name in expected if name not in stored]),
        tell_names("unknown", [n for n in stored if n not in expected and not n.startswith(UNUSED_PREFIXES)]),
        tell_names("of another shape", shapes),
    ]
    if any(problems):
        raise ModelError(f"{where}: tensors don't fit the config. " + " ".join(filter(None, problems)))


def tell_names(what: str, names: list[str]) -> str:
    """`2 missing: a, b.`; nothing where there are none, and some where there are many."""
    if not names:
        return ""
    rest = f" and {len(names) - _MAX_NAMES_SHOWN} more" if len(names) > _MAX_NAMES_SHOWN else ""
    return f"{len(names)} {what}: {', '.join(names[:_MAX_NAMES_SHOWN])}{rest}."


def _read_header(file: Path) -> dict[str, _Stored]:
    """List the tensors of a file by the names they have in it. Raises ModelError when the file is damaged."""
    if file.suffix == ".pt":
        tensors = _load_pickle(file, "meta").items()
        return {key: _Stored(file, key, tuple(tensor.shape), tensor.dtype) for key, tensor in tensors}
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118 (not a mapping)
            return {
                key: _Stored(file, key, tuple(part.get_shape()), DTYPES[part.get_dtype()])
                for key, part in slices.items()
            }
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file}: not a whole safetensors file: {error}") from error
    except KeyError as error:
        raise ModelError(f"{file}: holds tensors of dtype {error}, which is not supported") from error


def _read_stored(stored: Mapping[str, _Stored], device: str) -> Iterator[tuple[str, Tensor]]:
    """Read tensors, file by file, straight to a device."""
    for file in sorted({tensor.file for tensor in stored.values()}):
        keys = {name: tensor.key for name, tensor in stored.items() if tensor.file == file}
        yield from zip(keys, _read_tensors(file, keys.values(), device), strict=True)


def _read_tensors(file: Path, keys: Iterable[str], device: str) -> Iterator[Tensor]:
    if file.suffix == ".pt":
        content = _load_pickle(file, device)
        yield from (content[key] for key in keys)
        return
    try:
        with safe_open(file, framework="pt", device=device) as opened:
            yield from (opened.get_tensor(key) for key in keys)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file}: can't be read: {error}") from error


def _load_pickle(file: Path, device: str) -> dict[str, Tensor]:
    """Read a state dict as released; `weights_only`, so that the file can't run anything."""
    try:
        content = torch.load(file, map_location=device, weights_only=True, mmap=True)
    except Exception as error:  # damaged archives raise RuntimeError, pickle's errors, EOFError, …
        raise ModelError(f"{file}: not a state dict that can be read safely: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(f"{file}: expected a flat state dict of tensors")
    return content
