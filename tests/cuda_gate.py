"""Compiles every CUDA kernel for every GPU generation, without a GPU, and reads the machine code.

    python tests/cuda_gate.py [--library FILE] [ARCH ...]

prints a table and fails on what the kernels must not do: spill registers; where they stream
activations that are aligned, read or write them in pieces of less than 16 bytes; convolve without
tensor cores, or, where aligned, without asynchronous copies of 16 bytes; on Hopper, without wgmma
and tensor copies. With --library it reads what a build has compiled. Otherwise it compiles, two
files at a time.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "csrc")]

import build as library  # noqa: E402
from fusedres import elf, toolchain  # noqa: E402
from fusedres.report.table import render  # noqa: E402

SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


@dataclass(frozen=True)
class Streaming:
    """What a kernel that streams activations reads and writes."""

    reads: int  # tensors of activations
    writes: int
    numbers: int = 0  # stored one by one: statistics, and the sums of a block
    copies: int = 0  # tensors that come by asynchronous copies ("LDGSTS")
    wide: int | None = None  # the template argument that says: aligned; the others may be narrower


STREAMING = {
    "residual_mix_fwd_kernel": Streaming(3, 1, wide=1),
    "residual_mix_bwd_kernel": Streaming(4, 3, wide=1),
    "stream_stats_kernel": Streaming(1, 0, numbers=2, wide=2),
    "stream_fwd_apply_kernel": Streaming(2, 1, wide=2),
    "stream_bwd_reduce_kernel": Streaming(3, 0, numbers=2, wide=2),
    "stream_bwd_apply_kernel": Streaming(3, 2, wide=2),
    # two parts, and what they give: mean, var, scale; dweight, dbias, scale, q, r
    "bn_act_fwd_whole_kernel": Streaming(2, 1, numbers=5, copies=1, wide=2),
    "bn_act_bwd_whole_kernel": Streaming(3, 2, numbers=7, copies=2, wide=2),
    # squeezed; hidden, logits: loops
    "se_fwd_cluster_kernel": Streaming(1, 1, numbers=8, copies=1),
    "se_bwd_cluster_kernel": Streaming(1, 2, numbers=10, copies=1),  # dlogits, dhidden: loops; dy
}
# The same of the convolutions, whose operands come by asynchronous copies ("LDGSTS").
WIDE_CONV = {"conv_bn_act_fwd_kernel": 2, "conv_stats_fwd_kernel": 2}
# Kernels that only one architecture has, their file, and the instructions that they are about.
HOPPER, HOPPER_FILE, HOPPER_ARCH = "conv_sm90_kernel", "conv_sm90.cu", "90a"
HOPPER_INSTRUCTIONS = ("HGMMA", "UTMALDG", "USETMAXREG")
# What its warpgroups then share: a producer's 40 registers a thread and two consumers' 232. Of
# fewer, the consumers would wait for registers for ever.
HOPPER_REGISTERS = (40 + 2 * 232) // 3
# 16-byte accesses a pack of eight; float64 has the general kernels only
ACCESSES = {"float": 2, "__half": 1, "__nv_bfloat16": 1}


@dataclass(frozen=True)
class Found:
    """One kernel's machine code for one architecture."""

    kernel: str
    arguments: tuple[str, ...]  # of the template
    arch: str
    registers: int
    stack: int
    shared: int
    local: int
    counts: Counter

    @property
    def instructions(self) -> int:
        return sum(self.counts.values())

    def of(self, kind: str) -> int:
        """Instructions of a kind: "HMMA" counts HMMA.16816.F32 and its like."""
        return sum(n for name, n in self.counts.items() if f"{name}.".startswith(kind + "."))

    def widths(self, kind: str) -> dict[str, int]:
        """Global loads ("LDG", "LDGSTS") or stores ("STG") by width: "U8", "U16", "32", "64", "128"."""
        found: Counter = Counter()
        for name, n in self.counts.items():
            if name.startswith(kind + "."):
                width = re.search(r"\.(U8|S8|U16|S16|64|128)\b", name)
                found[width.group(1) if width else "32"] += n
        return dict(found)


