"""Builds fusedres/_C.so on the LibTorch stable ABI with ninja; wheels are py3-none-<platform>.

The library uses no Python C API and links to torch by name only, so one build serves every Python
and every torch >= 2.10. Environment:

FUSEDRES_CXX or CXX   the C++ compiler (default g++)
FUSEDRES_SANITIZE     e.g. "address,undefined": a debug build with these sanitizers
FUSEDRES_CUDA_ARCHS   reserved for the CUDA kernels; must be empty in this version
"""

import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_LIBS = ("torch", "torch_cpu", "c10")
AVX2 = "-mavx2 -mfma -mf16c"
ISAS = {
    "portable": "",
    "avx2": AVX2,
    # GCC 12 warns about _mm512_undefined_epi32 in its own header
    "avx512": f"{AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -Wno-uninitialized"
    " -Wno-maybe-uninitialized",
}


def torch_include() -> Path:
    """The installed torch's headers, found without importing torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise RuntimeError("building fusedres needs torch >= 2.10 installed (--no-build-isolation)")
    include = Path(spec.origin).parent / "include"
    if not (include / "torch/csrc/stable/library.h").is_file():
        raise RuntimeError(f"torch at {include.parent} has no stable ABI headers (torch >= 2.10)")
    return include


def compile_flags() -> str:
    sanitize = os.environ.get("FUSEDRES_SANITIZE", "")
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


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_file(target: Path, work: Path) -> str:
    """The build as ninja text: one object a source, and one a kernel source and instruction set."""
    cxx = os.environ.get("FUSEDRES_CXX") or os.environ.get("CXX") or "g++"
    sanitize = os.environ.get("FUSEDRES_SANITIZE", "")
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    lines = [
        f"cxx = {cxx}",
        f"flags = {compile_flags()}",
        f"torch = -DTORCH_TARGET_VERSION=0x020a000000000000 -isystem {torch_include()}",
        f"sanitize = {'-fsanitize=' + sanitize if sanitize else ''}",
        "rule cxx\n  description = compile $in",
        "  command = $cxx $flags $more -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc",
        # an empty library with the right soname: the real ones are in the process when this loads
        "rule stub\n  command = $cxx -shared -nostdlib -x c++ /dev/null"
        + " -Wl,-soname,$soname -o $out",
        "rule link\n  description = link $out",
        "  command = $cxx $sanitize -shared -o $out $in -L$stubs -Wl,--no-as-needed "
        + " ".join(f"-l{lib}" for lib in TORCH_LIBS),
    ]
    objects = []
    for source in sorted((ROOT / "csrc").rglob("*.cpp")):
        name = source.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
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
    stubs = [work / f"lib{lib}.so" for lib in TORCH_LIBS]
    for stub in stubs:
        lines.append(f"build {escape(stub)}: stub\n  soname = {stub.name}")
    inputs = " ".join(map(escape, objects))
    depends = " ".join(map(escape, stubs))
    lines.append(f"build {escape(target)}: link {inputs} | {depends}\n  stubs = {work}")
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    """Replaces setuptools' compiler: the object graph above, rebuilt incrementally by ninja."""

    def run(self) -> None:
        if os.environ.get("FUSEDRES_CUDA_ARCHS", "").strip():
            raise RuntimeError("FUSEDRES_CUDA_ARCHS is set, but this version has no CUDA sources")
        package = ROOT / "fusedres" if self.inplace else Path(self.build_lib).resolve() / "fusedres"
        sanitize = os.environ.get("FUSEDRES_SANITIZE", "").replace(",", "-")
        work = ROOT / "build" / ("ninja" + (f"-{sanitize}" if sanitize else ""))
        target = Path(os.environ.get("FUSEDRES_OUTPUT") or package / "_C.so")
        work.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (work / "build.ninja").write_text(ninja_file(target, work))
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(work)], check=True)

    def get_outputs(self) -> list[str]:
        return [] if self.inplace else [str(Path(self.build_lib) / "fusedres" / "_C.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BinaryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


class PlatformWheel(bdist_wheel):
    """No Python C API: one wheel a platform, for every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    packages=[*find_packages(include=["fusedres", "fusedres.*"]), "fusedres.kernels"],
    package_dir={"fusedres.kernels": "kernels"},
    ext_modules=[Extension("fusedres._C", sources=[])],  # makes setuptools run build_ext
    distclass=BinaryDistribution,
    cmdclass={"build_ext": NinjaBuild, "bdist_wheel": PlatformWheel},
)
