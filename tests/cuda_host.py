"""Compiles CUDA kernels for the host simulator (cuda_on_host/) and calls them on CPU tensors.

What is compiled lies in build/cuda_on_host/, under names that hold a hash of the sources: a
session compiles what changed, once.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import re
import struct
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
SIMULATOR = ROOT / "tests" / "cuda_on_host"
KERNELS = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "cuda_on_host"
PASSES = sorted(KERNELS.glob("stream_*.cu"))

COMMON = (
    "-std=c++17 -g1 -fPIC -Wall -Wextra -Wno-unknown-pragmas -Wno-sign-compare"
    " -fno-strict-aliasing -DFUSEDRES_CUDA_ON_HOST"
)
# Of the kernels, and of the runtime: that is not instrumented (cuda_on_host/README.md). float32 and
# bfloat16 stand for all dtypes under the sanitizers.
FLAVOURS = {
    "plain": ("-O1", "-O2"),
    "asan": (
        # of UBSan's checks those that ASan does not cover: the others double the time to compile
        "-O1 -DFUSEDRES_FEW_DTYPES -fsanitize=address,bounds,alignment,shift,signed-integer-overflow"
        ",integer-divide-by-zero -fno-sanitize-recover=all"
        " --param asan-instrumentation-with-call-threshold=0",
        "-O2 -DSIM_ASAN",
    ),
    "tsan": ("-O1 -DFUSEDRES_FEW_DTYPES -fsanitize=thread", "-O2 -DSIM_TSAN"),
}
ORDERS = ("forward", "reverse", "random")


# --- compiling


def compiler() -> str:
    return os.environ.get("FUSEDRES_CXX") or os.environ.get("CXX") or "g++"


def run(*command: str | Path) -> None:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"


@cache
def digest(*folders: Path) -> str:
    """Of all that an object can depend on: headers and sources, and the compiler."""
    found = hashlib.sha256()
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True).stdout
    found.update((version + COMMON + str(FLAVOURS)).encode())
    for folder in folders:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            found.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    for path in sorted((ROOT / "csrc").glob("*.h")):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Processes of pytest-xdist build one after another, and the second finds it done."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def objects(sources: Iterable[Path], name: str, flags: str, key: str) -> list[Path]:
    """Compile what is missing, two at a time."""
    jobs = []
    results = []
    for source in sources:
        target = BUILD / f"{name}.{source.stem}.{key}.o"
        results.append(target)
        if not target.exists():
            jobs.append((source, target))

    def compile_one(job: tuple[Path, Path]) -> None:
        source, target = job
        half_done = target.with_suffix(f".{os.getpid()}")
        options = f"{COMMON} {flags}".split()
        options += [f"-I{SIMULATOR / 'include'}", "-x", "c++"]
        run(compiler(), *options, "-c", source, "-o", half_done)
        half_done.replace(target)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, jobs))
    return results


def runtime(flavour: str) -> list[Path]:
    """The simulator itself."""
    sources = sorted((SIMULATOR / "runtime").glob("*.cpp"))
    key = digest(SIMULATOR / "runtime", SIMULATOR / "include")
    with locked(f"runtime.{flavour}"):
        return objects(sources, f"runtime.{flavour}", FLAVOURS[flavour][1], key)


def passes(flavour: str) -> list[Path]:
    """The kernels that several ops launch: what csrc/cuda/ compiles once, too."""
    with locked(f"passes.{flavour}"):
        return objects(
            PASSES, f"passes.{flavour}", FLAVOURS[flavour][0], digest(KERNELS, SIMULATOR)
        )


def build(
    name: str, sources: Iterable[Path], flavour: str = "plain", *, library: bool, ops: bool = True
) -> Path:
    """A shared library, or a program, of ``sources`` and the simulator; ``ops``: and the passes."""
    flags, key = FLAVOURS[flavour][0], digest(KERNELS, SIMULATOR)
    target = BUILD / f"{name}.{flavour}.{key}{'.so' if library else ''}"
    parts = [*runtime(flavour), *(passes(flavour) if ops else ())]
    with locked(f"{name}.{flavour}"):
        if not target.exists():
            parts = objects(sources, f"{name}.{flavour}", flags, key) + parts
            half_done = target.with_suffix(f".{os.getpid()}")
            kind = "-shared" if library else "-rdynamic"
            sanitize = [f for f in flags.split() if f.startswith("-fsanitize")]
            run(compiler(), kind, *sanitize, "-o", half_done, *parts, "-ldl")
            half_done.replace(target)
    return target


def program(name: str, sources: Iterable[Path], flavour: str, *, ops: bool = True) -> list[str]:
    """The command that starts a program, with what its sanitizer needs."""
    path = str(build(name, sources, flavour, library=False, ops=ops))
    # TSan's shadow memory does not fit every randomised address space.
    return ["setarch", "-R", path] if flavour == "tsan" else [path]


ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:exitcode=99",
    "UBSAN_OPTIONS": "exitcode=99",
    "TSAN_OPTIONS": "exitcode=66:history_size=0",
}


# --- params: the structs of csrc/cuda/<op>.cuh, read from there so that they cannot drift

_C_TYPES = {
    "int64_t": ctypes.c_int64,
    "int": ctypes.c_int,
    "double": ctypes.c_double,
    "bool": ctypes.c_bool,
    "Dtype": ctypes.c_int,
    "Act": ctypes.c_int,
    "Gate": ctypes.c_int,
}
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


@cache
def params_type(op: str) -> type[ctypes.Structure]:
    name = "".join(part.capitalize() for part in op.split("_")) + "Params"
    text = (KERNELS / f"{op}.cuh").read_text()
    body = re.search(rf"struct {name} {{(.*?)\n}};", text, re.S).group(1)
    fields = []
    for statement in re.sub(r"//.*", "", body).split(";"):
        words = statement.replace("*", "* ").replace(",", " ").split()
        if not words:
            continue
        words = words[1:] if words[0] == "const" else words
        kind = ctypes.c_void_p if words[0].endswith("*") else _C_TYPES[words[0]]
        fields += [(member, kind) for member in words[1:]]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


@dataclass
class Recording:
    """Calls as replay.cpp reads them: params with their pointers' memory."""

    calls: list[bytes] = field(default_factory=list)

    def add(self, name: str, params: ctypes.Structure, pointers: dict[str, Tensor]) -> None:
        data = bytes(params)
        parts = [struct.pack("<I", len(name)), name.encode(), struct.pack("<Q", len(data)), data]
        parts.append(struct.pack("<I", len(pointers)))
        for member, t in pointers.items():
            content = ctypes.string_at(t.data_ptr(), t.numel() * t.element_size())
            place = getattr(type(params), member).offset, t.data_ptr() % 16, len(content)
            parts += [struct.pack("<QQQ", *place), content]
        self.calls.append(b"".join(parts))


