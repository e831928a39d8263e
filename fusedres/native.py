"""Loads the compiled library, and remembers why when it, or its CUDA kernels, cannot be used."""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from . import elf, toolchain

ISA_NAMES = ("portable", "avx2", "avx512")

# The words of csrc/cuda/host.h for a launch that did not start, and left the device as it was.
REFUSED = "the launch was refused"

# The words of PyTorch's headers for a function of its own that failed, and those that allocate.
FAILED = "API call failed at"
ALLOCATES = re.compile(r"aten::(?:\w*empty|clone|contiguous|to\b)|aoti_torch_\w*empty")

_refusals: dict[tuple[str, int], str] = {}  # by op and device
_lock = threading.Lock()


def library_path() -> Path:
    """Where the compiled library is looked for; FUSEDRES_LIBRARY names another one."""
    override = os.environ.get("FUSEDRES_LIBRARY")
    return Path(override) if override else Path(__file__).with_name("_C.so")


@cache
def load_error() -> str | None:
    """Load the library once; None, or the reason it is not there."""
    path = library_path()
    if not path.is_file():
        return f"{path.name} is not built: run `make build`, or install a wheel"
    if elf.is_cut_short(path):
        return f"{path.name} does not load: the file is cut short; build or install it again"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{path.name} does not load: {str(error).splitlines()[0]}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("fusedres_native::bn_act", "CPU"):
        return f"{path.name} is not the library of fusedres"
    return None


def cpu_isa() -> str | None:
    """The instruction set the CPU kernels run with, or None without the library."""
    if load_error() is not None:
        return None
    return ISA_NAMES[torch.ops.fusedres_native.cpu_isa()]


@cache
def _last_words() -> Callable[[], bytes | None]:
    """Tells why a function of PyTorch's failed in this thread; PyTorch does from 2.13 on."""
    found = sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"))
    library = ctypes.CDLL(str(found[0])) if found else None
    tell = getattr(library, "torch_exception_get_what_without_backtrace", None)
    if tell is None:
        return lambda: None
    tell.restype = ctypes.c_char_p
    return tell


def explained(op: str, x: Tensor, error: RuntimeError) -> RuntimeError:
    """``error`` of the library; its reason where PyTorch's headers said no more than "failed".

    They do when memory runs out: on a GPU that is PyTorch's own error for it again.
    """
    if FAILED not in str(error):
        return error
    on_cpu = x.device.type == "cpu"
    words = (_last_words()() or b"").decode().split("\n\n")[0]
    if not words and ALLOCATES.search(str(error)):
        words = "DefaultCPUAllocator: can't allocate memory" if on_cpu else "CUDA out of memory."
    kind = torch.OutOfMemoryError if "out of memory" in words and not on_cpu else RuntimeError
    return kind(f"{op}: {words or error}")


# --- CUDA


@cache
def cuda_inside() -> tuple[tuple[int, int], tuple[str, ...]] | None:
    """The CUDA release and the architectures of the kernels in the library; None without any."""
    if load_error() is not None:
        return None
    told = torch.ops.fusedres_native.cuda_inside()
    if not told:
        return None
    release, _, archs = told.partition(":")
    major, _, minor = release.partition(".")
    return (int(major), int(minor)), tuple(archs.split(","))


def cuda_launches() -> int:
    """How many kernels this thread has launched so far."""
    return torch.ops.fusedres_native.cuda_launches()


@cache
def driver() -> tuple[int, int] | None:
    """The CUDA release that the NVIDIA driver is made for; None without a driver."""
    version = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()  # 13020 is 13.2
    return (version // 1000, version % 1000 // 10) if version else None


@cache
def uncovered(index: int) -> str | None:
    """Why a library with CUDA kernels has none that run on this device, and the fix; or None."""
    inside = cuda_inside()
    if inside is None:
        return None
    (major, _), archs = inside
    found = driver()
    if found is not None and found[0] < major:  # CUDA's minor versions are compatible
        return (
            "the driver is made for CUDA {}.{}, the library's kernels for CUDA {}: update the"
            " NVIDIA driver, or build the library with an older nvcc"
        ).format(*found, major)
    capability = torch.cuda.get_device_capability(index)
    if any(toolchain.covers(arch, capability) for arch in archs):
        return None
    own = toolchain.arch_of(capability)
    fix = "there are none for it: they need 8.0" if own is None else _fix(own)
    return "{} has compute capability {}.{}, the library's kernels are for {}: {}".format(
        torch.cuda.get_device_name(index), *capability, " ".join(archs), fix
    )


def _fix(arch: str) -> str:
    wheel = "install the wheel for all GPUs, or in the sources run"
    return f"{wheel} FUSEDRES_CUDA_ARCHS={arch} pip install --no-build-isolation ."


@cache
def has_cuda_kernel(op: str) -> bool:
    name = f"fusedres_native::{op}"
    defined = torch._C._dispatch_has_kernel(name)
    return defined and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")


def cuda_reason(op: str, index: int) -> str | None:
    """Why the library cannot run ``op`` on this CUDA device, or None."""
    if (error := load_error()) is not None:
        return error
    if cuda_inside() is None:
        return "the library holds CPU kernels, x is on cuda"
    if torch.version.hip is not None:
        return "the kernels are compiled for NVIDIA GPUs only, this PyTorch is built for ROCm"
    if not has_cuda_kernel(op):
        return f"there is no CUDA kernel for {op}"
    return uncovered(index) or _refusals.get((op, index))


def refuse(op: str, index: int, error: RuntimeError) -> str:
    """From now on ``op`` cannot run on this device: its launch was refused. Returns the reason."""
    reason = str(error).splitlines()[0]
    with _lock:
        _refusals[op, index] = reason
    return reason