def tool(name: str) -> str:
    """One of CUDA's binary utilities, which come with Triton too."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def compiled(cuda, source: Path, arch: str, folder: Path) -> list[Found]:
    cubin = folder / f"{source.stem}.{arch}.cubin"
    command = [cuda.nvcc, "-cubin", *library.nvcc_flags(replace(cuda, archs=(arch,))).split()]
    command += [library.TORCH_TARGET, "-isystem", library.torch_include(), source, "-o", cubin]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc failed for {source.name} sm_{arch}:\n{done.stderr}")
    if "wgmma" in done.stderr:  # ptxas: it serialised the products
        raise RuntimeError(f"{source.name} sm_{arch}:\n{done.stderr}")
    return read(cubin, arch)


def cuobjdump(*arguments: str | Path) -> str:
    """What it prints; it starts another tool of CUDA's."""
    path = f"{Path(tool('cuobjdump')).parent}:{os.environ['PATH']}"
    command = [tool("cuobjdump"), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"PATH": path}
    ).stdout


def read(file: Path, arch: str) -> list[Found]:
    """The kernels for one architecture in a cubin, or in a library."""
    which = () if file.suffix == ".cubin" else ("--gpu-architecture", f"sm_{arch}")
    text = cuobjdump(*which, "--dump-resource-usage", "--dump-sass", file)
    return list(kernels_in(text, arch))


def kernels_in(text: str, arch: str) -> Iterator[Found]:
    usage = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    codes = dict(part.split("\n", 1) for part in text.split("Function : ")[1:])
    names = [name for name, *_ in usage]
    demangled = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for (name, *numbers), told in zip(usage, demangled, strict=True):
        told = re.sub(r"[\w:]+<(\d+), (\d+)>", r"\1x\2", told)  # tiles
        function = re.search(r"(\w+)(?:<([^<>]*)>)?\(", told)
        arguments = tuple(re.sub(r"\([\w:]+\)", "", function[2] or "").split(", "))
        lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", codes[name])
        yield Found(function[1], arguments, arch, *map(int, numbers), Counter(lines))


def failures(found: Found) -> Iterator[str]:
    spills = sum(n for name, n in found.counts.items() if name.startswith(("STL", "LDL")))
    if found.stack or found.local or spills:
        yield f"spills: {found.stack} bytes of stack, {spills} local loads and stores"
    # not LDG and STG: the compiler did not see that it is global memory
    if generic := found.of("LD.E.128") + found.of("ST.E.128"):
        yield f"{generic} accesses of 16 bytes that could be of any memory"
    if found.kernel in WIDE_CONV:
        yield from convolution_failures(found)
    if found.kernel == HOPPER:
        for name in HOPPER_INSTRUCTIONS:
            if not found.of(name):
                yield f"no {name}"
        if found.widths("STG").get("128") is None:
            yield "no store of 16 bytes"
        if found.registers < HOPPER_REGISTERS:
            yield f"{found.registers} registers a thread to share out, wanted {HOPPER_REGISTERS}"
    rule = STREAMING.get(found.kernel)
    if rule is None or found.arguments[0] not in ACCESSES:
        return
    if rule.wide is None or found.arguments[rule.wide] in ("true", "1"):
        yield from narrow_accesses(found, rule)


