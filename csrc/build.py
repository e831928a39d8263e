"""What is compiled, with which flags, and how it is linked: the library's build as ninja text.

setup.py and the tests use it. Without CUDA architectures only g++ is needed; with them every
csrc/cuda/<op>.cu is one object with machine code for each. The library links to torch by name
only and holds CUDA's runtime itself, so it loads beside a torch for CPUs and beside one for CUDA.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from setuptools.errors import CompileError, PlatformError

ROOT = Path(__file__).resolve().parents[1]
TORCH_LIBS = ("torch", "torch_cpu", "c10")
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # 2.10
AVX2 = "-mavx2 -mfma -mf16c"
ISAS = {
    "portable": "",
    "avx2": AVX2,
    # GCC 12 warns about _mm512_undefined_epi32 in its own header
    "avx512": f"{AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -Wno-uninitialized"
    " -Wno-maybe-uninitialized",
}


def _load(path: Path):
    """A file by itself: importing the package would need the library."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toolchain = _load(ROOT / "fusedres" / "toolchain.py")
glibc = _load(ROOT / "csrc" / "glibc.py")


@dataclass(frozen=True)
class Cuda:
    """An nvcc, and what it is to compile for."""

    archs: tuple[str, ...]
    nvcc: str
    release: tuple[int, int]
    libraries: tuple[str, ...]  # folders that hold CUDA's static runtime

    @property
    def flags(self) -> str:
        codes = [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in self.archs]
        return " ".join(codes)


# --- what is asked for, and what there is


def wanted_archs() -> tuple[str, ...]:
    """What FUSEDRES_CUDA_ARCHS names; where it is not set, the GPUs of this machine."""
    text = os.environ.get("FUSEDRES_CUDA_ARCHS")
    try:
        return toolchain.present_archs() if text is None else toolchain.parse(text)
    except ValueError as error:
        raise PlatformError(str(error)) from None


def find_cuda() -> Cuda | None:
    """The CUDA part of the build, or None for CPU kernels only.

    Raises:
        PlatformError: architectures were asked for, and there is no nvcc that compiles for them.
    """
    archs, asked = wanted_archs(), "FUSEDRES_CUDA_ARCHS" in os.environ
    if not archs:
        return None
    try:
        nvcc = toolchain.find_nvcc()
    except ValueError as error:
        raise PlatformError(str(error)) from None
    names, fix = " ".join(archs), f"pip install '{toolchain.PACKAGES}'"
    if nvcc is None:
        problem = f"no nvcc was found to compile CUDA kernels for {names}"
        places = "FUSEDRES_NVCC, the packages, CUDA_HOME and PATH"
        if asked:
            raise PlatformError(
                f"{problem} (looked at {places}): {fix}, or set FUSEDRES_CUDA_ARCHS= (empty) for"
                " CPU kernels only"
            )
        print(f"fusedres: {problem}, the GPUs of this machine: they are left out. {fix}")
        return None
    release = _release(nvcc)
    if late := toolchain.too_new(archs, release):
        needed = ".".join(map(str, max(toolchain.FIRST_RELEASE[arch] for arch in late)))
        raise PlatformError(
            f"{nvcc} is of CUDA {release[0]}.{release[1]}, which cannot compile for"
            f" {' '.join(late)} (needs {needed} or newer): {fix}, or leave them out of"
            " FUSEDRES_CUDA_ARCHS"
        )
    return Cuda(archs, nvcc, release, _library_folders(nvcc))


def _release(nvcc: str) -> tuple[int, int]:
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    release = toolchain.release_of(done.stdout) if done.returncode == 0 else None
    if release is None:
        said = (done.stderr or done.stdout).strip().splitlines() or ["nothing"]
        raise PlatformError(f"{nvcc} --version exits with {done.returncode} and says: {said[-1]}")
    return release