_recording: Recording | None = None


@contextlib.contextmanager
def record() -> Iterator[Recording]:
    """Keep the calls made inside."""
    global _recording
    _recording = Recording()
    try:
        yield _recording
    finally:
        _recording = None


class CudaError(RuntimeError):
    """A launch that failed, with the simulator's message."""


@cache
def library(op: str) -> ctypes.CDLL:
    source = SIMULATOR / "ops" / f"{op}.cpp"
    lib = ctypes.CDLL(str(build(op, [source], library=True)))
    lib.sim_workspace.restype = ctypes.c_int64
    lib.sim_workspace.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t]
    lib.sim_call.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    lib.sim_take_error.restype = ctypes.c_char_p
    lib.sim_take_launched.restype = ctypes.c_char_p
    lib.sim_set_order.argtypes = [ctypes.c_int, ctypes.c_ulonglong]
    lib.sim_error_string.restype = ctypes.c_char_p
    return lib


@dataclass
class Machine:
    """The simulated device, and the order its threads run in."""

    order: str = "forward"
    seed: int = 1
    sms: int = 4
    shared_bytes: int = 227 * 1024
    major: int = 9
    blocks_of_sm: int = 8  # as many of 256 threads as registers allow
    cluster_sms: int = 8  # among which the blocks of a cluster can be


_machine = Machine()
launched: list[str] = []  # the kernels' names
clusters: list[int] = []  # and how many blocks a cluster had


@contextlib.contextmanager
def machine(**options) -> Iterator[None]:
    """Run the calls inside on a device with these properties."""
    global _machine
    before, _machine = _machine, Machine(**options)
    try:
        yield
    finally:
        _machine = before


def call(op: str, direction: str, x: Tensor, /, **members) -> None:
    """Fill an op's params and launch it. ``x`` gives dtype, sizes and memory order."""
    lib = library(op)
    name = f"{op}_{direction}"
    n, c = x.shape[:2]
    hw = x[0, 0].numel() if n and c else 0
    # a size-1 image is NHWC by the contract
    planar = x.is_contiguous() and hw != 1
    members = dict(dtype=DTYPES[x.dtype], planar=planar, n=n, c=c, hw=hw) | members
    pointers = {k: v for k, v in members.items() if isinstance(v, Tensor)}
    values = {k: v.data_ptr() if isinstance(v, Tensor) else v for k, v in members.items()}
    params = params_type(op)(**{k: v for k, v in values.items() if v is not None})
    bytes_needed = lib.sim_workspace(name.encode(), ctypes.byref(params), ctypes.sizeof(params))
    assert bytes_needed >= 0, f"{name}: the params differ from csrc/cuda/{op}.cuh"
    if bytes_needed:
        buffer = torch.full((bytes_needed + 256,), 255, dtype=torch.uint8)
        start = -buffer.data_ptr() % 256
        pointers["workspace"] = buffer[start : start + bytes_needed]
        params.workspace = pointers["workspace"].data_ptr()
    if _recording is not None:
        _recording.add(name, params, pointers)
    device = asdict(_machine)
    order, seed = ORDERS.index(device.pop("order")), device.pop("seed")
    lib.sim_set_device(*device.values())
    lib.sim_set_order(order, seed)
    code = lib.sim_call(name.encode(), ctypes.byref(params))
    for line in lib.sim_take_launched().decode().splitlines():
        kernel, cluster = line.split()
        launched.append(kernel)
        clusters.append(int(cluster))
    if code:
        message = lib.sim_take_error().decode() or lib.sim_error_string(code).decode()
        raise CudaError(f"{name}: {message}")
