"""Are the four packages ours? Their names are common; another distribution could shadow one of them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("graph", "model_shards", "stages", "deploy")


class PackageCollision(Exception):
    """Another distribution's package of the same name is in the way."""


def check_packages() -> None:
    """Raises PackageCollision when the packages do not lie in one folder, and says which is foreign."""
    folders = {name: _folder(name) for name in PACKAGES}
    ours = folders["deploy"]
    foreign = {name: folder for name, folder in folders.items() if folder != ours}
    if foreign:
        listed = ", ".join(f"{name!r} comes from {folder}" for name, folder in foreign.items())
        raise PackageCollision(
            f"our packages lie in {ours}, but {listed}; uninstall what brings it, or use a fresh .venv"
        )


def _folder(name: str) -> Path | None:
    spec = find_spec(name)
    return Path(spec.origin).resolve().parent.parent if spec is not None and spec.origin else None
