"""``python -m fusedres doctor``: what this machine can run, and why the rest cannot."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .. import dispatch, elf, native, reference, toolchain, triton_kernels
from ..ops.convolution import onednn_has
from .table import render


@dataclass(frozen=True)
class Finding:
    """One line: ``available`` is None for a plain fact, ``reason`` says why something is not."""

    name: str
    value: str
    available: bool | None = None
    reason: str | None = None


def examine() -> list[Finding]:
    """Everything ``doctor`` says, in its order."""
    found: list[Finding] = []
    for part in (_software, _library, _onednn, _cpu, _gpu, _triton, _compilers, _backends):
        found += part()
    return found


def main(as_json: bool) -> int:
    """Print the findings; 0 when at least the reference works, else 1."""
    found = examine()
    works = next(f for f in found if f.name == "backend reference").available
    if as_json:
        print(json.dumps([asdict(f) for f in found], indent=2))
    else:
        signs = {None: "", True: "yes", False: "no"}
        rows = [(f.name, signs[f.available], f.value, f.reason or "") for f in found]
        print(render(("what", "", "found", "reason"), rows))
    return 0 if works else 1


def _software() -> Iterator[Finding]:
    from .. import __version__  # the package is complete only once this module has been imported

    yield Finding("python", f"{platform.python_version()} on {platform.system()}")
    cuda, hip = torch.version.cuda, getattr(torch.version, "hip", None)
    build = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "CPU only"
    yield Finding("torch", f"{torch.__version__}, built for: {build}")
    yield Finding("fusedres", __version__)


def _library() -> Iterator[Finding]:
    error = native.load_error()
    lacks = _ops_without_kernel() if error is None else []
    if lacks:
        error = f"is of another version: it lacks {', '.join(lacks)}; build it again"
    yield Finding("native library", str(native.library_path()), error is None, error)
    if error is None:
        inside = native.ISA_NAMES if platform.machine() == "x86_64" else native.ISA_NAMES[:1]
        in_use = f"{native.cpu_isa()} in use, of {', '.join(inside)}"
        yield Finding("CPU kernels", in_use, True)
    yield _gpu_kernels()


def _gpu_kernels() -> Finding:
    """The library's CUDA kernels, by what it says and by what is in the file."""
    inside = native.cuda_inside()
    if native.load_error() is not None:
        return Finding("GPU kernels", "none", False, "they are in the native library")
    if inside is None:
        return Finding("GPU kernels", "none", False, "the library holds CPU kernels only")
    (major, minor), archs = inside
    value = f"CUDA {major}.{minor}: {' '.join(archs)}"
    found = elf.cuda_archs(native.library_path())
    if found != archs:
        return Finding("GPU kernels", value, False, f"the file holds {' '.join(found) or 'none'}")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if (reason := native.uncovered(index)) is not None:
            return Finding("GPU kernels", value, False, reason)
    return Finding("GPU kernels", value, True)


def _ops_without_kernel() -> list[str]:
    """Ops of this package that the loaded library does not implement."""
    names = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    names -= {f"fusedres_native::{op}" for op in dispatch.CUDA_ONLY}
    ours = sorted(name for name in names if name.startswith("fusedres_native::"))
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    keys = "CPU", "CompositeExplicitAutograd", "CompositeImplicitAutograd"
    return [name for name in ours if not any(has(name, key) for key in keys)]


def _onednn() -> Iterator[Finding]:
    available = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    reason = None if available else "this PyTorch has no oneDNN, or it is switched off"
    yield Finding("oneDNN convolution", "float32", available, reason)
    detour = "this CPU lacks the instructions: computed in float32, rounded once"
    for dtype in (torch.bfloat16, torch.float16):
        name, has = str(dtype).removeprefix("torch."), onednn_has(dtype)
        yield Finding("oneDNN convolution", name, has, None if has else detour)


def _cpu() -> Iterator[Finding]:
    capability = torch.backends.cpu.get_cpu_capability()
    model = _cpu_model() or platform.machine()
    yield Finding("CPU", f"{model}; PyTorch uses {capability}")
    yield Finding("threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors")


def _cpu_model() -> str | None:
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return None
    lines = info.read_text(errors="replace").splitlines()
    return next((s.partition(":")[2].strip() for s in lines if s.startswith("model name")), None)


def _gpu() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        built = torch.version.cuda or getattr(torch.version, "hip", None)
        reason = "PyTorch finds no device" if built else "this PyTorch is built for CPUs only"
        yield Finding("GPU", "none", False, reason)
    else:
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            name = torch.cuda.get_device_name(i)
            yield Finding("GPU", f"{i}: {name}, compute capability {major}.{minor}", True)


def _triton() -> Iterator[Finding]:
    reason = triton_kernels.missing()
    yield Finding("Triton", triton_kernels.version() or "none", reason is None, reason)
    folder = triton_kernels.package().cache_folder()
    reason = _not_writable(folder)
    yield Finding("measured choices", str(folder), reason is None, reason)


def _not_writable(folder: Path) -> str | None:
    """Why nothing can be kept in a folder that may not exist yet, or None."""
    there = next(p for p in (folder, *folder.parents) if p.exists())
    if not there.is_dir():
        return f"{there} is not a folder"
    return None if os.access(there, os.W_OK) else f"{there} cannot be written"


def _compilers() -> Iterator[Finding]:
    wanted = os.environ.get("FUSEDRES_CXX") or os.environ.get("CXX") or "g++"
    yield _compiler("C++ compiler", wanted, shutil.which(wanted))
    yield _compiler("nvcc", "nvcc", _nvcc())


def _compiler(name: str, wanted: str, path: str | None) -> Finding:
    if path is None:
        return Finding(name, "none", False, f"{wanted} is not on PATH; needed only for building")
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(name, path, False, f"{path} --version: {error}")
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    release = next((s for s in lines if "release" in s), lines[0] if lines else "")
    if done.returncode:
        return Finding(name, path, False, f"{path} --version exits with {done.returncode}")
    return Finding(name, f"{path}: {release}", True)


def _nvcc() -> str | None:
    """The nvcc that a build with CUDA kernels takes."""
    try:
        return toolchain.find_nvcc()
    except ValueError:  # FUSEDRES_NVCC names none
        return None


def _backends() -> Iterator[Finding]:
    for name, reason in dispatch.backends().items():
        reason = reason or _trial(name)
        value = "works: tried with batch_norm_act" if reason is None else ""
        yield Finding(f"backend {name}", value, reason is None, reason)


def _trial(backend: str) -> str | None:
    """Run one op; None, or what went wrong, whatever it was."""
    device, _ = dispatch.available_on(backend)
    x = torch.linspace(-1, 1, 48, device=device).view(2, 3, 2, 4)
    bn = None, None, None, None, None, True, 1e-5, "relu"
    try:
        with dispatch.backend(backend):
            y = torch.ops.fusedres.bn_act(x, *bn, False)[0]
        torch.testing.assert_close(y, reference.bn_act(x, *bn)[0])
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return None
