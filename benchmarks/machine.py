"""The machine that a figure comes from: what it is, and what it can do at most, measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

import torch

import fusedres
from fusedres import native

from .clock import Clock, last_level_cache

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "torchvision", "openvino", "onnxruntime", "triton", "tensorrt", "numpy")
PACKAGES += ("nvidia-cudnn-frontend",)
# What decides how oneDNN convolves: vector width, and instructions for reduced precision.
CPU_FLAGS = (
    "avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx_ne_convert", "amx_bf16", "amx_fp16",
)  # fmt: skip
COPY_BYTES = 256 * 2**20  # several times any last-level cache that two cores see
MATMUL_SIZE = 2048
REPEATS = 12


@dataclass(frozen=True)
class Rates:
    """The best that this machine does, in this process: bytes and flops a second."""

    copy_bandwidth: float
    matmul: dict[str, float]

    def flops(self, dtype: torch.dtype) -> float:
        """The matmul rate in ``dtype``, or in float32 where there is no faster one."""
        return self.matmul.get(str(dtype).removeprefix("torch."), self.matmul["float32"])


def identity() -> dict:
    """The machine in words and numbers; nothing that names its owner or place."""
    flags = _cpuinfo("flags").split()
    return {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "flags": [f for f in CPU_FLAGS if f in flags],
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "cache_bytes": last_level_cache(torch.device("cpu")),
        "system": f"{platform.system()} {platform.machine()}",
        "onednn_bf16_convolution": has_bf16_convolution(),
        "fusedres_isa": native.cpu_isa(),
    }


def has_bf16_convolution() -> bool:
    """Whether oneDNN convolves bfloat16 on this CPU (else aten's slow fallback does)."""
    supported = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    return supported and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    onednn = re.search(r"MKL-DNN v([\d.]+)", torch.__config__.show())
    found["onednn"] = onednn and onednn[1]
    found["fusedres"] = fusedres.__version__
    return found


def provenance() -> dict:
    """Commit, whether the sources (results aside) differ from it, and the date."""
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {
        "commit": commit,
        "modified": bool(changes) if commit else None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "backends": fusedres.backends(),
    }


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpuinfo(field: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    found = re.search(rf"^{field}\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1] if found else ""


def measure_rates(device: torch.device) -> Rates:
    """The best copy bandwidth (bytes read and written) and matmul rates of a few repeats."""
    clock = Clock(device)

    def best(call: Callable[[], object]) -> float:
        call()
        return min(clock.seconds_at_once(call) for _ in range(REPEATS))

    size = COPY_BYTES * (4 if device.type == "cuda" else 1)
    matmul = {}
    for dtype in _fast_dtypes(device):
        n = MATMUL_SIZE * (4 if device.type == "cuda" else 1)
        a = torch.randn(n, n, dtype=dtype, device=device)
        matmul[str(dtype).removeprefix("torch.")] = 2 * n**3 / best(lambda a=a: a @ a)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return Rates(2 * size / best(lambda: target.copy_(source)), matmul)


def _fast_dtypes(device: torch.device) -> list[torch.dtype]:
    if device.type == "cuda":
        return [torch.float32, torch.bfloat16, torch.float16]
    return [torch.float32, torch.bfloat16] if has_bf16_convolution() else [torch.float32]


@cache
def rates(device: torch.device) -> Rates:
    """``measure_rates()``, once in this process."""
    return measure_rates(device)


class OtherLoad:
    """How many cores were busy with other processes while the block ran; None where unknown."""

    def __enter__(self) -> OtherLoad:
        self._start = _cpu_seconds()
        self.cores: float | None = None
        return self

    def __exit__(self, *exc) -> None:
        end = _cpu_seconds()
        if self._start is not None and end is not None:
            wall, busy, own = (b - a for a, b in zip(self._start, end, strict=True))
            self.cores = round(max(0.0, busy - own) / wall, 2)


def _cpu_seconds() -> tuple[float, float, float] | None:
    """(wall, busy on all cores, this process and its children), in seconds."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return time.monotonic(), busy, sum(os.times()[:4])


def gpu() -> dict | None:
    """The CUDA device and its driver, or None."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "memory_bytes": found.total_memory,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.splitlines()[0].strip()


def devices() -> list[torch.device]:
    """The CPU, and a GPU where there is one."""
    names = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [torch.device(name) for name in names]


def describe() -> dict:
    """Everything above, for the head of a result file."""
    measured = {d.type: asdict(rates(d)) for d in devices()}
    return {
        "machine": identity() | {"measured": measured},
        "gpu": gpu(),
        "versions": versions(),
        **provenance(),
    }
