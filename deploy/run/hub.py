"""Checkpoints by their name on the Hugging Face hub: `owner/name@revision` becomes a folder of the library's cache.

Rules:
- What is whole in the cache under a pinned commit is taken without asking anybody.
- A hub that can't be reached is found out within seconds; then the cache is taken, or all that is missing is named.
- Only what is read here is downloaded: no code, no pictures, no second format of the weights.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType

from graph.errors import GraphError
from graph.secret import KNOWN, hide, mask_urls
from graph.sections import HUB_ID
from model_shards.config import load_config
from model_shards.errors import ModelError
from model_shards.json_text import parse_json

_TIMEOUT_S = 5.0
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SETTINGS = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "HF_ENDPOINT")
_VOCODER = "assets/token2wav"
_INDEX = "model.safetensors.index.json"

ALLOWED = (
    *("config.json", "manifest.json", "*.safetensors", _INDEX),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json"),
    f"{_VOCODER}/*",
)
"""Patterns of what is downloaded."""

_MODEL_FILES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "config.json": ("config.json",),
        "tokenizer.json (or vocab.json, merges.txt, added_tokens.json)": ("tokenizer.json", "vocab.json"),
        f"model.safetensors (or {_INDEX} and the files it names)": (
            "model.safetensors",
            _INDEX,
            "shards/llm.safetensors",
        ),
    }
)
_VOCODER_FILES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        f"{_VOCODER}/{part}.pt (or .safetensors)": (
            *(f"{_VOCODER}/{part}{suffix}" for suffix in (".pt", ".safetensors")),
            "shards/vocoder.safetensors",
        )
        for part in ("flow", "hift")
    }
)
"""What a checkpoint needs, as it is told, and the files of which one will do."""


class HubError(GraphError):
    """A checkpoint of the hub can neither be fetched nor found in the cache."""


@dataclass(frozen=True, slots=True)
class HubId:
    """revision: a branch, a tag or a commit."""

    repo: str
    revision: str

    @staticmethod
    def parse(model: str) -> HubId | None:
        """None when `model` is no hub id."""
        match = HUB_ID.fullmatch(model)
        return HubId(match["repo"], match["revision"] or "main") if match else None

    @property
    def is_pinned(self) -> bool:
        return _COMMIT.fullmatch(self.revision) is not None


def fetch(hub_id: HubId, tell: Callable[[str], None]) -> Path:
    """The folder of a checkpoint, downloaded where the cache lacks it; progress goes to stderr where it is a terminal.

    tell: what the user should know, line by line. Raises HubError, or ModelError when its config.json is damaged.
    """
    name = f"{hub_id.repo}@{hub_id.revision}"
    with _one_line(name):
        _keep_secret()
        cached = _cached_folder(hub_id)
        if hub_id.is_pinned and not _lacking(hub_id, cached):
            return cached
        folder, why = _downloaded_or(cached, hub_id)
        missing = _lacking(hub_id, folder)
    if missing:
        cause = f"no such folder, and the hub does not give it ({why})" if why else "no whole MiniCPM-o 4.5 checkpoint"
        raise HubError("\n".join([f"model {name}: {cause}; put these files into {folder}:", *missing]))
    if why:
        tell(f"model {name}: the hub does not give it ({why}); taking {folder} from the cache")
    elif not hub_id.is_pinned:
        tell(f"model {name} is commit {folder.name}; pin it with {hub_id.repo}@{folder.name}")
    return folder


def _downloaded_or(cached: Path, hub_id: HubId) -> tuple[Path, str]:
    """The folder to take, and why the hub did not give it, or ""."""
    try:
        return _download(hub_id), ""
    except _unreachable() as error:
        return cached, _reason(error)
    except Exception as error:  # what else the library and those below it raise is an open set
        if _lacking(hub_id, cached):
            raise
        return cached, _reason(error)


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """What goes wrong within the library, told in one line: a proxy it can't use, a variable it can't read …"""
    try:
        yield
    except (GraphError, ModelError):
        raise
    except Exception as error:
        proxies = [variable for variable in os.environ if variable.upper() in _SETTINGS or variable.startswith("HF_")]
        check = f"check {', '.join(sorted(proxies))}" if proxies else "check its installation"
        message = f"model {name}: the hub can't be asked ({_reason(error)}); {check}, or write a checkpoint's folder"
        raise HubError(message) from error


def _keep_secret() -> None:
    """Errors of the library quote its settings."""
    for variable, value in os.environ.items():
        if variable.upper() in _SETTINGS:
            KNOWN.add_source(value)
        if variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            KNOWN.add(value.strip())
            KNOWN.variables.add(variable)
    from huggingface_hub import get_token

    if token := get_token():
        KNOWN.add(token)


def _lacking(hub_id: HubId, folder: Path) -> list[str]:
    """What a folder of the cache lacks: of the hub's own list, where a download that was cut off has left it there."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        listed = [file.path for file in get_cached_repo_tree(hub_id.repo, revision=hub_id.revision)]
    except CachedRepoTreeNotFoundError:
        return missing_files(folder)
    required = [name for name in listed if any(fnmatchcase(name, pattern) for pattern in ALLOWED)]
    return [name for name in required if not (folder / name).is_file()] or missing_files(folder)


def missing_files(folder: Path) -> list[str]:
    """What a checkpoint folder lacks, by name. Raises ModelError when its config.json is damaged."""
    required = dict(_MODEL_FILES)
    if not (folder / "config.json").is_file() or load_config(folder).vocoder is not None:
        required |= _VOCODER_FILES
    missing = [label for label, files in required.items() if not any((folder / file).is_file() for file in files)]
    return missing + [name for name in _indexed_files(folder / _INDEX) if not (folder / name).is_file()]


def _indexed_files(index: Path) -> Iterator[str]:
    if index.is_file():
        try:
            yield from sorted({str(name) for name in parse_json(index.read_bytes())["weight_map"].values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise HubError(f"{index}: not an index of safetensors files: {error!r}") from error


def _cached_folder(hub_id: HubId) -> Path:
    """Where the library keeps this revision. One whose commit is not known yet may be put there under its own name."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    storage = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=hub_id.repo, repo_type="model")
    ref = storage / "refs" / hub_id.revision
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else hub_id.revision
    return storage / "snapshots" / commit


def _download(hub_id: HubId) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    # Asked first, and once: the library's own look-ups wait without limit, or try again for half a minute.
    HfApi().model_info(hub_id.repo, revision=hub_id.revision, timeout=_TIMEOUT_S)
    return Path(
        snapshot_download(hub_id.repo, revision=hub_id.revision, allow_patterns=list(ALLOWED), etag_timeout=_TIMEOUT_S)
    )


def _unreachable() -> tuple[type[Exception], ...]:
    """What the library raises when the hub, the net, the disk or the user's rights are not as they should be."""
    # Of httpx or of httpx2, whichever the library is built on.
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    return (HTTPError, OSError, RuntimeError)  # RuntimeError: its downloader in Rust


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    return hide(mask_urls(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"))
