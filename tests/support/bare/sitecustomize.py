"""In front of PYTHONPATH this makes of an interpreter, and of all that it starts, one with few packages: the standard
library, those that a borrowed GPU machine has (torch, numpy, msgpack, safetensors, pyzmq, and what they import
themselves), and our own. Whatever else is installed can't be imported.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

THEIRS = {"torch", "numpy", "msgpack", "safetensors", "zmq"}
OF_TORCH = {
    "functorch",
    "torchgen",
    "triton",
    "typing_extensions",
    "sympy",
    "mpmath",
    "networkx",
    "jinja2",
    "markupsafe",
}
OF_TORCH |= {"fsspec", "filelock", "setuptools", "pkg_resources", "_distutils_hack"}
OURS = {"graph", "stages", "deploy", "model_shards", "tests", "sitecustomize"}


class Bare(MetaPathFinder):
    """Refuses to find anything else, but for what lies in a folder of stand-ins."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names | THEIRS | OF_TORCH | OURS or top.startswith("_sysconfigdata"):
            return None
        standins = [entry for entry in sys.path if entry.endswith("standins")]
        found = PathFinder.find_spec(name, standins if path is None else path)
        if found is None or not any((found.origin or "").startswith(entry) for entry in standins):
            raise ModuleNotFoundError(f"No module named {name!r}: it is not among the few", name=name)
        return found


sys.meta_path.insert(0, Bare())
