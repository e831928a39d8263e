"""csrc/cuda/*.cu with its kernels on the host simulator, as PyTorch ops on CPU tensors.

What a GPU's library does from tensors to launches is compiled here with the host's compiler: the
checks of arguments, parameters of other dtypes, scratch memory, what is allocated and returned.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from unittest import mock

import torch

import cuda_host
import fusedres
from fusedres import triton_kernels
from fusedres.ops import bn_act, bn_se_act, conv_bn_act, conv_stats, residual_mix, squeeze_excite

CSRC = cuda_host.ROOT / "csrc"
SCHEMAS = (
    bn_act.STATS_SCHEMA, bn_act.SCHEMA, bn_act.BACKWARD_SCHEMA,
    squeeze_excite.SCHEMA, squeeze_excite.BACKWARD_SCHEMA,
    bn_se_act.SCHEMA, bn_se_act.BACKWARD_SCHEMA,
    residual_mix.SCHEMA, residual_mix.BACKWARD_SCHEMA,
    conv_bn_act.OWN.schema, conv_stats.OWN.schema,
)  # fmt: skip


def _torch_flags() -> str:
    include = Path(importlib.util.find_spec("torch").origin).parent / "include"
    # torch's headers first: the simulator's __noinline__ would change an attribute in them
    first = f"-include {CSRC / 'cuda' / 'host.h'}"
    target = "-DTORCH_TARGET_VERSION=0x020a000000000000"
    return f"{target} -fvisibility=hidden -isystem {include} {first}"


@cache
def built() -> Path:
    """The library; compiles what changed."""
    sources = {*(CSRC / "cuda").glob("*.cu")} - {*cuda_host.PASSES}
    sources |= {CSRC / "cuda" / "registration.cpp", CSRC / "view.cpp"}
    key = hashlib.sha256(cuda_host.digest(cuda_host.KERNELS, cuda_host.SIMULATOR).encode())
    key.update((CSRC / "view.cpp").read_bytes() + Path(__file__).read_bytes())
    key.update(torch.__version__.encode())
    key = key.hexdigest()[:16]
    target = cuda_host.BUILD / f"glue.{key}.so"
    shared = cuda_host.runtime("plain") + cuda_host.passes("plain")
    with cuda_host.locked("glue"):
        if not target.exists():
            parts = cuda_host.objects(sorted(sources), "glue", f"-O1 {_torch_flags()}", key)
            half_done = target.with_suffix(f".{os.getpid()}")
            torch_libraries = f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"
            link = cuda_host.compiler(), "-shared", "-o", half_done, *parts, *shared, "-ldl"
            cuda_host.run(*link, *torch_libraries)
            half_done.replace(target)
    return target


@cache
def simulated() -> ctypes.CDLL:
    """The simulator in the library."""
    simulator = ctypes.CDLL(str(built()))
    simulator.sim_set_device(4, 227 * 1024, 9, 8, 8)
    return simulator


@cache
def ops():
    """The namespace of the ops, ``torch.ops.fusedres_on_host``."""
    library = torch.library.Library("fusedres_on_host", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    library.define("cuda_launches() -> int")
    _kept.append(library)
    torch.ops.load_library(str(built()))
    simulated()
    return torch.ops.fusedres_on_host


_kept: list[torch.library.Library] = []  # a library's definitions live as long as the object


@contextlib.contextmanager
def glue_on_host() -> Iterator[None]:
    """Ops run their CUDA implementations on the simulator, in the place of Triton's."""
    names = {schema.partition("(")[0] for schema in SCHEMAS}
    replaced = mock.patch.multiple(
        triton_kernels,
        has=names.__contains__,
        launcher=lambda op: getattr(ops(), op),
        can_run=lambda op, x, by_name: None,
    )
    with replaced, fusedres.backend("triton"):
        yield
