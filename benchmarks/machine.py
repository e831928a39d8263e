"""The machine that a figure comes from: what it is, and what it can do at most, measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import statistics
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

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "torchvision", "openvino", "numpy")
# What decides how oneDNN convolves: vector width, and instructions for reduced precision.
CPU_FLAGS = (
    "avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx_ne_convert", "amx_bf16", "amx_fp16",
)  # fmt: skip
COPY_BYTES = 256 * 2**20  # several times any last-level cache that two cores see
MATMUL_SIZE = 2048
REPEATS = 7


@dataclass(frozen=True)
class Rates:
    """The best that this machine does, in this process: bytes and flops a second."""

    copy_bandwidth: float
    matmul: dict[str, float]


def identity() -> dict:
    """The machine in words and numbers; nothing that names its owner or place."""
    flags = _cpuinfo("flags").split()
    return {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "flags": [f for f in CPU_FLAGS if f in flags],
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "cache_bytes": last_level_cache(),
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
    """Commit, whether the sources differ from it, and the date."""
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--", ".")
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


def last_level_cache() -> int:
    """Bytes of the largest cache of the first core; 32 MiB where the system does not say."""
    units = {"K": 2**10, "M": 2**20}
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * units.get(text[-1:], 1))
    return max(sizes, default=32 * 2**20)


class CacheFlush:
    """Writes more than the caches hold, on all threads, so that each timed call starts cold."""

    def __init__(self):
        self._buffer = torch.zeros(max(2 * last_level_cache(), 64 * 2**20) // 4)

    def __call__(self) -> None:
        self._buffer.add_(1)


def _median_seconds(call: Callable[[], object]) -> float:
    call()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure_rates() -> Rates:
    """Median copy bandwidth (bytes read and written) and matmul rates."""
    source = torch.ones(COPY_BYTES // 4)
    target = torch.empty_like(source)
    bandwidth = 2 * COPY_BYTES / _median_seconds(lambda: target.copy_(source))
    matmul = {}
    dtypes = [torch.float32, torch.bfloat16] if has_bf16_convolution() else [torch.float32]
    for dtype in dtypes:
        a = torch.randn(MATMUL_SIZE, MATMUL_SIZE, dtype=dtype)
        seconds = _median_seconds(lambda a=a: a @ a)
        matmul[str(dtype).removeprefix("torch.")] = 2 * MATMUL_SIZE**3 / seconds
    return Rates(bandwidth, matmul)


@cache
def rates() -> Rates:
    """``measure_rates()``, once in this process."""
    return measure_rates()


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


def describe() -> dict:
    """Everything above, for the head of a result file."""
    return {
        "machine": identity() | {"measured": asdict(rates())},
        "versions": versions(),
        **provenance(),
    }