def narrow_accesses(found: Found, rule: Streaming) -> Iterator[str]:
    """An unrolled loop and what is left of it are several whole packs of all tensors.

    Bytes of the mask are narrower, and so are coefficients, which are numbers of four bytes.
    """
    each = ACCESSES[found.arguments[0]]
    accesses = (
        ("loads", "LDG", rule.reads, {"32", "U8"}),
        ("copies", "LDGSTS", rule.copies, set()),
        ("stores", "STG", rule.writes, {"U8"}),
    )
    for what, instruction, tensors, narrow in accesses:
        widths = found.widths(instruction)
        whole = widths.pop("128", 0)
        if whole < tensors * each or whole % each:
            yield f"{whole} {what} of 16 bytes for {tensors} tensors"
        if what == "stores" and widths.pop("32", 0) > rule.numbers:
            yield f"stores of four bytes beside the {rule.numbers} numbers"
        if pieces := {w: n for w, n in widths.items() if w not in narrow}:
            yield f"{what} of less than 16 bytes: {pieces}"


def convolution_failures(found: Found) -> Iterator[str]:
    for instruction in ("HMMA", "LDSM"):
        if not found.of(instruction):
            yield f"no {instruction}"
    if found.arguments[WIDE_CONV[found.kernel]] not in ("true", "1"):
        return
    if set(found.widths("LDGSTS")) != {"128"}:
        yield f"asynchronous copies: wanted 16 bytes each, got {found.widths('LDGSTS')}"
    stores = {w: n for w, n in found.widths("STG").items() if w not in ("32", "128")}
    if stores or not found.widths("STG").get("128"):  # 32: the statistics
        yield f"stores: wanted 16 bytes each, got {found.widths('STG')}"


def table(results: list[Found]) -> str:
    columns = (
        "kernel", "for", "sm", "registers", "shared", "instructions", "HMMA, HGMMA", "loads", "copies",
        "stores",
    )  # fmt: skip
    rows = []
    for f in results:
        told = [
            " ".join(f"{n}x{width}" for width, n in sorted(f.widths(kind).items()))
            for kind in ("LDG", "LDGSTS", "STG")
        ]
        rows.append((
            f.kernel.removesuffix("_kernel"), " ".join(f.arguments), f.arch, str(f.registers),
            str(f.shared), str(f.instructions), str(f.of("HMMA") + f.of("HGMMA")), *told,
        ))  # fmt: skip
    return render(columns, sorted(rows), numeric=columns[3:7])


def everything(archs: list[str], built: Path | None) -> list[Found]:
    """The kernels, compiled now or read from a library."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        if built is not None:
            jobs = [pool.submit(read, built, arch) for arch in archs or elf.cuda_archs(built)]
        else:
            os.environ["FUSEDRES_CUDA_ARCHS"] = " ".join(archs or toolchain.ALL)
            cuda = library.find_cuda()
            jobs = [
                pool.submit(compiled, cuda, source, arch, Path(folder))
                for arch in cuda.archs
                for source in SOURCES
                if source.name != HOPPER_FILE or arch == HOPPER_ARCH
            ]
        # kernels of a header that several files include are compiled in each: shown once
        unique = {(f.kernel, f.arguments, f.arch): f for job in jobs for f in job.result()}
    # in a library the other architectures hold Hopper's kernels without a body
    return [f for f in unique.values() if f.kernel != HOPPER or f.arch == HOPPER_ARCH]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--library", type=Path, metavar="FILE")
    parser.add_argument("archs", nargs="*", metavar="ARCH")
    options, start = parser.parse_args(), time.monotonic()
    results = everything(options.archs, options.library)
    print(table(results))
    wrong = [(f, message) for f in results for message in failures(f)]
    for f, message in wrong:
        print(f"{f.kernel} <{', '.join(f.arguments)}> sm_{f.arch}: {message}")
    seconds = time.monotonic() - start
    print(f"{len(results)} kernels in {seconds:.0f} s, {len(wrong)} failures")
    of_hopper = {HOPPER} if HOPPER_ARCH in {f.arch for f in results} else set()
    missing = (STREAMING.keys() | WIDE_CONV.keys() | of_hopper) - {f.kernel for f in results}
    if missing:
        print(f"no such kernel any more: {', '.join(sorted(missing))}")
    return bool(wrong or missing)


if __name__ == "__main__":
    sys.exit(main())