def _library_folders(nvcc: str) -> tuple[str, ...]:
    """The folders of CUDA's static runtime: nvcc may be a script that starts another one."""
    dry = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    told = subprocess.run(dry, capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", told, re.M)
    home = Path(top[1].strip()) if top else Path(nvcc).resolve().parents[1]
    folders = [home / "lib64", home / "lib", *sorted(home.glob("targets/*/lib"))]
    found = [str(f.resolve()) for f in folders if (f / "libcudart_static.a").is_file()]
    return tuple(dict.fromkeys(found))


def torch_include() -> Path:
    """The installed torch's headers, found without importing torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise PlatformError(
            "building fusedres needs torch >= 2.10 installed (--no-build-isolation)"
        )
    include = Path(spec.origin).parent / "include"
    if not (include / "torch/csrc/stable/library.h").is_file():
        raise PlatformError(f"torch at {include.parent} has no stable ABI headers (torch >= 2.10)")
    return include


def compiler() -> str:
    return os.environ.get("FUSEDRES_CXX") or os.environ.get("CXX") or "g++"


# --- the graph


def compile_flags(sanitize: str) -> str:
    # no contraction: every instruction set gives the same bits (csrc/cpu/simd.h)
    flags = ["-std=c++17 -fPIC -fvisibility=hidden -fvisibility-inlines-hidden -ffp-contract=off"]
    flags += ["-Wall -Wextra -Wno-unused-parameter -Wno-psabi"]
    if sanitize:
        # ASan sees what null, alignment and object-size checks would; with its checks inlined and
        # those on, GCC takes over ten minutes for the kernels
        flags += [f"-O1 -g1 -fno-omit-frame-pointer -fsanitize={sanitize}"]
        flags += ["-fno-sanitize=null,alignment,object-size,vptr -DFUSEDRES_NO_AVX512"]
        flags += ["--param asan-instrumentation-with-call-threshold=0"]
    else:
        flags += ["-O3 -g0"]
    return " ".join(flags)


def nvcc_flags(cuda: Cuda) -> str:
    flags = ["-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden"]
    # USE_CUDA: torch's declarations of its CUDA functions (csrc/cuda/host.h makes them weak)
    flags += [f"-DUSE_CUDA {cuda.flags}"]
    if cuda.release >= (12, 8):
        flags += ["--compress-mode=size"]
    if "90a" in cuda.archs:  # conv_sm90_launch.cuh
        flags += ["-DFUSEDRES_SM90A"]
    return " ".join(flags)


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_file(
    target: Path, work: Path, sanitize: str, cuda: Cuda | None, stand_ins: Sequence[Path] = ()
) -> str:
    """The build as ninja text: one object a source, and one a kernel source and instruction set."""
    lines = [
        f"cxx = {compiler()}",
        f"flags = {compile_flags(sanitize)}",
        f"torch = {TORCH_TARGET} -isystem {torch_include()}",
        f"sanitize = {'-fsanitize=' + sanitize if sanitize else ''}",
        # no "deps = gcc": two builds at once spoil its log, ninja 1.13 does not mend it, and from
        # then on each build compiles everything (ninja-build/ninja#2703)
        "rule cxx\n  description = compile $in",
        "  command = $cxx $flags $more -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        # an empty library with the right soname: the real ones are in the process when this loads
        "rule stub\n  command = $cxx -shared -nostdlib -x c++ /dev/null"
        + " -Wl,-soname,$soname -o $out",
        # moved into place when it is whole: a build that fails leaves no half of a library
        "rule link\n  description = link $out",
        "  command = $cxx $sanitize -shared -o $out.part $in -L$stubs -Wl,--no-as-needed "
        + " ".join(f"-l{lib}" for lib in TORCH_LIBS)
        + " -Wl,--as-needed $libraries && mv -f $out.part $out",
    ]
    objects = _cpu_objects(work, sanitize, lines)
    # What is inside, for fusedres.native: a file of its own, so that only it is compiled again.
    inside = "{}.{}:{}".format(*cuda.release, ",".join(cuda.archs)) if cuda else ""
    info = work / "csrc.build_info.o"
    source = ROOT / "csrc" / "build_info.cpp"
    lines.append(f"build {escape(info)}: cxx {escape(source)}")
    lines.append(f"  more = -DFUSEDRES_CUDA_INSIDE='\"{inside}\"'")
    objects.append(info)
    libraries = ""
    older = " ".join(map(str, stand_ins))  # behind what needs them, before what they stand in for
    if cuda is not None:
        objects += _cuda_objects(work, cuda, lines)
        folders = " ".join(f"-L{folder}" for folder in cuda.libraries)
        libraries = f"{folders} -lcudart_static"
    stubs = [work / f"lib{lib}.so" for lib in TORCH_LIBS]
    for stub in stubs:
        lines.append(f"build {escape(stub)}: stub\n  soname = {stub.name}")
    inputs = " ".join(map(escape, objects))
    depends = " ".join(map(escape, stubs))
    lines.append(f"build {escape(target)}: link {inputs} | {depends}")
    lines.append(f"  stubs = {work}\n  libraries = {libraries} {older} -lpthread -ldl -lrt")
    return "\n".join(lines) + "\n"


def _cpu_objects(work: Path, sanitize: str, lines: list[str]) -> list[Path]:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    objects = []
    for source in sorted([*(ROOT / "csrc").glob("*.cpp"), *(ROOT / "csrc/cpu").glob("*.cpp")]):
        name = source.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        if name == "csrc.build_info":
            continue
        if name != "csrc.cpu.kernels":
            objects.append(work / f"{name}.o")
            lines.append(f"build {escape(objects[-1])}: cxx {escape(source)}\n  more = $torch")
            continue
        for number, (isa, extra) in enumerate(ISAS.items()):
            # a sanitized build leaves AVX-512 out: it is the same source as AVX2
            if isa == "portable" or (x86 and not (sanitize and isa == "avx512")):
                objects.append(work / f"{name}.{isa}.o")
                more = f"-DFUSEDRES_ISA={isa} -DFUSEDRES_ISA_ID={number} {extra}"
                lines.append(f"build {escape(objects[-1])}: cxx {escape(source)}\n  more = {more}")
    return objects


def _cuda_objects(work: Path, cuda: Cuda, lines: list[str]) -> list[Path]:
    lines += [
        f"nvcc = {cuda.nvcc}",
        f"nvcc_flags = {nvcc_flags(cuda)}",
        "rule nvcc\n  description = compile $in for " + " ".join(cuda.archs),
        "  command = $nvcc -ccbin $cxx $nvcc_flags $torch -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
    ]
    objects = []
    for source in sorted((ROOT / "csrc/cuda").glob("*.c[pu]*")):
        if source.suffix not in (".cpp", ".cu"):
            continue
        objects.append(work / f"csrc.cuda.{source.stem}.o")
        rule, more = ("nvcc", "") if source.suffix == ".cu" else ("cxx", "\n  more = $torch")
        lines.append(f"build {escape(objects[-1])}: {rule} {escape(source)}{more}")
    return objects


def build(target: Path) -> None:
    """Compile and link what changed.

    Raises:
        PlatformError: something that the build needs is missing; the message says what to do.
        CompileError: a compiler or the linker failed; what it said has been printed.
    """
    sanitize = os.environ.get("FUSEDRES_SANITIZE", "")
    # architectures compiled into a sanitized library could only be loaded beside a GPU's driver
    cuda = None if sanitize else find_cuda()
    work = ROOT / "build" / ("ninja" + (f"-{sanitize.replace(',', '-')}" if sanitize else ""))
    work.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:  # of two builds at once the second finds it done
        fcntl.flock(lock, fcntl.LOCK_EX)
        # a sanitizer's own library asks for what it needs
        stand_ins = [] if sanitize else glibc.stand_ins(compiler(), work / "older")
        (work / "build.ninja").write_text(ninja_file(target, work, sanitize, cuda, stand_ins))
        done = subprocess.run([sys.executable, "-m", "ninja", "-C", str(work)])
    if done.returncode:
        compilers = compiler() if cuda is None else f"{compiler()} or {cuda.nvcc}"
        raise CompileError(
            f"{compilers} failed: its message is above, the commands are in {work / 'build.ninja'};"
            f" {target} was not written. FUSEDRES_CXX names another compiler, FUSEDRES_NVCC another"
            " nvcc, FUSEDRES_CUDA_ARCHS= (empty) leaves the CUDA kernels out"
        )


def missing_packages(archs: Sequence[str]) -> list[str]:
    """What a build in an environment of its own has to install for these architectures."""
    try:
        return [toolchain.PACKAGES] if archs and toolchain.find_nvcc() is None else []
    except ValueError as error:
        raise PlatformError(str(error)) from None
