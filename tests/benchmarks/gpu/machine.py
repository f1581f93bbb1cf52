"""Part 1: what it is measured on, and which of torch's features there are."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from tests.benchmarks.gpu.parts import Entry, Request

PACKAGES: Final = ("torch", "numpy", "msgpack", "safetensors", "pyzmq", "triton", "flash-attn", "torchao")


def measure(request: Request) -> Iterator[Entry]:
    import torch

    on_gpu = request.device == "cuda"
    yield (
        "machine",
        {
            "gpu": torch.cuda.get_device_name() if on_gpu else None,
            "gpu_memory_gib": round(torch.cuda.mem_get_info()[1] / 2**30, 1) if on_gpu else None,
            "capability": ".".join(map(str, torch.cuda.get_device_capability())) if on_gpu else None,
            "driver": _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
            if on_gpu
            else None,
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "load_before": round(os.getloadavg()[0], 2),
        },
    )
    yield (
        "versions",
        {
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            **{name: _version(name) for name in PACKAGES},
            "commit": _output(["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]),
        },
    )
    yield "features", {name: _tried(look) for name, look in FEATURES.items()}


def _attention(name: str) -> str:
    """Whether the LLM and the talker may have this kernel here, by the function that they ask. Raises ModelError."""
    import torch

    from model_shards.attention import choose_attention

    device = "cuda" if torch.cuda.is_available() else "cpu"
    choose_attention(device, torch.bfloat16, name)
    chosen = choose_attention(device, torch.bfloat16)
    return "chosen" if name == chosen else f"runs; {chosen} is chosen"


def _graphs() -> str:
    """A graph is captured and played."""
    import torch

    x = torch.zeros(8, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x + 1
    graph.replay()
    torch.cuda.synchronize()
    return f"captured: {float(y[0]) == 1.0}"


def _fp8() -> str:
    """A product of two matrices in fp8."""
    import torch

    x = torch.ones(32, 32, device="cuda").to(torch.float8_e4m3fn)
    one = torch.ones((), device="cuda")
    out = torch._scaled_mm(x, x.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    return f"_scaled_mm: {float(out[0, 0]) == 32.0}"


def _int4() -> str:
    """A product with weights in 4 bits, as torch packs them."""
    import torch

    codes = torch.zeros(64, 64, dtype=torch.uint8, device="cuda")
    packed = torch._convert_weight_to_int4pack(codes, 2)
    scales = torch.ones(2, 64, 2, dtype=torch.bfloat16, device="cuda")
    torch._weight_int4pack_mm(torch.ones(1, 128, dtype=torch.bfloat16, device="cuda"), packed, 64, scales)
    return "_weight_int4pack_mm"


def _mps() -> str:
    """Would processes share the GPU side by side? Without MPS their kernels take turns."""
    return "runs" if Path("/tmp/nvidia-mps/control").exists() else "does not run: kernels of processes take turns"


FEATURES: Final[dict[str, Callable[[], str]]] = {
    **{f"{name} attention": partial(_attention, name) for name in ("flash", "varlen", "sdpa")},
    "cuda_graphs": _graphs,
    "fp8": _fp8,
    "int4": _int4,
    "mps": _mps,
}


def _tried(look: Callable[[], str]) -> dict[str, Any]:
    try:
        return {"there": True, "says": look()}
    except Exception as error:  # whatever a torch without it raises
        return {
            "there": False,
            "says": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}",
        }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _output(command: list[str]) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
