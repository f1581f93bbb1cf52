"""In front of PYTHONPATH this makes of an interpreter, and of all that it starts, one with few packages: the standard
library, those that a borrowed GPU machine has (torch, numpy, msgpack, safetensors, pyzmq, and what they import
themselves), and our own. Whatever else is installed is not found.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import BuiltinImporter, FrozenImporter, ModuleSpec, PathFinder
from types import ModuleType

THEIRS = {"torch", "numpy", "msgpack", "safetensors", "zmq"}
OF_TORCH = {"functorch", "torchgen", "triton", "typing_extensions", "sympy", "mpmath", "networkx", "jinja2"}
OF_TORCH |= {"markupsafe", "fsspec", "filelock", "setuptools", "pkg_resources", "_distutils_hack"}
OURS = {"graph", "stages", "deploy", "model_shards", "tests"}


class Bare(MetaPathFinder):
    """Finds these where they are, and anything else in a folder of stand-ins only."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        top = name.partition(".")[0]
        is_free = top in sys.stdlib_module_names | THEIRS | OF_TORCH | OURS or top.startswith("_sysconfigdata")
        if path is None and not is_free:
            path = [entry for entry in sys.path if entry.endswith("standins")]
        return PathFinder.find_spec(name, path)

    find_distributions = staticmethod(PathFinder.find_distributions)  # versions are told of all


sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Bare()]
