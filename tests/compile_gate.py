"""Compiles every Triton kernel for every GPU generation, without a GPU, and reads the machine code.

    python tests/compile_gate.py [--full]

prints a table and fails on what the kernels must not do: spill registers, take more shared memory
than there is, compute products without the tensor cores, go without the tensor descriptors they
claim, or read or write the activations in pieces of less than 16 bytes (gate_rules.py). What is
compiled is what the launchers launch: they run on meta tensors (gate_calls.py), and each launch is
recorded instead of started (``launch.dry_run``).

By default every combination of operands is compiled in bf16 and fp16 with the first configuration,
and every other configuration once, for one architecture in turn, so that every kernel is compiled
for all; --full compiles every configuration in bf16, fp16 and fp32 for every architecture.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from fusedres import triton_kernels  # noqa: E402
from fusedres.report.table import render  # noqa: E402
from gate_calls import CALLS, configuration, variant  # noqa: E402
from gate_rules import Found, Job, failures  # noqa: E402

ARCHS = (80, 90, 100, 120)
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
HALF = (torch.bfloat16, torch.float16)
TYPES = {**DTYPES, torch.uint8: "u8", torch.bool: "i1", torch.float64: "fp64", torch.int32: "i32"}


# --- what is launched


def jobs(full: bool) -> list[Job]:
    """What to compile, each once."""
    launch = importlib.import_module("fusedres.kernels.launch")
    found: dict[Job, None] = {}
    turns: Counter = Counter()  # of the architectures, by kernel
    variants: set = set()
    configurations: set = set()
    for dtype, nhwc in itertools.product(DTYPES if full else HALF, (True, False)):
        for call in CALLS:
            with launch.dry_run() as launches:
                call(dtype, nhwc)
            for one in launches:
                default = (dtype, variant(one)) not in variants
                another = configuration(one) not in configurations
                variants.add((dtype, variant(one)))
                configurations.add(configuration(one))
                if full or default or another:
                    archs = archs_of(one.flags)
                    archs = archs if full else (archs[turns[one.name] % len(archs)],)
                    new = [job_of(one, DTYPES[dtype], arch) for arch in archs]
                    turns[one.name] += 1
                    found |= dict.fromkeys(new)
    compiled_for = {(job.kernel, job.arch) for job in found}
    for job, arch in itertools.product(list(found), ARCHS):  # of a kernel that had too few turns
        if (job.kernel, arch) not in compiled_for and arch in archs_of(dict(job.constants)):
            compiled_for.add((job.kernel, arch))
            found[replace(job, arch=arch)] = None
    return list(found)


def archs_of(flags: dict) -> tuple[int, ...]:
    """The architectures on which a launch with these flags may happen."""
    return tuple(arch for arch in ARCHS if arch >= 90 or not flags.get("TMA"))


def job_of(launch, dtype: str, arch: int) -> Job:
    """The specialisation that Triton would choose for the arguments of a launch."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    signature, constants, aligned = {}, {}, []
    for i, (parameter, value) in enumerate(zip(launch.kernel.params, launch.args, strict=False)):
        name = parameter.name
        signature[name] = "constexpr"
        if value is None:
            constants[name] = None
        elif isinstance(value, TensorDescriptor):
            block = ",".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}[{block}]>"
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            aligned.append(i)
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            constants[name] = 1
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                aligned.append(i)
    for name, value in launch.flags.items():
        signature[name], constants[name] = "constexpr", value
    kernel = launch.kernel.fn
    return Job(
        kernel.__module__, kernel.__name__, dtype, arch, tuple(launch.options.items()),
        tuple(signature.items()), tuple(constants.items()), tuple(aligned),
    )  # fmt: skip


# --- compiling, in a worker process


def compiled(job: Job) -> Found:
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    triton_kernels.package()
    kernel = getattr(importlib.import_module(job.module), job.kernel)
    source = ASTSource(
        fn=kernel, signature=dict(job.signature), constexprs=dict(job.constants),
        attrs={(i,): [["tt.divisibility", 16]] for i in job.aligned},
    )  # fmt: skip
    try:
        binary = triton_compile(
            source, target=GPUTarget("cuda", job.arch, 32), options=dict(job.options)
        )
    except Exception as error:
        return Found(job, error=f"{type(error).__name__}: {error}")
    return read_machine_code(job, binary.asm["cubin"], binary.metadata.shared)


def read_machine_code(job: Job, cubin: bytes, shared: int) -> Found:
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", "--dump-sass", file.name],
            env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"},
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", text, re.M)
    counts = Counter(lines)
    return Found(job, *map(int, usage.groups()), shared, len(lines), counts)


def table(results: list[Found]) -> str:
    columns = "kernel", "dtype", "sm", "warps", "registers", "shared", "instructions", "loads"
    rows = []
    for f in results:
        sizes = f.widths("LDG")
        loads = " ".join(f"{n}x{width}" for width, n in sorted(sizes.items()))
        rows.append((
            f.job.kernel.removesuffix("_kernel"), f.job.dtype, str(f.job.arch), str(f.job.warps),
            str(f.registers), str(f.shared), str(f.instructions), loads, f.job.flags,
        ))  # fmt: skip
    return render((*columns, "flags"), sorted(rows), numeric=columns[2:7])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="every configuration everywhere")
    full = parser.parse_args().full
    os.environ.pop("TRITON_INTERPRET", None)
    triton_kernels.package()
    todo, start = jobs(full), time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        results = list(pool.map(compiled, todo, chunksize=4))
    print(table(results))
    wrong = [(f.job, message) for f in results for message in failures(f)]
    for job, message in wrong:
        print(f"{job.kernel} sm_{job.arch} {job.dtype} {job.flags}: {message}")
    seconds = time.monotonic() - start
    print(f"{len(results)} kernels compiled in {seconds:.0f} s, {len(wrong)} failures")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
