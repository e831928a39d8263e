"""Builds fusedres/_C.so on the LibTorch stable ABI with ninja; wheels are py3-none-<platform>.

The library uses no Python C API and links to torch by name only, so one build serves every Python
and every torch >= 2.10. Environment:

FUSEDRES_CUDA_ARCHS   GPUs to compile CUDA kernels for: "90a", "80 86 89", "all"; empty: none.
                      Not set: the GPUs of this machine, if it has any and nvcc
FUSEDRES_NVCC         the nvcc; else that of the packages, of CUDA_HOME, or on PATH
FUSEDRES_CXX or CXX   the C++ compiler (default g++)
FUSEDRES_SANITIZE     e.g. "address,undefined": a debug build with these sanitizers, for CPUs
FUSEDRES_OUTPUT       where to put the library
"""

import os
import sys
from pathlib import Path

from setuptools import Distribution, Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import build as library  # noqa: E402

sys.path.pop(0)


class NinjaBuild(build_ext):
    """Replaces setuptools' compiler: csrc/build.py's graph, rebuilt incrementally by ninja."""

    def run(self) -> None:
        package = ROOT / "fusedres" if self.inplace else Path(self.build_lib).resolve() / "fusedres"
        library.build(Path(os.environ.get("FUSEDRES_OUTPUT") or package / "_C.so").absolute())

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


def local_version() -> str:
    """What tells a wheel for the GPUs that were asked for from the usual one."""
    if "FUSEDRES_CUDA_ARCHS" not in os.environ:
        return ""
    cuda = library.find_cuda()
    archs, release = (cuda.archs, cuda.release) if cuda else ((), None)
    return library.toolchain.local_version(archs, release)


# A front end that asks what to install before it builds runs "setup.py egg_info" (PEP 517's
# get_requires_for_build_wheel, as setuptools carries it out); nvcc cannot be there yet.
ASKED_FOR_PACKAGES = sys.argv[1:] == ["egg_info"]

setup(
    packages=[*find_packages(include=["fusedres", "fusedres.*"]), "fusedres.kernels"],
    package_dir={"fusedres.kernels": "kernels"},
    ext_modules=[Extension("fusedres._C", sources=[])],  # makes setuptools run build_ext
    distclass=BinaryDistribution,
    cmdclass={"build_ext": NinjaBuild, "bdist_wheel": PlatformWheel},
    setup_requires=library.missing_packages(library.wanted_archs()) if ASKED_FOR_PACKAGES else [],
    options={"egg_info": {"tag_build": "" if ASKED_FOR_PACKAGES else local_version()}},
)
